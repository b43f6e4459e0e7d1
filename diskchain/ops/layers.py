"""The files under a catalog: look whether they are what we remember, make overlays, put files away."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from diskchain.chain import qcow2
from diskchain.chain.model import Catalog, Image, layer_name
from diskchain.chain.text import name_with
from diskchain.errors import Busy, ChainDamaged, DiskchainError, NotFound, Refused
from diskchain.host import files, locks, qemu_img
from diskchain.host.fault import point
from diskchain.ops.approve import approve_chain, differing, fingerprint, virtual_size
from diskchain.ops.vm import new_id
from diskchain.store import seal
from diskchain.store.journal import Entry


def verify_chain(catalog: Catalog, top: str) -> None:
    """Given an image, compare its whole chain on disk with the catalog: names, formats, sizes, fingerprints.

    Raise HostileImage for what QEMU must not see, ChainDamaged for what is not as it was left.
    """
    chain = catalog.chain(top)
    try:
        found = approve_chain(chain[0].path, chain[0].fmt, roots=sorted({i.path.parent for i in chain}))
    except NotFound as error:
        raise ChainDamaged(f"{chain[0].target}: {error.message}", hint=_missing_hint(chain[0])) from error
    for image, there in zip(chain, found, strict=False):
        if not _same_file(image.path, there.path):
            raise ChainDamaged(f"{image.target}: the chain leads to {there.path}, the catalog says {image.path}",
                               hint="something else than diskchain changed the chain; see RECOVER.txt")  # fmt: skip
    if len(found) != len(chain):
        raise ChainDamaged(f"{chain[0].target}: the chain has {len(found)} images, the catalog knows {len(chain)}",
                           hint="something else than diskchain changed the chain; see RECOVER.txt")  # fmt: skip
    for image in chain:
        verify_frozen(image)


def _missing_hint(image: Image) -> str:
    return f"bring {image.path.name} back to {image.path.parent}, or let diskchain look for it: diskchain check --repair VM"


def _same_file(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and one.resolve() == other.resolve())


def verify_frozen(image: Image) -> None:
    """Compare a frozen image with its recorded fingerprint. Raise ChainDamaged when it was changed or replaced."""
    if image.fingerprint is None:
        return
    try:
        now = fingerprint(image.path, image.fmt)
    except NotFound as error:
        raise ChainDamaged(f"{image.target}: {error.message}", hint=_missing_hint(image)) from error
    changed = differing(image.fingerprint, now)
    if changed:
        raise ChainDamaged(
            f"{image.target}: {image.path} was changed since it was frozen ({', '.join(changed)} differ)",
            hint=changed_hint(image),
        )
    _verify_seal(image)


def changed_hint(image: Image) -> str:
    """Return what to do about a frozen image that is not as it was."""
    hint = "something wrote to it or put another file in its place; bring the right file back"
    if "map" in (image.fingerprint or {}):
        hint += "; if it was only its bitmaps or internal snapshots that were removed: diskchain check --repair VM"
    return hint


def _verify_seal(image: Image) -> None:
    """A base that was sealed must have its time, too: what is written in place does not show in its tables."""
    found = seal.load(image.path)
    if found is not None and image.path.stat().st_mtime_ns != found.mtime_ns:
        raise ChainDamaged(f"{image.target}: {image.path} was written to since it was sealed on {found.created}",
                           hint=f"diskchain base verify --deep '{image.path}'; if it is right, seal it again")  # fmt: skip


def verify_overlay(image: Image, below: Image) -> None:
    """Look at one layer alone: there, regular, as it was left, naming `below`. Raise HostileImage, ChainDamaged."""
    verify_frozen(image)
    try:
        verify_reference(image, below)
    except NotFound as error:
        raise ChainDamaged(f"{image.target}: {error.message}", hint=_missing_hint(image)) from error


def verify_active(catalog: Catalog) -> None:
    """Verify the chain of every disk."""
    for image_id in catalog.active.values():
        verify_chain(catalog, image_id)


def refuse_foreign_writers(catalog: Catalog) -> None:
    """Raise Busy when somebody writes to an active layer of a VM that is off (a QEMU that nobody told us of)."""
    for image_id in catalog.active.values():
        path = catalog.images[image_id].path
        if path.is_file() and locks.has_writer(path):
            raise Busy(f"{path} is being written by {locks.open_by(path)}, though {catalog.name} is off",
                       hint="end that program first")  # fmt: skip


@contextlib.contextmanager
def kept_off(catalog: Catalog) -> Iterator[None]:
    """Keep every QEMU from starting on the active layers of a VM that is off, while its layers are switched.

    Its manager may start it at any time. Look whether it is off inside: one that began a moment before may have no image
    open yet, and fails. A layer that is missing keeps them off itself. Raise Busy when one is at work.
    """
    paths = [path for path in (catalog.images[i].path for i in catalog.active.values()) if path.is_file()]
    with locks.guard_images((), wait=1.0, users=locks.open_by, readers=paths):
        yield


def freeze(catalog: Catalog, ids: Iterable[str]) -> Catalog:
    """Return the catalog with fresh fingerprints for these images, which nobody writes to any more."""
    images = [catalog.images[i] for i in ids]
    return catalog.with_images(
        replace(image, fingerprint=fingerprint(image.path, image.fmt), virtual_size=_virtual_size(image))
        for image in images
    )


def _virtual_size(image: Image) -> int:
    return virtual_size(image.path, image.fmt)


def plan_overlays(catalog: Catalog, on: Mapping[str, str], directory: Path | None = None) -> dict[str, Image]:
    """Given for each target the image to stand on, return the new overlays (not made yet), beside it or in `directory`.

    Names: `layer_name`; they do not grow with the chain. Raise Refused for one that is taken, or can't be written down, and
    without the right to make files there.
    """
    overlays = {}
    for target, below_id in on.items():
        below, base = catalog.images[below_id], catalog.chain(below_id)[-1]
        image_id = new_id()
        path = (directory or below.path.parent) / layer_name(base.path, target, image_id)
        files.require_access(path.parent, os.W_OK | os.X_OK, "create a layer in")
        if os.path.lexists(path):  # before the journal knows the name: its undo unlinks what it knows
            raise Refused(f"{path} exists already", hint="move it away, then try again")
        qemu_img.refuse_unnameable(qemu_img.backing_name_for(path, below.path))
        size = virtual_size(below.path, below.fmt)
        overlays[target] = Image(image_id, path, "qcow2", target, size, below_id, ours=True)
    return overlays


async def make_overlays(catalog: Catalog, overlays: Mapping[str, Image]) -> None:
    """Write the planned overlays, durably, with the owner and mode of what they stand on; verify their headers.

    O_EXCL and O_NOFOLLOW: an existing file or a symlink is never written to. Raise Refused, NoSpace.
    """
    for image in overlays.values():
        await _make_overlay(image, catalog.images[image.backing or ""])
    for directory in {image.path.parent for image in overlays.values()}:
        files.fsync_dir(directory)


async def _make_overlay(image: Image, below: Image) -> None:
    if image.path.exists() or image.path.is_symlink():
        raise Refused(f"{image.path} exists already", hint="move it away, then try again")
    fd = files.create_exclusive(image.path)
    try:
        point("overlay.created")
        name = qemu_img.backing_name_for(image.path, below.path)
        with files.os_errors(image.path, "write"):
            await qemu_img.create(fd, name, below.fmt, image.virtual_size)
            files.copy_owner(below.path, image.path)
            os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) | stat.S_IRUSR | stat.S_IWUSR)  # a base may be read-only
            os.fsync(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            image.path.unlink()
        raise
    finally:
        os.close(fd)
    verify_reference(image, below)


def verify_reference(image: Image, below: Image) -> None:
    """Re-read an overlay's header. Raise ChainDamaged unless it names the right backing file and format."""
    if not names_backing(image.path, below):
        header, wanted = _header(image.path), qemu_img.backing_name_for(image.path, below.path)
        raise ChainDamaged(f"{image.path} names {header.backing_name!r} ({header.backing_format}) as its backing file, "
                           f"not {wanted!r} ({below.fmt})")  # fmt: skip


def verify_alone(image: Image) -> None:
    """Re-read an image's header. Raise ChainDamaged unless it stands on nothing."""
    name = _header(image.path).backing_name
    if name:
        raise ChainDamaged(f"{image.path} names {name!r} as its backing file, it should stand alone")


def stands_alone(image: Path) -> bool:
    """Whether an image's header names no backing file."""
    return not _header(image).backing_name


def backing_name(image: Image) -> str:
    """Return the backing file that an image's header names, as it stands there; nothing if none."""
    return _header(image.path).backing_name or ""


def names_backing(image: Path, below: Image) -> bool:
    """Whether an overlay's header names this image as its backing file: as we write it, or as others do."""
    header = _header(image)
    name = header.backing_name or ""
    ours = name == qemu_img.backing_name_for(image, below.path)
    theirs = name != "" and ":" not in name and _same_file(image.parent / name, below.path)
    return (ours or theirs) and header.backing_format == below.fmt


def names_as_we_do(image: Path, below: Image) -> bool:
    """Whether an overlay's header names this image, in the way that we write it."""
    header = _header(image)
    return header.backing_name == qemu_img.backing_name_for(image, below.path) and header.backing_format == below.fmt


def _header(path: Path) -> qcow2.Header:
    fd = files.open_untrusted(path)
    try:
        data = files.read_span(fd, 0, 1 << 16)
        return qcow2.parse_header(data, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def is_empty(path: Path) -> bool:
    """Whether an overlay of ours holds no data at all: its L1 table is all zero. Missing or torn = empty too."""
    try:
        fd = files.open_untrusted(path)
    except NotFound:
        return True
    try:
        size = os.fstat(fd).st_size
        if size == 0:
            return True
        header = qcow2.parse_header(files.read_span(fd, 0, 1 << 16), size)
        table = files.read_span(fd, header.l1_offset, header.l1_bytes)
        return not any(table)
    except DiskchainError:
        return size < 1 << 18  # qemu-img create was killed half-way: nothing but metadata of an empty image
    finally:
        os.close(fd)


def trash_of(path: Path) -> Path:
    """Return the name a file is put away under, beside it."""
    return path.with_name(name_with(".", path.name, ".trash"))


def to_trash(paths: Iterable[Path]) -> None:
    """Rename files away, durably; what is no regular file (so not ours) is passed over. So are those already away: what has
    such a name by now is somebody else's.
    """
    for path in paths:
        if path.is_file() and not path.is_symlink() and not os.path.lexists(trash_of(path)):
            files.rename_durably(path, trash_of(path))


async def put_away(entry: Entry, paths: Sequence[Path]) -> None:
    """Remove files for good. Can be repeated: once they are all away that is noted, for their names may be used anew."""
    if not entry.data.get("away"):
        to_trash(paths)
        point(f"{entry.op}.trashed")
        entry.note(away=True)
    await empty_trash(paths)
    point(f"{entry.op}.trash-emptied")


async def empty_trash(paths: Iterable[Path]) -> None:
    """Unlink what was put away (0.4 s for 2 GiB on ext4: off the event loop)."""
    for path in paths:
        await asyncio.to_thread(files.unlink_durably, trash_of(path))
