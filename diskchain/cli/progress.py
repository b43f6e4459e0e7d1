"""Progress on stderr: one line that changes on a terminal, a line for each 10 % elsewhere, of JSON where that was asked for."""

from __future__ import annotations

import json
import time
from typing import Any, TextIO

from diskchain.chain.text import printable, size
from diskchain.cli import streams
from diskchain.cli.render import duration, named

PATIENCE = 1.0  # seconds before lines are written where nobody watches
_EVERY = 0.2  # seconds between two drawings


class LineProgress:
    """Implements ops.progress.Progress. `warnings` collects what is warned of, for JSON. With `vm` each line names it.

    `as_json`: where nobody watches each line is an object {"progress": {...}}, in bytes and seconds (docs/commands.md).
    """

    def __init__(
        self, stream: TextIO, *, quiet: bool, warnings: list[str], patience: float = PATIENCE, vm: str = "",
        as_json: bool = False,
    ) -> None:  # fmt: skip
        self._stream, self._quiet, self._warnings, self._vm = stream, quiet, warnings, vm
        self._live = not quiet and streams.is_terminal(stream)
        self._patience, self._as_json = patience, as_json
        self._what = self._note = ""
        self._total = self._shown = self._done = 0
        self._began = self._drawn = 0.0

    def begin(self, what: str, total: int, *, note: str = "") -> None:
        """A long piece of work begins."""
        self._what, self._total, self._note = printable(what), total, printable(note)
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
            seconds = time.monotonic() - self._began
            self._stream.write((self._object(seconds) if self._as_json else self._line(seconds)) + "\n")
            self._stream.flush()

    def _percent(self) -> int:
        return min(100, 100 * self._done // self._total) if self._total > 0 else 0

    def _pace(self, seconds: float) -> tuple[float, float] | None:
        """Bytes in a second and the seconds that are left, once there is something to tell them from."""
        if seconds <= 0.5 or not self._done:
            return None
        rate = self._done / seconds
        return rate, max(0.0, self._total - self._done) / rate

    def _object(self, seconds: float) -> str:
        pace = self._pace(seconds)
        told: dict[str, Any] = {
            "what": self._what,
            "done": self._done,
            "total": self._total,
            "percent": self._percent(),
        }
        told |= {"rate": int(pace[0]), "eta": round(pace[1], 1)} if pace else {"rate": None, "eta": None}
        if self._note:
            told["note"] = self._note
        return json.dumps({"progress": {"vm": self._vm, **told} if self._vm else told})

    def _line(self, seconds: float) -> str:
        parts = [named(self._vm, self._what), f"{size(self._done)}/{size(self._total)}", f"{self._percent()} %"]
        if pace := self._pace(seconds):
            parts += [f"{size(int(pace[0]))}/s", f"ETA {duration(pace[1])}"]
        if self._note:
            parts.append(f"({self._note})")
        return "  ".join(parts)
