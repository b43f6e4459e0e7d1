"""delete = merge, with the VM off: the overlay on F(S) goes back into F(S).

-         VM off; sharers; fingerprints; space                                    nothing changed
intent    catalog: S is deleted, its memory is gone                               redo
commit    under the image guard: check, commit, check, fsync                      redo, only while all still name C
relink    each D: rebase -u, fsync, re-read; catalog: what named C names P        redo
relinked  C to trash, guard released, unlinked                                    redo
done      journal removed
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diskchain.chain.model import Catalog, Image, Memory
from diskchain.chain.plan import Deletion, Fold, Plan, plan_delete
from diskchain.chain.text import size as text_of
from diskchain.errors import Busy, DiskchainError, HasChildren, NoSpace, Unfinished, UnsupportedDisk, VMRunning
from diskchain.host import files, locks, qemu_img
from diskchain.host.fault import point
from diskchain.host.locks import ImageGuard
from diskchain.ops import layers, merge, sharers
from diskchain.ops.approve import approve_chain
from diskchain.ops.merge import Merged
from diskchain.ops.progress import QUIET, Progress
from diskchain.ops.vm import VM, now_utc, remove_snapshot_dir
from diskchain.store import journal
from diskchain.store.journal import Entry

GUARD_WAIT = 10.0  # seconds that an orphaned engine has to go away


def plan_all(catalog: Catalog, names: Sequence[str]) -> list[Deletion]:
    """Given snapshots' names, return their deletions in order, each planned on what the ones before it leave.

    Raise NotFound, Protected, HasChildren.
    """
    deletions = []
    for name in names:
        deletion = plan_delete(catalog, catalog.find(name))
        deletions.append(deletion)
        catalog = after(catalog, deletion)
    return deletions


def after(catalog: Catalog, deletion: Deletion) -> Catalog:
    """Return the catalog as it is when the deletion is done (fingerprints aside)."""
    for fold in deletion.folds:
        catalog = catalog.folded(fold.target, fold.top.id, fold.into.id)
    gone = [i.id for i in (*deletion.unlinks, *deletion.kept)]
    return catalog.without_images(gone).without_snapshot(deletion.snapshot.id)


def _verify(catalog: Catalog, deletion: Deletion) -> None:
    """Look at every layer that a deletion reads, writes, relinks or unlinks. Raise HostileImage, ChainDamaged.

    Not at a base that was merged into already: it is no state, and has no fingerprint to keep.
    """
    for fold in deletion.folds if not deletion.snapshot.merge_begun else ():
        layers.verify_chain(catalog, fold.top.id)
        for overlay in fold.overlays:
            image = catalog.images[overlay.id]  # as it is now: a planned one may stand on what is still to be merged
            layers.verify_overlay(image, catalog.images[image.backing or ""])
    for image in deletion.unlinks:
        layers.verify_frozen(image)


def to_plan(vm: VM, deletions: Sequence[Deletion]) -> Plan:
    """Return the plan of some deletions in words and figures. Raise ChainDamaged, HostileImage."""
    for deletion in deletions:
        _verify(vm.catalog, deletion)
    steps, moved, lost = [], 0, []
    for deletion in deletions:
        for fold in deletion.folds:
            held = files.allocated_bytes(fold.top.path)
            moved += held
            steps.append(f"{fold.target}: fold {text_of(held)} of {fold.top.path.name} into {fold.into.path.name}")
        steps += [
            f"{i.target}: delete {i.path.name} ({text_of(files.allocated_bytes(i.path))})" for i in deletion.unlinks
        ]
        steps += [
            f"{i.target}: let go of {i.path.name}; the file stays (diskchain did not make it)" for i in deletion.kept
        ]
        if deletion.unlinks:
            lost.append(f"the disks' state of {deletion.snapshot.name}")
        if deletion.snapshot.memory.saved:
            lost.append(f"the memory of {deletion.snapshot.name} ({text_of(deletion.snapshot.memory.bytes)})")
    names = ", ".join(repr(d.snapshot.name) for d in deletions)
    return Plan(f"{vm.name}: delete {names}", tuple(steps), bytes=moved, space_needed=_needed(deletions),
                lost=tuple(lost), point_of_no_return="when the first merge begins (then forward only)")  # fmt: skip


def _needed(deletions: Sequence[Deletion]) -> int:
    return sum(merge.growth(f.top, f.into) for d in deletions for f in d.folds)


async def check(vm: VM, deletions: Sequence[Deletion]) -> None:
    """Raise what stands in the way of the deletions: VMRunning, HasSharers, ChainDamaged, UnsupportedDisk, NoSpace."""
    if not (await vm.driver.state()).is_off:
        first = deletions[0].snapshot.name
        raise VMRunning(f"{vm.name} is on; a merge needs it to be off",
                        hint=f"diskchain stop {vm.name}, or: diskchain delete --restart {vm.name} {first}")  # fmt: skip
    await vm.driver.refuse("merge")
    await vm.verify_definition()
    mine = list(vm.catalog.images.values())
    for deletion in deletions:
        await asyncio.to_thread(_verify, vm.catalog, deletion)
        for image in deletion.unlinks:
            sharers.refuse_overlays(vm, image, mine)
        for fold in deletion.folds:
            await _refuse_used(fold)
            sharers.refuse_shared(vm, fold.into, mine)
            sharers.refuse_shared(vm, fold.top, mine)
            _refuse_what_a_merge_loses(fold)
    _check_space(deletions)


async def _refuse_used(fold: Fold) -> None:
    """Raise Busy when somebody has a layer open; a QEMU that was just killed gets a moment to let go."""
    end = time.monotonic() + 2.0
    for path in (fold.top.path, fold.into.path):
        while locks.image_in_use(path):
            if time.monotonic() < end:
                await asyncio.sleep(0.05)
                continue
            raise Busy(f"{path} is in use by {locks.open_by(path)}", hint="end that program first")


def _refuse_what_a_merge_loses(fold: Fold) -> None:
    for image in approve_chain(fold.top.path, fold.top.fmt)[:2]:
        if image.header and (image.header.has_bitmaps or image.header.snapshots):
            what = "persistent dirty bitmaps" if image.header.has_bitmaps else "internal snapshots"
            raise UnsupportedDisk(f"{image.path} holds {what}; a merge would lose them",
                                  hint="qemu-img bitmap --remove / qemu-img snapshot -d, if nobody needs them")  # fmt: skip


def _check_space(deletions: Sequence[Deletion]) -> None:
    for deletion in deletions:
        for fold in deletion.folds:
            freed = deletion.snapshot.memory.bytes if deletion.snapshot.memory.saved else 0
            need = merge.growth(fold.top, fold.into)
            free = files.free_bytes(fold.into.path)
            if need > free + freed:
                raise NoSpace(
                    f"folding {fold.top.path.name} into {fold.into.path.name} needs up to {text_of(need)}, "
                    f"{text_of(free)} are free",
                    hint=f"free {text_of(need - free)} on {fold.into.path.parent}",
                )


async def delete(vm: VM, deletion: Deletion, progress: Progress = QUIET) -> list[Merged]:
    """Delete one snapshot of a VM that is off (see `check`). The VM's lock is held, its journal is empty.

    Raise Unfinished when the merge stopped half-way: nothing is lost, `recover` goes on.
    """
    entry = journal.begin(vm.home, "delete", deletion.snapshot.id, now_utc(), _journal_data(deletion))
    try:
        return await carry_out(vm, entry, progress)
    except (Busy, VMRunning) as error:  # somebody came between the check and the guard
        raise Unfinished(f"{error.message}; the snapshot is deleted, its merge waits",
                         hint=f"end that, then: diskchain recover {vm.name}") from error  # fmt: skip


def _journal_data(deletion: Deletion) -> dict[str, Any]:
    return {
        "snapshot": deletion.snapshot.id,
        "name": deletion.snapshot.name,
        "folds": [{"target": f.target, "top": f.top.id, "into": f.into.id, "overlays": [d.id for d in f.overlays],
                   "top_path": str(f.top.path)} for f in deletion.folds],
        "unlinks": [{"id": i.id, "path": str(i.path), "target": i.target} for i in deletion.unlinks],
        "kept": [i.id for i in deletion.kept],
        "unclean": deletion.snapshot.merge_begun,
    }  # fmt: skip


async def carry_out(vm: VM, entry: Entry, progress: Progress) -> list[Merged]:
    """Go on from whatever state the entry is in, to the end."""
    merged: list[Merged] = []
    if entry.state == "intent":
        _tombstone(vm, entry)
    if entry.state != "relinked" and _folds(vm.catalog, entry):
        merged = await _fold_all(vm, entry, progress)
    elif entry.state != "relinked":
        _forget_layers(vm, entry)
        entry.advance("relinked")
    gone = [*(vm.home.disks_dir / f["top_path"] for f in entry.data["folds"]),
            *(vm.home.disks_dir / u["path"] for u in entry.data["unlinks"])]  # fmt: skip
    layers.to_trash(gone)
    point("delete.trashed")
    await layers.empty_trash(gone)
    remove_snapshot_dir(vm, entry.data["snapshot"])
    entry.close()
    vm.home.fill_reserve()
    merged += [Merged(u["target"], u["path"], "", 0, 0.0, "unlink") for u in entry.data["unlinks"]]
    return merged


def _tombstone(vm: VM, entry: Entry) -> None:
    """The snapshot is no state any more, durably, before its frozen images change; its memory goes at once."""
    snapshot = vm.catalog.snapshots.get(entry.data["snapshot"])
    if snapshot is None:
        return  # we died after the catalog of afterwards was written
    vm.save(vm.catalog.with_snapshot(replace(snapshot, deleted=True, memory=Memory())))
    files.unlink_durably(vm.home.memory(snapshot.id))
    point("delete.tombstoned")


def _folds(catalog: Catalog, entry: Entry) -> list[Fold]:
    images = catalog.images
    return [
        Fold(
            f["target"],
            images[f["top"]],
            images[f["into"]],
            tuple(images[d] for d in f["overlays"] if d in images),
            tuple(catalog.chain(f["into"])[1:]),
        )
        for f in entry.data["folds"]
        if f["top"] in images
    ]


async def _fold_all(vm: VM, entry: Entry, progress: Progress) -> list[Merged]:
    """Commit every disk, relink every disk, put the tops away: all others are held off from the first to the last."""
    folds = _folds(vm.catalog, entry)
    paths = [path for fold in folds for path in (fold.into.path, fold.top.path)]
    merged: list[Merged] = []
    with locks.guard_images(paths, wait=GUARD_WAIT, users=locks.open_by) as guard:
        if not (await vm.driver.state()).is_off:
            raise VMRunning(f"{vm.name} was started a moment ago", hint=f"stop it; then: diskchain recover {vm.name}")
        if entry.state != "relink":
            merged = await _commit_all(vm, entry, folds, guard, progress)
            entry.advance("relink")
        else:
            await _commit_again(vm, folds, guard, progress)
        await _relink_all(vm, entry)
        _forget_layers(vm, entry)
        entry.advance("relinked")
        layers.to_trash(fold.top.path for fold in folds)
    return merged


async def _commit_all(vm: VM, entry: Entry, folds: list[Fold], guard: ImageGuard, progress: Progress) -> list[Merged]:
    """Move the data of every disk. Raise Unfinished when one did not end well."""
    unclean = entry.data["unclean"] or entry.state == "commit"
    if entry.state != "commit":
        entry.advance("commit")
    merged = []
    try:
        for index, fold in enumerate(folds):
            merged.append(await merge.fold(fold, guard, 2 * index, unclean=unclean, progress=progress))
            point("delete.committed-one")
    except (DiskchainError, OSError) as error:
        entry.data["unclean"] = True
        with contextlib.suppress(DiskchainError):
            entry.note()
        text = error.message if isinstance(error, DiskchainError) else str(error)
        raise Unfinished(f"the merge stopped: {text}; nothing is lost",
                         hint=f"put right the cause, then: diskchain recover {vm.name}") from error  # fmt: skip
    return merged


async def _commit_again(vm: VM, folds: list[Fold], guard: ImageGuard, progress: Progress) -> None:
    """Recovery from `relink`: a top that the VM's definition still names may have been written since (somebody else than
    us can have started it): its data goes down once more. What names P already is the truth (a redo would put old over new).
    """
    named = await vm.driver.next_files() or {}
    for index, fold in enumerate(folds):
        if named.get(fold.target) == fold.top.path:
            await merge.fold(fold, guard, 2 * index, unclean=True, progress=progress)


async def _relink_all(vm: VM, entry: Entry) -> None:
    """Everything that named C names P. Can be repeated; never goes back to the commit."""
    for fold in _folds(vm.catalog, entry):
        for overlay in fold.overlays:
            await _relink(overlay, fold.into)
            point("delete.relinked-one")
    catalog, folds = vm.catalog, _folds(vm.catalog, entry)
    for fold in folds:
        catalog = catalog.folded(fold.target, fold.top.id, fold.into.id)
    await vm.driver.align(catalog.active_chains(), [fold.top.path for fold in folds])
    point("delete.aligned")


async def _relink(overlay: Image, into: Image) -> None:
    if not layers.names_backing(overlay.path, into):
        name = qemu_img.backing_name_for(overlay.path, into.path)
        await qemu_img.rebase(overlay.path, name, into.fmt)
        files.fsync_file(overlay.path)
    layers.verify_reference(overlay, into)


def _forget_layers(vm: VM, entry: Entry) -> None:
    """Write the catalog of afterwards: survivors name P, with fresh fingerprints. Can be repeated."""
    catalog = vm.catalog
    folds = _folds(catalog, entry)
    for fold in folds:
        catalog = catalog.folded(fold.target, fold.top.id, fold.into.id)
    gone = [u["id"] for u in entry.data["unlinks"]] + entry.data["kept"]
    catalog = catalog.without_images(gone)
    if entry.data["snapshot"] in catalog.snapshots:
        catalog = catalog.without_snapshot(entry.data["snapshot"])
    changed = {f.into.id for f in folds} | {d.id for f in folds for d in f.overlays}
    active = set(catalog.active.values())
    catalog = layers.freeze(catalog, changed - active)
    catalog = catalog.with_images(replace(catalog.images[i], fingerprint=None) for i in changed & active)
    vm.save(catalog)


async def make_bootable(vm: VM, entry: Entry) -> None:
    """Wait for an orphaned engine to go, and put the metadata of both layers right, before a VM starts on them."""
    folds = _folds(vm.catalog, entry)
    if entry.state != "commit" or not folds:
        return
    paths = [path for fold in folds for path in (fold.into.path, fold.top.path)]
    with locks.guard_images(paths, wait=GUARD_WAIT, users=locks.open_by) as guard:
        for index, fold in enumerate(folds):
            await merge.make_whole(fold, guard, 2 * index)


def defer(vm: VM, entry: Entry) -> None:
    """`start` wins: an interrupted commit becomes a pending merge; its plan is made anew when it is done."""
    snapshot = vm.catalog.snapshots[entry.data["snapshot"]]
    begun = entry.state == "commit" or entry.data["unclean"]
    catalog = vm.catalog.with_snapshot(replace(snapshot, deleted=True, merge_begun=begun, memory=Memory()))
    if begun:  # these images are no state of their own any more; what they look like says nothing
        catalog = catalog.with_images(replace(f.into, fingerprint=None) for f in _folds(catalog, entry))
    vm.save(catalog)
    files.unlink_durably(vm.home.memory(snapshot.id))
    entry.close()


async def merge_pending(vm: VM, progress: Progress) -> list[Merged]:
    """Carry out the merges that were put off, of a VM that is off; those that can't be yet stay pending."""
    merged: list[Merged] = []
    for snapshot in vm.catalog.pending():
        try:
            deletion = plan_delete(vm.catalog, replace(snapshot, protected=False))
        except HasChildren as error:
            progress.warn(f"the merge of {snapshot.name} stays pending: {error.message}")
            continue
        await check(vm, [deletion])
        merged += await delete(vm, deletion, progress)
    return merged
