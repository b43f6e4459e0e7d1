"""Which files the header of an image may mean as its backing file, in every format of QEMU's that has one.

For the question who uses an image: nothing is checked here, a damaged or hostile overlay is a user, too. What may be opened
is decided elsewhere (qcow2.py).
"""

from __future__ import annotations

import json
import re
import struct

FIRST_READ = 64
LONGEST_NAME = 4096  # bytes: QED's limit; 1023 in qcow2
FARTHEST = 1 << 32  # bytes; a name lies in the header, which is smaller by far
MOST_PROTOCOLS = 8
_QCOW = struct.Struct(">QI")  # version 1 to 3: offset, length; at 8
_QED_FEATURES = struct.Struct("<Q")  # at 16
_QED = struct.Struct("<II")  # offset, length; at 56
_QED_HAS_BACKING = 1
_STRINGS = re.compile(r""""((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'""")


def name_place(first: bytes) -> tuple[int, int] | None:
    """Given the first bytes of a file, return (offset, length) of the backing file's name; None where there is none."""
    if len(first) < FIRST_READ:
        first = first.ljust(FIRST_READ, b"\0")
    if first.startswith(b"QFI\xfb"):
        offset, length = _QCOW.unpack_from(first, 8)
    elif first.startswith(b"QED\0") and _QED_FEATURES.unpack_from(first, 16)[0] & _QED_HAS_BACKING:
        offset, length = _QED.unpack_from(first, 56)
    else:
        return None
    return (offset, min(length, LONGEST_NAME)) if 0 < offset < FARTHEST and length else None


def files_named(name: bytes) -> list[str]:
    """Given a backing name as it stands in a header, return every file that it may mean: a path; what follows a protocol
    (`file:PATH`, `blkdebug:CONF:PATH`); in `json:{...}` each string, under whatever key (`file.filename`, `image`, ...).
    """
    text = name.split(b"\0")[0].decode("utf-8", "surrogateescape")
    found: list[str] = []
    for one in _strings(text.removeprefix("json:")) if text.startswith("json:") else [text]:
        parts = one.split(":", MOST_PROTOCOLS)
        found += [":".join(parts[n:]) for n in range(len(parts))]
    return [one for one in dict.fromkeys(found) if one]


def _strings(text: str) -> list[str]:
    """Every string in JSON, between quotes of either kind: QEMU takes both."""
    return [_plain(double or single) for double, single in _STRINGS.findall(text)]


def _plain(quoted: str) -> str:
    inside = re.sub(r'(?<!\\)"', r"\"", quoted.replace("\\'", "'"))
    try:
        return str(json.loads(f'"{inside}"', strict=False))
    except ValueError:
        return quoted
