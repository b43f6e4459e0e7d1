"""The console reader itself: a wrong reader would make the oracle of all other tests worthless."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.support.console import Console


def texts(console: Console, after: int = 0) -> list[str]:
    return [line for _, line in console.lines(after)]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "console"


def append(log: Path, text: str) -> None:
    with log.open("a") as file:
        file.write(text)


def test_lines_appended_in_pieces_are_joined(log: Path) -> None:
    console = Console(log, thread=False)
    assert texts(console) == []
    append(log, "one\r\ntw")
    assert texts(console) == ["one"]
    append(log, "o\r\n")
    assert texts(console) == ["one", "two"]


@pytest.mark.parametrize("new", ["short\n", "as long!\n", "longer than it was before\n"])
def test_lines_of_a_truncated_file_are_read_from_its_start(log: Path, new: str) -> None:
    console = Console(log, thread=False)
    append(log, "first..\nhalf a l")
    mark = console.mark()
    log.write_text(new)
    assert texts(console, mark) == [new.rstrip()]
    assert texts(console)[0] == "first.."


def test_wait_looks_only_after_the_mark(log: Path) -> None:
    console = Console(log, thread=False)
    append(log, "C 1 bad=0\n")
    mark = console.mark()
    assert console.wait(r"^C (\d+)")[1] == "1"
    append(log, "C 2 bad=0\n")
    assert console.wait(r"^C (\d+)", after=mark)[1] == "2"
    with pytest.raises(TimeoutError, match="the last lines:\n  C 1 bad=0\n  C 2 bad=0"):
        console.wait("^T ", timeout=0)


def test_a_line_that_is_half_written_at_the_mark_is_not_after_it(log: Path) -> None:
    """Paused after `C 343 bad=0`, the VM goes on from a snapshot that was taken just before a line's end."""
    console = Console(log, thread=False)
    append(log, "C 342 bad=0\r\nC 343 bad=0")
    mark = console.mark()
    append(log, "\r\nC 398 bad=0\r\n")
    assert texts(console, mark) == ["C 398 bad=0"]
    assert console.wait(r"^C (\d+)", after=mark)[1] == "398"


def test_counter_and_bad_read_the_oracle(log: Path) -> None:
    console = Console(log, thread=False)
    assert console.counter() is None
    append(log, "C START 4\nC 5 bad=0\nC MISMATCH mem=5 vda=4\nC 6 bad=1\n")
    mark = console.mark()
    append(log, "C START TORN vda=1 vdb=9\nC BADMEM x\nC BADLOG y\nC IOERROR z\nC 7 bad=2\nC 8")
    assert console.counter() == 7
    assert console.bad()[0] == "C MISMATCH mem=5 vda=4"
    assert len(console.bad()) == 5
    assert len(console.bad(mark)) == 4


def test_longest_gap_counts_the_edges(log: Path) -> None:
    with Console(log) as console:
        begin = time.monotonic()
        time.sleep(0.3)
        append(log, "T 1\n")
        console.wait("^T 1")
        assert 0.3 <= console.longest_gap(begin, time.monotonic()) < 30
        time.sleep(0.5)
        assert console.longest_gap(begin, time.monotonic()) >= 0.5


def test_longest_gap_without_a_thread_is_refused(log: Path) -> None:
    with pytest.raises(RuntimeError, match="reader thread"):
        Console(log, thread=False).longest_gap(0, 1)
