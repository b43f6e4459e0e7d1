"""Layers into one below or above them, under the image guard: check, move, sync, check. The only place data is moved.

What taught these lines (facts.md): `qemu-img commit -d` can be redone after any kill; one failed fdatasync in the
default cache mode leaves clusters in use with refcount 0, and the re-run says exit 0; so after anything but a clean
end: drop the page cache, repair, redo with O_DIRECT, compare. The kernel reports a failed writeback once, to
descriptors that were open then: ours is opened (by the guard) before the merge begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from diskchain.chain.allocation import (
    Allocation,
    RawExtents,
    has_subclusters,
    missing_bytes,
    missing_runs,
    new_bytes,
    runs,
    union,
)
from diskchain.chain.deletion import Fold, Pull
from diskchain.chain.model import Image
from diskchain.errors import ChainDamaged, DiskchainError
from diskchain.host import files, qemu_img
from diskchain.host.fault import point
from diskchain.host.locks import ImageGuard
from diskchain.host.qemu_img import AS_FAST_AS_IT_CAN, Caching, Pace
from diskchain.ops import caching, layers
from diskchain.ops.allocation import allocated, raw_extents, replaced
from diskchain.ops.approve import virtual_size
from diskchain.ops.caching import supports_direct
from diskchain.ops.progress import Progress

AT_ONCE = 4  # images that are checked at the same time
WORTH_FORGETTING = 256 << 10  # bytes of a piece; each is a call of its own


@dataclass(frozen=True)
class Merged:
    """One merge that was carried out. Bytes moved at most, seconds."""

    disk: str
    top: str
    into: str
    bytes: int
    seconds: float
    method: str


def growth(fold: Fold) -> int:
    """Return how many bytes `into` can grow by when what goes is folded into it (from their allocation tables)."""
    return new_bytes(union([allocated(i.path) for i in fold.gone]), held(fold.into))


def pulled(pull: Pull, overlay: Image) -> int:
    """Return how many bytes an overlay can grow by when what it stands on is copied up into it."""
    return missing_bytes([held(i) for i in pull.gone], allocated(overlay.path))


def held(image: Image) -> Allocation | RawExtents:
    """Return what a layer holds."""
    return raw_extents(image.path) if image.fmt == "raw" else allocated(image.path)


async def fold(
    fold: Fold, guard: ImageGuard, *, unclean: bool, progress: Progress, pace: Pace = AS_FAST_AS_IT_CAN
) -> Merged:
    """Fold layers down into one below them.

    `unclean`: an earlier try did not end well. Raise ToolFailed, ChainDamaged, OSError: the redo copy (what goes) is whole
    in every case.
    """
    began = time.monotonic()
    into, gone = _nodes(fold, guard)
    direct = unclean and supports_direct(fold.into.path)
    if unclean:
        await make_whole(fold, guard)
    method = "commit" if unclean else fold.method
    how = await asyncio.to_thread(caching.of_fold, fold, method, unclean=unclean, pace=pace)
    size = sum(files.allocated_bytes(i.path) for i in fold.gone)
    async with contextlib.nullcontext() if method == "clone" else caching.reading_ahead(fold.gone, how, pace):
        if not unclean:
            await _make_ready(fold, method, guard)
        progress.begin(f"merging {fold.target}", size, note="safe to interrupt")
        try:
            point("merge.committing")
            async with _overlapped(fold.into, guard, how):
                await _move(fold, method, guard, progress.update, pace, how)
        finally:
            progress.end()
    point("merge.committed")
    await _fit(fold, into)
    await _require_durable_and_sound(fold.into, guard, direct=direct)
    if unclean:
        await qemu_img.compare(gone[0], into, direct=direct)
    return Merged(
        fold.target, str(fold.top.path), str(fold.into.path), size, round(time.monotonic() - began, 3), method
    )


async def _make_ready(fold: Fold, method: str, guard: ImageGuard) -> None:
    beside = [asyncio.to_thread(_forget_replaced, fold, guard)] if method == "clone" else []
    await _together(_put_all_right((fold.into, *fold.gone)), *beside)


def _forget_replaced(fold: Fold, guard: ImageGuard) -> None:
    """Sharing blocks makes the kernel drop what it has cached of the blocks that were there: most of the time that a clone
    takes of an image that is in memory. It is done beside the checks instead.
    """
    with contextlib.suppress(DiskchainError, OSError):  # the checks say what is wrong
        upper = union([allocated(i.path) for i in fold.gone])
        for start, end in runs(upper) if fold.into.fmt == "raw" else replaced(fold.into.path, upper):
            if end - start >= WORTH_FORGETTING:
                guard.drop_cache(fold.into.path, start, end)


async def _move(
    fold: Fold, method: str, guard: ImageGuard, tell: Callable[[int], None], pace: Pace, how: Caching
) -> None:
    """Move the data. `tell`: bytes that are done.

    Layer by layer the lowest goes first: what an upper one holds is written over what a lower one held, and at any
    instant `into` differs from before only where one of the layers hides it.
    """
    into, gone = _nodes(fold, guard)
    if method == "commit" and fold.through and not any(guard.is_alone_on(i.path) for i in fold.below):
        size = sum(files.allocated_bytes(i.path) for i in fold.gone)
        node = qemu_img.unlocked_chain([(i.path, i.fmt) for i in (*fold.gone, fold.into)])
        await qemu_img.commit(node, base=_as_followed(fold), layers=len(fold.gone), caching=how, guard=guard.fds,
                              on_percent=_bytes(tell, 0, size), pace=pace)  # fmt: skip
        return
    done = 0
    for image, node in reversed(list(zip(fold.gone, gone, strict=True))):
        size = files.allocated_bytes(image.path)
        heard = _bytes(tell, done, size)
        if (
            method == "commit"
        ):  # of several into one whose own backing files we hold, too: QEMU does not find it by name
            on_it = qemu_img.unlocked(image.path, image.fmt, into)
            await qemu_img.commit(on_it, caching=how, guard=guard.fds, on_percent=heard, pace=pace)
        else:
            await qemu_img.convert_into(node, into, clone=method == "clone", caching=how, guard=guard.fds,
                                        on_percent=heard, pace=pace)  # fmt: skip
        done += size
        point("merge.layer-moved")


def _overlapped(image: Image, guard: ImageGuard, how: Caching) -> AbstractAsyncContextManager[None]:
    """The disk works while the engine does, not after it; around the page cache it does anyway."""
    return guard.writing_back(image.path) if how is Caching.THROUGH else contextlib.nullcontext()


def _bytes(tell: Callable[[int], None], done: int, size: int) -> Callable[[float], None]:
    return lambda percent: tell(done + int(size * percent / 100))


async def _require_durable_and_sound(image: Image, guard: ImageGuard, *, direct: bool) -> None:
    """Sync, and check the metadata; at the same time where both look at the page cache. Raise OSError, ChainDamaged."""
    if direct:
        guard.sync(image.path)
        await _require_sound(image, direct=True)
    else:
        await _together(asyncio.to_thread(guard.sync, image.path), _require_sound(image, direct=False))


async def _together(*work: Coroutine[Any, Any, None]) -> None:
    """Do some things at the same time; raise what the first of them raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None


async def _require_sound(image: Image, *, direct: bool) -> None:
    result = await qemu_img.check(_alone(image), direct=direct)
    if result.corruptions:
        raise ChainDamaged(f"{image.path} is not clean after the merge ({result.corruptions} errors)")


async def _fit(fold: Fold, into: dict[str, Any]) -> None:
    """A disk that was made smaller above its base: commit leaves the base as long as it was, and what lies beyond the
    overlay's end would show in the VM again. (A larger overlay makes commit grow the base.)
    """
    wanted, there = (virtual_size(i.path, i.fmt) for i in (fold.top, fold.into))
    if there > wanted:
        await qemu_img.shrink(into, wanted)
        point("merge.shrunk")


async def make_whole(fold: Fold, guard: ImageGuard) -> None:
    """After a merge that was cut off: repair the metadata of the layers, as the disk has them. Raise ChainDamaged."""
    direct = supports_direct(fold.into.path)
    guard.drop_cache(fold.into.path)
    for image in (fold.into, *fold.gone):
        await _put_right(image, direct=direct)


async def pull(
    pull: Pull, overlay: Image, guard: ImageGuard, *, unclean: bool, progress: Progress, pace: Pace = AS_FAST_AS_IT_CAN
) -> Merged:
    """Copy what an overlay shows of the layers that go up into it; `settle` lets it stand on what they stand on then.

    Raise as `fold`.
    """
    began = time.monotonic()
    direct = unclean and supports_direct(overlay.path)
    if unclean:
        await put_back(pull, overlay, guard)
    else:
        await _put_right(overlay, direct=False)
    size = pulled(pull, overlay)
    how = caching.of_images((overlay, *pull.gone, *pull.beneath), unclean=unclean, pace=pace)
    progress.begin(f"merging {pull.target}", size, note="safe to interrupt")
    try:
        point("merge.committing")
        node = _on(overlay, (*pull.gone, *pull.beneath), guard)
        cluster = allocated(overlay.path).cluster_size
        async with _overlapped(overlay, guard, how):
            await qemu_img.copy_up(node, _not_up_yet(pull, overlay), cluster=cluster, caching=how, guard=guard.fds,
                                   on_bytes=progress.update, pace=pace)  # fmt: skip
    finally:
        progress.end()
    point("merge.committed")
    await _require_durable_and_sound(overlay, guard, direct=direct)
    await _require_all_up(pull, overlay, guard, compare=unclean, direct=direct)
    seconds = round(time.monotonic() - began, 3)
    return Merged(pull.target, str(pull.gone[0].path), str(overlay.path), size, seconds, pull.method)


def _not_up_yet(pull: Pull, overlay: Image) -> Iterator[tuple[int, int]]:
    return missing_runs([held(i) for i in pull.gone], allocated(overlay.path))


async def _require_all_up(pull: Pull, overlay: Image, guard: ImageGuard, *, compare: bool, direct: bool) -> None:
    """Read the overlay's tables: it holds all that the layers that go hold. Where they can't tell, or after what did not
    end well, compare what it shows on the layers that go and without them. Raise ChainDamaged.
    """
    if compare or has_subclusters(allocated(overlay.path)):
        with_them = _on(overlay, (*pull.gone, *pull.beneath), guard)
        await qemu_img.compare(with_them, _on(overlay, pull.beneath, guard), direct=direct)
    elif any(True for _ in _not_up_yet(pull, overlay)):
        raise ChainDamaged(f"{overlay.path} does not hold all that was copied into it")


def _on(overlay: Image, below: Sequence[Image], guard: ImageGuard) -> dict[str, Any]:
    """An overlay as a node on these, the top of them first, and on nothing else."""
    return qemu_img.unlocked(overlay.path, overlay.fmt, _below(below, guard))


def _below(images: Sequence[Image], guard: ImageGuard) -> dict[str, Any] | None:
    """A chain that is only read, top first, as a node. Another merge of the same deletion may hold some of it alone."""
    node: dict[str, Any] | None = None
    for image in reversed(images):
        node = qemu_img.read_only(image.path, image.fmt, node)
        if guard.is_alone_on(image.path):
            node["file"]["locking"] = "off"
    return node


async def put_back(pull: Pull, overlay: Image, guard: ImageGuard) -> None:
    """After a pull that was cut off: repair the overlay's metadata, and let it stand on what it was copied from again.

    It shows the same there, whatever has been copied; and a pull that is done again begins from what is surely whole.
    """
    guard.drop_cache(overlay.path)
    await _put_right(overlay, direct=supports_direct(overlay.path))
    await _stand_on(overlay, pull.gone[0], guard)


async def settle(pull: Pull, overlay: Image, guard: ImageGuard) -> None:
    """After a pull that ended well: the overlay names what is below, or nothing. Can be repeated."""
    if pull.below is not None:
        await _stand_on(overlay, pull.below, guard)
        return
    if not layers.stands_alone(overlay.path):
        await qemu_img.rebase_node(_alone(overlay), "", "")
        guard.sync(overlay.path)
    layers.verify_alone(overlay)


async def _stand_on(overlay: Image, below: Image, guard: ImageGuard) -> None:
    if not layers.names_as_we_do(overlay.path, below):
        await qemu_img.rebase_node(_alone(overlay), qemu_img.backing_name_for(overlay.path, below.path), below.fmt)
        guard.sync(overlay.path)
    layers.verify_reference(overlay, below)


def _nodes(fold: Fold, guard: ImageGuard) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`into` and what goes (top first) as nodes under our guard, on what is below them.

    `into` needs its own backing files: where its clusters are larger than the overlay's, what is written is less than
    a cluster, and QEMU fills the rest from below.
    """
    into = top = qemu_img.unlocked(fold.into.path, fold.into.fmt, _below(fold.below, guard))
    gone: list[dict[str, Any]] = []
    for image in reversed(fold.gone):
        top = qemu_img.unlocked(image.path, image.fmt, top)
        gone.insert(0, top)
    return into, gone


def _as_followed(fold: Fold) -> str:
    """Return how QEMU calls `into` when it follows the headers from the top: `-b` is compared with that as it stands."""
    path = str(fold.top.path)
    for image in fold.gone:
        name = layers.backing_name(image)
        path = name if name.startswith("/") else path[: path.rfind("/") + 1] + name
    return path


def _alone(image: Image) -> dict[str, Any]:
    """An image as a node without what it stands on."""
    return qemu_img.unlocked(image.path, image.fmt)


async def _put_all_right(images: Sequence[Image]) -> None:
    """Check the images, a few at a time, and repair what qemu-img can. Raise as `_put_right`."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def one(image: Image) -> None:
        async with turns:
            await _put_right(image, direct=False)

    await _together(*map(one, images))


async def _put_right(image: Image, *, direct: bool) -> None:
    """Check an image and repair what qemu-img can; run it again when the repair itself stopped half-way."""
    alone = _alone(image)
    if (await qemu_img.check(alone, direct=direct)).clean:
        return
    for _ in range(3):
        await qemu_img.check(alone, repair=True, direct=direct)
        if (await qemu_img.check(alone, direct=direct)).clean:
            return
    raise ChainDamaged(f"{image.path} can't be repaired", hint="keep every file of the chain; see RECOVER.txt")
