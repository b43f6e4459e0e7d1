"""Files that the page cache does not hold."""

from __future__ import annotations

import os
from pathlib import Path


def on_the_disk_alone(path: Path, size: int = 32 << 20) -> Path:
    """Make a file of random bytes that is not cached."""
    with path.open("wb") as opened:
        opened.write(os.urandom(size))
    forgotten(path)
    return path


def forgotten(path: Path) -> None:
    """Have the kernel drop what it has cached of a file."""
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
