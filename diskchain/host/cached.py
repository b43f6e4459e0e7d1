"""What of a file the kernel has in its page cache, and how much more has room there."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path

SPOTS = 64  # pages that are looked at; each that is not cached begins to be read by it


def cached_share(path: Path) -> float:
    """Return how much of a file is in the page cache, 0 to 1, from samples (preadv2(2), RWF_NOWAIT).

    1 where the filesystem can't tell, and of an empty file: what is not known to be elsewhere is looked for there.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return 1.0
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # else what follows begins to be read, too
        size, page = os.fstat(fd).st_size, bytearray(1)
        return sum(_is_cached(fd, at, page) for at in _spots(size)) / SPOTS if size else 1.0
    except OSError:
        return 1.0
    finally:
        os.close(fd)


def _spots(size: int) -> list[int]:
    """One somewhere in each part, so that a second look does not find the pages of the first."""
    return [int(size * (part + random.random()) / SPOTS) for part in range(SPOTS)]  # noqa: S311


def _is_cached(fd: int, at: int, page: bytearray) -> bool:
    try:
        return os.preadv(fd, [page], at, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False


def memory_to_spare() -> int:
    """Return the bytes that programs and the page cache can still take (MemAvailable of proc(5)); 0 if that is not known."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0
