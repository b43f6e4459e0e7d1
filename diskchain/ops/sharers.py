"""Who else uses an image? Merging into a shared base destroys its other overlays in silence; so ask everybody first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from diskchain.chain.model import Image
from diskchain.config import Config
from diskchain.errors import DiskchainError, HasSharers, Refused
from diskchain.ops.directories import DEPTH, Identity, Unread, below, identity, look_through
from diskchain.ops.vm import VM
from diskchain.store import catalog as catalog_store
from diskchain.store import seal
from diskchain.store.catalog import Home


def refuse_shared(vm: VM, image: Image, mine: Iterable[Image]) -> None:
    """Raise HasSharers, naming them, when anybody but the images `mine` uses the image.

    Looked through: all machines and their catalogs, every file beside any known disk and below the image roots (by device
    and inode, so other names and hard links count), the image's link count and its seal. Raise Refused when a file or
    directory of those can't be read: it may be a user.
    """
    status = image.path.stat()
    if status.st_nlink > 1:
        raise HasSharers(f"{image.path} has {status.st_nlink} names (hard links); who uses the others is not known",
                         hint="copy it to a file of its own first (cp --reflink=auto)")  # fmt: skip
    refuse_overlays(vm, image, mine)


def refuse_overlays(vm: VM, image: Image, mine: Iterable[Image]) -> None:
    """Raise HasSharers, naming them, when anybody but the images `mine` stands on the image or uses it as a disk; Refused
    when that can't be told.
    """
    if seal.is_sealed(image.path):
        raise HasSharers(f"{image.path} is sealed as a base; it is neither merged into nor removed",
                         hint=f"diskchain detach {vm.name} gives the VM a copy of its own")  # fmt: skip
    status = image.path.stat()
    known = {i.path for i in mine} | {image.path}
    target = (status.st_dev, status.st_ino)
    overlays, unread = _overlays_in_directories(vm, target, known)
    users = sorted(set(_other_machines(vm, target)) | {str(path) for path in overlays})
    if users:
        raise HasSharers(f"{image.path} is used by {', '.join(users)} too; a merge or delete would destroy them",
                         hint=f"diskchain detach {vm.name} gives it a copy; or let the other users go first")  # fmt: skip
    if unread:
        raise _not_known(image.path, unread)


def _not_known(image: Path, unread: list[Unread]) -> Refused:
    first, more = unread[0], len(unread) - 1
    what = f"{first.path} can't be read ({first.why})" + (f", and {more} more" if more else "")
    hint = "run diskchain as root, or let it read that (chmod, setfacl); what is no image can be moved to another directory"
    return Refused(f"{what}: whether it stands on {image} is not known",
                   hint=hint if first.denied else "look at dmesg and at that file, then try again")  # fmt: skip


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


def _overlays_in_directories(vm: VM, target: Identity, known: set[Path]) -> tuple[list[Path], list[Unread]]:
    """Return the strangers that stand on the target, and what could not be looked at.

    The image roots that nobody chose (the settings' default) are looked through as far as we may.
    """
    beside = {i.path.parent.resolve() for i in vm.catalog.images.values()}
    for other in vm.host.neighbours():
        beside |= {disk.parent.resolve() for disk in other.disks}
    roots = {place for root in vm.config.image_roots for place in below(root.resolve(), DEPTH)}
    chosen = vm.config.image_roots != Config.image_roots
    paths, files_of_ours = {path.resolve() for path in known}, {identity(path) for path in known}
    overlays: list[Path] = []
    unread: list[Unread] = []
    for directory in sorted(beside | roots):
        looked = look_through(directory)
        for path, stands_on in looked.overlays.items():
            if path.resolve() in paths or (identity(path) in files_of_ours and _names(path) == 1):
                continue  # the second: through a bind mount
            overlays += [path] if target in stands_on else []
        unread += [one for one in looked.unread if directory in beside or chosen or not one.denied]
    return overlays, unread


def overlays_beside(image: Path) -> list[Path]:
    """As `overlays_in` its own directory."""
    return overlays_in(image.parent, image)


def overlays_in(directory: Path, image: Path) -> list[Path]:
    """Return the images in a directory that name this one as their backing file. Raise Refused when that can't be told."""
    status, looked = image.stat(), look_through(directory)
    found = sorted(path for path, stands_on in looked.overlays.items() if (status.st_dev, status.st_ino) in stands_on)
    if looked.unread and not found:
        raise _not_known(image, looked.unread)
    return found


def _names(path: Path) -> int:
    """How many hard links a file has; each may be somebody's."""
    try:
        return path.stat().st_nlink
    except OSError:
        return 0
