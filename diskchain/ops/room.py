"""Where there is room, when it is not where it is needed: the directories that are known, one for each filesystem."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from diskchain.chain.text import size
from diskchain.errors import DiskchainError
from diskchain.host import files
from diskchain.ops.vm import VM


def places(vm: VM, need: int) -> list[tuple[Path, int]]:
    """Return the known directories on other filesystems with so many bytes free, and how many are; the roomiest first.

    Known: the image roots of the configuration, and where layers of the VM lie already.
    """
    full = {_device(vm.home.disks_dir)}
    found: dict[int | None, tuple[Path, int]] = {}
    for directory in (*vm.config.image_roots, *sorted({i.path.parent for i in vm.catalog.images.values()})):
        device = _device(directory)
        if device is None or device in full or device in found or not os.access(directory, os.W_OK | os.X_OK):
            continue
        with contextlib.suppress(DiskchainError):
            free = files.free_bytes(directory)
            if free >= need:
                found[device] = (directory, free)
    return sorted(found.values(), key=lambda place: -place[1])


def _device(path: Path) -> int | None:
    try:
        return path.stat().st_dev
    except OSError:
        return None


def ways(vm: VM, need: int, command: str) -> str:
    """Return the rest of a hint: a command that ends in a directory, with every directory that it would fit."""
    fits = places(vm, need)
    if not fits:
        return ""
    others = "".join(f", or {path} ({size(free)} free)" for path, free in fits[1:3])
    return f"; or {command} {fits[0][0]} (needs {size(need)}, {size(fits[0][1])} free{others})"
