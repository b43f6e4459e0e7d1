"""How much room is needed where; and where there is some, when it is not there: the known directories, one for each filesystem."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from diskchain.chain.plan import Need
from diskchain.chain.text import size
from diskchain.errors import DiskchainError
from diskchain.host import files
from diskchain.ops.directories import below
from diskchain.ops.vm import VM


def needs(wanted: Iterable[tuple[Path, int]]) -> tuple[Need, ...]:
    """Given directories and the bytes that are needed there at most, return the sum for each filesystem, and what is free."""
    found: dict[int | None, Need] = {}
    for directory, count in ((d, c) for d, c in wanted if c):
        device = _device(directory)
        if device in found:
            found[device] = replace(found[device], bytes=found[device].bytes + count)
        elif device is not None:
            found[device] = Need(str(directory), count, files.free_bytes(directory))
    return tuple(found.values())


def places(vm: VM, need: int) -> list[tuple[Path, int]]:
    """Return the known directories on other filesystems with so many bytes free, and how many are; the roomiest first.

    Known: the image roots of the configuration, volumes that are mounted in them, and where layers of the VM lie already.
    """
    full = {_device(vm.home.disks_dir)}
    found: dict[int | None, tuple[Path, int]] = {}
    for directory in (*_roots(vm.config.image_roots), *sorted({i.path.parent for i in vm.catalog.images.values()})):
        device = _device(directory)
        if device is None or device in full or device in found or not os.access(directory, os.W_OK | os.X_OK):
            continue
        with contextlib.suppress(DiskchainError):
            free = files.free_bytes(directory)
            if free >= need:
                found[device] = (directory, free)
    return sorted(found.values(), key=lambda place: -place[1])


def _roots(roots: Iterable[Path]) -> Iterator[Path]:
    for root in roots:
        inside = (path for path in below(root, 1) if path != root and path.is_relative_to(root))
        yield from sorted(path for path in inside if path.is_mount())
        yield root


def _device(path: Path) -> int | None:
    try:
        return path.stat().st_dev
    except OSError:
        return None


def ways(vm: VM, wanted: Sequence[tuple[str, int]]) -> str:
    """Return the rest of a hint: commands that end in a directory, each with the roomiest that it would fit and its need.

    `wanted`: a command, and the bytes that it needs there at most.
    """
    found = [(command, need, fits[0]) for command, need in wanted if (fits := places(vm, need))]
    text = "".join(
        f"; or {command} {path} (needs {size(need)}, {size(free)} free)" for command, need, (path, free) in found
    )
    used = {path for _, _, (path, _) in found}
    others = [
        f"{path} {size(free)}" for path, free in places(vm, min((n for _, n in wanted), default=0)) if path not in used
    ]
    return text + (f"; also free: {', '.join(others)}" if others else "")
