"""A file copied by the kernel: its holes stay holes, on XFS and btrfs its blocks are shared; and compared, as the disk has it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from diskchain.errors import ChainDamaged
from diskchain.host import files
from diskchain.host.fault import point

_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_PIECE = 32 << 20  # bytes between two looks whether we were cancelled
_ACROSS = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


async def copy(source: int, target: int, path: Path, on_bytes: Callable[[int], None]) -> None:
    """Make the open, empty file `target` (called `path` in messages) the same as `source`, durably. Raise NoSpace."""
    with files.os_errors(path, "write"):
        if not _cloned(source, target):
            os.ftruncate(target, os.fstat(source).st_size)
            for offset, length in _data(source):
                await asyncio.to_thread(_copy_piece, source, target, offset, length)
                point("copy.piece")
                on_bytes(length)
        await asyncio.to_thread(os.fsync, target)


def _cloned(source: int, target: int) -> bool:
    with contextlib.suppress(OSError):
        fcntl.ioctl(target, _FICLONE, source)
        return True
    return False


def _data(fd: int) -> Iterator[tuple[int, int]]:
    """Yield what is no hole, in pieces."""
    for start, end in files.data_extents(fd, os.fstat(fd).st_size):
        for offset in range(start, end, _PIECE):
            yield offset, min(_PIECE, end - offset)


def _copy_piece(source: int, target: int, offset: int, length: int) -> None:
    while length > 0:
        try:
            done = os.copy_file_range(source, target, length, offset, offset)
        except OSError as error:
            if error.errno not in _ACROSS:
                raise
            done = os.pwrite(target, os.pread(source, min(length, 1 << 20), offset), offset)
        if done == 0:
            raise OSError(errno.EIO, "the file became shorter while it was copied")
        offset, length = offset + done, length - done


async def compare(source: int, target: int, path: Path) -> None:
    """Compare every byte; the target is read from its disk. It was synced. Raise ChainDamaged."""
    with files.os_errors(path, "read"):
        os.posix_fadvise(target, 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(source).st_size
        same = size == os.fstat(target).st_size
        for offset in range(0, size, _PIECE) if same else ():
            same = same and await asyncio.to_thread(_same, source, target, offset)
    if not same:
        raise ChainDamaged(
            f"{path} is not what was copied into it", hint="look at dmesg and at that disk; nothing was changed"
        )


def _same(source: int, target: int, offset: int) -> bool:
    step = 1 << 20
    return all(os.pread(source, step, at) == os.pread(target, step, at) for at in range(offset, offset + _PIECE, step))
