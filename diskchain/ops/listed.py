"""Which of our snapshots libvirt's own list is to have (see register.py), as values."""

from __future__ import annotations

from datetime import datetime

from diskchain.chain.model import Catalog, Snapshot
from diskchain.drivers.domains import Domain
from diskchain.drivers.protocol import Listed
from diskchain.ops.definitions import definition_at
from diskchain.store.catalog import Home, restore_overlay


def uses(catalog: Catalog) -> bool:
    """Whether any of the VM's snapshots stands in libvirt's list."""
    return any(s.registered for s in catalog.snapshots.values())


def of_others(domain: Domain, catalog: Catalog) -> list[tuple[str, int]]:
    """Return the snapshots in libvirt's list that are not ours: names and times, oldest first."""
    ours = {s.name for s in catalog.visible() if s.registered}
    return [each for each in domain.snapshots if each[0] not in ours]


def wanted(catalog: Catalog, home: Home) -> list[Listed]:
    """Return what libvirt's list is to have of this VM, parents first. Raise ChainDamaged for a lost configuration."""
    listed = {s.id: s for s in catalog.visible() if s.registered}
    ordered = sorted(listed.values(), key=lambda s: len(list(catalog.line(s.id))))
    return [_listed(catalog, home, s, _ancestor(catalog, s.parent, listed)) for s in ordered]


def _ancestor(catalog: Catalog, parent: str | None, listed: dict[str, Snapshot]) -> Snapshot | None:
    return next((s for s in catalog.line(parent) if s.id in listed), None)


def _listed(catalog: Catalog, home: Home, snapshot: Snapshot, parent: Snapshot | None) -> Listed:
    files = {}
    for target, frozen in snapshot.disks.items():
        image = catalog.images[frozen]
        above = [overlay.path for overlay in catalog.overlays_on(frozen)]
        # libvirt wants the name of a layer on top; where none is, that of the one that RECOVER.txt would make
        files[target] = (image, above[0] if above else restore_overlay(image.path, target, snapshot.id))
    memory = home.memory(snapshot.id) if snapshot.memory.saved else None
    return Listed(
        snapshot.id, snapshot.name, snapshot.description, int(datetime.fromisoformat(snapshot.created).timestamp()),
        parent.name if parent else None, definition_at(home, snapshot), files, memory, snapshot.was,
        current=_is_current(catalog, snapshot),
    )  # fmt: skip


def _is_current(catalog: Catalog, snapshot: Snapshot) -> bool:
    return next((s.id for s in catalog.line(catalog.current) if s.registered and not s.deleted), None) == snapshot.id
