"""Deleted, and not merged yet: carry it out, or take it back."""

from __future__ import annotations

from dataclasses import replace

from diskchain.chain.deletion import Deletion, plan_deletion
from diskchain.chain.model import Snapshot
from diskchain.errors import NotFound, Refused
from diskchain.ops import delete, delete_plan, methods
from diskchain.ops.merge import Merged
from diskchain.ops.progress import Progress
from diskchain.ops.vm import VM


def plan(vm: VM) -> Deletion:
    """Return what can be carried out now of what was deleted before."""
    return methods.choose_all(vm.catalog, [plan_deletion(vm.catalog, [])])[0]


async def merge_pending(vm: VM, progress: Progress, *, rate: int | None = None) -> list[Merged]:
    """Carry out the merges that were put off, of a VM that is off; those that can't be yet stay pending."""
    deletion = plan(vm)
    if not deletion.does_something:
        return []
    await delete_plan.check(vm, [deletion])
    return await delete.delete(vm, deletion, progress, rate=rate)


def can_undelete(vm: VM, snapshot: Snapshot) -> bool:
    """Whether a deleted snapshot is all there still."""
    return not snapshot.merge_begun and (vm.home.snapshot_dir(snapshot.id) / "machine.json").is_file()


def to_undelete(vm: VM, name: str) -> Snapshot:
    """Return the deleted snapshot that can be taken back.

    Raise NotFound, Refused when only its layer is left, or its name is taken.
    """
    found = [s for s in vm.catalog.pending() if name in (s.name, s.id)]
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
