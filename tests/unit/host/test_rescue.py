"""Write protection that is left in a process (our own, here) is lifted, and nobody says so before it is true."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from diskchain.errors import Unfinished
from diskchain.host import rescue

# linux/userfaultfd.h; the system call's number is that of x86-64
_SYSCALL, _USER_MODE_ONLY, _API, _REGISTER, _FEATURE_WP, _MODE_WP = 323, 1, 0xC018AA3F, 0xC020AA00, 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def protected() -> Iterator[tuple[int, int]]:
    """A range of our memory that userfaultfd write-protects, as (address, length)."""
    fd = int(_libc.syscall(_SYSCALL, os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY))
    assert fd >= 0, os.strerror(ctypes.get_errno())
    fcntl.ioctl(fd, _API, struct.pack("QQQ", 0xAA, _FEATURE_WP, 0))
    memory = mmap.mmap(-1, 16 * mmap.PAGESIZE)
    place = ctypes.c_char.from_buffer(memory)
    where = (ctypes.addressof(place), len(memory))
    fcntl.ioctl(fd, _REGISTER, struct.pack("QQQQ", *where, _MODE_WP, 0))
    assert rescue.protected_ranges(os.getpid()) == [where]
    yield where
    os.close(fd)
    del place
    memory.close()


class Unwilling:
    """The kernel, refusing so many requests (it does while the process's map changes)."""

    def __init__(self, refusals: int) -> None:
        self._refusals, self._real = refusals, fcntl.ioctl

    def __call__(self, fd: int, request: int, argument: Any) -> Any:
        if self._refusals > 0:
            self._refusals -= 1
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return self._real(fd, request, argument)


def test_release_refused_at_first_tries_again(protected: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the kernel's own word is that nothing is protected; then there is nothing to free."""
    monkeypatch.setattr(fcntl, "ioctl", Unwilling(2))
    assert rescue.release(os.getpid()) == 1
    assert rescue.protected_ranges(os.getpid()) == []
    assert rescue.release(os.getpid()) == 0


def test_release_refused_always_is_not_called_done(protected: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest may hang: an error that says so."""
    monkeypatch.setattr(fcntl, "ioctl", Unwilling(1000))
    with pytest.raises(Unfinished, match="1 of 1 ranges"):
        rescue.release(os.getpid())
    assert rescue.protected_ranges(os.getpid()) == [protected]
