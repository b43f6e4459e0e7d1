"""Text from images, guests and configuration, made safe to print."""

from __future__ import annotations


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
