"""recover: whatever was killed, whenever: finish it or undo it. Every changing command does this first.

Which of the two is decided by looking (running QEMU, headers, catalog), by the tables at the top of each operation's
file. It never guesses from the journal's note alone where reality can tell.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from diskchain.drivers.protocol import VMState
from diskchain.errors import RecordDamaged, Refused, Unfinished
from diskchain.host import files
from diskchain.ops import (
    create,
    create_rest,
    delete,
    elsewhere,
    flat_pause,
    layers,
    move,
    quiesce,
    repair,
    revert,
    save_memory,
    state_files,
)
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


async def recover(vm: VM, progress: Progress = QUIET, *, undo: bool = False,
                  finish: bool = False) -> Recovered | None:  # fmt: skip
    """Resolve the VM's open journal entry; return what was done, or None when there was nothing. The lock is held.

    `undo`/`finish` force a direction; Raise Refused where that direction is closed, Unfinished when it stopped again.
    """
    sweep(vm)
    entry = journal.open_entry(vm.home)
    if entry is None:
        return None
    state, name = entry.state, str(entry.data.get("name", entry.id))
    handlers = {"create": _create, "revert": _revert, "delete": _delete, "repair": _repair, "move": _move,
                "delete-to": _elsewhere, "detach-to": _elsewhere}  # fmt: skip
    await vm.driver.refuse_elsewhere()
    if entry.op not in handlers:
        raise RecordDamaged(f"the journal of {vm.name} holds an operation {entry.op!r} of a newer diskchain")
    outcome, note = await handlers[entry.op](vm, entry, progress, undo, finish)
    vm.reload()
    if entry.op == "create":
        await flat_pause.after(vm, entry.data["save"])
    return Recovered(entry.op, name, state, outcome, note)


def sweep(vm: VM) -> None:
    """Unlink temporary files that a kill left in our own directories."""
    for directory in (vm.home.path, vm.home.journal):
        for path in directory.glob(files.TEMPORARY + "*"):
            state_files.remove(path)  # a TPM that was being made is a directory


# -- create ------------------------------------------------------------------------------------------------------------


async def _create(vm: VM, entry: Entry, progress: Progress, undo: bool, finish: bool) -> tuple[str, str]:
    if entry.state == "intent":
        await create_rest.undo(vm, entry)
        return "undone", "the VM's disks were not switched"
    if entry.state == "prepared":
        await create_rest.thaw_what_was_frozen(vm, entry, progress)
        return await create_rest.resolve_prepared(vm, entry, progress)
    if undo:
        raise Refused(
            "the disks were switched; the snapshot exists", hint=f"diskchain recover {vm.name}, then delete it"
        )
    snapshot = vm.catalog.snapshots[entry.data["snapshot"]]
    snapshot = replace(snapshot, pause_ms=entry.data.get("pause_ms"), captured=entry.data.get("captured", {}),
                       partial=tuple(entry.data.get("partial", snapshot.partial)))  # fmt: skip
    snapshot = quiesce.noted(snapshot, entry.data)
    snapshot = create_rest.note_frozen(vm, snapshot)
    if entry.state == "saved":
        memory = await save_memory.seal_or_give_up(vm.home, snapshot.id, 0.0)
        if not memory.saved:
            return create_rest.without_memory(vm, entry, memory.reason)
        vm.save(vm.catalog.with_snapshot(replace(snapshot, memory=memory, consistency="memory")))
        entry.close()
        return "finished", "its memory is saved"
    if entry.state == "saving" and vm.driver.save_owner() != entry.data["owner"]:
        return create_rest.without_memory(vm, entry, "the VM ended before its memory was saved")
    if entry.state == "switched" and snapshot.memory.status == "saving":
        return create_rest.without_memory(vm, entry, entry.data.get("reason") or "interrupted")
    snapshot = await create.finish(vm, entry, snapshot, progress)
    return "finished", f"memory: {snapshot.memory.status}"


# -- revert ------------------------------------------------------------------------------------------------------------


async def _revert(vm: VM, entry: Entry, progress: Progress, undo: bool, finish: bool) -> tuple[str, str]:
    if entry.state in ("intent", "stopped"):
        if finish:
            raise Refused("the revert had not begun to switch; it is undone, then can be asked for again",
                          hint=f"diskchain recover {vm.name}")  # fmt: skip
        await revert.undo(vm, entry)
        return "undone", "the VM is on its disks of before"
    if undo or entry.data.get("undoing"):
        await revert.undo(vm, entry)
        return "undone", "the VM is on its disks of before"
    if entry.state == "switched":
        return await revert.resume_load(vm, entry, progress), "the VM is on the reverted disks"
    if entry.data["power"] == "running" and await vm.driver.state() is VMState.PAUSED:
        await vm.driver.resume()
    await revert.wake(vm, entry, progress)
    await revert.finish(vm, entry)
    return "finished", "the VM is on the reverted disks"


# -- delete ------------------------------------------------------------------------------------------------------------


async def _delete(vm: VM, entry: Entry, progress: Progress, undo: bool, finish: bool) -> tuple[str, str]:
    if undo:
        raise Refused("a delete that has begun can only go forward; nothing you see in the VM changes by it",
                      hint=f"diskchain recover {vm.name}")  # fmt: skip
    before = entry.state in ("intent", "commit")
    if before and delete.moves_data(entry) and not (await vm.driver.state()).is_off:
        raise Unfinished(f"the merge of {entry.data['name']!r} waits until {vm.name} is off",
                         hint=f"diskchain stop {vm.name}")  # fmt: skip
    if before:
        left = delete.of_entry(vm.catalog, entry)
        gone = [i for fold in left.folds for i in fold.gone] + [i for pull in left.pulls for i in pull.gone]
        for image in gone:
            layers.verify_frozen(image)
    await delete.carry_out(vm, entry, progress)
    return "finished", "the merge is done"


async def _repair(vm: VM, entry: Entry, progress: Progress, undo: bool, finish: bool) -> tuple[str, str]:
    return await repair.resume(vm, entry, undo=undo)


async def _move(vm: VM, entry: Entry, progress: Progress, undo: bool, finish: bool) -> tuple[str, str]:
    return await move.resume(vm, entry)


async def _elsewhere(vm: VM, entry: Entry, progress: Progress, undo: bool, finish: bool) -> tuple[str, str]:
    return await elsewhere.resume(vm, entry)


async def before_start(vm: VM, progress: Progress) -> Recovered | None:
    """`start` wins: an interrupted commit is put off (after a look at both layers), everything else is resolved."""
    return await put_off(vm) or await recover(vm, progress)


async def put_off(vm: VM) -> Recovered | None:
    """Let an interrupted merge be pending again, after a look at both layers; return None where there is none, or where
    it has begun to relink. Raise ChainDamaged, Busy.
    """
    entry = journal.open_entry(vm.home)
    if entry is None or entry.op != "delete" or entry.state not in ("intent", "commit") or not delete.moves_data(entry):
        return None
    await delete.make_bootable(vm, entry)
    delete.defer(vm, entry)
    if not (entry.data["snapshots"] or entry.data["waits"]):  # a detach: nothing remembers it
        return Recovered("delete", entry.data["name"], entry.state, "undone", "it was given up for the start")
    return Recovered("delete", entry.data["name"], entry.state, "deferred", "it merges at the next stop")
