"""start, stop, pause, resume."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, replace

from diskchain.drivers.protocol import VMState
from diskchain.errors import Busy, ChainDamaged, Degraded, DiskchainError, NoSpace, Refused
from diskchain.host import files
from diskchain.host.fault import point
from diskchain.ops import layers, pending, quiesce, recover, state_files
from diskchain.ops.merge import Merged
from diskchain.ops.progress import QUIET, Progress
from diskchain.ops.vm import VM
from diskchain.store import journal


@dataclass(frozen=True)
class Stopped:
    """What a stop did. `changed` is False when the VM was off already."""

    changed: bool
    merged: list[Merged]


async def start(vm: VM, progress: Progress = QUIET, *, paused: bool = False) -> bool:
    """Start the VM on its active layers; return False when it runs already. An interrupted merge is put off for it.

    Raise ChainDamaged, HostileImage before QEMU sees anything that is not as it was left; Refused when it is paused.
    """
    recovered = await recover.before_start(vm, progress)
    before = vm.catalog
    if not await can_start(vm):
        return recovered is not None  # what was interrupted may have started it
    known = await state_files.provide(vm.driver, replace(vm.catalog, asleep=False))
    if vm.known and known != before:  # a domain without records is started without making any
        vm.save(known)
    point("start.launching")
    await vm.driver.start(vm.catalog.active_chains(), paused=paused)
    return True


async def can_start(vm: VM) -> bool:
    """Look at everything that could stand in the way of a start; return False when the VM runs already. Raise as `start`."""
    state = await vm.driver.state()
    if state is VMState.RUNNING:
        return False
    if not state.is_off:
        raise Refused(f"{vm.name} is on already, {state.value}", hint=f"diskchain resume {vm.name}")
    vm.refresh(moved=True)
    await vm.verify_definition()
    await asyncio.to_thread(layers.verify_active, vm.catalog)
    if vm.registered:  # its QEMU is of our own user
        for image_id in vm.catalog.active.values():
            files.require_access(vm.catalog.images[image_id].path, os.R_OK | os.W_OK, "write to")
        if missing := vm.driver.missing_files(vm.driver.definition()):
            raise Refused(f"{vm.name} can't start: {'; '.join(missing)}",
                          hint="bring the files back, or correct the machine file and define it again")  # fmt: skip
    return True


async def stop(vm: VM, progress: Progress = QUIET, *, timeout: float, force: bool = False,
               merge: bool = True) -> Stopped:  # fmt: skip
    """Stop the VM: power button, `timeout` seconds; with `force` at once, like a power cut. Then do pending merges.

    Raise DiskchainError when the guest did not end (it goes on running), Refused when it is paused, Degraded when it was
    stopped and a pending merge can't begin.
    """
    state = await vm.driver.state()
    changed = not state.is_off
    await _before_stop(vm, progress, finish_save=changed and not force)
    if changed and force:
        await vm.driver.kill()
    elif changed:
        await _shut_down(vm, state, timeout)
    if not merge:
        return Stopped(changed, [])
    await recover.recover(vm, progress)
    try:
        return Stopped(changed, await pending.merge_pending(vm, progress))
    except (Refused, Busy, NoSpace, ChainDamaged) as error:  # no merge has begun
        if not changed or journal.is_open(vm.home):
            raise
        raise Degraded(f"{vm.name} is stopped; what was deleted is not merged yet: {error.message}",
                       hint=error.hint) from error  # fmt: skip


async def _before_stop(vm: VM, progress: Progress, *, finish_save: bool) -> None:
    """An interrupted save is finished before the VM goes; an interrupted revert must not start it again afterwards."""
    entry = journal.open_entry(vm.home)
    if entry and entry.op == "create" and finish_save:
        await recover.recover(vm, progress)
    elif entry and entry.op == "revert":
        entry.note(power="stopped", was="stopped")


async def _shut_down(vm: VM, state: VMState, timeout: float) -> None:
    if state is not VMState.RUNNING:
        raise Refused(f"{vm.name} is {state.value}; it can't see its power button",
                      hint=f"diskchain resume {vm.name}, or: diskchain stop --force {vm.name}")  # fmt: skip
    if not await vm.driver.power_off(timeout):
        raise DiskchainError(f"{vm.name} did not shut down within {timeout:.0f} seconds; it goes on running",
                             hint=f"try again, or: diskchain stop --force {vm.name} (like a power cut)")  # fmt: skip


async def can_switch(vm: VM, *, run: bool) -> bool:
    """Whether a pause (or with `run` a resume) changes anything. Raise Refused when the VM is off."""
    state = await vm.driver.state()
    if state.is_off:
        raise Refused(f"{vm.name} is off", hint=f"diskchain start {vm.name}")
    if state is VMState.SUSPENDED and not run:
        raise Refused(f"the guest of {vm.name} sleeps (suspended to RAM); it can't be paused now, and may wake by itself",
                      hint=f"diskchain resume {vm.name} wakes it; then pause it")  # fmt: skip
    return (state is VMState.RUNNING) != run


async def pause(vm: VM) -> bool:
    """Stop the virtual CPUs; return False when they stand already. Raise Refused when the VM is off, or its guest sleeps."""
    if not await can_switch(vm, run=False):
        return False
    await vm.driver.pause()
    return True


async def resume(vm: VM, progress: Progress = QUIET) -> bool:
    """Let the virtual CPUs go on, wake a guest that sleeps; return False when they run already.

    Raise Refused when the VM is off.
    """
    if not await can_switch(vm, run=True):
        return False
    sleeps = await vm.driver.state() is VMState.SUSPENDED
    await (vm.driver.wake_up() if sleeps else vm.driver.resume())
    await _wake(vm, progress)
    return True


async def _wake(vm: VM, progress: Progress) -> None:
    """A revert left the guest paused as its memory was loaded: now that it runs, thaw it and tell it the time."""
    if not vm.catalog.asleep:
        return
    current = vm.catalog.snapshots.get(vm.catalog.current or "")
    await quiesce.wake(vm, progress, frozen=current is None or current.frozen)
    vm.save(replace(vm.catalog, asleep=False))
