"""Progress as a parameter with a silent default; only `cli/` knows how it is shown."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What an operation tells while it works. Sizes in bytes."""

    def begin(self, what: str, total: int, *, note: str = "") -> None:
        """A long piece of work begins; `note` says what may be done meanwhile, like `safe to interrupt`."""

    def update(self, done: int) -> None:
        """So much of it is done."""

    def end(self) -> None:
        """It is over."""

    def warn(self, text: str) -> None:
        """Something an admin should know; the operation goes on."""


class Quiet:
    """Says nothing."""

    def begin(self, what: str, total: int, *, note: str = "") -> None:
        """Nothing."""

    def update(self, done: int) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""


QUIET = Quiet()
