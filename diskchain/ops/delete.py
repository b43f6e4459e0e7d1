"""delete, accept, merge: layers are merged, or unlinked, with the VM off where data is moved.

-         VM off; sharers; fingerprints; space                                    nothing changed
intent    catalog: the snapshots are deleted, their memory is gone                redo
commit    under the image guard: check, move the data, check, fsync               redo, only while all still name C
relink    each D: rebase -u, fsync, re-read; catalog: what named C names P        redo
relinked  C to trash, guard released, unlinked                                    redo
done      journal removed

C = the layers that go; P = what they are folded into. A pull goes the other way: D takes what C shows, and names what C
stood on; until `relink` D names C (and is made to again whenever it is interrupted), and C is whole to the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diskchain.chain.deletion import Deletion, Fold, Pull, moved, with_survivors, without_snapshots
from diskchain.chain.model import Catalog, Image, Memory
from diskchain.errors import Busy, ChainDamaged, DiskchainError, HostileImage, Unfinished, VMRunning
from diskchain.host import files, locks, qemu_img
from diskchain.host.fault import point
from diskchain.host.locks import ImageGuard
from diskchain.host.qemu_img import Pace
from diskchain.ops import layers, merge, right_of_way
from diskchain.ops.merge import Merged
from diskchain.ops.progress import QUIET, Progress
from diskchain.ops.vm import VM, new_id, now_utc, remove_snapshot_dir
from diskchain.store import journal
from diskchain.store.journal import Entry


async def delete(
    vm: VM, deletion: Deletion, progress: Progress = QUIET, *, name: str = "", rate: int | None = None
) -> list[Merged]:
    """Carry out a deletion (see delete_plan.check). The VM's lock is held, its journal is empty. `name`: for messages.

    `rate`: bytes a second that a merge may write at most; kept in the journal, so `recover` keeps it, too.
    Raise Unfinished when a merge stopped half-way: nothing is lost, `recover` goes on.
    """
    catalog = vm.catalog
    for snapshot in deletion.later:
        catalog = catalog.with_snapshot(replace(catalog.snapshots[snapshot.id], deleted=True))
    if deletion.later:
        vm.save(catalog)
    if not (deletion.snapshots or deletion.waits or deletion.moves_data):
        return []
    data = journal_data(deletion)
    entry = journal.begin(vm.home, "delete", new_id(), now_utc(), {**data, "name": name or data["name"], "rate": rate})
    try:
        return await carry_out(vm, entry, progress)
    except (Busy, VMRunning) as error:  # somebody came between the check and the guard
        raise Unfinished(f"{error.message}; what was deleted stays so, its merge waits",
                         hint=f"end that, then: diskchain recover {vm.name}") from error  # fmt: skip


def journal_data(deletion: Deletion) -> dict[str, Any]:
    """Return what a journal entry keeps of a deletion."""
    all_of_them = (*deletion.snapshots, *deletion.waits)
    return {
        "snapshots": [s.id for s in deletion.snapshots],
        "waits": [s.id for s in deletion.waits],
        "name": ", ".join(s.name for s in all_of_them),
        "folds": [{"target": f.target, "top": f.top.id, "into": f.into.id, "through": _ids(f.through),
                   "overlays": _ids(f.overlays), "method": f.method,
                   "gone_paths": [str(i.path) for i in f.gone]} for f in deletion.folds],
        "pulls": [{"target": p.target, "gone": _ids(p.gone), "overlays": _ids(p.overlays),
                   "below": p.below.id if p.below else None,
                   "gone_paths": [str(i.path) for i in p.gone if i.ours]} for p in deletion.pulls],
        "unlinks": [{"id": i.id, "path": str(i.path), "target": i.target} for i in deletion.unlinks],
        "kept": _ids(deletion.kept),
        "unclean": any(s.merge_begun for s in deletion.snapshots),
    }  # fmt: skip


def _ids(images: Sequence[Image]) -> list[str]:
    return [i.id for i in images]


def of_entry(catalog: Catalog, entry: Entry) -> Deletion:
    """Return what is still to be done of an entry: merges whose layers the catalog still has."""
    images, data = catalog.images, entry.data
    snapshots = [catalog.snapshots[i] for i in _snapshot_ids(entry) if i in catalog.snapshots]
    folds = [
        Fold(f["target"], images[f["top"]], images[f["into"]], _known(catalog, f["overlays"]),
             _known(catalog, f.get("through", [])), tuple(catalog.chain(f["into"])[1:]), f.get("method", "commit"))
        for f in data["folds"] if f["top"] in images
    ]  # fmt: skip
    pulls = [
        Pull(p["target"], _known(catalog, p["gone"]), _known(catalog, p["overlays"]),
             images[p["below"]] if p["below"] else None, tuple(catalog.chain(p["gone"][-1])[1:]))
        for p in data.get("pulls", []) if p["gone"][0] in images
    ]  # fmt: skip
    unlinks = _known(catalog, [u["id"] for u in data["unlinks"]])
    waits = tuple(catalog.snapshots[i] for i in data.get("waits", []) if i in catalog.snapshots)
    pulls = with_survivors(folds, pulls)
    return Deletion(tuple(snapshots), tuple(folds), tuple(pulls), unlinks, _known(catalog, data["kept"]), waits)


def _snapshot_ids(entry: Entry) -> list[str]:
    data = entry.data  # an entry of an earlier version has one snapshot
    return list(data["snapshots"]) if "snapshots" in data else [data["snapshot"]]


def _known(catalog: Catalog, ids: Sequence[str]) -> tuple[Image, ...]:
    return tuple(catalog.images[i] for i in ids if i in catalog.images)


def moves_data(entry: Entry) -> bool:
    """Whether an entry merges layers, so that the VM must be off."""
    return bool(entry.data["folds"] or entry.data.get("pulls"))


async def carry_out(vm: VM, entry: Entry, progress: Progress) -> list[Merged]:
    """Go on from whatever state the entry is in, to the end. Raise Unfinished for every failure of a disk or a program:
    the snapshots may be gone already. (Busy, VMRunning, ChainDamaged say themselves what is to be done.)
    """
    try:
        return await _carry_out(vm, entry, progress)
    except (Unfinished, Busy, VMRunning, ChainDamaged, HostileImage):
        raise
    except (DiskchainError, OSError) as error:
        raise Unfinished(f"the delete stopped: {error}; nothing is lost",
                         hint=f"put right the cause, then: diskchain recover {vm.name}") from error  # fmt: skip


async def _carry_out(vm: VM, entry: Entry, progress: Progress) -> list[Merged]:
    merged: list[Merged] = []
    if entry.state == "intent":
        _tombstone(vm, entry)
    if entry.state != "relinked" and of_entry(vm.catalog, entry).moves_data:
        merged = await _move_all(vm, entry, progress)
    elif entry.state != "relinked":
        _forget_layers(vm, entry)
        entry.advance("relinked")
    gone = [vm.home.disks_dir / path for path in _gone_paths(entry)]
    await layers.put_away(entry, gone)
    for snapshot_id in (*_snapshot_ids(entry), *entry.data.get("waits", [])):
        remove_snapshot_dir(vm, snapshot_id)
    entry.close()
    vm.home.fill_reserve()
    merged += [Merged(u["target"], u["path"], "", 0, 0.0, "unlink") for u in entry.data["unlinks"]]
    return merged


def _gone_paths(entry: Entry) -> Iterator[str]:
    for part in (*entry.data["folds"], *entry.data.get("pulls", [])):
        yield from part["gone_paths"] if "gone_paths" in part else [part["top_path"]]
    for unlinked in entry.data["unlinks"]:
        yield unlinked["path"]


def _tombstone(vm: VM, entry: Entry) -> None:
    """The snapshots are no states any more, durably, before their frozen images change; their memory goes at once.

    An overlay that a pull writes to is no longer as it was frozen, until the pull is done.
    """
    catalog = vm.catalog
    ids = [i for i in (*_snapshot_ids(entry), *entry.data.get("waits", [])) if i in catalog.snapshots]
    written = [o for pull in of_entry(catalog, entry).pulls for o in pull.overlays]
    if not (ids or written):
        return  # we died after the catalog of afterwards was written
    for snapshot_id in ids:
        catalog = catalog.with_snapshot(replace(catalog.snapshots[snapshot_id], deleted=True, memory=Memory()))
    vm.save(catalog.with_images(replace(o, fingerprint=None) for o in written))
    for snapshot_id in ids:
        files.unlink_durably(vm.home.memory(snapshot_id))
    point("delete.tombstoned")


# -- moving data -------------------------------------------------------------------------------------------------------


def _written(deletion: Deletion) -> list[Path]:
    """The layers that we alone may use: each fold's `into`, what goes, and what then names `into`; each pull's overlays.

    One can be more than one of these: what is left between two layers that go is an overlay here, the next `into` there.
    """
    paths = [i.path for fold in deletion.folds for i in (fold.into, *fold.gone, *fold.overlays)]
    return list(dict.fromkeys(paths + [o.path for pull in deletion.pulls for o in pull.overlays]))


def _read(deletion: Deletion) -> list[Path]:
    """The layers that nobody else may write: what pulls read from."""
    return list(dict.fromkeys(i.path for pull in deletion.pulls for i in pull.gone))


def _guarded(deletion: Deletion) -> contextlib.AbstractContextManager[ImageGuard]:
    written = _written(deletion)
    readers = [path for path in _read(deletion) if path not in written]
    return locks.guard_images(written, wait=locks.GUARD_WAIT, users=locks.open_by, readers=readers)


async def _move_all(vm: VM, entry: Entry, progress: Progress) -> list[Merged]:
    """Merge every disk, relink every disk, put layers away: all others are held off from the first to the last."""
    deletion = of_entry(vm.catalog, entry)
    merged: list[Merged] = []
    with _guarded(deletion) as guard:
        await _require_off(vm)
        if entry.state != "relink":
            async with right_of_way.yielded(vm, entry, progress) as told:
                merged = await _merge_all(vm, entry, deletion, guard, told)
            await _require_off(vm)  # a QEMU that takes no locks (facts.md) was not held off by the guard
            entry.advance("relink")
        else:
            await _merge_again(vm, entry, deletion, guard, progress)
        await _relink_all(vm, entry, guard)
        _forget_layers(vm, entry)
        entry.advance("relinked")
        layers.to_trash(vm.home.disks_dir / path for path in _gone_paths(entry))
    return merged


async def _require_off(vm: VM) -> None:
    if not (await vm.driver.state()).is_off:
        raise VMRunning(f"{vm.name} was started a moment ago", hint=f"stop it; then: diskchain recover {vm.name}")


async def _merge_all(vm: VM, entry: Entry, deletion: Deletion, guard: ImageGuard,
                     progress: Progress) -> list[Merged]:  # fmt: skip
    """Move the data of every disk. Raise Unfinished when one did not end well."""
    unclean, pace = entry.data["unclean"] or entry.state == "commit", _pace(vm, entry)
    if entry.state != "commit":
        entry.advance("commit")
    merged = []
    try:
        for fold in deletion.folds:
            merged.append(await merge.fold(fold, guard, unclean=unclean, progress=progress, pace=pace))
            point("delete.committed-one")
        for pull in deletion.pulls:
            for overlay in pull.overlays:
                merged.append(await merge.pull(pull, overlay, guard, unclean=unclean, progress=progress, pace=pace))
                point("delete.committed-one")
    except (DiskchainError, OSError) as error:
        entry.data["unclean"] = True
        with contextlib.suppress(DiskchainError):
            entry.note()
        raise Unfinished(f"the merge stopped: {error}; nothing is lost",
                         hint=f"put right the cause, then: diskchain recover {vm.name}") from error  # fmt: skip
    return merged


def _pace(vm: VM, entry: Entry) -> Pace:
    return Pace(entry.data.get("rate"), vm.config.merge.io_priority == "idle")


async def _merge_again(vm: VM, entry: Entry, deletion: Deletion, guard: ImageGuard, progress: Progress) -> None:
    """Recovery from `relink`: a top that the VM's definition still names may have been written since (somebody else than
    us can have started it): its data goes down once more. What names P already is the truth (a redo would put old over new).
    """
    named = await vm.driver.next_files() or {}
    for fold in deletion.folds:
        if fold.target in named and files.is_same(named[fold.target], fold.top.path):
            await merge.fold(fold, guard, unclean=True, progress=progress, pace=_pace(vm, entry))


async def _relink_all(vm: VM, entry: Entry, guard: ImageGuard) -> None:
    """Everything that named C names what it stands on now. Can be repeated; never goes back to the merge."""
    deletion = of_entry(vm.catalog, entry)
    for fold in deletion.folds:
        for overlay in fold.overlays:
            await _relink(overlay, fold.into, guard)
            point("delete.relinked-one")
    for pull in deletion.pulls:
        for overlay in pull.overlays:
            await merge.settle(pull, overlay, guard)
            point("delete.relinked-one")
    was = [layer.path for fold in deletion.folds for layer in fold.gone]
    await vm.driver.align(moved(vm.catalog, deletion).active_chains(), was)
    point("delete.aligned")


async def _relink(overlay: Image, into: Image, guard: ImageGuard) -> None:
    if not layers.names_backing(overlay.path, into):
        name = qemu_img.backing_name_for(overlay.path, into.path)
        await qemu_img.rebase_node(qemu_img.unlocked(overlay.path, overlay.fmt), name, into.fmt)
        guard.sync(overlay.path)
    layers.verify_reference(overlay, into)


def _forget_layers(vm: VM, entry: Entry) -> None:
    """Write the catalog of afterwards: survivors name P, with fresh fingerprints. Can be repeated."""
    deletion = of_entry(vm.catalog, entry)
    catalog = without_snapshots(moved(vm.catalog, deletion), _snapshot_ids(entry))
    changed = {f.into.id for f in deletion.folds} | {d.id for f in deletion.folds for d in f.overlays}
    changed |= {d.id for p in deletion.pulls for d in p.overlays}
    changed &= catalog.images.keys()  # an overlay of one merge can be what goes in another
    active = set(catalog.active.values())
    catalog = layers.freeze(catalog, changed - active)
    catalog = catalog.with_images(replace(catalog.images[i], fingerprint=None) for i in changed & active)
    vm.save(catalog)


# -- put off -----------------------------------------------------------------------------------------------------------


async def make_bootable(vm: VM, entry: Entry) -> None:
    """Wait for an orphaned engine to go, and put the metadata of the layers right, before a VM starts on them.

    What a pull had already relinked stands on what it read from again: that is what the catalog says.
    """
    deletion = of_entry(vm.catalog, entry)
    if entry.state != "commit" or not deletion.moves_data:
        return
    with _guarded(deletion) as guard:
        for fold in deletion.folds:
            await merge.make_whole(fold, guard)
        for pull in deletion.pulls:
            for overlay in pull.overlays:
                await merge.put_back(pull, overlay, guard)


def defer(vm: VM, entry: Entry) -> None:
    """`start` wins: an interrupted merge becomes a pending one; its plan is made anew when it is done."""
    deletion, catalog = of_entry(vm.catalog, entry), vm.catalog
    begun = entry.state == "commit" or entry.data["unclean"]
    for snapshot in (*deletion.snapshots, *deletion.waits):
        begun_too = begun and snapshot in deletion.snapshots
        catalog = catalog.with_snapshot(replace(snapshot, deleted=True, merge_begun=begun_too, memory=Memory()))
    if begun:  # these images are no state of their own any more; what they look like says nothing
        catalog = catalog.with_images(replace(f.into, fingerprint=None) for f in deletion.folds)
    pulled = {o.id for p in deletion.pulls for o in p.overlays} - set(catalog.active.values())
    vm.save(layers.freeze(catalog, pulled))
    for snapshot in (*deletion.snapshots, *deletion.waits):
        files.unlink_durably(vm.home.memory(snapshot.id))
    entry.close()
