"""host/cached on a real file: what the page cache holds of it, and what is read ahead."""

from __future__ import annotations

import os
from pathlib import Path

from diskchain.host.cached import cached_share, read_ahead
from tests.support.rig import MiB, wait_for


def not_cached(path: Path) -> Path:
    """Make a file of 32 MiB that is on the disk alone."""
    with path.open("wb") as opened:
        opened.write(os.urandom(32 * MiB))
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def test_all_none_or_half_of_a_file_is_cached(tmp_path: Path) -> None:
    """A file for each: what is looked at begins to be read."""
    all_of_it, none, half = (not_cached(tmp_path / name) for name in ("all", "none", "half"))
    all_of_it.read_bytes()
    with half.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        opened.read(16 * MiB)
    assert cached_share(all_of_it) == 1
    assert cached_share(none) <= 0.05
    assert 0.45 <= cached_share(half) <= 0.55


def test_what_is_read_ahead_is_cached_soon(tmp_path: Path) -> None:
    """Nothing waits for it."""
    file = not_cached(tmp_path / "file")
    read_ahead(file)
    wait_for(lambda: cached_share(file) == 1, "it is read", 20)


def test_what_cannot_be_asked_counts_as_cached(tmp_path: Path) -> None:
    """An empty file, one that is not there, one that tells nothing."""
    (tmp_path / "empty").touch()
    assert cached_share(tmp_path / "empty") == 1
    assert cached_share(tmp_path / "none") == 1
    assert cached_share(Path("/proc/self/status")) == 1
    read_ahead(tmp_path / "none")
