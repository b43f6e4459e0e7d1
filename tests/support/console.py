"""Follow the console log file of a guest and answer questions about what the guest said, and when."""

from __future__ import annotations

import os
import re
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

Line = tuple[float, str]

COUNTER = re.compile(r"^C (\d+) bad=")
BAD = re.compile(r"^C (MISMATCH|BADMEM|BADLOG|IOERROR|START TORN)")
LOOK_EACH = 0.02  # seconds; a look each millisecond takes a sixth of a processor from the guest
TAIL_BYTES = 256


class FileFollower:
    """Give the new complete lines of a file that grows, is truncated or is replaced; it may not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start_again()

    def _start_again(self) -> None:
        self._position = 0
        self._tail = b""  # the last bytes that were read
        self.half_line = b""  # a line without its end

    def read_lines(self) -> list[str]:
        """Return the lines that were completed since the last call."""
        try:
            with self._path.open("rb") as file:
                data = self._read_new(file)
        except FileNotFoundError:
            return []
        *lines, self.half_line = (self.half_line + data).split(b"\n")
        return [line.decode("latin-1").rstrip("\r") for line in lines]

    def _read_new(self, file: BinaryIO) -> bytes:
        if os.fstat(file.fileno()).st_size == self._position:
            return b""
        file.seek(self._position - len(self._tail))
        # A truncated file may already have grown again beyond our position: only its content can tell.
        if file.read(len(self._tail)) != self._tail:
            cut_off = self.half_line
            self._start_again()
            file.seek(0)
            self.half_line = cut_off and cut_off + b"\n"  # ended there, and stays a line of its own
        data = file.read()
        self._position += len(data)
        self._tail = (self._tail + data)[-TAIL_BYTES:]
        return data


class Console:
    """What a guest wrote to its console log, over all its boots.

    Given the path of the file, follow it with a thread that gives each line its time (within `each` seconds), or with
    `thread=False` only look when asked; then the times say when it was seen, not when it was written. A mark is a
    position in the list of lines; "after a mark" never looks at older lines.
    """

    def __init__(self, path: Path | str, *, thread: bool = True, each: float = LOOK_EACH) -> None:
        self._follower = FileFollower(Path(path))
        self._lines: list[Line] = []
        self._each = each
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="console", daemon=True) if thread else None
        if self._thread:
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop following the file; the lines stay readable."""
        self._closed.set()
        if self._thread:
            self._thread.join()

    def _follow(self) -> None:
        while not self._closed.wait(self._each):
            self._poll()

    def _poll(self) -> None:
        with self._lock:
            now = time.monotonic()
            self._lines += [(now, line) for line in self._follower.read_lines()]

    def lines(self, after: int = 0) -> list[Line]:
        """Return (time.monotonic(), line) for each line up to this moment."""
        self._poll()
        with self._lock:
            return self._lines[after:]

    def mark(self) -> int:
        """Return the position after the last line up to this moment; a line that is half written belongs to before.

        A VM is paused, or another state of it loaded, in the middle of a line as well as between two.
        """
        self._poll()
        with self._lock:
            return len(self._lines) + bool(self._follower.half_line)

    def wait(self, pattern: str, timeout: float = 60, after: int = 0) -> re.Match[str]:
        """Return the match of the first line after the mark in which the pattern is found.

        Raise TimeoutError, with the last lines, if there is none in time.
        """
        deadline = time.monotonic() + timeout
        position = after
        while True:
            expired = time.monotonic() > deadline
            for _, line in self.lines(position):
                position += 1
                if match := re.search(pattern, line):
                    return match
            if expired:
                raise TimeoutError(f"no line with {pattern!r} within {timeout} s; {self._describe_end()}")
            time.sleep(self._each)

    def _describe_end(self) -> str:
        last = [line for _, line in self.lines()[-10:]]
        return "the last lines:\n  " + "\n  ".join(last) if last else "the guest said nothing at all"

    def counter(self) -> int | None:
        """Return the n of the last `C n`, None before the first."""
        matches = (COUNTER.search(line) for _, line in reversed(self.lines()))
        return next((int(match[1]) for match in matches if match), None)

    def bad(self, after: int = 0) -> list[str]:
        """Return every complaint of the consistency oracle after the mark."""
        return [line for _, line in self.lines(after) if BAD.search(line)]

    def longest_gap(self, t0: float, t1: float, pattern: str = r"^T ") -> float:
        """Return the longest time in seconds, within t0..t1 (time.monotonic()), without a line with the pattern."""
        if self._thread is None:
            raise RuntimeError("longest_gap() needs the times of the reader thread")
        times = [at for at, line in self.lines() if t0 <= at <= t1 and re.search(pattern, line)]
        return max(later - earlier for earlier, later in pairwise([t0, *times, t1]))
