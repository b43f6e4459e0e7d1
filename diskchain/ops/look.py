"""Look, and change nothing: what list, tree, show and machine list say, gathered from the records and the files."""

from __future__ import annotations

import calendar
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from diskchain.chain.allocation import hidden_bytes
from diskchain.chain.model import Catalog, Image, Snapshot
from diskchain.chain.plan import Plan
from diskchain.chain.text import counted, size
from diskchain.config import load_config
from diskchain.drivers import domain_xml
from diskchain.drivers.domains import choose_uri
from diskchain.drivers.machines import Registered
from diskchain.errors import DiskchainError, DriverFailed
from diskchain.host import files, locks
from diskchain.ops import roles
from diskchain.ops.allocation import allocated, raw_extents
from diskchain.ops.machine import parse
from diskchain.ops.places import LIBVIRT
from diskchain.ops.vm import VM, Host
from diskchain.store import catalog as catalog_store
from diskchain.store import journal
from diskchain.store.catalog import Home

OLD_AFTER_DAYS = 14
MERGE_RATE = 200 << 20  # bytes a second, for a rough word on how long a merge takes


@dataclass(frozen=True)
class SnapshotView:
    """A snapshot with what the files say. `frees`: what a delete gives back, None when the files can't tell."""

    snapshot: Snapshot
    parent: str | None
    disks: list[dict[str, str | None]]
    disk_bytes: int | None
    memory_bytes: int
    frees: int | None
    age_seconds: float | None
    current: bool
    warnings: list[str] = field(default_factory=list)

    @property
    def keeps(self) -> int:
        """Bytes that this snapshot's own layers and memory take."""
        return (self.disk_bytes or 0) + self.memory_bytes


@dataclass(frozen=True)
class PendingView:
    """A deleted snapshot whose merge is still to be done."""

    snapshot: Snapshot
    bytes: int
    age_seconds: float | None
    waits: bool = False  # several layers stand on its layer

    @property
    def memory_bytes(self) -> int:
        """Its saved memory, which is there until the merge."""
        return self.snapshot.memory.bytes if self.snapshot.memory.saved else 0

    @property
    def seconds(self) -> int:
        """About how long the merge takes."""
        return max(1, self.bytes // MERGE_RATE)


@dataclass(frozen=True)
class Listing:
    """All snapshots of a VM, oldest first, and the present."""

    vm: str
    state: str
    disks: int
    current: str | None
    snapshots: list[SnapshotView]
    pending: list[PendingView]
    now_bytes: int
    all_bytes: int
    layers: int
    unfinished: dict[str, str] | None = None  # an operation that was interrupted


async def listing(vm: VM) -> Listing:
    """Return what `list` and `tree` show."""
    state = await state_word(vm)
    return replace(gather(vm.catalog, vm.home, state, time.time()), unfinished=_interrupted(vm))


def _interrupted(vm: VM) -> dict[str, str] | None:
    """Return the operation that was interrupted; None when there is none, or somebody is at work on it."""
    if not journal.is_open(vm.home) or locks.holder_operation(vm.home.lock):
        return None
    try:
        entry = journal.open_entry(vm.home)
    except DiskchainError:
        return {"op": "unknown", "name": "", "state": "damaged"}
    return {"op": entry.op, "name": str(entry.data.get("name", "")), "state": entry.state} if entry else None


def gather(catalog: Catalog, home: Home, state: str, now: float) -> Listing:
    """Given a catalog, look at its files."""
    current = _visible_name(catalog, catalog.current)
    images = catalog.images.values()
    return Listing(
        vm=catalog.name, state=state, disks=len(catalog.active), current=current,
        snapshots=[view(catalog, home, s, now) for s in catalog.visible()],
        pending=[_pending_view(catalog, s, now) for s in catalog.pending()],
        now_bytes=sum(_allocated(catalog.images[i].path) or 0 for i in catalog.active.values()),
        all_bytes=sum(_allocated(image.path) or 0 for image in images), layers=len(images),
    )  # fmt: skip


async def state_word(vm: VM) -> str:
    """Return the VM's state in a word, `unknown` when it can't be asked."""
    try:
        return (await vm.driver.state()).value
    except DiskchainError:
        return "unknown"


def view(catalog: Catalog, home: Home, snapshot: Snapshot, now: float) -> SnapshotView:
    """Return a snapshot with what its files say."""
    sizes = [_allocated(catalog.images[i].path) for i in snapshot.disks.values()]
    disk_bytes = None if None in sizes else sum(s or 0 for s in sizes)
    memory = snapshot.memory.bytes if snapshot.memory.saved else 0
    old = age(snapshot.created, now)
    warnings = [f"older than {OLD_AFTER_DAYS}d"] if old is not None and old > OLD_AFTER_DAYS * 86400 else []
    warnings += ["expired"] if _is_past(snapshot.expires, now) else []
    if disk_bytes is None:
        warnings.insert(0, "a layer is missing")
    if memory and not home.memory(snapshot.id).exists():
        warnings.insert(0, "its memory file is missing")
    return SnapshotView(
        snapshot, _visible_name(catalog, snapshot.parent), _disks(catalog, snapshot), disk_bytes, memory,
        _frees(catalog, snapshot, memory), old, _visible_name(catalog, catalog.current) == snapshot.name, warnings,
    )  # fmt: skip


def _visible_name(catalog: Catalog, snapshot_id: str | None) -> str | None:
    """Return the name of the snapshot, or of its nearest ancestor that an admin sees."""
    for snapshot in catalog.line(snapshot_id):
        if not snapshot.deleted and not snapshot.creating:
            return snapshot.name
    return None


def _disks(catalog: Catalog, snapshot: Snapshot) -> list[dict[str, str | None]]:
    """For each disk the frozen image, and the overlay on it that leads to the present."""
    present = {image.id for chain in catalog.active_chains().values() for image in chain}
    return [
        {
            "target": target,
            "frozen": str(catalog.images[image_id].path),
            "active": next((str(o.path) for o in catalog.overlays_on(image_id) if o.id in present), None),
        }
        for target, image_id in snapshot.disks.items()
    ]


def _frees(catalog: Catalog, snapshot: Snapshot, memory: int) -> int | None:
    """Return the bytes that no other state reads: what a delete gives back. None when the files can't tell.

    Nothing stands on a layer: all of it. One overlay: what that overlay hides of it. Several: it stays.
    """
    total = memory
    try:
        for image_id in snapshot.disks.values():
            image, overlays = catalog.images[image_id], catalog.overlays_on(image_id)
            if not overlays:
                total += files.allocated_bytes(image.path) if image.ours else 0
            elif len(overlays) == 1:
                below = raw_extents(image.path) if image.fmt == "raw" else allocated(image.path)
                total += hidden_bytes(below, allocated(overlays[0].path))
    except DiskchainError:
        return None
    return total


def _pending_view(catalog: Catalog, snapshot: Snapshot, now: float) -> PendingView:
    waits = catalog.is_fork(snapshot)
    size = sum(_allocated(catalog.images[i].path) or 0 for i in snapshot.disks.values())
    return PendingView(snapshot, size if waits else _to_merge(catalog, snapshot), age(snapshot.created, now), waits)


def to_merge(catalog: Catalog, snapshots: Iterable[Snapshot]) -> int:
    """Return the bytes that are to be merged of deleted snapshots, as far as it can be."""
    return sum(_to_merge(catalog, s) for s in snapshots if not catalog.is_fork(s))


def _to_merge(catalog: Catalog, snapshot: Snapshot) -> int:
    tops = [o for image_id in snapshot.disks.values() for o in catalog.overlays_on(image_id)]
    return sum(_allocated(o.path) or 0 for o in tops)


def _allocated(path: Path) -> int | None:
    try:
        return files.allocated_bytes(path)
    except DiskchainError:
        return None


def age(created: str, now: float) -> float | None:
    """Given an ISO 8601 UTC time, return the seconds since then; None when it can't be read."""
    try:
        return max(0.0, now - calendar.timegm(time.strptime(created, "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return None


def _is_past(moment: str, now: float) -> bool:
    return bool(moment) and (age(moment, now) or 0.0) > 0


def expired(catalog: Catalog, now: float) -> list[str]:
    """Return the snapshots that were to be kept until a moment that is past (create --expires)."""
    return [s.name for s in catalog.visible() if _is_past(s.expires, now)]


# -- as JSON -----------------------------------------------------------------------------------------------------------


def snapshot_json(seen: SnapshotView) -> dict[str, Any]:
    """Return the keys that scripts rely on, of one snapshot."""
    s, memory = seen.snapshot, seen.snapshot.memory
    return {
        "id": s.id, "name": s.name, "created": s.created, "parent": seen.parent, "description": s.description,
        "state": s.state, "consistency": s.consistency, "partial": list(s.partial), "quiesced": s.quiesced,
        "unquiesced": s.unquiesced or None,
        "disks": seen.disks,
        "memory": {"status": memory.status, "bytes": memory.bytes, "sha256": memory.sha256 or None,
                   "seconds": memory.seconds, "reason": memory.reason or None},
        "captured": captured(s), "pause_ms": s.pause_ms,
        "was": s.was, "by": s.by, "protected": s.protected, "expires": s.expires or None, "automatic": s.automatic,
        "current": seen.current, "keeps": seen.keeps, "frees": seen.frees,
        "age_seconds": None if seen.age_seconds is None else int(seen.age_seconds), "warnings": seen.warnings,
    }  # fmt: skip


def captured(snapshot: Snapshot) -> list[str]:
    """Return what a snapshot holds of its VM."""
    return ["disks", "configuration", *snapshot.captured, *(["memory"] if snapshot.memory.saved else [])]


def listing_json(listing: Listing) -> dict[str, Any]:
    """Return the object that `list --json` prints."""
    return {**_listing_head(listing), "snapshots": [snapshot_json(v) for v in listing.snapshots]}


def tree_json(listing: Listing) -> dict[str, Any]:
    """Return the object that `tree --json` prints: children nested."""

    def below(parent: str | None) -> list[dict[str, Any]]:
        return [
            {**snapshot_json(v), "children": below(v.snapshot.name)} for v in listing.snapshots if v.parent == parent
        ]

    return {**_listing_head(listing), "snapshots": below(None)}


def _listing_head(listing: Listing) -> dict[str, Any]:
    return {
        "vm": listing.vm, "state": listing.state, "current": listing.current, "now": {"keeps": listing.now_bytes},
        "unfinished": listing.unfinished,
        "pending": [{"op": "wait" if p.waits else "merge", "snapshot": p.snapshot.name, "bytes": p.bytes,
                     "memory": p.memory_bytes}
                    for p in listing.pending],
    }  # fmt: skip


# -- one snapshot ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """All about one snapshot."""

    view: SnapshotView
    layers: list[dict[str, Any]]
    configuration: dict[str, Any]
    memory_file: str | None


def show(vm: VM, name: str) -> Shown:
    """Return all about a snapshot. Raise NotFound."""
    snapshot = vm.catalog.find(name)
    known = roles.of(vm.catalog, vm.registered)
    layers = [
        {**_layer(image, target), "role": known.get(target, "data")}
        for target, top in snapshot.disks.items()
        for image in vm.catalog.chain(top)
    ]
    memory = str(vm.home.memory(snapshot.id)) if snapshot.memory.saved else None
    return Shown(view(vm.catalog, vm.home, snapshot, time.time()), layers, _configuration(vm, snapshot), memory)


def _layer(image: Image, target: str) -> dict[str, Any]:
    return {"target": target, "path": str(image.path), "format": image.fmt, "bytes": _allocated(image.path),
            "virtual_size": image.virtual_size}  # fmt: skip


def _configuration(vm: VM, snapshot: Snapshot) -> dict[str, Any]:
    """Return the machine that the snapshot recorded; empty when it can't be read."""
    try:
        record = json.loads(vm.home.configuration(snapshot.id).read_bytes())
        text = json.loads(record["text"])
        machine = domain_xml.summary(text["persistent"]) if record["driver"] == LIBVIRT else text["machine"]
    except (OSError, ValueError, KeyError, TypeError, DriverFailed):
        return {}
    return machine if isinstance(machine, dict) else {}


def show_json(vm: VM, shown: Shown) -> dict[str, Any]:
    """Return the object that `show --json` prints."""
    body = {**snapshot_json(shown.view), "layers": shown.layers, "memory_file": shown.memory_file,
            "configuration": shown.configuration}  # fmt: skip
    return {"vm": vm.name, "snapshot": body}


# -- machines ----------------------------------------------------------------------------------------------------------


async def machines(host: Host) -> list[dict[str, Any]]:
    """Return what `machine list` shows, one machine after the other; a damaged one with what is known of it."""
    found = []
    for name in host.machines.names():
        try:
            found.append(await _machine(host, host.machines.get(name)))
        except DiskchainError:
            unknown = ("uuid", "memory", "cpus", "firmware", "tpm", "home", "console", "snapshots")
            found.append({"name": name, "state": "damaged", "disks": [], "macs": [], **dict.fromkeys(unknown)})
    return found


async def _machine(host: Host, registered: Registered) -> dict[str, Any]:
    machine = registered.machine
    catalog: Catalog | None = None
    state = "unknown"
    try:
        async with host.look(machine.name) as vm:
            catalog, state = vm.catalog, await state_word(vm)
    except DiskchainError:
        pass
    return {
        "name": machine.name, "uuid": machine.uuid, "state": state, "memory": machine.memory, "cpus": machine.cpus,
        "firmware": machine.firmware, "tpm": machine.tpm,
        "disks": [_disk(asdict(d), catalog) for d in machine.disks], "macs": [n.mac for n in machine.nets],
        "home": str(registered.home), "console": str(registered.home / "console.log"),
        "snapshots": len(catalog.visible()) if catalog else None,
    }  # fmt: skip


def _disk(spec: dict[str, Any], catalog: Catalog | None) -> dict[str, Any]:
    target = str(spec["target"])
    chain = catalog.chain(catalog.active[target]) if catalog and target in catalog.active else []
    active, base = (str(chain[0].path), str(chain[-1].path)) if chain else (None, spec["image"])
    return {"target": target, "active": active, "base": base, "format": chain[0].fmt if chain else spec["fmt"],
            "role": spec["role"]}  # fmt: skip


def plan_define(file: Path) -> Plan:
    """Return what `machine define` would define, read from the file alone. Raise NotFound, BadMachineFile."""
    machine = parse(file)
    steps = [f"define it with {size(machine.memory)} of memory and {counted(machine.cpus, 'CPU')}"]
    steps += [f"firmware: {machine.firmware}"] if machine.firmware != "bios" else []
    steps += ["a TPM (swtpm)"] if machine.tpm else []
    steps += [f"{disk.target}: {file.parent / disk.image}" for disk in machine.disks]
    return Plan(f"{machine.name}: define", tuple(steps))


# -- small questions ---------------------------------------------------------------------------------------------------


def is_unfinished(vm: VM) -> bool:
    """Whether an operation on the VM is at work or was interrupted."""
    return journal.is_open(vm.home)


def open_operation(vm: VM) -> str | None:
    """Return the operation that is at work or was interrupted. Raise RecordDamaged."""
    entry = journal.open_entry(vm.home)
    return entry.op if entry else None


def saves_memory(vm: VM) -> bool:
    """Whether a create on the VM has come to the point where memory is being saved."""
    entry = journal.open_entry(vm.home)
    return entry is not None and entry.op == "create" and entry.state in ("saving", "saved")


def names_quietly() -> list[str]:
    """Return the names of all VMs, for completion: whatever goes wrong, no names."""
    try:
        return Host(load_config(), choose_uri(None)).names()
    except Exception:
        return []


def snapshot_names_quietly(vm: str, *, deleted: bool = False) -> list[str]:
    """Return the names of a VM's snapshots, or of those that are deleted and not merged yet, for completion."""
    try:
        home = Host(load_config(), choose_uri(None)).places.find(vm).home
        catalog = catalog_store.load(home) if home else None
        return [s.name for s in (catalog.pending() if deleted else catalog.visible())] if catalog else []
    except Exception:
        return []
