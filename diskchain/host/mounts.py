"""Under which other names a file is reached: mounts of the same filesystem (bind mounts), from /proc/self/mountinfo."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple


class Mount(NamedTuple):
    """One mount: its device (`8:1`), which directory of the filesystem it shows, and where."""

    device: str
    root: str
    point: str


def mounts(table: str | None = None) -> list[Mount]:
    """Return all mounts, in the order in which they were made (a later one hides what is below it)."""
    text = Path("/proc/self/mountinfo").read_text() if table is None else table
    fields = (line.split(" ") for line in text.splitlines())
    return [Mount(f[2], _plain(f[3]), _plain(f[4])) for f in fields if len(f) > 4]


def _plain(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), word)


def other_names(path: Path) -> list[Path]:
    """Given a file, return the other paths at which mounts of its filesystem show it. Names, not hard links."""
    found, real = mounts(), path.resolve()
    home = max((m for m in found if _inside(str(real), m.point)), key=lambda m: len(m.point), default=None)
    if home is None:
        return []
    within = _joined(home.root, str(real)[len(home.point.rstrip("/")) :])
    names = {
        Path(_joined(m.point, within[len(m.root.rstrip("/")) :]))
        for m in found
        if m.device == home.device and _inside(within, m.root)
    }
    return sorted(name for name in names if name != real and _same(name, real))


def _inside(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _joined(directory: str, rest: str) -> str:
    return (directory.rstrip("/") + "/" + rest.lstrip("/")).rstrip("/") or "/"


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
