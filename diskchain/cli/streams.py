"""Standard input, output and error, whatever they are: closed, a full disk, a pipe that nobody reads.

What can't be written never raises and never ends what a command does. The border asks `unwritten` afterwards.
"""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Any, TextIO


class Sink(io.FileIO):
    """A descriptor to write to. After the first error nothing is written any more; it is kept in `error`."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Take all that is given, whatever becomes of it."""
        view = memoryview(data).cast("B")
        written = 0
        while self.error is None and written < len(view):
            try:
                count = super().write(view[written:])
            except OSError as error:
                self.error = error
            else:
                if count is None:  # somebody made it non-blocking
                    select.select([], [self], [])
                written += count or 0
        return len(view)


def secure() -> None:
    """Give the process streams that can be used. Called once, before anything else.

    A closed descriptor becomes /dev/null: or the next file that is opened, a record, would be our standard output.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout, sys.stderr = _tough(sys.stdout, 1), _tough(sys.stderr, 2)


def _tough(stream: Any, number: int) -> TextIO:
    if stream is not None:
        stream.flush()
    sink = Sink(number, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(sink), encoding=getattr(stream, "encoding", None), errors="backslashreplace",
        line_buffering=number == 2 or bool(getattr(stream, "line_buffering", False)),
        write_through=bool(getattr(stream, "write_through", False)),
    )  # fmt: skip


def unwritten() -> OSError | None:
    """Write what is left of standard output; return why something of it could not be written."""
    if sys.stdout is None:
        return None
    try:
        sys.stdout.flush()
    except OSError as error:
        return error
    sink = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return sink.error if isinstance(sink, Sink) else None


def is_terminal(stream: Any) -> bool:
    """Whether a person is at the other end; a stream that was closed is none."""
    return stream is not None and not stream.closed and bool(stream.isatty())
