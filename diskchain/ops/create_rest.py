"""What becomes of a create that did not come to its end: asked of the running hypervisor, then finished or undone."""

from __future__ import annotations

from dataclasses import replace

from diskchain.chain.model import Catalog, Image, Memory, Snapshot
from diskchain.drivers.protocol import VMState
from diskchain.errors import ChainDamaged
from diskchain.host import files
from diskchain.ops import layers, quiesce, save_memory, state_files
from diskchain.ops.progress import Progress
from diskchain.ops.vm import VM, definition_at, remove_snapshot_dir
from diskchain.store.journal import Entry


def note_frozen(vm: VM, snapshot: Snapshot) -> Snapshot:
    """Write the snapshot as made, with fingerprints of the images it froze. Can be repeated."""
    snapshot = replace(snapshot, creating=False)
    catalog = layers.freeze(vm.catalog.with_snapshot(snapshot), snapshot.disks.values())
    vm.save(catalog)
    return snapshot


async def resolve_prepared(vm: VM, entry: Entry, progress: Progress) -> tuple[str, str]:
    """From `prepared`, not knowing more: ask a running QEMU; without one the overlays may hold guest writes (forward).

    Return `undone` or `finished`, and a note.
    """
    named = entry.data["snapshot"] in vm.catalog.snapshots
    switched = await _switched(vm, entry)
    if switched is False or (switched is None and not named):
        await undo(vm, entry)
        await _let_run(vm, entry)
        return "undone", "the VM's disks were not switched"
    await wait_for_stray_save(vm, entry, progress)
    await _let_run(vm, entry)
    snapshot = vm.catalog.snapshots[entry.data["snapshot"]]
    captured = state_files.finish_capture(vm, snapshot.id, definition_at(vm.home, snapshot))
    snapshot = note_frozen(vm, replace(snapshot, captured=captured))
    await align(vm, progress)
    if snapshot.memory.status == "saving":
        return without_memory(vm, entry, "interrupted while the VM was paused")
    entry.close()
    return "finished", "the VM's disks were switched"


def without_memory(vm: VM, entry: Entry, why: str) -> tuple[str, str]:
    """The snapshot stays, as a disk snapshot; the reason is kept with it."""
    snapshot = vm.catalog.snapshots[entry.data["snapshot"]]
    files.unlink_durably(save_memory.part_of(vm.home, snapshot.id))
    vm.save(vm.catalog.with_snapshot(replace(snapshot, memory=Memory("failed", reason=why))))
    entry.close()
    return "finished", f"without memory: {why}"


async def align(vm: VM, progress: Progress) -> None:
    """Let the next start write to the active layers; where something else put the VM onto other files, say so."""
    for target in await vm.driver.align(vm.catalog.active_chains()):
        progress.warn(
            f"{target} of {vm.name} is defined with a file that diskchain does not know: diskchain adopt {vm.name}"
        )


async def _switched(vm: VM, entry: Entry) -> bool | None:
    """Whether the VM is on the new overlays, or starts on them next; None when it is off and nobody but the catalog
    decides that. Raise ChainDamaged when it is mixed.
    """
    off = (await vm.driver.state()).is_off
    active = await (vm.driver.next_files() if off else vm.driver.written_files())
    if active is None:
        return None
    new = {t: image.path for t, image in planned_overlays(vm, entry).items()}
    count = sum(active.get(t) == path for t, path in new.items())
    if 0 < count < len(new):
        raise ChainDamaged(f"{count} of {len(new)} disks of {vm.name} were switched; that can't be",
                           hint="stop the VM and keep every file")  # fmt: skip
    return count > 0 or (off and _were_written(vm, entry))


def _were_written(vm: VM, entry: Entry) -> bool:
    """Whether the overlays of a VM that is off were in use, and last: its manager did not live to note the switch."""
    overlays = planned_overlays(vm, entry)
    below = [vm.catalog.images[i].path for t, i in entry.data["before"].items() if t in overlays]
    there = [image.path for image in overlays.values() if image.path.exists()]
    if all(layers.is_empty(path) for path in there):
        return False
    return max(p.stat().st_mtime_ns for p in there) >= max(p.stat().st_mtime_ns for p in below)


async def wait_for_stray_save(vm: VM, entry: Entry, progress: Progress) -> None:
    """A save whose instant is not certain is of no use, but QEMU < 10 must not be told to cancel it."""
    if entry.data["save"] == "never" or (await vm.driver.state()).is_off:
        return
    if vm.driver.save_owner() == entry.data["owner"]:
        await vm.driver.give_up_save()
        await save_memory.wait_until_over(vm, progress)
        await vm.driver.end_memory_save()


async def thaw_what_was_frozen(vm: VM, entry: Entry, progress: Progress) -> None:
    """After our death (and perhaps the watchdog's): a guest that may be frozen runs, and is thawed."""
    if not entry.data.get("quiesce") or (await vm.driver.state()).is_off:
        return
    await wait_for_stray_save(vm, entry, progress)
    await _let_run(vm, entry)
    await quiesce.thaw(vm, progress)


async def _let_run(vm: VM, entry: Entry) -> None:
    """A VM that ran before the pause runs again (the watchdog did that already, unless it was killed too)."""
    if not (await vm.driver.state()).is_off:
        await save_memory.let_do_as_before(vm, entry.data["was"])


# -- undo --------------------------------------------------------------------------------------------------------------


async def undo(vm: VM, entry: Entry) -> None:
    """Take back a create that has not switched any disk: definition first, then the overlays that hold no data."""
    overlays = planned_overlays(vm, entry)
    if await vm.driver.state() is not VMState.STOPPED:
        await vm.driver.forget_prepared(overlays)
        await vm.driver.end_memory_save()
    vm.reload()
    vm.save(without(vm.catalog, entry))
    await vm.driver.align(vm.catalog.active_chains(), [image.path for image in overlays.values()])
    for image in overlays.values():
        if image.path.exists():
            if not layers.is_empty(image.path):
                raise ChainDamaged(
                    f"{image.path} holds data, though no VM ever wrote to it", hint="keep it, and look who wrote to it"
                )
            files.unlink_durably(image.path)
    remove_snapshot_dir(vm, entry.data["snapshot"])
    entry.close()


def without(catalog: Catalog, entry: Entry) -> Catalog:
    """Return the catalog without anything of this create. Can be repeated."""
    gone = entry.data["snapshot"]
    ids = {o["id"] for o in entry.data["overlays"].values()}
    snapshots = {k: s for k, s in catalog.snapshots.items() if k != gone}
    return replace(catalog.without_images(ids), snapshots=snapshots, active=dict(entry.data["before"]),
                   current=entry.data["parent"])  # fmt: skip


def planned_overlays(vm: VM, entry: Entry) -> dict[str, Image]:
    """Return the overlays of a journalled create."""
    return {
        target: Image(
            o["id"], vm.home.disks_dir / o["path"], "qcow2", target, 0, entry.data["before"][target], ours=True
        )
        for target, o in entry.data["overlays"].items()
    }
