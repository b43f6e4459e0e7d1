"""Who else uses an image? Merging into a shared base destroys its other overlays in silence; so ask everybody first."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from diskchain.chain import qcow2
from diskchain.chain.model import Image
from diskchain.errors import DiskchainError, HasSharers
from diskchain.host import files
from diskchain.ops.vm import VM
from diskchain.store import catalog as catalog_store
from diskchain.store import seal
from diskchain.store.catalog import Home

DEPTH = 3  # directories below an image root that are looked through


def refuse_shared(vm: VM, image: Image, mine: Iterable[Image]) -> None:
    """Raise HasSharers, naming them, when anybody but the images `mine` uses the image.

    Looked through: all machines and their catalogs, every file beside any known disk and below the image roots (by device
    and inode, so other names and hard links count), the image's link count and its seal.
    """
    status = image.path.stat()
    if status.st_nlink > 1:
        raise HasSharers(f"{image.path} has {status.st_nlink} names (hard links); who uses the others is not known",
                         hint="copy it to a file of its own first (cp --reflink=auto)")  # fmt: skip
    refuse_overlays(vm, image, mine)


def refuse_overlays(vm: VM, image: Image, mine: Iterable[Image]) -> None:
    """Raise HasSharers, naming them, when anybody but the images `mine` stands on the image or uses it as a disk."""
    if seal.is_sealed(image.path):
        raise HasSharers(f"{image.path} is sealed as a base; it is neither merged into nor removed",
                         hint=f"diskchain detach {vm.name} gives the VM a copy of its own")  # fmt: skip
    status = image.path.stat()
    known = {i.path for i in mine} | {image.path}
    target = (status.st_dev, status.st_ino)
    users = sorted(set(_other_machines(vm, target)) | set(_overlays_in_directories(vm, target, known)))
    if users:
        raise HasSharers(f"{image.path} is used by {', '.join(users)} too; a merge or delete would destroy them",
                         hint=f"diskchain detach {vm.name} gives it a copy; or let the other users go first")  # fmt: skip


def _other_machines(vm: VM, target: tuple[int, int]) -> Iterable[str]:
    for other in vm.host.neighbours():
        if other.uuid == vm.driver.uuid:
            continue
        paths = list(other.disks)
        if other.home is not None:
            with contextlib.suppress(DiskchainError):
                paths += [i.path for i in catalog_store.load(Home(other.home)).images.values()]
        if any(identity(p) == target for p in paths):
            yield other.label


def _overlays_in_directories(vm: VM, target: tuple[int, int], known: set[Path]) -> Iterable[str]:
    directories = {i.path.parent.resolve() for i in vm.catalog.images.values()}
    for other in vm.host.neighbours():
        directories |= {disk.parent.resolve() for disk in other.disks}
    for root in vm.config.image_roots:
        directories |= set(directories_below(root.resolve(), DEPTH))
    paths, files_of_ours = {path.resolve() for path in known}, {identity(path) for path in known}
    for directory in directories:
        for path in _files(directory):
            if path.resolve() in paths or (identity(path) in files_of_ours and _names(path) == 1):
                continue  # the second: through a bind mount
            if _backs_on(path, target):
                yield str(path)


def directories_below(directory: Path, depth: int) -> Iterable[Path]:
    """Yield a directory and what is below it, to a depth; hidden ones and symlinks are passed over."""
    yield directory
    if depth > 0:
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in list(entries):
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                    yield from directories_below(Path(entry.path), depth - 1)


def overlays_beside(image: Path) -> list[Path]:
    """Return the images in the same directory that name this one as their backing file."""
    return overlays_in(image.parent, image)


def overlays_in(directory: Path, image: Path) -> list[Path]:
    """Return the images in a directory that name this one as their backing file."""
    status = image.stat()
    target = (status.st_dev, status.st_ino)
    return sorted(path for path in _files(directory) if path != image and _backs_on(path, target))


def _files(directory: Path) -> Iterable[Path]:
    try:
        with os.scandir(directory) as entries:
            return [Path(e.path) for e in entries if e.is_file(follow_symlinks=False) and not e.name.endswith(".trash")]
    except OSError:
        return []


def _backs_on(path: Path, target: tuple[int, int]) -> bool:
    return backing_identity(path) == target


def backing_identity(path: Path) -> tuple[int, int] | None:
    """Return (device, inode) of the backing file that an image names; None when it names none, or can't be read."""
    name = backing_name(path)
    file = None if name is None else _file_named(name)
    return None if file is None else identity(path.parent / file)


def backing_name(path: Path) -> str | None:
    """Return the backing file that an image names, as it stands in its header; None when it names none, or can't be read."""
    try:
        fd = files.open_untrusted(path)
    except DiskchainError:
        return None
    try:
        if files.read_span(fd, 0, 4) != qcow2.MAGIC:
            return None
        data = files.read_span(fd, 0, 1 << 16)
        return qcow2.parse_header(data, os.fstat(fd).st_size).backing_name
    except DiskchainError:
        return None
    finally:
        os.close(fd)


def _file_named(name: str) -> str | None:
    """Return the file of a backing name as QEMU writes them: a path, `file:PATH`, or `json:{...}` (the first file in it).

    A live snapshot that somebody else takes of an image of ours is recorded as `json:`.
    """
    if not name.startswith("json:"):
        return name.removeprefix("file:")
    try:
        node = json.loads(name.removeprefix("json:"))
    except (ValueError, RecursionError):
        return None
    while isinstance(node, dict) and isinstance(node.get("file"), dict):
        node = node["file"]
    file = node.get("filename", node.get("file.filename")) if isinstance(node, dict) else None
    return file if isinstance(file, str) else None


def _names(path: Path) -> int:
    """How many hard links a file has; each may be somebody's."""
    try:
        return path.stat().st_nlink
    except OSError:
        return 0


def identity(path: Path) -> tuple[int, int] | None:
    """Return (device, inode) of a path (symlinks followed); None where it can't be looked at."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
