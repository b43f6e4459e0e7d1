"""The guest's memory as the host's kernel sees it: resident, in huge pages, page by page. Imports nothing of diskchain."""

from __future__ import annotations

import array
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE, HUGE = 4096, 2 << 20
_PRESENT_AND_MAPPED_ONCE = 1 << 63 | 1 << 56  # the page of zeroes is present, but not mapped once


@dataclass(frozen=True)
class Ram:
    """QEMU's largest mapping of data; all in bytes."""

    pid: int
    start: int
    size: int
    resident: int
    huge: int

    def used(self) -> list[int]:
        """Return for each range of 2 MiB how many of its 512 pages are resident."""
        first, last = -(-self.start // HUGE) * HUGE, (self.start + self.size) // HUGE * HUGE
        entries = array.array("Q")
        with open(f"/proc/{self.pid}/pagemap", "rb") as pagemap:
            pagemap.seek(first // PAGE * 8)
            entries.frombytes(pagemap.read((last - first) // PAGE * 8))
        there = [e & _PRESENT_AND_MAPPED_ONCE == _PRESENT_AND_MAPPED_ONCE for e in entries]
        return [sum(there[n : n + 512]) for n in range(0, len(there), 512)]

    def use(self, ranges: Sequence[int], every: int) -> None:
        """Write a byte into every so manieth page of these ranges, as a guest that uses free memory would."""
        first = -(-self.start // HUGE) * HUGE
        with open(f"/proc/{self.pid}/mem", "r+b", buffering=0) as memory:
            for number in ranges:
                for page in range(0, HUGE, every * PAGE):
                    memory.seek(first + number * HUGE + page)
                    memory.write(b"\1")


def guest_ram(pid: int) -> Ram:
    """Return the guest's memory. TCG's own code buffer, rwxp, is larger than small guests and is not meant."""
    found = []
    for block in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text(), flags=re.MULTILINE):
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw-p ", block)
        if head:
            start, end = int(head[1], 16), int(head[2], 16)
            found.append(Ram(pid, start, end - start, _bytes(block, "Rss"), _bytes(block, "AnonHugePages")))
    return max(found, key=lambda ram: ram.size)


def _bytes(block: str, name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", block, re.MULTILINE)
    assert match
    return int(match[1]) << 10
