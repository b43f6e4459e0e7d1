"""Deleted, and not merged yet: carry it out, or take it back."""

from __future__ import annotations

from dataclasses import replace

from diskchain.chain.deletion import Deletion, plan_deletion
from diskchain.chain.model import Snapshot, named
from diskchain.errors import DiskchainError, NotFound, Refused
from diskchain.ops import delete, delete_plan, methods, recover
from diskchain.ops.merge import Merged
from diskchain.ops.progress import Progress
from diskchain.ops.vm import VM
from diskchain.store import journal


def plan(vm: VM) -> Deletion:
    """Return what can be carried out now of what was deleted before."""
    return methods.choose_all(vm.catalog, [plan_deletion(vm.catalog, [])])[0]


def steps(vm: VM) -> tuple[str, ...]:
    """Return the merges that were put off as steps of a plan."""
    return tuple(f"merge what was deleted: {snapshot.name}" for snapshot in vm.catalog.pending())


async def merge_pending(vm: VM, progress: Progress, *, rate: int | None = None) -> list[Merged]:
    """Carry out the merges that were put off, of a VM that is off; those that can't be yet stay pending."""
    deletion = plan(vm)
    if not deletion.does_something:
        return []
    await delete_plan.check(vm, [deletion])
    return await delete.delete(vm, deletion, progress, rate=rate)


async def merge_if_off(vm: VM, progress: Progress) -> list[Merged]:
    """Carry out the pending merges before something else, where the VM is off. The lock is held, the journal is empty.

    What keeps them from it, or stops them, is warned of; they stay pending, and hinder nothing. Raise what stopped one that
    can only go forward.
    """
    if not vm.catalog.pending() or not (await vm.driver.state()).is_off:
        return []
    try:
        return await merge_pending(vm, progress)
    except (DiskchainError, OSError) as error:
        if journal.is_open(vm.home) and await recover.put_off(vm) is None:
            raise
        progress.warn(f"what was deleted of {vm.name} is not merged yet: {error}")
        return []


def can_undelete(vm: VM, snapshot: Snapshot) -> bool:
    """Whether a deleted snapshot is all there still."""
    return not snapshot.merge_begun and vm.home.configuration(snapshot.id).is_file()


def to_undelete(vm: VM, name: str) -> Snapshot:
    """Return the deleted snapshot that can be taken back.

    Raise NotFound, Refused when only its layer is left, or its name is taken.
    """
    found = named(vm.catalog.pending(), name)
    if not found:
        raise NotFound(f"{vm.name} has no deleted snapshot {name!r} that waits for its merge",
                       hint=f"diskchain list {vm.name} shows those that do")  # fmt: skip
    whole = [s for s in found if can_undelete(vm, s)]
    if not whole:
        raise Refused(f"only the layer of {name!r} is left; its configuration and memory went when it was deleted",
                      hint="nothing can be taken back")  # fmt: skip
    if any(s.name == whole[-1].name for s in vm.catalog.visible()):
        raise Refused(f"{vm.name} has another snapshot {name!r} by now",
                      hint=f"diskchain rename {vm.name} {name} NEW, then try again")  # fmt: skip
    return whole[-1]


def undelete(vm: VM, name: str) -> Snapshot:
    """Take a delete back whose merge has not begun; return the snapshot. The lock is held. Raise as `to_undelete`."""
    back = replace(to_undelete(vm, name), deleted=False)
    vm.save(vm.catalog.with_snapshot(back))
    return back
