"""Copies of diskchain in which something is replaced by other text: a safeguard taken out, a size made small."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.rig import ROOT


@dataclass(frozen=True)
class Mutation:
    """What is replaced: file below diskchain/, text there, text instead."""

    changes: Sequence[tuple[str, str, str]]

    def copy_to(self, directory: Path) -> Path:
        """Make a copy of the package, and of what it is run with, with that in it."""
        shutil.copytree(ROOT / "diskchain", directory / "diskchain", ignore=shutil.ignore_patterns("__pycache__"))
        (directory / "tests/support").mkdir(parents=True)
        for name in ("__init__.py", "support/__init__.py", "support/zygote.py"):
            shutil.copy(ROOT / "tests" / name, directory / "tests" / name)
        for name, old, new in self.changes:
            path = directory / "diskchain" / name
            text = path.read_text()
            assert text.count(old) == 1, f"{name}: {old!r} stands there {text.count(old)} times"
            path.write_text(text.replace(old, new))
        return directory


ALL_IS_LARGE = Mutation((
    (
        "ops/caching.py",
        "CACHED_AT_MOST, AROUND_FROM, IN_PIECES_OF = 0.25, 1 * GiB, 1 * MiB",
        "CACHED_AT_MOST, AROUND_FROM, IN_PIECES_OF = 1.0, 0 * GiB, 0 * MiB",
    ),
))  # fmt: skip
"""Each commit of a first try goes around the page cache, as those of large layers that are not cached do."""
