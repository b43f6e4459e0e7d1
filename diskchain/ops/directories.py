"""Look through directories for images: every name of a file, what stands on what, and what could not be looked at.

A symlink counts for the file that it leads to: a VM may use an overlay elsewhere by that name. Only regular files are ever
opened. What can't be read is not taken for nothing: it may be an overlay of somebody else's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from diskchain.chain import backing
from diskchain.chain.text import size
from diskchain.errors import DiskchainError, HostileImage, NotFound
from diskchain.host import files

Identity = tuple[int, int]
DEPTH = 3  # directories below an image root that are looked through
SMALLEST = 512  # bytes; no overlay is smaller (qcow 560, qcow2 1.5 KiB, QED 8 KiB)
_KERNEL = (Path("/proc"), Path("/sys"))  # reading files there does things
_NOTHING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


@dataclass(frozen=True)
class Unread:
    """A file or directory that could not be read, and why. `denied`: for lack of rights."""

    path: Path
    why: str
    denied: bool


@dataclass
class Looked:
    """What a directory holds. `names`: of regular files, real ones first; `overlays`: what each may stand on."""

    names: list[tuple[Path, Identity]] = field(default_factory=list)
    overlays: dict[Path, frozenset[Identity]] = field(default_factory=dict)
    unread: list[Unread] = field(default_factory=list)


def look_through(directory: Path) -> Looked:
    """Look at every file in a directory, and into those that could be overlays. A directory that is not there is empty.

    A lost+found that only root may look into is passed over: no VM uses what fsck put there.
    """
    found = Looked()
    try:
        with os.scandir(directory) as entries:
            paths = sorted((entry.is_symlink(), Path(entry.path)) for entry in entries)
    except OSError as error:
        if error.errno not in _NOTHING and not (_denied(error) and directory.name == "lost+found"):
            found.unread.append(Unread(directory, str(error.strerror), _denied(error)))
        return found
    for _, path in paths:
        _look_at(path, found)
    return found


def _look_at(path: Path, found: Looked) -> None:
    status = None
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return
        found.names.append((path, (status.st_dev, status.st_ino)))
        if status.st_size >= SMALLEST and not _is_ours(path.name) and (below := _backings(path)):
            found.overlays[path] = below
    except NotFound:
        return
    except (OSError, DiskchainError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        number = cause.errno if isinstance(cause, OSError) else None
        if number not in _NOTHING:  # a symlink that leads to nothing, or gone since
            why = str(cause.strerror) if isinstance(cause, OSError) else str(error)
            found.unread.append(Unread(path, why + _described(status), _denied(cause)))


def _backings(path: Path) -> frozenset[Identity]:
    try:
        return backings(path)
    except HostileImage:  # exchanged for another file at this instant
        return backings(path)


def _is_ours(name: str) -> bool:
    """Layers that were put away, seals, unfinished records."""
    return name.startswith(files.TEMPORARY) or (name.startswith(".") and name.endswith((".trash", ".seal")))


def _denied(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM)


def _described(status: os.stat_result | None) -> str:
    if status is None:
        return ""
    try:
        owner = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        owner = str(status.st_uid)
    return f"; owner {owner}, mode {stat.S_IMODE(status.st_mode):04o}, {size(status.st_size)}"


def below(directory: Path, depth: int) -> Iterator[Path]:
    """Yield a directory and what is below it, to a depth; hidden ones are passed over. A symlink is followed, its real
    path is given; what is reached twice is not walked again.
    """
    walked: dict[Identity, int] = {}
    todo = [(directory, depth)]
    while todo:
        here, left = todo.pop()
        known = identity(here)
        if known is not None and walked.get(known, -1) >= left:
            continue
        yield here
        if known is not None and left > 0:
            walked[known] = left
            todo += [(place, left - 1) for place in _directories_in(here)]


def _directories_in(directory: Path) -> list[Path]:
    """What can't be read is found out by who looks through it."""
    found = []
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if not entry.name.startswith(".") and entry.is_dir():
                    found.append(Path(os.path.realpath(entry.path) if entry.is_symlink() else entry.path))
    return [place for place in found if place not in _KERNEL]


def backings(path: Path) -> frozenset[Identity]:
    """Return (device, inode) of the files that an image may stand on; nothing where it stands on none.

    Raise DiskchainError when it can't be read, NotFound when it is gone.
    """
    named = backing_names(path)
    found = (identity(place / name) for place in (bases(path) if named else ()) for name in named)
    return frozenset(one for one in found if one is not None)


def backing_names(path: Path) -> list[str]:
    """Return the files that an image may name as its backing file, as its header does. Raise as `backings`."""
    fd = files.open_untrusted(_real(path))
    try:
        where = backing.name_place(files.read_span(fd, 0, backing.FIRST_READ))
        return [] if where is None else backing.files_named(files.read_span(fd, *where))
    finally:
        os.close(fd)


def bases(path: Path) -> set[Path]:
    """Return the directories that a relative backing name may count from: of the name that QEMU was given, of the file."""
    return {path.parent, _real(path).parent}


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def identity(path: Path) -> Identity | None:
    """Return (device, inode) of a path (symlinks followed); None where it can't be looked at."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
