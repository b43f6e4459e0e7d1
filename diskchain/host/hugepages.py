"""Put a QEMU's memory back into huge pages (MADV_COLLAPSE, Linux 6.1), so that the next pause is as short as the first.

Saving memory in the background write-protects it page by page, which splits the guest's huge pages; the kernel's walk
over what was split is what the next pause consists of (facts.md). Collapsing is a hint about memory, no change of it:
it can be left off anywhere, done twice, and killed in the middle.

Only ranges that are (nearly) full are collapsed: a huge page is all resident, so a range of which the guest uses half
would take twice its memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import mmap
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diskchain.host.process import ProcessId

HUGE = 2 << 20  # bytes of a huge page on x86-64
_SMALL = 4096
_PER_HUGE = HUGE // _SMALL
FULL = 488  # pages of 512 that must be there: what is collapsed grows by at most 24/488 = 4.9 %
PIECE = 8 << 20  # bytes a call: between two the guest's faults and QEMU's other calls get their turn
SPLIT = 0.02  # of the resident memory in (nearly) full ranges that are not huge: below it there is nothing to win
_READ = 256 << 20  # bytes of memory whose page map is read at once (512 KiB)
_GROWTH = 1.05  # of the process's resident memory: the work ends when more came, whatever the reason

_PROCESS_MADVISE, _COLLAPSE = 440, 25  # asm-generic/unistd.h, asm-generic/mman-common.h
_CAP_SYS_NICE = 23
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_libc = ctypes.CDLL(None, use_errno=True)
log = logging.getLogger(__name__)

# The highest byte of a page map's entry: bit 63 present, bit 56 mapped once. The page of zeroes that a save maps where
# the guest never wrote is present and not mapped once: it takes no memory, and must not count as used.
_IS_THERE = bytes(1 if byte & 0x81 == 0x81 else 0 for byte in range(256))


@dataclass(frozen=True)
class Mapping:
    """A mapping of guest memory; `resident` and `huge` in bytes."""

    start: int
    end: int
    resident: int
    huge: int


@dataclass(frozen=True)
class Outcome:
    """What became of a collapse. Bytes of guest memory before and after; `why`: in words why not all was done."""

    resident_before: int
    resident_after: int
    huge_before: int
    huge_after: int
    seconds: float
    why: str = ""


class _IoVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def unusable() -> str:
    """Return in words why this host or our rights do not allow it, or nothing. Old kernels are found by trying."""
    try:
        enabled = _THP.read_text()
    except OSError:
        return "this kernel has no transparent huge pages"
    if "[never]" in enabled:
        return "transparent huge pages are switched off on this host"
    status = Path("/proc/self/status").read_text()
    capabilities = int(re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)[1], 16)  # type: ignore[index]
    return "" if capabilities >> _CAP_SYS_NICE & 1 else "no right to it (CAP_SYS_NICE)"


def probe() -> str:
    """Collapse memory of our own; return in words why it does not work here (for QEMU, too), or nothing."""
    why = unusable()
    if why:
        return why
    with contextlib.closing(mmap.mmap(-1, 2 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        memory.write(b"\1" * len(memory))
        memory.madvise(mmap.MADV_HUGEPAGE)
        view = ctypes.c_char.from_buffer(memory)
        start = -(-ctypes.addressof(view) // HUGE) * HUGE
        del view  # or the memory can't be closed
        pidfd = os.pidfd_open(os.getpid())
        try:
            failed = advise(pidfd, start, HUGE)
        finally:
            os.close(pidfd)
        return _words(failed) if failed else ""


def guest_memory(pid: int) -> list[Mapping]:
    """Return the mappings of the guest's memory: private, anonymous, and QEMU asked for huge pages there (`hg`).

    What is write-protected by a save just now (`uw`) is left out. Empty when there is none or we may not look.
    """
    try:
        text = Path(f"/proc/{pid}/smaps").read_text()
    except OSError:
        return []
    found = []
    for block in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE):
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ 00:00 0 *\n", block)
        flags = re.search(r"^VmFlags:(.*)", block, re.MULTILINE)
        if head and flags and "hg" in flags[1].split() and "uw" not in flags[1].split():
            start, end = int(head[1], 16), int(head[2], 16)
            if end - start >= HUGE:
                found.append(Mapping(start, end, _kib(block, "Rss"), _kib(block, "AnonHugePages")))
    return found


def _kib(block: str, name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", block, re.MULTILINE)
    return int(match[1]) << 10 if match else 0


def full_ranges(pid: int, mapping: Mapping) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of what is (nearly) full, in pieces of at most PIECE. Raise OSError without the right."""
    first, last = -(-mapping.start // HUGE) * HUGE, mapping.end // HUGE * HUGE
    begun, length = 0, 0
    for start in _full_huge_ranges(pid, first, last):
        if length and (start != begun + length or length >= PIECE):
            yield begun, length
            length = 0
        begun, length = (begun, length + HUGE) if length else (start, HUGE)
    if length:
        yield begun, length


def _full_huge_ranges(pid: int, first: int, last: int) -> Iterator[int]:
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for start in range(first, last, _READ):
            size = min(_READ, last - start)
            entries = os.pread(fd, size // _SMALL * 8, start // _SMALL * 8)
            there = entries[7::8].translate(_IS_THERE)
            for index in range(0, len(there), _PER_HUGE):
                if there.count(1, index, index + _PER_HUGE) >= FULL:
                    yield start + index * _SMALL
    finally:
        os.close(fd)


def collapse(process: ProcessId, *, limit: float, stop: threading.Event) -> Outcome:
    """Collapse the guest's memory, at most `limit` seconds or until `stop` is set. Never raises; says what it did."""
    began = time.monotonic()
    before = guest_memory(process.pid)
    why = _collapse(process, before, began + limit, stop) if _worth_it(before) else ""
    after = guest_memory(process.pid) if why or _worth_it(before) else before
    outcome = Outcome(_sum(before, "resident"), _sum(after, "resident"), _sum(before, "huge"), _sum(after, "huge"),
                      round(time.monotonic() - began, 3), why)  # fmt: skip
    log.debug("%s", outcome)
    return outcome


async def collapse_in_thread(process: ProcessId, limit: float) -> str:
    """Collapse in a thread; return why not all was done. When we are cancelled, the thread ends within a piece."""
    stop = threading.Event()
    try:
        return (await asyncio.to_thread(collapse, process, limit=limit, stop=stop)).why
    finally:
        stop.set()


def _sum(mappings: Sequence[Mapping], what: str) -> int:
    return sum(getattr(m, what) for m in mappings)


def _worth_it(mappings: Sequence[Mapping]) -> bool:
    return _sum(mappings, "resident") - _sum(mappings, "huge") > SPLIT * _sum(mappings, "resident")


def _collapse(process: ProcessId, mappings: Sequence[Mapping], end: float, stop: threading.Event) -> str:
    why = unusable()
    if why:
        return why
    try:
        pidfd = os.pidfd_open(process.pid)
        try:
            if not process.alive():  # the number is somebody else's by now
                return "QEMU has ended"
            return _in_pieces(pidfd, process.pid, mappings, end, stop)
        finally:
            os.close(pidfd)
    except OSError as error:
        return error.strerror or str(error)


def _in_pieces(pidfd: int, pid: int, mappings: Sequence[Mapping], end: float, stop: threading.Event) -> str:
    most = _resident(pid) * _GROWTH
    for mapping in mappings:
        for start, length in full_ranges(pid, mapping):
            began = time.monotonic()
            failed = advise(pidfd, start, length)
            if failed not in (0, errno.EAGAIN):  # EAGAIN: a page was in use just then; the next time will do
                return _words(failed)
            if began > end:
                return "it took too long"
            if _resident(pid) > most:
                return "resident memory grew meanwhile"
            if stop.wait(min(0.02, time.monotonic() - began)):
                return "interrupted"
    return ""


def advise(pidfd: int, start: int, length: int) -> int:
    """Collapse one piece of the process's memory; return 0 or the error number."""
    vector = _IoVector(start, length)
    ctypes.set_errno(0)
    done = _libc.syscall(_PROCESS_MADVISE, pidfd, ctypes.byref(vector), ctypes.c_size_t(1), _COLLAPSE, 0)
    return ctypes.get_errno() if done < 0 else 0


def _words(number: int) -> str:
    known = {
        errno.EINVAL: "this kernel can't (Linux 6.1 can)",
        errno.ENOSYS: "this kernel can't (Linux 6.1 can)",
        errno.EPERM: "no right to it (CAP_SYS_NICE)",
        errno.ENOMEM: "the host has no huge pages free",
        errno.EBUSY: "the memory limit of QEMU's control group is reached",
        errno.ESRCH: "QEMU has ended",
    }
    return known.get(number) or os.strerror(number)


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0
