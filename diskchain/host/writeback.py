"""Have the kernel write while an engine still works: the sync at the end then has little left to wait for.

What an engine writes lies in the page cache until a tenth of the memory is dirty, or until the sync: processor and disk
work one after the other (docs/benchmarks.md, "Merging").
"""

from __future__ import annotations

import ctypes
import functools
import threading
from contextlib import AbstractAsyncContextManager

from diskchain.host.beside import beside

_libc = ctypes.CDLL(None, use_errno=True)
_WRITE = 2  # SYNC_FILE_RANGE_WRITE
_EACH = 0.05  # seconds


def writing_back(fd: int) -> AbstractAsyncContextManager[None]:
    """While the block runs, let the kernel begin to write what is dirty of an open file, every 50 ms.

    Nothing is raised, and no error is taken from the sync to come: sync_file_range(2) with this flag alone neither waits
    nor asks what has failed (Linux, fs/sync.c). Where it can't be done, nothing happens. The descriptor is not used after
    the block.
    """
    return beside(functools.partial(_write_back, fd))


def _write_back(fd: int, ended: threading.Event) -> None:
    whole = ctypes.c_int64(0), ctypes.c_int64(0)
    while not ended.wait(_EACH):
        if _libc.sync_file_range(fd, *whole, _WRITE) != 0:
            return
