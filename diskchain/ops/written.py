"""Names that go into records and headers: what can't be written there is refused before anything is done."""

from __future__ import annotations

from pathlib import Path

from diskchain.chain.text import printable
from diskchain.errors import BadName


def refuse_unwritable(path: Path) -> None:
    """Raise BadName for a path with control characters, or with bytes that are no UTF-8: a record can't hold these, a
    header must not.
    """
    text = str(path)
    if any(code < 0x20 or 0x7F <= code < 0xA0 or 0xD800 <= code <= 0xDFFF for code in map(ord, text)):
        raise BadName(f"{printable(text)} has control characters, or bytes that are no UTF-8: such a name can't be recorded",
                      hint="rename the file or its directory")  # fmt: skip
