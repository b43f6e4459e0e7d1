"""Text from images, guests and configuration, made safe to print; sizes in words."""

from __future__ import annotations

_KIB = 1024


def printable(text: str) -> str:
    """Given any text, return it on one line, safe for a terminal.

    Control, bidi and other invisible characters become escapes (`\\n`, `\\x1b`, `\\u202e`); bytes that were no
    UTF-8 (surrogateescape) become `\\xNN`.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")


def size(count: int | None) -> str:
    """Given bytes, return them short, in binary units: `340M`, `1.2G`; `?` when they are not known."""
    if count is None:
        return "?"
    value, unit = float(count), ""
    for unit in ("", "K", "M", "G", "T", "P"):
        if round(value) < _KIB or unit == "P":
            break
        value /= _KIB
    short = f"{value:.1f}" if unit in ("M", "G", "T", "P") and value < 9.95 else f"{value:.0f}"
    return short.removesuffix(".0") + unit
