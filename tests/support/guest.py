"""Where the micro guest is. scripts/make-guest builds it; fixtures/guest/init says what it can do."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def debian_disk() -> Path:
    """Return the disk of a real Debian (scripts/make-debian-guest). Raise FileNotFoundError if it has not been built."""
    disk = ROOT / os.environ.get("DISKCHAIN_DEBIAN_DIR", ".cache/debian-guest") / "debian.qcow2"
    if not disk.is_file():
        raise FileNotFoundError(f"{disk} is missing: run scripts/make-debian-guest first")
    return disk


def guest_files(*, agent: bool = False) -> tuple[Path, Path]:
    """Return the paths of vmlinuz and initrd.gz (with the guest agent: initrd-agent.gz).

    Raise FileNotFoundError if the guest has not been built."""
    directory = ROOT / os.environ.get("DISKCHAIN_GUEST_DIR", ".cache/guest")
    files = directory / "vmlinuz", directory / ("initrd-agent.gz" if agent else "initrd.gz")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: run scripts/make-guest first")
    return files
