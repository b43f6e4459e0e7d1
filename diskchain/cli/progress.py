"""Progress on stderr: one line that changes on a terminal, a line for each 10 % elsewhere."""

from __future__ import annotations

import time
from typing import TextIO

from diskchain.chain.text import printable, size
from diskchain.cli.render import duration, named

PATIENCE = 1.0  # seconds before lines are written where nobody watches
_EVERY = 0.2  # seconds between two drawings


class LineProgress:
    """Implements ops.progress.Progress. `warnings` collects what is warned of, for JSON. With `vm` each line names it."""

    def __init__(
        self, stream: TextIO, *, quiet: bool, warnings: list[str], patience: float = PATIENCE, vm: str = ""
    ) -> None:
        self._stream, self._quiet, self._warnings, self._vm = stream, quiet, warnings, vm
        self._live = not quiet and stream.isatty()
        self._patience = patience
        self._what = self._note = ""
        self._total = self._shown = self._done = 0
        self._began = self._drawn = 0.0

    def begin(self, what: str, total: int, *, note: str = "") -> None:
        """A long piece of work begins."""
        self._what, self._total, self._note = printable(named(self._vm, what)), total, printable(note)
        self._shown, self._done, self._began, self._drawn = -1, 0, time.monotonic(), 0.0
        self.update(0)

    def update(self, done: int) -> None:
        """Draw, if it is time."""
        self._done = done
        if self._live and time.monotonic() - self._drawn >= _EVERY:
            self._draw()
        elif not self._live and not self._quiet and time.monotonic() - self._began >= self._patience:
            self._tell()

    def end(self) -> None:
        """Take the line away."""
        if self._live and self._what:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
        self._what = ""

    def warn(self, text: str) -> None:
        """Print a warning, also with -q."""
        self._warnings.append(text)
        if self._live and self._what:
            self._stream.write("\r\x1b[K")
        self._stream.write(f"warning: {printable(named(self._vm, text))}\n")
        self._stream.flush()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._stream.write(f"\r{self._line(self._drawn - self._began)}\x1b[K")
        self._stream.flush()

    def _tell(self) -> None:
        step = self._percent() // 10
        if step > self._shown:
            self._shown = step
            self._stream.write(self._line(time.monotonic() - self._began) + "\n")
            self._stream.flush()

    def _percent(self) -> int:
        return min(100, 100 * self._done // self._total) if self._total > 0 else 0

    def _line(self, seconds: float) -> str:
        parts = [self._what, f"{size(self._done)}/{size(self._total)}", f"{self._percent()} %"]
        if seconds > 0.5 and self._done:
            rate = self._done / seconds
            left = max(0.0, self._total - self._done) / rate
            parts += [f"{size(int(rate))}/s", f"ETA {duration(left)}"]
        if self._note:
            parts.append(f"({self._note})")
        return "  ".join(parts)
