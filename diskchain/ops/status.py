"""status: one line a VM, and what an admin should look at. Quick: nothing is read but records, headers of files' sizes."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diskchain.chain.model import Catalog
from diskchain.chain.rules import (
    Finding,
    deep_chains,
    error,
    expired_snapshots,
    full_volume,
    info,
    memory_fits,
    old_snapshots,
)
from diskchain.drivers.protocol import VMState
from diskchain.errors import DiskchainError
from diskchain.host import files
from diskchain.ops import drift, roles
from diskchain.ops.look import age, expired
from diskchain.ops.looked import Look, look, room, stands_still
from diskchain.ops.save_memory import space_for
from diskchain.ops.vm import Host
from diskchain.store.catalog import Home


@dataclass(frozen=True)
class Status:
    """One VM. Numbers are None where they can't be read."""

    name: str
    state: str
    snapshots: int | None = None
    oldest_seconds: float | None = None
    depth: int | None = None
    used: int | None = None
    pending: int | None = None
    free: int | None = None
    volume: Path | None = None  # a directory on the volume with the least space
    volume_size: int | None = None
    findings: list[Finding] = field(default_factory=list)
    driver: str = "qemu"
    roles: dict[str, str] = field(default_factory=dict)  # by target: os | data

    def to_json(self) -> dict[str, Any]:
        """Return the keys that scripts rely on."""
        oldest = None if self.oldest_seconds is None else int(self.oldest_seconds)
        return {"name": self.name, "driver": self.driver, "roles": self.roles, "state": self.state, "snapshots": self.snapshots,
                "oldest_seconds": oldest, "depth": self.depth, "used": self.used, "pending": self.pending,
                "free": self.free, "volume": str(self.volume) if self.volume else None, "volume_size": self.volume_size,
                "findings": [f.to_json() for f in self.findings]}  # fmt: skip


async def status(host: Host, name: str) -> Status:
    """Return how a VM is. Raise NotFound."""
    seen = await look(host, name)
    found = list(seen.findings)
    found += stands_still(seen)
    kind = seen.place.kind if seen.place else "qemu"
    if seen.catalog is None:
        return Status(seen.name, _word(seen), findings=found, driver=kind)
    return replace(_of_catalog(seen, seen.catalog, found), driver=kind, roles=roles.of(seen.catalog, seen.registered))


def _word(seen: Look) -> str:
    if seen.place is None or (seen.catalog is None and seen.state in (None, VMState.STOPPED)):
        return "damaged"
    return seen.state.value if seen.state else "unknown"


def _of_catalog(seen: Look, catalog: Catalog, found: list[Finding]) -> Status:
    first = catalog.images[next(iter(catalog.active.values()))].path
    home = seen.home or Home.beside(first, catalog.uuid)
    now = time.time()
    ages = [(s.name, a) for s in catalog.visible() if (a := age(s.created, now)) is not None]
    depth = max((len(chain) for chain in catalog.active_chains().values()), default=0)
    volumes = _volumes(catalog, home)
    found += _missing(catalog)
    if seen.domain and not seen.in_flight:
        found += drift.of_domain(seen.domain, catalog, known=seen.home is not None)
    found += old_snapshots(seen.name, ages)
    found += expired_snapshots(seen.name, expired(catalog, now))
    found += deep_chains(seen.name, depth)
    for path, space in volumes.items():
        found += full_volume(seen.name, path, *space)
    if (
        seen.state in (VMState.RUNNING, VMState.PAUSED, VMState.STOPPED)
        and (free_beside := room(home.disks_dir)) is not None
    ):
        found += memory_fits(seen.name, home.disks_dir, free_beside, space_for(seen.memory_bytes))
    tightest = min(volumes, key=lambda path: volumes[path][0], default=None)
    free, total = volumes[tightest] if tightest else (0, 0)
    ready = [s for s in catalog.pending() if not catalog.is_fork(s)]
    pending = [o.path for s in ready for i in s.disks.values() for o in catalog.overlays_on(i)]
    if pending:
        found.append(info("pending-merge", seen.name, f"{len(ready)} deleted, to be merged",
                          f"diskchain merge {seen.name} (when it is off)"))  # fmt: skip
    return Status(
        seen.name, _word(seen) if not seen.busy else f"{_word(seen)} ({seen.busy.split()[0]})", len(catalog.visible()),
        max((a for _, a in ages), default=None), depth, _used(catalog, home), sum(map(_taken, pending)),
        free, tightest, total, found,
    )  # fmt: skip


def _missing(catalog: Catalog) -> list[Finding]:
    return [
        error("layer-missing", f"{i.target} {i.path}", "the file is not there; every state above it needs it",
              f"bring {i.path.name} back to {i.path.parent}")
        for i in catalog.images.values() if not i.path.exists()
    ]  # fmt: skip


def _used(catalog: Catalog, home: Home) -> int:
    memory = [home.memory(s.id) for s in catalog.snapshots.values() if s.memory.saved]
    return sum(_taken(path) for path in [*(i.path for i in catalog.images.values()), *memory])


def _taken(path: Path) -> int:
    try:
        return files.allocated_bytes(path)
    except DiskchainError:
        return 0


def _volumes(catalog: Catalog, home: Home) -> dict[Path, tuple[int, int]]:
    """Return free and whole size of each volume that the VM writes to, by one directory on it."""
    found: dict[int, tuple[Path, tuple[int, int]]] = {}
    active = [catalog.images[i].path.parent for i in catalog.active.values()]
    for directory in dict.fromkeys([*active, home.disks_dir]):
        with contextlib.suppress(OSError):
            data = os.statvfs(directory)
            numbers = (data.f_bavail * data.f_frsize, data.f_blocks * data.f_frsize)
            found.setdefault(directory.stat().st_dev, (directory, numbers))
    return dict(found.values())
