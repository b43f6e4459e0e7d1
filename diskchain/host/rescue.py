"""Free a QEMU whose guest hangs on write protection that a failed background save left behind.

QEMU 7.2 tracks the guest's writes with userfaultfd while it saves memory. When the save fails or is cancelled, it closes
nothing: every write of the guest to a page not yet saved waits for ever (fixed by QEMU 10.0; facts.md). From outside we
take a copy of its userfaultfd (pidfd_getfd, Linux 5.6) and lift the protection of every range that still has it.
UFFDIO_UNREGISTER alone does not wake the waiting threads, hence the order below. Needs the right to ptrace QEMU.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from diskchain.errors import Refused, Unfinished

# linux/userfaultfd.h: _IOWR(0xAA, 6, 24 bytes), _IOR(0xAA, 2, 16 bytes), _IOR(0xAA, 1, 16 bytes)
_WRITEPROTECT, _WAKE, _UNREGISTER = 0xC018AA06, 0x8010AA02, 0x8010AA01
_PIDFD_GETFD = 438  # the same number on every architecture
_TRIES = 5
_libc = ctypes.CDLL(None, use_errno=True)


def protected_ranges(pid: int) -> list[tuple[int, int]]:
    """Return (address, length) of the process's memory that is write-protected by userfaultfd (VmFlags `uw`).

    Raise Refused without the right to look.
    """
    found: list[tuple[int, int]] = []
    now = (0, 0)
    for line in _smaps(pid):
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if head:
            now = (int(head[1], 16), int(head[2], 16) - int(head[1], 16))
        elif line.startswith("VmFlags:") and "uw" in line.split():
            found.append(now)
    return found


def _smaps(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Refused(f"can't look into QEMU (pid {pid}): {error.strerror}",
                      hint="run diskchain as root, or allow ptrace of your own processes") from error  # fmt: skip


def release(pid: int) -> int:
    """Lift every leaked write protection of a process; return how many ranges were freed.

    Raise Refused without the right to do it, Unfinished when some are left: the guest may hang on them.
    """
    before = left = protected_ranges(pid)
    for again in range(_TRIES):
        if not left:
            break
        time.sleep(0.05 * again)
        _lift_all(pid, left)
        left = protected_ranges(pid)  # the kernel may have refused, or QEMU's map may have changed meanwhile
    if left:
        raise Unfinished(f"{len(left)} of {len(before)} ranges of QEMU's memory (pid {pid}) stayed write-protected; its guest "
                         "may hang", hint="diskchain recover tries again; diskchain stop --force ends it")  # fmt: skip
    return len(before)


def _lift_all(pid: int, ranges: list[tuple[int, int]]) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for number in _userfaultfds(pid):
            fd = _copy_fd(pidfd, number)
            try:
                for start, length in ranges:
                    _lift(fd, start, length)
            finally:
                os.close(fd)
    finally:
        os.close(pidfd)


def _userfaultfds(pid: int) -> Iterator[int]:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if str(entry.readlink()) == "anon_inode:[userfaultfd]":
                yield int(entry.name)
        except OSError:
            continue


def _copy_fd(pidfd: int, number: int) -> int:
    fd = int(_libc.syscall(_PIDFD_GETFD, pidfd, number, 0))
    if fd < 0:
        raise Refused(f"can't reach into QEMU: {os.strerror(ctypes.get_errno())}",
                      hint="run diskchain as root, or allow ptrace of your own processes (kernel.yama.ptrace_scope)")  # fmt: skip
    return fd


def _lift(fd: int, start: int, length: int) -> None:
    """Unprotect, wake, unregister. A range that another of QEMU's userfaultfds owns answers with an error, and so does one
    that was changed meanwhile: whoever calls looks again.
    """
    for request, argument in (
        (_WRITEPROTECT, struct.pack("QQQ", start, length, 0)),
        (_WAKE, struct.pack("QQ", start, length)),
        (_UNREGISTER, struct.pack("QQ", start, length)),
    ):
        try:
            fcntl.ioctl(fd, request, argument)
        except OSError:
            return
