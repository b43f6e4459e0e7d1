"""What a filesystem can do, tried for real: on unnamed files (O_TMPFILE), so that nothing is left and nothing seen."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE
_LENGTH = 64 << 10


@dataclass(frozen=True)
class Tried:
    """What was found in a directory: True, False, or None with `why` where it could not be tried."""

    clone: bool | None = None
    direct: bool | None = None
    reserve: bool | None = None
    why: str = ""


def directory(path: Path) -> Tried:
    """Try FICLONE, O_DIRECT and fallocate in a directory. Its entries and times stay as they are."""
    if not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
        return Tried(why="no right to write there")
    try:
        with _unnamed(path) as one, _unnamed(path) as other:
            os.pwrite(one, b"\1" * _LENGTH, 0)
            return Tried(
                _works(lambda: fcntl.ioctl(other, _FICLONE, one)), _direct(path), _works(lambda: _reserve(one))
            )
    except OSError as error:
        what = (
            "no unnamed files there"
            if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT)
            else error.strerror
        )
        return Tried(why=str(what))


@contextlib.contextmanager
def _unnamed(path: Path, flags: int = 0) -> Iterator[int]:
    fd = os.open(path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _works(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        return False
    return True


def _direct(path: Path) -> bool:
    def attempt() -> None:
        with _unnamed(path, os.O_DIRECT) as fd, mmap.mmap(-1, _LENGTH) as aligned:
            os.pwrite(fd, aligned, 0)

    return _works(attempt)


def _reserve(fd: int) -> None:
    if _libc.fallocate(fd, _KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(_LENGTH * 4)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
