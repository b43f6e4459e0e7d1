"""host/cached on a real file: what the page cache holds of it; and what room there is."""

from __future__ import annotations

import os
from pathlib import Path

from diskchain.host.cached import cached_share, memory_to_spare
from tests.support.page_cache import on_the_disk_alone
from tests.support.rig import MiB


def test_all_none_or_half_of_a_file_is_cached(tmp_path: Path) -> None:
    """A file for each: what is looked at begins to be read."""
    all_of_it, none, half = (on_the_disk_alone(tmp_path / name) for name in ("all", "none", "half"))
    all_of_it.read_bytes()
    with half.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        opened.read(16 * MiB)
    assert cached_share(all_of_it) == 1
    assert cached_share(none) <= 0.05
    assert 0.45 <= cached_share(half) <= 0.55


def test_what_cannot_be_asked_counts_as_cached(tmp_path: Path) -> None:
    """An empty file, one that is not there, one that tells nothing."""
    (tmp_path / "empty").touch()
    assert cached_share(tmp_path / "empty") == 1
    assert cached_share(tmp_path / "none") == 1
    assert cached_share(Path("/proc/self/status")) == 1


def test_memory_to_spare_is_what_the_kernel_says() -> None:
    """More than nothing, less than there is."""
    assert MiB < memory_to_spare() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
