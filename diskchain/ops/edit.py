"""rename, describe, protect: what changes only the catalog."""

from __future__ import annotations

from dataclasses import replace

from diskchain.chain.model import Snapshot, snapshot_name
from diskchain.errors import BadName
from diskchain.ops.vm import VM


def rename(vm: VM, name: str, new: str) -> Snapshot:
    """Give a snapshot another name; a kept present becomes an ordinary snapshot by it. Raise NotFound, BadName."""
    snapshot, new = vm.catalog.find(name), snapshot_name(new)
    if any(s.name == new and s.id != snapshot.id and not s.deleted for s in vm.catalog.snapshots.values()):
        raise BadName(f"{vm.name} has a snapshot {new!r} already", hint="choose another name")
    return _put(vm, replace(snapshot, name=new, automatic=False))


def describe(vm: VM, name: str, text: str) -> Snapshot:
    """Give a snapshot a description. Raise NotFound, BadName for more than 4000 characters."""
    if len(text) > 4000:
        raise BadName("a description has at most 4000 characters")
    return _put(vm, replace(vm.catalog.find(name), description=text.encode("utf-8", "replace").decode()))


def protect(vm: VM, name: str, on: bool) -> Snapshot:
    """Protect a snapshot against deletion, or let it go. Raise NotFound."""
    return _put(vm, replace(vm.catalog.find(name), protected=on))


def _put(vm: VM, snapshot: Snapshot) -> Snapshot:
    vm.save(vm.catalog.with_snapshot(snapshot))
    return snapshot
