"""host/hugepages on memory of our own: what counts as full, and what a collapse does to it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from pathlib import Path

import pytest

from diskchain.host import hugepages
from diskchain.host.hugepages import FULL, HUGE, Mapping
from diskchain.host.process import process_id

RANGES = 6


class Memory:
    """Private memory of small pages, of which huge ones are wanted now, beginning at a multiple of 2 MiB."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, (RANGES + 1) * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.map.madvise(mmap.MADV_NOHUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.start = -(-start // HUGE) * HUGE
        self._offset = self.start - start

    def write(self, number: int, pages: int) -> None:
        """Write into the first pages of a range."""
        for page in range(pages):
            at = self._offset + number * HUGE + page * 4096
            self.map[at : at + 2] = bytes((number + 1, page % 251))

    def read(self, number: int) -> None:
        """Only read: the kernel maps its page of zeroes."""
        for page in range(512):
            assert self.map[self._offset + number * HUGE + page * 4096] == 0

    def intact(self, number: int, pages: int) -> bool:
        """Whether what was written is there."""
        at = self._offset + number * HUGE
        return all(self.map[at + p * 4096 : at + p * 4096 + 2] == bytes((number + 1, p % 251)) for p in range(pages))

    def mapping(self) -> Mapping:
        """As `guest_memory` finds it (the kernel may have joined it with a neighbour)."""
        (found,) = [m for m in hugepages.guest_memory(os.getpid()) if m.start <= self.start < m.end]
        return found


def filled() -> Memory:
    """Full; half full; only read; just full enough; one page short of it; untouched."""
    memory = Memory()
    for number, pages in enumerate((512, 256, 0, FULL, FULL - 1, 0)):
        memory.write(number, pages)
    memory.read(2)
    return memory


@pytest.fixture
def memory() -> Memory:
    """That, where no huge pages are wanted: the kernel makes none by itself."""
    return filled()


@pytest.fixture
def wanted() -> Memory:
    """That, where they are: from now on the kernel may make some by itself, of any range."""
    memory = filled()
    memory.map.madvise(mmap.MADV_HUGEPAGE)
    return memory


def mine(memory: Memory) -> set[int]:
    """Which of its ranges are full."""
    whole = Mapping(memory.start, memory.start + RANGES * HUGE, 0, 0)
    found = set()
    for start, length in hugepages.full_ranges(os.getpid(), whole):
        found |= {(at - memory.start) // HUGE for at in range(start, start + length, HUGE)}
    return found


def test_full_ranges_are_those_that_are_used_not_those_that_were_read(memory: Memory) -> None:
    assert mine(memory) == {0, 3}


def test_full_ranges_come_in_pieces(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(RANGES):
        memory.write(number, 512)
    whole = Mapping(memory.start, memory.start + RANGES * HUGE, 0, 0)
    assert [n for _, n in hugepages.full_ranges(os.getpid(), whole)] == [4 * HUGE, 2 * HUGE]
    monkeypatch.setattr(hugepages, "_READ", HUGE)  # read in other pieces than given out
    assert [n for _, n in hugepages.full_ranges(os.getpid(), whole)] == [4 * HUGE, 2 * HUGE]
    between = Mapping(memory.start + 4096, memory.start + RANGES * HUGE - 4096, 0, 0)
    assert sum(n for _, n in hugepages.full_ranges(os.getpid(), between)) == (RANGES - 2) * HUGE


def test_collapse_makes_huge_pages_of_the_full_ranges_only() -> None:
    """Tried again when others are huge then: the kernel looks for such ranges by itself (khugepaged)."""
    process = process_id(os.getpid())
    assert process
    for _ in range(5):
        memory = filled()
        memory.map.madvise(mmap.MADV_HUGEPAGE)
        outcome = hugepages.collapse(process, limit=30, stop=threading.Event())
        assert outcome.why == hugepages.probe()
        assert memory.intact(0, 512) and memory.intact(1, 256) and memory.intact(3, FULL) and memory.intact(4, FULL - 1)
        if mine(memory) == {0, 3}:
            break
    assert mine(memory) == {0, 3}
    if not outcome.why:  # a kernel or a host without them says why, and nothing else changes
        assert outcome.huge_after - outcome.huge_before >= 2 * HUGE
        assert outcome.resident_after <= outcome.resident_before * 1.05


def test_collapse_stops_when_told(wanted: Memory) -> None:
    process = process_id(os.getpid())
    assert process
    stop = threading.Event()
    stop.set()
    assert hugepages.collapse(process, limit=30, stop=stop).why in ("interrupted", hugepages.probe())
    assert wanted.intact(0, 512)


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.EINVAL, "6.1"), (errno.EPERM, "CAP_SYS_NICE"), (errno.ENOMEM, "no huge pages free"), (errno.EIO, "error")],
)
def test_collapse_refused_by_the_kernel_says_why(
    wanted: Memory, monkeypatch: pytest.MonkeyPatch, number: int, says: str
) -> None:
    monkeypatch.setattr(hugepages, "unusable", lambda: "")
    monkeypatch.setattr(hugepages, "advise", lambda *_: number)
    process = process_id(os.getpid())
    assert process
    assert says in hugepages.collapse(process, limit=30, stop=threading.Event()).why


def test_collapse_goes_on_after_a_piece_that_was_in_use(wanted: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def busy(pidfd: int, start: int, length: int) -> int:
        calls.append(start)
        return errno.EAGAIN

    monkeypatch.setattr(hugepages, "unusable", lambda: "")
    monkeypatch.setattr(hugepages, "advise", busy)
    process = process_id(os.getpid())
    assert process and hugepages.collapse(process, limit=30, stop=threading.Event()).why == ""
    assert {wanted.start, wanted.start + 3 * HUGE} <= set(calls)


@pytest.mark.parametrize(("text", "says"), [("always madvise [never]\n", "switched off"), (None, "no transparent")])
def test_unusable_hosts_say_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "enabled"
    if text:
        path.write_text(text)
    monkeypatch.setattr(hugepages, "_THP", path)
    assert says in hugepages.unusable() and says in hugepages.probe()


def test_a_process_that_has_ended_is_no_error() -> None:
    process = process_id(os.getpid())
    assert process
    gone = type(process)(2**22 - 1, 1)
    assert hugepages.collapse(gone, limit=1, stop=threading.Event()).resident_before == 0
