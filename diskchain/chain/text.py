"""Text from images, guests and configuration, made safe to print; sizes in words; names that fit into a directory."""

from __future__ import annotations

import hashlib

NAME_MAX = 255  # bytes of a file's name, on every file system that counts bytes
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


def cut(text: str, limit: int) -> str:
    """Return as much of the beginning of a text as has at most `limit` bytes; no character is cut in two."""
    text = text[:limit]
    while _length(text) > limit:
        text = text[:-1]
    return text


def name_with(before: str, name: str, after: str) -> str:
    """Given a file's name, return `before` + name + `after`, the name of something beside it.

    Where that is too long for a file system, a digest of the name and as much of its end as fits stand for the name.
    """
    if _length(before + name + after) <= NAME_MAX:
        return before + name + after
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    room = NAME_MAX - _length(f"{before}{digest}.{after}")
    while _length(name) > room:
        name = name[1:]
    return f"{before}{digest}.{name}{after}"


def _length(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: `1 CPU`, `2 CPUs`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
