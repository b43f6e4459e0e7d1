"""What a revert would do: everything that is looked at and decided before anything changes."""

from __future__ import annotations

import asyncio
import getpass
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from diskchain.chain.model import Catalog, Image, Memory, Snapshot, snapshot_name
from diskchain.chain.plan import Plan, RevertDisks, plan_revert_disks
from diskchain.chain.text import size
from diskchain.drivers.protocol import Definition, VMState
from diskchain.errors import (
    BadName,
    ChainDamaged,
    HostileImage,
    MemoryNotSaved,
    NoSpace,
    NotFound,
    Refused,
)
from diskchain.host import files
from diskchain.ops import layers, room, save_memory, state_files
from diskchain.ops.create import METADATA
from diskchain.ops.vm import VM, definition_at, new_id, now_utc


@dataclass(frozen=True)
class Request:
    """What was asked for. `power`: start, paused, stopped, or "" = as the snapshot was."""

    name: str
    keep_as: str = ""
    discard: bool = False
    keep_memory: bool = False
    cold: bool = False
    power: str = ""
    only: tuple[str, ...] = ()  # only these disks go back; implies cold and the configuration of now
    config: str = "restore"  # restore | keep


@dataclass(frozen=True)
class Prepared:
    """What is decided before anything changes."""

    snapshot: Snapshot
    disks: RevertDisks
    overlays: dict[str, Image]
    state: VMState
    keep: Snapshot | None
    with_memory: bool
    power: str  # running | paused | stopped
    definition: Definition
    plan: Plan
    changes: list[str]
    copies: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)  # NVRAM, TPM: as verified


def undo_target(vm: VM) -> str:
    """Return the snapshot that `undo` goes back to. Raise NotFound when there is none."""
    left = vm.catalog.left
    if left is None or left not in vm.catalog.snapshots or vm.catalog.snapshots[left].deleted:
        raise NotFound(f"there is nothing to undo on {vm.name}",
                       hint=f"only a revert that kept the present can be undone; see: diskchain list {vm.name}")  # fmt: skip
    return vm.catalog.snapshots[left].name


async def prepare(vm: VM, request: Request) -> Prepared:
    """Look at everything that could stand in the way, and return what `revert` would do. Changes nothing.

    Raise NotFound, BadName, ChainDamaged, HostileImage, MemoryDamaged, MemoryNotSaved, Refused, NoSpace.
    """
    snapshot = vm.catalog.find(request.name)
    await vm.driver.refuse("revert")
    await vm.verify_definition()
    state = await vm.driver.state()
    if request.keep_memory and state.is_off:
        raise MemoryNotSaved(f"{vm.name} is off; it has no memory to keep", hint="leave --keep-memory away")
    with_memory = snapshot.memory.saved and not request.cold and not request.only
    definition, changes = _configuration(vm, snapshot, request, with_memory)
    disks = plan_revert_disks(
        vm.catalog, snapshot, vm.driver.disks(definition), request.only, keeps=not request.discard
    )
    for image_id in (*(snapshot.disks[t] for t in disks.covered), *disks.stays.values()):
        await asyncio.to_thread(layers.verify_chain, vm.catalog, image_id)
    if not request.discard:
        await asyncio.to_thread(_verify_present, vm.catalog, snapshot.name)
    if state.is_off:
        layers.refuse_foreign_writers(vm.catalog)
    else:
        await vm.verify_running(same_disks=False)
    definition = vm.driver.renewed(definition)
    missing = vm.driver.missing_files(definition)
    if missing:
        raise Refused(f"the configuration of {snapshot.name!r} can't start: {'; '.join(missing)}",
                      hint="bring the files back")  # fmt: skip
    power = request.power.replace("start", "running") or _usual_power(snapshot, with_memory, state)
    if power != "stopped":
        await _refuse_unsupported(vm, snapshot, definition)
    copies = (
        {} if request.only else state_files.read_copies(vm, snapshot, definition, all_of=request.config == "restore")
    )
    warnings = vm.driver.memory_loads_with(definition) if with_memory else []
    keep = None if request.discard else _keep(vm.catalog, request, state, listed=vm.lists_snapshots)
    if keep:
        if keep.memory.status == "saving":
            await vm.driver.check_memory_save()
        await state_files.check_can_keep(vm, with_memory=keep.memory.status == "saving")
    overlays = layers.plan_overlays(vm.catalog, disks.on)
    _check_space(vm, overlays, keep)
    plan = _plan(vm, snapshot, disks, state, keep, with_memory, power, changes)
    plan = replace(plan, steps=(*plan.steps, *_states_step(copies)), warnings=(*plan.warnings, *warnings))
    return Prepared(snapshot, disks, overlays, state, keep, with_memory, power, definition, plan, changes, copies)


def _states_step(copies: Mapping[str, object]) -> list[str]:
    return [f"put back: {', '.join(state_files.label(name) for name in copies)}"] if copies else []


async def _refuse_unsupported(vm: VM, snapshot: Snapshot, definition: Definition) -> None:
    """Another QEMU may be installed than then. What it can't start is refused while the VM still runs."""
    lacks = await vm.driver.unsupported(definition)
    if not lacks:
        return
    way = f"diskchain revert --cold --config keep {vm.name} {snapshot.name}"
    if await vm.driver.unsupported(vm.driver.definition()):
        way = f"define it with a machine type of this QEMU (docs/machine.md), then: {way}"
    raise Refused(f"the configuration of {snapshot.name!r} can't start: {'; '.join(lacks)}",
                  hint=f"back to its disks only: {way}")  # fmt: skip


def _configuration(vm: VM, snapshot: Snapshot, request: Request, with_memory: bool) -> tuple[Definition, list[str]]:
    """Return the configuration of afterwards, and in words what changes by it.

    Raise Refused when the present one is to be kept with memory that was saved under another.
    """
    if request.only:
        return vm.driver.definition(), []
    then = read_definition(vm, snapshot)
    changes = vm.driver.differences(vm.driver.definition(), then)
    if request.config == "restore" or not changes:
        return then, changes
    if with_memory:
        raise Refused(f"the memory of {snapshot.name!r} loads only into the configuration it was saved with "
                      f"({'; '.join(changes)})", hint="leave --config keep away, or add --cold")  # fmt: skip
    return vm.driver.definition(), []


def _verify_present(catalog: Catalog, going_to: str) -> None:
    """The present can be kept only while it is whole. Raise ChainDamaged, HostileImage with the way out."""
    try:
        layers.verify_active(catalog)
    except (ChainDamaged, HostileImage) as error:
        lost = f"diskchain revert --discard {catalog.name} {going_to}"
        raise type(error)(error.message, hint=f"bring the right file back; or give the present up: {lost}") from error


def read_definition(vm: VM, snapshot: Snapshot) -> Definition:
    """Return the configuration that a snapshot recorded. Raise ChainDamaged when it is gone."""
    return definition_at(vm.home, snapshot)


def _keep(catalog: Catalog, request: Request, state: VMState, *, listed: bool) -> Snapshot:
    names = {s.name for s in catalog.snapshots.values() if not s.deleted}
    number = catalog.keeps + 1
    while not request.keep_as and f"before-revert-{number}" in names:
        number += 1
    name = snapshot_name(request.keep_as) if request.keep_as else f"before-revert-{number}"
    if name in names:
        raise BadName(f"{catalog.name} has a snapshot {name!r} already", hint="choose another --keep-as")
    memory = Memory("saving") if request.keep_memory else Memory()
    return Snapshot(
        id=new_id(), name=name, created=now_utc(), parent=catalog.current, disks=dict(catalog.active),
        description=f"the present before going back to {request.name}", automatic=not request.keep_as,
        registered=listed,
        consistency="off" if state.is_off else "crash", was=state.value, by=getpass.getuser(), memory=memory,
        frozen=catalog.asleep,
    )  # fmt: skip


def _need(vm: VM, overlays: int, keep: Snapshot | None) -> int:
    """Bytes that are needed at most beside the disks."""
    saving = keep is not None and keep.memory.status == "saving"
    return METADATA * overlays + (save_memory.space_for(vm.driver.memory_bytes()) if saving else 0)


def _check_space(vm: VM, overlays: dict[str, Image], keep: Snapshot | None) -> None:
    need = _need(vm, len(overlays), keep)
    free = files.free_bytes(vm.home.path)
    if free < need:
        raise NoSpace(f"{size(need)} are needed beside the disks of {vm.name}, {size(free)} are free",
                      hint="free space" + (", or leave --keep-memory away" if need > 1 << 30 else ""))  # fmt: skip


def _usual_power(snapshot: Snapshot, with_memory: bool, state: VMState) -> str:
    if with_memory:
        return "paused" if snapshot.was == "paused" else "running"
    return {VMState.STOPPED: "stopped", VMState.PAUSED: "paused"}.get(state, "running")


def _plan(vm: VM, snapshot: Snapshot, disks: RevertDisks, state: VMState, keep: Snapshot | None, with_memory: bool,
          power: str, changes: list[str]) -> Plan:  # fmt: skip
    steps, lost = [_way(snapshot, state, power, with_memory)], []
    if snapshot.memory.saved and not (with_memory and power != "stopped"):
        steps.append(f"the memory of {snapshot.name!r} is left aside; it stays in the snapshot")
    gone = disks.covered if keep is None else tuple(vm.catalog.active)
    written = sum(_allocated(vm.catalog.images[i].path) for t, i in vm.catalog.active.items() if t in gone)
    if keep is None:
        lost.append(f"the present ({size(written)} of writes) is discarded")
    elif keep.memory.status == "saving":
        steps.append(f"the present is kept as {keep.name}, with its memory")
    else:
        steps.append(f"the present ({size(written)} of writes since) is kept as {keep.name}, disk only, 0 extra bytes")
        if not state.is_off:
            lost.append("the programs that run now (the kept present is like after a power cut)")
    if disks.left_alone:
        steps.append(
            f"{', '.join(disks.left_alone)} left as now; only {', '.join(disks.covered) or 'nothing'} goes back"
        )
    unused = [t for t in snapshot.disks if t not in disks.on]
    if unused:
        steps.append(f"{', '.join(unused)} of the snapshot left out: the configuration of now has no such disk")
    if changes:
        steps.append("configuration goes back: " + "; ".join(changes))
    need = _need(vm, len(disks.on), keep)
    return Plan(f"{vm.name}: revert to {snapshot.name!r}", tuple(steps), space_needed=need,
                needs=room.needs([(vm.home.disks_dir, need)]),
                downtime_estimate_s=2.0 if (state, power) == (VMState.RUNNING, "running") else 0.0, lost=tuple(lost),
                point_of_no_return="when the definition names the new overlays" if power == "stopped"
                else "when the VM runs on the new overlays" if power == "running"
                else "when the VM is loaded on the new overlays")  # fmt: skip


def _way(snapshot: Snapshot, state: VMState, power: str, with_memory: bool) -> str:
    """Say in a line what becomes of the running VM."""
    if state.is_off and power == "stopped":
        return "stopped, and stays so"
    now = f"{state.value} -> stopped (not shut down)" if not state.is_off else state.value
    if power == "stopped":
        return f"{now}, and stays so"
    return f"{now} -> {power} from " + (f"memory of {snapshot.created}" if with_memory else "its disks")


def _allocated(path: Path) -> int:
    """What a layer takes; nothing when it is gone (a lost present can be left with --discard)."""
    try:
        return files.allocated_bytes(path)
    except NotFound:
        return 0
