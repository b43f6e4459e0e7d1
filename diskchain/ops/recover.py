"""recover: whatever was killed, whenever: finish it or undo it. Every changing command does this first.

Which of the two is decided by looking (running QEMU, headers, catalog), by the tables at the top of each operation's
file. It never guesses from the journal's note alone where reality can tell.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from diskchain.chain.model import Memory
from diskchain.drivers.machines import Machines
from diskchain.drivers.protocol import VMState
from diskchain.errors import ChainDamaged, RecordDamaged, Refused, Unfinished
from diskchain.host import files
from diskchain.ops import create, delete, layers, revert, save_memory
from diskchain.ops.progress import QUIET, Progress
from diskchain.ops.vm import VM
from diskchain.store import journal
from diskchain.store.journal import Entry


@dataclass(frozen=True)
class Recovered:
    """What was found and done. `outcome`: finished, undone, deferred."""

    op: str
    name: str
    state: str
    outcome: str
    note: str = ""


async def recover(vm: VM, machines: Machines, progress: Progress = QUIET, *, undo: bool = False,
                  finish: bool = False) -> Recovered | None:  # fmt: skip
    """Resolve the VM's open journal entry; return what was done, or None when there was nothing. The lock is held.

    `undo`/`finish` force a direction; Raise Refused where that direction is closed, Unfinished when it stopped again.
    """
    sweep(vm)
    entry = journal.open_entry(vm.home)
    if entry is None:
        return None
    state, name = entry.state, str(entry.data.get("name", entry.id))
    handlers = {"create": _create, "revert": _revert, "delete": _delete}
    if entry.op not in handlers:
        raise RecordDamaged(f"the journal of {vm.name} holds an operation {entry.op!r} of a newer diskchain")
    outcome, note = await handlers[entry.op](vm, entry, progress, undo, finish)
    vm.reload()
    return Recovered(entry.op, name, state, outcome, note)


def sweep(vm: VM) -> None:
    """Unlink temporary files that a kill left in our own directories."""
    for directory in (vm.home.path, vm.home.journal):
        for path in directory.glob(files.TEMPORARY + "*"):
            files.unlink_durably(path)


# -- create ------------------------------------------------------------------------------------------------------------


async def _create(vm: VM, entry: Entry, progress: Progress, undo: bool, finish: bool) -> tuple[str, str]:
    if entry.state == "intent":
        await create.undo(vm, entry)
        return "undone", "the VM's disks were not switched"
    if entry.state == "prepared":
        return await _create_prepared(vm, entry, progress)
    if undo:
        raise Refused(
            "the disks were switched; the snapshot exists", hint=f"diskchain recover {vm.name}, then delete it"
        )
    snapshot = vm.catalog.snapshots[entry.data["snapshot"]]
    snapshot = create.note_frozen(vm, replace(snapshot, pause_ms=entry.data.get("pause_ms")))
    if entry.state == "saved":
        memory = await save_memory.seal(vm.home, snapshot.id, 0.0)
        vm.save(vm.catalog.with_snapshot(replace(snapshot, memory=memory, consistency="memory")))
        entry.close()
        return "finished", "its memory is saved"
    if entry.state == "saving" and vm.driver.save_owner() != entry.data["owner"]:
        return _without_memory(vm, entry, "the VM ended before its memory was saved")
    if entry.state == "switched" and snapshot.memory.status == "saving":
        return _without_memory(vm, entry, entry.data.get("reason") or "interrupted")
    snapshot = await create.finish(vm, entry, snapshot, progress)
    return "finished", f"memory: {snapshot.memory.status}"


def _without_memory(vm: VM, entry: Entry, why: str) -> tuple[str, str]:
    snapshot = vm.catalog.snapshots[entry.data["snapshot"]]
    files.unlink_durably(save_memory.part_of(vm.home, snapshot.id))
    vm.save(vm.catalog.with_snapshot(replace(snapshot, memory=Memory("failed", reason=why))))
    entry.close()
    return "finished", f"without memory: {why}"


async def _create_prepared(vm: VM, entry: Entry, progress: Progress) -> tuple[str, str]:
    """We died somewhere around the pause. A running QEMU is asked; without one the overlays may hold guest writes."""
    named = entry.data["snapshot"] in vm.catalog.snapshots
    switched = await _switched(vm, entry)
    if switched is False or (switched is None and not named):
        await create.undo(vm, entry)
        await _let_run(vm, entry)
        return "undone", "the VM's disks were not switched"
    await _wait_for_stray_save(vm, entry, progress)
    await _let_run(vm, entry)
    snapshot = vm.catalog.snapshots[entry.data["snapshot"]]
    create.note_frozen(vm, snapshot)
    if snapshot.memory.status == "saving":
        return _without_memory(vm, entry, "interrupted while the VM was paused")
    entry.close()
    return "finished", "the VM's disks were switched"


async def _switched(vm: VM, entry: Entry) -> bool | None:
    """Whether the running VM is on the new overlays; None when no VM runs. Raise ChainDamaged when it is mixed."""
    if (await vm.driver.state()).is_off:
        return None
    active = await vm.driver.active_files()
    new = {t: image.path for t, image in create.planned_overlays(vm, entry).items()}
    count = sum(active.get(t) == path for t, path in new.items())
    if 0 < count < len(new):
        raise ChainDamaged(f"{count} of {len(new)} disks of {vm.name} were switched; that can't be",
                           hint="stop the VM and keep every file")  # fmt: skip
    return count > 0


async def _wait_for_stray_save(vm: VM, entry: Entry, progress: Progress) -> None:
    """A save whose instant is not certain is of no use, but QEMU < 10 must not be told to cancel it."""
    if entry.data["save"] == "never" or (await vm.driver.state()).is_off:
        return
    if vm.driver.save_owner() == entry.data["owner"]:
        await save_memory.wait_until_over(vm, progress)
        await vm.driver.end_memory_save()


async def _let_run(vm: VM, entry: Entry) -> None:
    """A VM that ran before the pause runs again (the watchdog did that already, unless it was killed too)."""
    if entry.data["was"] == "running" and await vm.driver.state() is VMState.PAUSED:
        await vm.driver.resume()


# -- revert ------------------------------------------------------------------------------------------------------------


async def _revert(vm: VM, entry: Entry, progress: Progress, undo: bool, finish: bool) -> tuple[str, str]:
    if entry.state in ("intent", "stopped"):
        if finish:
            raise Refused("the revert had not begun to switch; it is undone, then can be asked for again",
                          hint=f"diskchain recover {vm.name}")  # fmt: skip
        await revert.undo(vm, entry)
        return "undone", "the VM is on its disks of before"
    if undo:
        await revert.undo(vm, entry)
        return "undone", "the VM is on its disks of before"
    if entry.state == "switched":
        return await revert.resume_load(vm, entry), "the VM is on the reverted disks"
    if entry.data["power"] == "running" and await vm.driver.state() is VMState.PAUSED:
        await vm.driver.resume()
    await revert.finish(vm, entry)
    return "finished", "the VM is on the reverted disks"


# -- delete ------------------------------------------------------------------------------------------------------------


async def _delete(vm: VM, entry: Entry, progress: Progress, undo: bool, finish: bool) -> tuple[str, str]:
    if undo:
        raise Refused("a delete that has begun can only go forward; nothing you see in the VM changes by it",
                      hint=f"diskchain recover {vm.name}")  # fmt: skip
    if entry.state in ("intent", "commit") and entry.data["folds"] and not (await vm.driver.state()).is_off:
        raise Unfinished(f"the merge of {entry.data['name']!r} waits until {vm.name} is off",
                         hint=f"diskchain stop {vm.name}")  # fmt: skip
    if entry.state in ("intent", "commit"):
        _verify_before_redo(vm, entry)
    await delete.carry_out(vm, entry, progress)
    return "finished", "the merge is done"


def _verify_before_redo(vm: VM, entry: Entry) -> None:
    for fold in entry.data["folds"]:
        if fold["top"] in vm.catalog.images:
            layers.verify_frozen(vm.catalog.images[fold["top"]])


async def before_start(vm: VM, machines: Machines, progress: Progress) -> Recovered | None:
    """`start` wins: an interrupted commit is put off (after a look at both layers), everything else is resolved."""
    entry = journal.open_entry(vm.home)
    if entry is not None and entry.op == "delete" and entry.state in ("intent", "commit") and entry.data["folds"]:
        await delete.make_bootable(vm, entry)
        delete.defer(vm, entry)
        return Recovered("delete", entry.data["name"], entry.state, "deferred", "it merges at the next stop")
    return await recover(vm, machines, progress)
