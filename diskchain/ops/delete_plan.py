"""What a delete, an accept or a merge is going to do, in words and figures; and what stands in its way."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from diskchain.chain.deletion import Deletion, Fold, Pull, after, plan_deletion
from diskchain.chain.model import Catalog, Image, Snapshot
from diskchain.chain.plan import Plan
from diskchain.chain.text import size as text_of
from diskchain.errors import Busy, DiskchainError, NoSpace, UnsupportedDisk, VMRunning
from diskchain.host import files, locks
from diskchain.ops import layers, merge, rights, room, sharers
from diskchain.ops.approve import header, virtual_size
from diskchain.ops.look import MERGE_RATE
from diskchain.ops.vm import VM

CLONE_RATE = 10 << 30  # bytes a second, where blocks are shared


def verify(catalog: Catalog, deletion: Deletion) -> None:
    """Look at every layer that a deletion reads, writes, relinks or unlinks. Raise HostileImage, ChainDamaged.

    Not at a base that was merged into already: it is no state, and has no fingerprint to keep.
    """
    begun = any(s.merge_begun for s in deletion.snapshots)
    for fold in deletion.folds if not begun else ():
        layers.verify_chain(catalog, fold.top.id)
        _verify_overlays(catalog, fold.overlays)
    for pull in deletion.pulls:
        for overlay in pull.overlays:
            if overlay.id in catalog.images and catalog.images[overlay.id].backing == pull.gone[0].id:
                layers.verify_chain(catalog, overlay.id)
    for image in deletion.unlinks:
        layers.verify_frozen(image)


def _verify_overlays(catalog: Catalog, overlays: Sequence[Image]) -> None:
    for overlay in overlays:
        image = catalog.images[overlay.id]  # as it is now: a planned one may stand on what is still to be merged
        layers.verify_overlay(image, catalog.images[image.backing or ""])


# -- words and figures -------------------------------------------------------------------------------------------------


def to_plan(vm: VM, deletions: Sequence[Deletion], *, title: str = "", rate: int | None = None) -> Plan:
    """Return the plan of some deletions in words and figures. Their layers are verified (methods.choose_all did it).

    `rate`: bytes a second that may be written at most.
    """
    steps, lost = ([step for d in deletions for step in _steps(d)], [text for d in deletions for text in _lost(d)])
    put_off = _put_off(vm.catalog, deletions)
    steps += [f"when {vm.name} is off: {step}" for d in put_off for step in _steps(d)]
    lost += [f"{_memory(s)}, when it is merged" for d in deletions for s in d.later if s.memory.saved]
    title, deletions = title or _title(vm.name, deletions), [*deletions, *put_off]
    moved = sum(_moved(d) for d in deletions)
    moving = any(d.moves_data for d in deletions)
    needs = room.needs((path.parent, count) for d in deletions for path, count in _growths(d))
    return Plan(
        title, tuple(steps) or ("nothing is to be done",), bytes=moved, space_needed=sum(n.bytes for n in needs), needs=needs,
        time_estimate_s=round(sum(_seconds(d, min(rate or MERGE_RATE, MERGE_RATE)) for d in deletions), 1),
        lost=tuple(lost),
        point_of_no_return="when the first merge begins (then forward only)" if moving else "",
    )  # fmt: skip


def _title(vm: str, deletions: Sequence[Deletion]) -> str:
    named = [s for d in deletions for s in (*d.snapshots, *d.waits, *d.later)]
    now = ", ".join(repr(s.name) for s in named if not s.deleted)
    before = ", ".join(repr(s.name) for s in named if s.deleted)
    if not now:
        return f"{vm}: merge {before} (deleted before)"
    return f"{vm}: delete {now}" + (f"; also merges {before} (deleted before)" if before else "")


def _put_off(catalog: Catalog, deletions: Sequence[Deletion]) -> list[Deletion]:
    """What is merged when the VM is off, of what is only recorded now; nothing where the files can't tell."""
    if not any(d.later for d in deletions):
        return []
    for deletion in deletions:
        catalog = after(catalog, deletion)
    with contextlib.suppress(DiskchainError, OSError):
        planned = plan_deletion(catalog, [])
        verify(catalog, planned)
        return [planned]
    return []


def _steps(deletion: Deletion) -> Iterator[str]:
    for fold in deletion.folds:
        names = ", ".join(i.path.name for i in fold.gone)
        yield f"{fold.target}: fold {text_of(_held(fold.gone))} of {names} into {fold.into.path.name} ({fold.method})"
    for pull in deletion.pulls:
        names = ", ".join(i.path.name for i in pull.gone)
        for overlay in pull.overlays:
            count = text_of(merge.pulled(pull, overlay))
            yield f"{pull.target}: copy up to {count} of {names} up into {overlay.path.name} ({pull.method})"
        for image in pull.gone:
            yield f"{pull.target}: " + (f"delete {image.path.name}" if image.ours else _let_go(image))
    for image in deletion.unlinks:
        yield f"{image.target}: delete {image.path.name} ({text_of(files.allocated_bytes(image.path))})"
    for image in deletion.kept:
        yield f"{image.target}: {_let_go(image)}"
    for snapshot in deletion.waits:
        yield (f"{snapshot.name!r}: let go of its name, configuration and memory; several layers stand on its layer, "
               "which stays until one is left (--copy: copied into each of them now)")  # fmt: skip
    for snapshot in deletion.later:
        yield f"{snapshot.name!r}: recorded; undelete takes it back until it is merged"


def _let_go(image: Image) -> str:
    return f"let go of {image.path.name}; the file stays (diskchain did not make it)"


def _lost(deletion: Deletion) -> Iterator[str]:
    gone = {i.id for i in deletion.unlinks}
    for snapshot in (*deletion.snapshots, *deletion.waits):
        if gone & set(snapshot.disks.values()) and not snapshot.deleted:
            yield f"the disks' state of {snapshot.name!r}"
        if snapshot.memory.saved:
            yield _memory(snapshot)


def _memory(snapshot: Snapshot) -> str:
    return f"the memory of {snapshot.name!r} ({text_of(snapshot.memory.bytes)})"


def _held(images: Sequence[Image]) -> int:
    return sum(files.allocated_bytes(i.path) for i in images)


def _seconds(deletion: Deletion, rate: int) -> float:
    """Roughly; blocks that are shared cost by the piece, not by the byte."""
    shared = sum(_held(f.gone) for f in deletion.folds if f.method == "clone")
    return (_moved(deletion) - shared) / rate + shared / CLONE_RATE


def _moved(deletion: Deletion) -> int:
    down = sum(_held(fold.gone) for fold in deletion.folds)
    return down + sum(merge.pulled(pull, overlay) for pull in deletion.pulls for overlay in pull.overlays)


# -- what stands in the way --------------------------------------------------------------------------------------------


async def check(vm: VM, deletions: Sequence[Deletion], *, space: bool = True) -> None:
    """Raise what stands in the way of the deletions: VMRunning, HasSharers, ChainDamaged, UnsupportedDisk, Refused, NoSpace.

    Without `space` room is not looked at: the merge is written elsewhere.
    """
    if any(d.moves_data for d in deletions):
        if not (await vm.driver.state()).is_off:
            raise VMRunning(f"{vm.name} is on; a merge needs it to be off",
                            hint=f"diskchain stop {vm.name}, or add --restart")  # fmt: skip
        await vm.driver.refuse("merge")
        await vm.verify_definition()
    mine = list(vm.catalog.images.values())
    for deletion in deletions:
        await asyncio.to_thread(verify, vm.catalog, deletion)
        for image in deletion.unlinks:
            await _refuse_used(image.path)
            sharers.refuse_overlays(vm, image, mine)
        _refuse_what_is_lost(deletion.unlinks, by="a delete")
        for fold in deletion.folds:
            await _check_layers(vm, (fold.into, *fold.gone), mine)
            _refuse_what_is_lost((fold.into, *fold.gone))
        for pull in deletion.pulls:
            await _check_layers(vm, pull.overlays, mine)
            for image in (i for i in pull.gone if i.ours):
                sharers.refuse_overlays(vm, image, mine)
            _refuse_what_is_lost([i for i in pull.gone if i.ours])  # what is not stays as it is
            _refuse_what_is_lost(pull.overlays, bitmaps=False)  # they may show what is no longer below them then
            _refuse_short_layers(pull)
        _refuse_without_rights(deletion, in_place=space)
    if space:
        _check_space(vm, deletions)


async def _check_layers(vm: VM, images: Sequence[Image], mine: Sequence[Image]) -> None:
    for image in images:
        await _refuse_used(image.path)
        sharers.refuse_shared(vm, image, mine)


def _refuse_without_rights(deletion: Deletion, *, in_place: bool) -> None:
    """Raise Refused for what is written and what is removed: once the snapshots are gone it is too late to find out."""
    merges: list[Fold | Pull] = [*deletion.folds, *deletion.pulls]
    written = [overlay for part in merges for overlay in part.overlays]
    gone = [*deletion.unlinks, *(image for part in merges for image in part.gone)]
    for fold in deletion.folds:
        if in_place:
            written += [fold.into, *fold.gone]
        else:
            gone.append(fold.into)
    for image in written:
        rights.refuse_unwritable(image.path)
    for image in gone:
        if image.ours:
            rights.refuse_unremovable(image.path)


async def _refuse_used(path: Path) -> None:
    """Raise Busy when somebody has a layer open; a QEMU that was just killed gets a moment to let go."""
    end = time.monotonic() + 2.0
    while locks.image_in_use(path):
        if time.monotonic() >= end:
            raise Busy(f"{path} is in use by {locks.open_by(path)}", hint="end that program first")
        await asyncio.sleep(0.05)


def _refuse_what_is_lost(images: Sequence[Image], *, by: str = "a merge", bitmaps: bool = True) -> None:
    for image in images:
        found = header(image.path, image.fmt)
        has_bitmaps = bool(bitmaps and found and found.has_bitmaps)
        if found and (has_bitmaps or found.snapshots):
            what = "persistent dirty bitmaps" if has_bitmaps else "internal snapshots"
            raise UnsupportedDisk(f"{image.path} holds {what}; {by} would lose them",
                                  hint="qemu-img bitmap --remove / qemu-img snapshot -d, if nobody needs them; "
                                       "then: diskchain check --repair VM")  # fmt: skip


def _refuse_short_layers(pull: Pull) -> None:
    """Beyond the end of a layer a disk reads zeros, whatever lies there further below: what goes must hide, for each overlay,
    all of what that stands on afterwards. Otherwise sizes may differ (facts.md).
    """
    if pull.below is None:
        return
    images = (*pull.gone, *pull.overlays, pull.below)
    sizes = {i.id: virtual_size(i.path, i.fmt) for i in images}
    reach = min(sizes[i.id] for i in pull.gone)
    if any(reach < min(sizes[o.id], sizes[pull.below.id]) for o in pull.overlays):
        names = ", ".join(f"{i.path.name} {text_of(sizes[i.id])}" for i in images)
        raise UnsupportedDisk(f"{pull.target} was resized, its layers can't be copied upwards: {names}",
                              hint="delete all branches but one, then it is folded down")  # fmt: skip


def _needs(deletions: Sequence[Deletion]) -> dict[int, int]:
    """Bytes needed at most, by filesystem."""
    needs: dict[int, int] = {}
    for path, count in ((p, c) for d in deletions for p, c in _growths(d)):
        device = path.parent.stat().st_dev
        needs[device] = needs.get(device, 0) + count
    return needs


def _growths(deletion: Deletion) -> Iterator[tuple[Path, int]]:
    for fold in deletion.folds:
        yield fold.into.path, merge.growth(fold)
    for pull in deletion.pulls:
        for overlay in pull.overlays:
            yield overlay.path, merge.pulled(pull, overlay)


def _freed(vm: VM, deletions: Sequence[Deletion]) -> dict[int, int]:
    """Bytes that saved memory gives back before a merge begins, by filesystem."""
    freed: dict[int, int] = {}
    for snapshot in (s for d in deletions for s in (*d.snapshots, *d.waits) if s.memory.saved):
        with contextlib.suppress(OSError):  # not there any more: nothing is freed
            status = vm.home.memory(snapshot.id).stat()
            freed[status.st_dev] = freed.get(status.st_dev, 0) + status.st_blocks * 512
    return freed


def _check_space(vm: VM, deletions: Sequence[Deletion]) -> None:
    needs, freed = _needs(deletions), _freed(vm, deletions)
    for path in (path for d in deletions for path, _ in _growths(d)):
        device = path.parent.stat().st_dev
        need, free, more = needs[device], files.free_bytes(path), freed.get(device, 0)
        if need > free + more:
            raise NoSpace(f"merging into {path.name} needs up to {text_of(need)}, {text_of(free)} are free",
                          hint=f"free {text_of(need - free - more)} on {path.parent}" + _what_fits(deletions))  # fmt: skip


def _what_fits(deletions: Sequence[Deletion]) -> str:
    leaves = [s.name for d in deletions for s in d.snapshots if not _merged(d, s)]
    return (
        f"; deleting {', '.join(leaves)} alone needs nothing" if leaves else ", or delete a branch that you don't need"
    )


def _merged(deletion: Deletion, snapshot: Snapshot) -> bool:
    gone = {i.id for i in (*deletion.unlinks, *deletion.kept)}
    return not set(snapshot.disks.values()) <= gone
