"""What a revert would do: everything that is looked at and decided before anything changes."""

from __future__ import annotations

import asyncio
import getpass
from collections.abc import Collection, Mapping
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
from diskchain.ops.definitions import verify_for_memory
from diskchain.ops.places import LIBVIRT
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
    targets: tuple[str, ...] = ()  # the disks that the VM has afterwards
    waiting: tuple[str, ...] = ()  # those that it gets only at its next start
    restart: Definition | None = None  # to be started again with, when everything is put back


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
    vm.refresh(moved=True)
    await vm.verify_definition()
    state = await vm.driver.state()
    if request.keep_memory and state.is_off:
        raise MemoryNotSaved(f"{vm.name} is off; it has no memory to keep", hint="leave --keep-memory away")
    with_memory = snapshot.memory.saved and not request.cold and not request.only
    power = request.power.replace("start", "running") or _usual_power(snapshot, with_memory, state)
    loads = with_memory and power != "stopped"
    definition, changes = await _configuration(vm, snapshot, request, with_memory=with_memory, loads=loads)
    targets, waiting = _wanted(vm, snapshot, definition)
    disks = plan_revert_disks(vm.catalog, snapshot, (*targets, *waiting), request.only, keeps=not request.discard)
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
    if power != "stopped":
        await _refuse_unsupported(vm, snapshot, definition)
    copies = (
        {} if request.only else state_files.read_copies(vm, snapshot, definition, all_of=request.config == "restore")
    )
    warnings = vm.driver.memory_loads_with(definition) if with_memory else []
    keep = None if request.discard else _keep(vm.catalog, request, state, listed=vm.lists_snapshots)
    if keep:
        if keep.memory.status == "saving":
            await save_memory.refuse_sleeping(
                vm.driver, f"wake it: diskchain resume {vm.name}; or leave --keep-memory away"
            )
            await vm.driver.check_memory_save()
        await state_files.check_can_keep(vm, with_memory=keep.memory.status == "saving")
    overlays = layers.plan_overlays(vm.catalog, disks.on)
    _check_space(vm, overlays, keep)
    plan = _plan(vm, snapshot, disks, state, keep, with_memory, power, changes)
    plan = replace(plan, steps=(*plan.steps, *_states_step(copies)), warnings=(*plan.warnings, *warnings))
    return Prepared(snapshot, disks, overlays, state, keep, with_memory, power, definition, plan, changes, copies,
                    targets, waiting, vm.driver.without_memory(await _present(vm), vm.catalog.active))  # fmt: skip


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


async def _configuration(vm: VM, snapshot: Snapshot, request: Request, *, with_memory: bool,
                         loads: bool) -> tuple[Definition, list[str]]:  # fmt: skip
    """Return the configuration of afterwards, and in words what changes by it. `loads`: the VM runs from its memory then.

    Raise Refused when the present one is to be kept with memory that was saved under another, ChainDamaged when the memory
    was saved under another than is recorded.
    """
    now = _without_memory(vm, snapshot, await _present(vm))
    if request.only:
        return now, _attached_for_good(vm, now, [])
    if with_memory:
        verify_for_memory(vm.home, snapshot)
    then = read_definition(vm, snapshot)
    after = _without_memory(vm, snapshot, then)
    changes = vm.driver.differences(now, after)
    if request.config == "restore" or not changes:
        return (then, changes) if loads else (after, changes + _attached_for_good(vm, after, changes))
    if with_memory:
        raise Refused(f"the memory of {snapshot.name!r} loads only into the configuration it was saved with "
                      f"({'; '.join(changes)})", hint="leave --config keep away, or add --cold")  # fmt: skip
    return now, _attached_for_good(vm, now, [])


async def _present(vm: VM) -> Definition:
    """The configuration of now: a domain's disks may be attached to the running one only."""
    return await vm.driver.live_definition() if vm.driver.kind == LIBVIRT else vm.driver.definition()


def _without_memory(vm: VM, snapshot: Snapshot, definition: Definition) -> Definition:
    """A start without memory: every disk that the running VM had, and whose data we have, is in the definition then."""
    attached = [t for t in vm.driver.disks(definition) if t in snapshot.disks or t in vm.catalog.active]
    return vm.driver.without_memory(definition, attached)


def _attached_for_good(vm: VM, after: Definition, changes: Collection[str]) -> list[str]:
    before = vm.driver.disks(vm.driver.definition())
    return [f"{t}, attached to the running VM only, is in its definition from now on" for t in vm.driver.disks(after)
            if t not in before and f"{t} attached" not in changes]  # fmt: skip


def _wanted(vm: VM, snapshot: Snapshot, definition: Definition) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the disks that the VM has afterwards, and those that it gets only at its next start.

    A domain's disk that was only defined, and never in use yet, is none of ours: it is as it is defined.
    """
    runs, starts = vm.driver.disks(definition), vm.driver.disks(vm.driver.without_memory(definition, ()))
    found, ours = {**runs, **starts}, vm.driver.kind != LIBVIRT
    known = [t for t, path in found.items() if ours or t in snapshot.disks or _is_known(vm.catalog, t, path)]
    return tuple(t for t in known if t in runs), tuple(t for t in known if t not in runs)


def _is_known(catalog: Catalog, target: str, path: Path) -> bool:
    return any(image.target == target or files.is_same(image.path, path) for image in catalog.images.values())


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
            f"{', '.join(disks.left_alone)} left as now; only {', '.join(disks.covered) or 'nothing'} "
            f"{'go' if len(disks.covered) > 1 else 'goes'} back"
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
