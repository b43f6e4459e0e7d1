"""create: pause, an overlay for every disk in one transaction, resume; memory is saved while the guest runs.

-         lock; chain healthy; name free; space; background save probed               recover: nothing changed
intent    journal; memory file and overlays made, verified, synced                     undo: unlink ours
prepared  the catalog names the overlays (empty ones read the same); watchdog ready    ask QEMU: all-old = undo
(pause)   freeze if asked for; stop, one transaction, capture memory, resume: nothing  QEMU gone = forward
          else is in the pause; thaw                                                   what is frozen is thawed
switched  disks are done; the guest runs                                               redo
saving    memory goes to `.part`                                                       still in QEMU: finish it
saved     sealed, renamed, catalog; journal removed last                               redo
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diskchain.chain.model import Catalog, Image, Memory, MiB, Snapshot, snapshot_name
from diskchain.chain.plan import Plan
from diskchain.chain.text import size
from diskchain.drivers.protocol import VMState
from diskchain.errors import (
    BadName,
    ChainDamaged,
    DiskchainError,
    MemoryNotSaved,
    NoSpace,
    NotFound,
    Refused,
    UnsupportedDisk,
)
from diskchain.host import files
from diskchain.host.fault import point
from diskchain.host.process import uninterrupted
from diskchain.ops import create_pause, flat_pause, layers, register, room, save_memory, state_files
from diskchain.ops.create_rest import align, note_frozen, resolve_prepared, undo, wait_for_stray_save
from diskchain.ops.progress import QUIET, Progress
from diskchain.ops.quiesce import Freeze, noted, refuse_without_agent
from diskchain.ops.vm import VM, definition_at, new_id, now_utc, record_configuration
from diskchain.ops.written import directory_for_layers
from diskchain.store import journal
from diskchain.store.journal import Entry

METADATA = 4 * MiB  # an empty overlay and its first tables


@dataclass(frozen=True)
class Request:
    """What was asked for. `memory`: auto, always, background, paused or never."""

    name: str = ""
    description: str = ""
    memory: str = "auto"
    max_pause: float = 0.5
    skip: tuple[str, ...] = ()  # targets that the snapshot does not cover; it has no memory then
    quiesce: bool = False
    register: bool = False  # libvirt is to list it too
    expires: float | None = None  # seconds until it is warned of
    overlay_dir: Path | None = None  # where the new layers are made; else beside what they stand on


@dataclass(frozen=True)
class Prepared:
    """What is decided before anything changes."""

    snapshot: Snapshot
    overlays: Mapping[str, Image]
    state: VMState
    save: str  # never | background | paused
    plan: Plan
    quiesce: bool = False
    devices: tuple[str, ...] = ()  # that the memory will be saved with


async def prepare(vm: VM, request: Request) -> Prepared:
    """Look at everything that could stand in the way, and return what `create` would do. Changes nothing.

    Raise BadName, ChainDamaged, HostileImage, NoSpace, MemoryNotSaved, Refused.
    """
    state = await vm.driver.state()
    if state in (VMState.CRITICAL, VMState.CRASHED):
        raise Refused(f"{vm.name} is {state.value}; a snapshot of it would be of no use",
                      hint=f"put right what stopped it, then: diskchain resume {vm.name}")  # fmt: skip
    if state is VMState.PAUSED and await vm.driver.stopped_by_save():
        raise Refused(f"{vm.name} was left paused by a save of its memory; it does not hold its disks",
                      hint=f"diskchain recover {vm.name}")  # fmt: skip
    await vm.driver.refuse("create")
    vm.refresh()
    await _refuse_unsuitable(vm, request.skip)
    name = _free_name(vm.catalog, request.name)
    if request.register:
        register.refuse_bad(vm, name)
    covered = _covered(vm.catalog, request.skip, [disk.target for disk in await vm.driver.unsuitable()])
    for image_id in covered.values():
        await asyncio.to_thread(layers.verify_chain, vm.catalog, image_id)
    await vm.verify_definition()
    if state.is_off:
        layers.refuse_foreign_writers(vm.catalog)
    else:
        await vm.verify_running()
    await vm.driver.check_files([vm.catalog.images[i].path for i in covered.values()], written=False)
    quiesce = request.quiesce and not state.is_off
    if quiesce:
        await refuse_without_agent(vm, state)
    overlays = layers.plan_overlays(
        vm.catalog, covered, request.overlay_dir and directory_for_layers(request.overlay_dir)
    )
    save = "never" if request.skip else await _decide_memory(vm, request.memory, state)
    definition = await vm.driver.live_definition()
    state_files.check_can_capture(vm, definition, state, save)
    _check_space(vm, overlays, save)
    snapshot = Snapshot(
        id=new_id(), name=name, created=now_utc(), parent=vm.catalog.current, disks=covered,
        description=request.description, was=state.value, by=getpass.getuser(), creating=True,
        consistency="off" if state.is_off else "crash",
        memory=Memory("none" if save == "never" else "saving"), partial=request.skip,
        frozen=quiesce or vm.catalog.asleep, unquiesced="interrupted" if quiesce else "",
        registered=request.register or vm.lists_snapshots,
        expires="" if request.expires is None else now_utc(request.expires),
    )  # fmt: skip
    copied = [state_files.label(one.name) for one in state_files.present(vm, definition)]
    plan = _plan(vm, snapshot, overlays, state, save, quiesce, copied)
    plan = replace(plan, warnings=(*plan.warnings, *await vm.driver.remarks()))
    devices = await vm.driver.devices() if save != "never" else ()
    return Prepared(snapshot, overlays, state, save, plan, quiesce, tuple(devices))


async def create(vm: VM, request: Request, progress: Progress = QUIET) -> Snapshot:
    """Make a snapshot; return it as the catalog has it. The VM's lock is held, its journal is empty.

    Raise as `prepare`; DriverFailed when the hypervisor refused (everything was put back). When only the memory could
    not be saved, the snapshot is returned with `memory.status` "failed".
    """
    prepared = await prepare(vm, request)
    if request.quiesce and not prepared.quiesce:
        progress.warn(f"{vm.name} is off; there is nothing to freeze")
    if prepared.save == "paused":
        runs = prepared.state is VMState.RUNNING
        progress.warn(f"{vm.name} stands still until its memory is saved" if runs
                      else f"{vm.name} will run for about a millisecond when its memory is saved, then pause again")  # fmt: skip
    if prepared.snapshot.registered:
        progress.warn(f"{prepared.snapshot.name!r}: {register.WARNING}")
    await flat_pause.before(vm, prepared.save)
    vm.save(vm.catalog)  # with the disks that it has now
    entry = journal.begin(vm.home, "create", prepared.snapshot.id, now_utc(), _journal_data(vm, prepared))
    try:
        memory_fd, capture = await _make_files(vm, prepared)
        try:
            snapshot = await _switch(vm, entry, prepared, memory_fd, capture)
        finally:
            capture.close()
            if memory_fd is not None:
                os.close(memory_fd)
    except (DiskchainError, OSError, asyncio.CancelledError):
        snapshot_or_none = await _after_failure(vm, entry, progress)
        if snapshot_or_none is None:
            raise
        return snapshot_or_none
    _warn_of_pause(snapshot, request, progress)
    snapshot = await finish(vm, entry, snapshot, progress)
    await flat_pause.after(vm, prepared.save)
    return snapshot


async def _after_failure(vm: VM, entry: Entry, progress: Progress) -> Snapshot | None:
    """Something failed before `switched` was noted. Return the snapshot when the disks were switched all the same."""
    await vm.driver.refuse_elsewhere()
    if entry.state == "intent":
        await undo(vm, entry)
    elif entry.state == "prepared":
        outcome, _ = await resolve_prepared(vm, entry, progress)
        if outcome == "finished":
            return vm.catalog.snapshots[entry.data["snapshot"]]
    elif entry.state == "saving":
        save_memory.leave_to_finisher(vm)
    return None


def _free_name(catalog: Catalog, wanted: str) -> str:
    taken = {s.name for s in catalog.snapshots.values() if not s.deleted}
    if wanted:
        name = snapshot_name(wanted)
        if name in taken:
            raise BadName(f"{catalog.name} has a snapshot {name!r} already", hint="choose another name, or none")
        return name
    stem = time.strftime("%Y-%m-%d-%H%M%S")
    return next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, 10000))) if n not in taken)


async def _refuse_unsuitable(vm: VM, skip: tuple[str, ...]) -> None:
    """Raise UnsupportedDisk, naming what to use instead, for a disk that no snapshot covers and that was not skipped."""
    for disk in await vm.driver.unsuitable():
        if disk.target not in skip:
            raise UnsupportedDisk(f"{disk.target} of {vm.name} can't be in a snapshot: it is {disk.why}",
                                  hint=f"{disk.instead}; or leave it out: --skip-disk {disk.target}")  # fmt: skip


def _covered(catalog: Catalog, skip: tuple[str, ...], elsewhere: Collection[str] = ()) -> dict[str, str]:
    """Return what is frozen for each disk that is not skipped. Raise NotFound, Refused."""
    for target in skip:
        if target not in catalog.active and target not in elsewhere:
            raise NotFound(f"{catalog.name} has no disk {target}", hint=f"its disks: {', '.join(catalog.active)}")
    covered = {t: i for t, i in catalog.active.items() if t not in skip}
    if not covered:
        raise Refused("every disk is skipped; nothing would be in the snapshot", hint="leave one --skip-disk away")
    return covered


async def _decide_memory(vm: VM, wanted: str, state: VMState) -> str:
    if wanted == "never" or (state.is_off and wanted in ("auto", "always")):
        return "never"
    if state.is_off:
        raise MemoryNotSaved(f"{vm.name} is off; it has no memory to save", hint="leave --memory away")
    await save_memory.refuse_sleeping(vm.driver, f"wake it: diskchain resume {vm.name}; or use --disk-only")
    await vm.driver.check_memory_save()
    blockers = await vm.driver.memory_blockers()
    if blockers:
        raise MemoryNotSaved(f"the memory of {vm.name} can't be saved: {'; '.join(blockers)}", hint="use --disk-only")
    if wanted == "paused" or state is VMState.PAUSED:
        return "paused"  # a paused VM is saved as it stands: it would be resumed by a background save
    await _check_background(vm)
    if wanted == "auto":
        need = save_memory.space_for(vm.driver.memory_bytes()) + save_memory.RESERVE
        free = files.free_bytes(vm.home.disks_dir)  # a domain has no records before the first
        if free < need:
            raise NoSpace(f"saving the memory of {vm.name} needs up to {size(need)}, {size(free)} are free",
                          hint="free space, or use --disk-only")  # fmt: skip
    return "background"


async def _check_background(vm: VM) -> None:
    """Raise MemoryNotSaved with every way that is left."""
    try:
        await vm.driver.check_background_save()
    except MemoryNotSaved as error:
        seconds = _expected_pause(vm.driver.memory_bytes())
        ways = f"use --disk-only, or --memory=paused (it stands still for up to {seconds:.1f} s)"
        raise MemoryNotSaved(error.message, hint=f"{ways}; or {error.hint}" if error.hint else ways) from error


def _expected_pause(ram: int) -> float:
    """Given RAM in bytes, return how long (seconds) a VM stands still whose memory is saved paused, at a slow disk's pace."""
    return max(0.1, round(ram / 1e9, 1))


def _check_space(vm: VM, overlays: Mapping[str, Image], save: str) -> None:
    directories = {image.path.parent for image in overlays.values()}
    for directory in directories:
        count = sum(image.path.parent == directory for image in overlays.values())
        need = METADATA * count
        if save != "never" and directory.stat().st_dev == vm.home.disks_dir.stat().st_dev:
            need += save_memory.space_for(vm.driver.memory_bytes())
        if files.free_bytes(directory) < need:
            raise NoSpace(f"{size(need)} are needed on {directory}, {size(files.free_bytes(directory))} are free",
                          hint="free space" + ("" if save == "never" else ", or use --disk-only")
                          + room.ways(vm, [(f"diskchain create {vm.name} --overlay-dir", need)]))  # fmt: skip


def _plan(vm: VM, snapshot: Snapshot, overlays: Mapping[str, Image], state: VMState, save: str, quiesce: bool,
          copied: Sequence[str]) -> Plan:  # fmt: skip
    steps = [
        f"{t}: freeze {vm.catalog.images[i.backing or ''].path.name}, go on in {i.path.name}"
        for t, i in overlays.items()
    ]
    steps += [f"copy the {what}" for what in copied]
    ram = vm.driver.memory_bytes()
    if state is VMState.RUNNING:
        steps.insert(0, "pause the VM (milliseconds)" if save != "paused" else "pause the VM until its memory is saved")
        steps.append("resume the VM")
    steps += [f"{target}: skipped; it is not in the snapshot, nor is memory" for target in snapshot.partial]
    if quiesce:
        steps = ["freeze the guest's file systems", *steps, "thaw them"]
    if save != "never":
        steps.append(f"save up to {size(ram)} of memory" + (" while the VM runs" if save == "background" else ""))
    memory = save_memory.space_for(ram) if save != "never" else 0
    needs = room.needs([*((i.path.parent, METADATA) for i in overlays.values()), (vm.home.disks_dir, memory)])
    downtime = _expected_pause(ram) if save == "paused" and state is VMState.RUNNING else 0.0
    return Plan(f"{vm.name}: create snapshot {snapshot.name!r}", tuple(steps),
                space_needed=sum(n.bytes for n in needs), needs=needs, downtime_estimate_s=downtime,
                point_of_no_return="when the disks are switched")  # fmt: skip


def _journal_data(vm: VM, prepared: Prepared) -> dict[str, Any]:
    return {
        "name": prepared.snapshot.name,
        "snapshot": prepared.snapshot.id,
        "before": dict(vm.catalog.active),
        "parent": vm.catalog.current,
        "overlays": {t: {"id": i.id, "path": str(i.path)} for t, i in prepared.overlays.items()},
        "save": prepared.save,
        "was": prepared.state.value,
        "owner": vm.driver.save_owner(),
        "quiesce": prepared.quiesce,
        "devices": list(prepared.devices),
    }


async def _make_files(vm: VM, prepared: Prepared) -> tuple[int | None, state_files.Capture]:
    """Make the snapshot's directory, configuration, memory file, overlays, and the file for NVRAM and TPM.

    Return the memory file's descriptor, and what copies NVRAM and TPM.
    """
    definition = await record_configuration(vm, prepared.snapshot.id)
    await layers.make_overlays(vm.catalog, prepared.overlays)
    await vm.driver.check_files([image.path for image in prepared.overlays.values()], written=True)
    capture = state_files.Capture(vm, prepared.snapshot.id, definition)
    if prepared.save == "never":
        return None, capture
    try:
        fd = await save_memory.make_file(vm, prepared.snapshot.id, was_running=prepared.state is VMState.RUNNING)
    except BaseException:
        capture.close()
        raise
    return fd, capture


async def _switch(vm: VM, entry: Entry, prepared: Prepared, memory_fd: int | None,
                  capture: state_files.Capture) -> Snapshot:  # fmt: skip
    """Cross the point of no return: from `prepared` to `switched` (or `saving`)."""
    if prepared.state.is_off:
        with layers.kept_off(vm.catalog):
            await vm.require_off()
            capture.copy()
            entry.advance("prepared")
            _name_overlays(vm, prepared)
            point("create.named")
            foreign = await vm.driver.align(vm.catalog.active_chains())
        if foreign:
            raise ChainDamaged(f"{', '.join(foreign)} of {vm.name} was switched to other files by something else just now",
                               hint=f"take them up: diskchain adopt {vm.name}")  # fmt: skip
        return _note_switched(vm, entry, prepared.snapshot, None, "")
    limit = None if prepared.save == "paused" else create_pause.LIMIT
    async with vm.driver.pause_guard(limit=limit) as guard:
        await vm.driver.prepare_disks(prepared.overlays)
        if memory_fd is not None:
            await vm.driver.prepare_memory_save(memory_fd, background=prepared.save == "background")
        entry.advance("prepared")
        _name_overlays(vm, prepared)
        ran = prepared.state is VMState.RUNNING
        freeze = Freeze(guard, vm.config.create.freeze_timeout) if prepared.quiesce else None
        pause = create_pause.Pause(
            vm.driver, guard, prepared.overlays, capture, save=prepared.save, ran=ran, freeze=freeze
        )
        if freeze:
            await freeze.begin()
        await uninterrupted(pause.run())
        partial = (*prepared.snapshot.partial, *await _plugged(vm))
        entry.data["partial"] = list(partial)
        snapshot = replace(prepared.snapshot, pause_ms=pause.milliseconds, partial=partial)
        entry.data["unquiesced"] = freeze.why if freeze else ""
        return _note_switched(vm, entry, noted(snapshot, entry.data), pause.captured, pause.why)


async def _plugged(vm: VM) -> list[str]:
    """Return the disks that the VM got since `prepare` found it to have those of the catalog and no others: the snapshot
    has not got them, and its memory needs them.
    """
    with contextlib.suppress(DiskchainError):
        return sorted(set(await vm.driver.written_files()) - set(vm.catalog.active))
    return []


def _name_overlays(vm: VM, prepared: Prepared) -> None:
    """The catalog names the new overlays before the switch: an empty overlay reads as what it stands on."""
    catalog = vm.catalog.with_snapshot(prepared.snapshot)
    vm.save(catalog.switched_to(prepared.overlays, prepared.snapshot.id))


def _note_switched(vm: VM, entry: Entry, snapshot: Snapshot, captured: bool | None, why: str) -> Snapshot:
    """Past the point of no return: NVRAM and TPM, journal, fingerprints of what is frozen now, then the catalog."""
    if captured is False:
        snapshot = replace(snapshot, memory=Memory("failed", reason=why))
    taken_at = time.time()
    snapshot = replace(snapshot, captured=state_files.finish_capture(vm, snapshot.id, definition_at(vm.home, snapshot)))
    entry.advance("saving" if captured else "switched", pause_ms=snapshot.pause_ms, reason=why, captured_at=taken_at,
                  captured=snapshot.captured)  # fmt: skip
    return note_frozen(vm, snapshot)


def _warn_of_pause(snapshot: Snapshot, request: Request, progress: Progress) -> None:
    if snapshot.pause_ms and snapshot.pause_ms > request.max_pause * 1000 and request.memory != "paused":
        progress.warn(
            f"the guest was paused for {snapshot.pause_ms:.0f} ms, longer than {request.max_pause * 1000:.0f} ms"
        )


async def finish(vm: VM, entry: Entry, snapshot: Snapshot, progress: Progress) -> Snapshot:
    """From `switched` or `saving` to the end. Called by `create` and by recovery."""
    await align(vm, progress)
    if entry.state == "switched":
        if snapshot.memory.status == "failed":
            await save_memory.let_go_on(vm, snapshot)
            await wait_for_stray_save(vm, entry, progress)
        files.unlink_durably(save_memory.part_of(vm.home, snapshot.id))
        entry.close()
        return snapshot
    try:
        snapshot = await save_memory.wait_and_seal(vm, entry, snapshot, progress)
    except asyncio.CancelledError:
        save_memory.leave_to_finisher(vm)
        raise
    if snapshot.was == "paused" or entry.data["save"] == "paused":
        await settle_power(vm, snapshot)
    entry.close()
    return snapshot


async def settle_power(vm: VM, snapshot: Snapshot) -> None:
    """After a plain save: bring the VM back to what it was."""
    if await vm.driver.state() is VMState.STOPPED:
        return
    await uninterrupted(save_memory.take_disks_back(vm, paused=snapshot.was == "paused"))
