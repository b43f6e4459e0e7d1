"""One layer into its backing file, under the image guard: check, commit, check, sync. The only place data is moved.

What taught these lines (facts.md): `qemu-img commit -d` can be redone after any kill; one failed fdatasync in the
default cache mode leaves clusters in use with refcount 0, and the re-run says exit 0; so after anything but a clean
end: drop the page cache, repair, redo with O_DIRECT, compare. The kernel reports a failed writeback once, to
descriptors that were open then: ours is opened (by the guard) before the merge begins.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diskchain.chain.allocation import new_bytes
from diskchain.chain.model import Image
from diskchain.chain.plan import Fold
from diskchain.errors import ChainDamaged
from diskchain.host import files, qemu_img
from diskchain.host.fault import point
from diskchain.host.locks import ImageGuard
from diskchain.ops.allocation import allocated, raw_extents
from diskchain.ops.approve import approve_chain
from diskchain.ops.progress import Progress


@dataclass(frozen=True)
class Merged:
    """One merge that was carried out. Bytes moved at most, seconds."""

    disk: str
    top: str
    into: str
    bytes: int
    seconds: float
    method: str


def growth(top: Image, into: Image) -> int:
    """Return how many bytes `into` can grow by when `top` is committed into it (from their allocation tables)."""
    below = raw_extents(into.path) if into.fmt == "raw" else allocated(into.path)
    return new_bytes(allocated(top.path), below)


async def fold(fold: Fold, guard: ImageGuard, index: int, *, unclean: bool, progress: Progress) -> Merged:
    """Commit one overlay into its backing file. `index`: place of `into` among the guard's images.

    `unclean`: an earlier try did not end well. Raise ToolFailed, ChainDamaged, OSError: the redo copy (the overlay) is
    whole in every case.
    """
    began = time.monotonic()
    into, top = _nodes(fold)
    direct = unclean and supports_direct(fold.into.path)
    if unclean:
        await make_whole(fold, guard, index)
    else:
        await _put_right(into, fold.into, direct=False)
        await _put_right(top, fold.top, direct=False)
    size = files.allocated_bytes(fold.top.path)
    progress.begin(f"merging {fold.target}", size, note="safe to interrupt")
    try:
        point("merge.committing")
        await qemu_img.commit(top, direct=direct, guard=guard.fds,
                              on_percent=lambda p: progress.update(int(size * p / 100)))  # fmt: skip
    finally:
        progress.end()
    point("merge.committed")
    await _fit(fold, into)
    guard.sync(index)
    result = await qemu_img.check(into, direct=direct)
    if result.corruptions:
        raise ChainDamaged(f"{fold.into.path} is not clean after the merge ({result.corruptions} errors)")
    if unclean:
        await qemu_img.compare(top, into, direct=direct)
    return Merged(
        fold.target, str(fold.top.path), str(fold.into.path), size, round(time.monotonic() - began, 3), fold.method
    )


async def _fit(fold: Fold, into: dict[str, Any]) -> None:
    """A disk that was made smaller above its base: commit leaves the base as long as it was, and what lies beyond the
    overlay's end would show in the VM again. (A larger overlay makes commit grow the base.)
    """
    wanted, there = (approve_chain(i.path, i.fmt)[0].virtual_size for i in (fold.top, fold.into))
    if there > wanted:
        await qemu_img.shrink(into, wanted)
        point("merge.shrunk")


async def make_whole(fold: Fold, guard: ImageGuard, index: int) -> None:
    """After a merge that was cut off: repair the metadata of both layers, as the disk has them. Raise ChainDamaged."""
    into, top = _nodes(fold)
    direct = supports_direct(fold.into.path)
    guard.drop_cache(index)
    await _put_right(into, fold.into, direct=direct)
    await _put_right(top, fold.top, direct=direct)


def _nodes(fold: Fold) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two layers as nodes under our guard, on what is below them.

    `into` needs its own backing files: where its clusters are larger than the overlay's, what is written is less than
    a cluster, and QEMU fills the rest from below.
    """
    below: dict[str, Any] | None = None
    for image in reversed(fold.below):
        below = qemu_img.read_only(image.path, image.fmt, below)
    into = qemu_img.unlocked(fold.into.path, fold.into.fmt, below)
    return into, qemu_img.unlocked(fold.top.path, fold.top.fmt, into)


async def _put_right(node: dict[str, Any], image: Image, *, direct: bool) -> None:
    """Check an image and repair what qemu-img can; run it again when the repair itself stopped half-way."""
    alone = {**node, "backing": None} if image.fmt == "qcow2" else node
    if (await qemu_img.check(alone, direct=direct)).clean:
        return
    for _ in range(3):
        await qemu_img.check(alone, repair=True, direct=direct)
        if (await qemu_img.check(alone, direct=direct)).clean:
            return
    raise ChainDamaged(f"{image.path} can't be repaired", hint="keep every file of the chain; see RECOVER.txt")


def supports_direct(path: Path) -> bool:
    """Whether the filesystem can read and write around its cache (O_DIRECT); FUSE and old tmpfs can't."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True
