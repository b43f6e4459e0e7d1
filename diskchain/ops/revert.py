"""revert: back to a snapshot on new overlays; the present is kept as `before-revert-N` unless it is to be discarded.

-         lock; memory digest, fingerprints of every frozen image, files of the configuration   nothing changed
intent    journal; new empty overlays on F(S)                                        undo: resume or start again
stopped   vCPUs stopped, QEMU quit: the active layers themselves are F(keep)         undo: start the old definition
switched  catalog and definition name the new overlays                               redo while they are empty
loaded    memory loaded, VM paused; or started; or left off                          forward: counts as done
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diskchain.chain.model import Catalog, Image, Memory, Snapshot, snapshot_name
from diskchain.chain.plan import Plan
from diskchain.chain.text import size
from diskchain.drivers.protocol import Definition, VMState
from diskchain.errors import (
    BadName,
    ChainDamaged,
    DiskchainError,
    DriverFailed,
    HostileImage,
    NoSpace,
    NotFound,
    Refused,
    Unfinished,
)
from diskchain.host import files
from diskchain.host.fault import point
from diskchain.ops import layers, save_memory
from diskchain.ops.create import METADATA, remove_snapshot_dir
from diskchain.ops.progress import QUIET, Progress
from diskchain.ops.vm import VM, new_id, now_utc
from diskchain.store import journal, memory_file
from diskchain.store.journal import Entry


@dataclass(frozen=True)
class Request:
    """What was asked for. `power`: start, paused, stopped, or "" = as the snapshot was."""

    name: str
    keep_as: str = ""
    discard: bool = False
    keep_memory: bool = False
    cold: bool = False
    power: str = ""


@dataclass(frozen=True)
class Prepared:
    """What is decided before anything changes."""

    snapshot: Snapshot
    overlays: dict[str, Image]
    state: VMState
    keep: Snapshot | None
    with_memory: bool
    power: str  # running | paused | stopped
    definition: Definition
    plan: Plan
    changes: list[str]


@dataclass(frozen=True)
class Reverted:
    """What was done."""

    snapshot: Snapshot
    kept_as: str | None
    state: str
    config_changes: list[str]
    seconds: float


def undo_target(vm: VM) -> str:
    """Return the snapshot that `undo` goes back to. Raise NotFound when there is none."""
    left = vm.catalog.left
    if left is None or left not in vm.catalog.snapshots:
        raise NotFound(f"there is nothing to undo on {vm.name}",
                       hint="only a revert that kept the present can be undone; see: diskchain list")  # fmt: skip
    return vm.catalog.snapshots[left].name


async def prepare(vm: VM, request: Request) -> Prepared:
    """Look at everything that could stand in the way, and return what `revert` would do. Changes nothing.

    Raise NotFound, BadName, ChainDamaged, HostileImage, MemoryDamaged, Refused, NoSpace.
    """
    snapshot = vm.catalog.find(request.name)
    state = await vm.driver.state()
    with_memory = snapshot.memory.saved and not request.cold
    for image_id in snapshot.disks.values():
        await asyncio.to_thread(layers.verify_chain, vm.catalog, image_id)
    if not request.discard:
        await asyncio.to_thread(_verify_present, vm.catalog, snapshot.name)
    if state.is_off:
        layers.refuse_foreign_writers(vm.catalog)
    definition = read_definition(vm, snapshot)
    missing = vm.driver.missing_files(definition)
    if missing:
        raise Refused(f"the configuration of {snapshot.name!r} can't start: {'; '.join(missing)}",
                      hint="bring the files back")  # fmt: skip
    keep = None if request.discard else _keep(vm.catalog, request, state)
    overlays = layers.plan_overlays(vm.catalog, snapshot.disks)
    _check_space(vm, overlays, keep)
    power = request.power.replace("start", "running") or _usual_power(snapshot, with_memory, state)
    changes = vm.driver.differences(vm.driver.definition(), definition)
    plan = _plan(vm, snapshot, state, keep, with_memory, power, changes)
    return Prepared(snapshot, overlays, state, keep, with_memory, power, definition, plan, changes)


def _verify_present(catalog: Catalog, going_to: str) -> None:
    """The present can be kept only while it is whole. Raise ChainDamaged, HostileImage with the way out."""
    try:
        layers.verify_active(catalog)
    except (ChainDamaged, HostileImage) as error:
        lost = f"diskchain revert --discard {catalog.name} {going_to}"
        raise type(error)(error.message, hint=f"bring the right file back; or give the present up: {lost}") from error


def read_definition(vm: VM, snapshot: Snapshot) -> Definition:
    """Return the configuration that a snapshot recorded. Raise ChainDamaged when it is gone."""
    path = vm.home.snapshot_dir(snapshot.id) / "machine.json"
    try:
        return Definition(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ChainDamaged(f"the configuration of snapshot {snapshot.name!r} can't be read: {path}",
                           hint="bring it back from a backup; its disks are listed in RECOVER.txt") from error  # fmt: skip


def _keep(catalog: Catalog, request: Request, state: VMState) -> Snapshot:
    names = {s.name for s in catalog.snapshots.values()}
    number = catalog.keeps + 1
    while not request.keep_as and f"before-revert-{number}" in names:
        number += 1
    name = snapshot_name(request.keep_as) if request.keep_as else f"before-revert-{number}"
    if name in names:
        raise BadName(f"{catalog.name} has a snapshot {name!r} already", hint="choose another --keep-as")
    memory = Memory("saving") if request.keep_memory and not state.is_off else Memory()
    return Snapshot(
        id=new_id(), name=name, created=now_utc(), parent=catalog.current, disks=dict(catalog.active),
        description=f"the present before going back to {request.name}", automatic=not request.keep_as,
        consistency="off" if state.is_off else "crash", was=state.value, by=getpass.getuser(), memory=memory,
    )  # fmt: skip


def _check_space(vm: VM, overlays: dict[str, Image], keep: Snapshot | None) -> None:
    need = METADATA * len(overlays)
    if keep and keep.memory.status == "saving":
        need += save_memory.space_for(vm.driver.memory_bytes())
    free = files.free_bytes(vm.home.path)
    if free < need:
        raise NoSpace(f"{size(need)} are needed beside the disks of {vm.name}, {size(free)} are free",
                      hint="free space" + (", or leave --keep-memory away" if need > 1 << 30 else ""))  # fmt: skip


def _usual_power(snapshot: Snapshot, with_memory: bool, state: VMState) -> str:
    if with_memory:
        return "paused" if snapshot.was == "paused" else "running"
    return {VMState.STOPPED: "stopped", VMState.PAUSED: "paused"}.get(state, "running")


def _plan(vm: VM, snapshot: Snapshot, state: VMState, keep: Snapshot | None, with_memory: bool, power: str,
          changes: list[str]) -> Plan:  # fmt: skip
    source = f"memory of {snapshot.created}" if with_memory else "its disks" if power != "stopped" else ""
    steps = [f"{state.value}" + (" -> stopped (not shut down)" if not state.is_off else "") + f" -> {power}"
             + (f" from {source}" if source else "")]  # fmt: skip
    lost = []
    written = sum(_allocated(vm.catalog.images[i].path) for i in vm.catalog.active.values())
    if keep is None:
        lost.append(f"the present ({size(written)} of writes) is discarded")
    elif keep.memory.status == "saving":
        steps.append(f"the present is kept as {keep.name}, with its memory")
    else:
        steps.append(f"the present ({size(written)} of writes since) is kept as {keep.name}, disk only, 0 extra bytes")
        if not state.is_off:
            lost.append("the programs that run now (the kept present is like after a power cut)")
    if changes:
        steps.append("configuration goes back: " + "; ".join(changes))
    return Plan(f"{vm.name}: revert to {snapshot.name!r}", tuple(steps), space_needed=METADATA * len(snapshot.disks),
                downtime_estimate_s=2.0 if not state.is_off else 0.0, lost=tuple(lost),
                point_of_no_return="when the VM runs on the new overlays")  # fmt: skip


def _allocated(path: Path) -> int:
    """What a layer takes; nothing when it is gone (a lost present can be left with --discard)."""
    try:
        return files.allocated_bytes(path)
    except NotFound:
        return 0


async def revert(vm: VM, request: Request, progress: Progress = QUIET) -> Reverted:
    """Go back to a snapshot. The VM's lock is held, its journal is empty. Raise as `prepare`.

    When the memory can't be loaded, everything is put back (a VM that ran is started again from its disks).
    """
    began = time.monotonic()
    prepared = await prepare(vm, request)
    with _verified_memory(vm, prepared) as memory:
        entry = journal.begin(vm.home, "revert", new_id(), now_utc(), _journal_data(vm, prepared))
        try:
            await layers.make_overlays(vm.catalog, prepared.overlays)
            await _stop(vm, entry, prepared.keep, progress)
        except (DiskchainError, OSError, asyncio.CancelledError):
            await undo(vm, entry)
            raise
        entry.advance("switched")
        await _switch(vm, entry)
        await _load(vm, entry, memory)
    await finish(vm, entry)
    final = await vm.driver.state()
    return Reverted(prepared.snapshot, prepared.keep.name if prepared.keep else None, final.value, prepared.changes,
                    round(time.monotonic() - began, 3))  # fmt: skip


@contextlib.contextmanager
def _verified_memory(vm: VM, prepared: Prepared) -> Iterator[int | None]:
    if not prepared.with_memory:
        yield None
        return
    fd = open_memory(vm, prepared.snapshot)
    try:
        yield fd
    finally:
        os.close(fd)


def open_memory(vm: VM, snapshot: Snapshot) -> int:
    """Return a descriptor of a snapshot's verified memory, placed at the stream. Raise MemoryDamaged."""
    return memory_file.open_verified(vm.home.memory(snapshot.id), snapshot.memory.bytes, snapshot.memory.sha256)


def _journal_data(vm: VM, prepared: Prepared) -> dict[str, Any]:
    old = vm.driver.definition()
    return {
        "snapshot": prepared.snapshot.id,
        "name": prepared.snapshot.name,
        "keep": asdict(prepared.keep) if prepared.keep else None,
        "before": {"active": dict(vm.catalog.active), "current": vm.catalog.current, "left": vm.catalog.left,
                   "keeps": vm.catalog.keeps, "definition": asdict(old)},
        "definition": asdict(prepared.definition),
        "overlays": {t: {"id": i.id, "path": str(i.path), "on": i.backing, "size": i.virtual_size}
                     for t, i in prepared.overlays.items()},
        "was": prepared.state.value,
        "with_memory": prepared.with_memory,
        "power": prepared.power,
    }  # fmt: skip


async def _stop(vm: VM, entry: Entry, keep: Snapshot | None, progress: Progress) -> None:
    """Stop the VM where it stands; with its memory if that was asked for."""
    if keep is not None:
        directory = vm.home.snapshot_dir(keep.id)
        with files.os_errors(directory, "create"):
            directory.mkdir(mode=0o700)
        definition = await vm.driver.live_definition()
        files.write_durably(directory / "machine.json", json.dumps(asdict(definition)).encode())
        files.fsync_dir(directory.parent)
        if keep.memory.status == "saving":
            memory = await _save_while_stopped(vm, keep, progress)
            entry.data["keep"]["memory"] = asdict(memory)
            entry.data["keep"]["consistency"] = "memory"
    point("revert.stopping")
    await vm.driver.quit()
    entry.advance("stopped")


async def _save_while_stopped(vm: VM, keep: Snapshot, progress: Progress) -> Memory:
    began = time.monotonic()
    ram = vm.driver.memory_bytes()
    xml = save_memory.domain_xml(vm.name, vm.driver.uuid, ram, 1)
    fd = await save_memory.make_file(vm.home, keep.id, xml, ram, was_running=keep.was == "running")
    try:
        await vm.driver.prepare_memory_save(fd, background=False)
        await vm.driver.pause()
        await vm.driver.start_memory_save(background=False)
        progress.begin("saving memory", ram)
        while (now := await vm.driver.save_progress()).status == "running":
            progress.update(now.done)
            await asyncio.sleep(0.05)
        progress.end()
        if now.status != "completed":
            raise DriverFailed(
                f"the memory of the present could not be saved: {now.error}", hint="leave --keep-memory away"
            )
    finally:
        os.close(fd)
    return await save_memory.seal(vm.home, keep.id, time.monotonic() - began)


def _overlays(vm: VM, entry: Entry) -> dict[str, Image]:
    return {
        t: Image(o["id"], vm.home.disks_dir / o["path"], "qcow2", t, o["size"], o["on"], ours=True)
        for t, o in entry.data["overlays"].items()
    }


async def _switch(vm: VM, entry: Entry) -> None:
    """Let catalog and definition name the new overlays. Can be repeated."""
    catalog, before = vm.catalog, entry.data["before"]
    keep = entry.data["keep"]
    left = None
    if keep:
        snapshot = Snapshot(**{**keep, "memory": Memory(**keep["memory"]), "partial": tuple(keep["partial"])})
        catalog = layers.freeze(catalog.with_snapshot(snapshot), snapshot.disks.values())
        left = snapshot.id
    catalog = catalog.switched_to(_overlays(vm, entry), entry.data["snapshot"])
    active = {t: i for t, i in catalog.active.items() if t in entry.data["overlays"]}
    counted = before["keeps"] + (1 if keep and keep["automatic"] else 0)
    vm.save(replace(catalog, active=active, left=left, keeps=counted))
    point("revert.catalog")
    await vm.driver.define(Definition(**entry.data["definition"]), vm.catalog.active_chains())


async def _load(vm: VM, entry: Entry, memory: int | None) -> None:
    """Start the VM on the new overlays as the plan says; when it does not start, put everything back."""
    try:
        if memory is not None and entry.data["power"] != "stopped":
            definition = Definition(**entry.data["definition"])
            await vm.driver.start_from_memory(definition, vm.catalog.active_chains(), memory)
        elif entry.data["power"] != "stopped":
            await vm.driver.start(vm.catalog.active_chains(), paused=True)
    except DriverFailed as error:
        await undo(vm, entry)
        raise DriverFailed(f"{error.message}; everything was put back", hint=error.hint) from error
    entry.advance("loaded")
    if entry.data["power"] == "running":
        await vm.driver.resume()
    point("revert.resumed")


async def finish(vm: VM, entry: Entry) -> None:
    """From `loaded` to the end: what was discarded is put away. Can be repeated."""
    if entry.data["keep"] is None:
        ids = _discarded(vm.catalog, entry)
        paths = [vm.catalog.images[i].path for i in ids if i in vm.catalog.images]
        entry.note(trash=[str(p) for p in paths] or entry.data.get("trash", []))
        layers.to_trash(paths)
        vm.save(vm.catalog.without_images(ids))
        await layers.empty_trash([vm.home.disks_dir / p for p in entry.data["trash"]])
    entry.close()


def _discarded(catalog: Catalog, entry: Entry) -> list[str]:
    """Return the former active layers that we made and that nothing stands on."""
    return [
        i
        for i in entry.data["before"]["active"].values()
        if i in catalog.images
        and catalog.images[i].ours
        and not catalog.overlays_on(i)
        and catalog.frozen_by(i) is None
        and i not in catalog.active.values()
    ]


async def resume_load(vm: VM, entry: Entry) -> str:
    """Recovery from `switched`: finish the revert; return in words what was done."""
    await _switch(vm, entry)
    untouched = all(layers.is_empty(i.path) for i in _overlays(vm, entry).values())
    state = await vm.driver.state()
    if not state.is_off and untouched and state is not VMState.RUNNING:
        await vm.driver.kill()  # it may have been loading its memory when we died
        state = VMState.STOPPED
    if state.is_off and untouched:
        snapshot = vm.catalog.snapshots[entry.data["snapshot"]]
        memory = open_memory(vm, snapshot) if entry.data["with_memory"] else None
        try:
            await _load(vm, entry, memory)
        finally:
            if memory is not None:
                os.close(memory)
    await finish(vm, entry)
    return "finished"


async def undo(vm: VM, entry: Entry) -> None:
    """Take back a revert whose new overlays hold no data: old catalog, old definition, and a VM that ran runs again."""
    overlays, before = _overlays(vm, entry), entry.data["before"]
    if entry.state in ("switched", "loaded"):
        if not all(layers.is_empty(i.path) for i in overlays.values()):
            raise Unfinished("the VM wrote to the reverted disks already; the revert can't be taken back that way",
                             hint=f"diskchain recover {vm.name} --finish, then: diskchain undo {vm.name}")  # fmt: skip
        await vm.driver.kill()
    vm.reload()
    keep = entry.data["keep"]
    snapshots = {k: s for k, s in vm.catalog.snapshots.items() if not keep or k != keep["id"]}
    catalog = replace(vm.catalog.without_images([i.id for i in overlays.values()]), snapshots=snapshots,
                      active=before["active"], current=before["current"], left=before["left"],
                      keeps=before["keeps"])  # fmt: skip
    catalog = catalog.with_images(replace(catalog.images[i], fingerprint=None) for i in before["active"].values())
    await vm.driver.define(Definition(**before["definition"]), catalog.active_chains())
    vm.save(catalog)
    for image in overlays.values():
        files.unlink_durably(image.path)
    if keep:
        remove_snapshot_dir(vm, keep["id"])
    await _power_as_before(vm, entry.data["was"])
    entry.close()


async def _power_as_before(vm: VM, was: str) -> None:
    state = await vm.driver.state()
    if state.is_off and was in ("running", "paused"):
        await vm.driver.start(vm.catalog.active_chains(), paused=was == "paused")
    elif was == "running" and state is VMState.PAUSED:
        await vm.driver.resume()
