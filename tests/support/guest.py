"""Where the micro guest is. scripts/make-guest builds it; fixtures/guest/init says what it can do."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def guest_files() -> tuple[Path, Path]:
    """Return the paths of vmlinuz and initrd.gz. Raise FileNotFoundError if the guest has not been built."""
    directory = ROOT / os.environ.get("DISKCHAIN_GUEST_DIR", ".cache/guest")
    files = directory / "vmlinuz", directory / "initrd.gz"
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: run scripts/make-guest first")
    return files
