"""Image files as bytes: copied with their holes, and told apart, without a program for each."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

_PIECE = 1 << 20
_LONGEST_NAME = 1023  # bytes, by the format; a torn header may say anything


def copy_sparse(source: str, target: str) -> None:
    """Copy a file with its holes, its times, mode and owner."""
    with open(source, "rb") as old, open(target, "wb") as new:
        os.truncate(new.fileno(), os.fstat(old.fileno()).st_size)
        for start, end in _data(old.fileno()):
            while start < end:
                start += os.copy_file_range(old.fileno(), new.fileno(), end - start, start, start)
        status = os.fstat(old.fileno())
        os.fchown(new.fileno(), status.st_uid, status.st_gid)
    shutil.copystat(source, target)


def copy_tree(source: Path, target: Path) -> None:
    """Copy a directory; files with several names in it have them in the copy, too."""
    copies: dict[tuple[int, int], str] = {}

    def copy(old: str, new: str) -> None:
        status = os.stat(old)
        known = copies.setdefault((status.st_dev, status.st_ino), new)
        copy_sparse(old, new) if known == new else os.link(known, new)

    shutil.copytree(source, target, symlinks=True, copy_function=copy)


def chain_bytes(path: Path) -> str:
    """Return a digest over every byte of an image and of all that it stands on, up to a missing file.

    The same digest, the same guest content.
    """
    found = hashlib.sha256()
    while True:
        found.update(os.fsencode(path))
        if not path.exists():
            return found.hexdigest()
        with path.open("rb") as file:
            found.update(os.fstat(file.fileno()).st_size.to_bytes(8, "big"))
            for start, end in _data(file.fileno()):
                for at in range(start, end, _PIECE):
                    found.update(at.to_bytes(8, "big") + os.pread(file.fileno(), min(_PIECE, end - at), at))
            below = _backing(file.fileno())
        if below is None:
            return found.hexdigest()
        path = path.parent / below


def backing(path: Path) -> Path | None:
    """Return the file that an image's header names below it, as a plain path."""
    with path.open("rb") as file:
        below = _backing(file.fileno())
    return None if below is None else Path(os.path.normpath(path.parent / below))


def _data(fd: int) -> Iterator[tuple[int, int]]:
    end, at = os.fstat(fd).st_size, 0
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # only a hole is left
            return
        stop = os.lseek(fd, at, os.SEEK_HOLE)
        yield at, stop
        at = stop


def _backing(fd: int) -> str | None:
    header = os.pread(fd, 20, 0)
    if header[:4] != b"QFI\xfb":
        return None
    offset, length = struct.unpack(">QI", header[8:20])
    return os.fsdecode(os.pread(fd, min(length, _LONGEST_NAME), offset)) if offset else None
