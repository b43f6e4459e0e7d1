"""delete --to: what layers hold together is written into new files elsewhere, then they go. For a volume without room."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diskchain.chain.deletion import Deletion, Fold, after
from diskchain.chain.model import Catalog, layer_name
from diskchain.chain.plan import Plan
from diskchain.errors import DiskchainError, NoSpace, UnsupportedDisk
from diskchain.ops import delete, delete_plan, detach, elsewhere, move, room
from diskchain.ops.elsewhere import Item
from diskchain.ops.merge import Merged
from diskchain.ops.progress import Progress
from diskchain.ops.vm import VM, new_id, now_utc
from diskchain.ops.written import directory_for_layers
from diskchain.store import journal


def items(catalog: Catalog, deletions: Sequence[Deletion], directory: Path) -> list[Item]:
    """Return the new files, lower ones first.

    Raise NotFound without that directory, BadName, UnsupportedDisk for what can't be written elsewhere.
    """
    directory = directory_for_layers(directory)
    if any(d.pulls for d in deletions) or len(deletions) > 1:
        raise UnsupportedDisk("a layer that diskchain did not make, or that is copied, can't be written elsewhere",
                              hint="leave --to away, or --copy")  # fmt: skip
    found = [_item(catalog, d, fold, directory) for d in deletions for fold in d.folds]
    return sorted(found, key=lambda item: len(catalog.chain(item.id)))


def _item(catalog: Catalog, deletion: Deletion, fold: Fold, directory: Path) -> Item:
    """It stands on what is there when all is done: what `into` stands on now may be in another fold."""
    base = catalog.chain(fold.into.id)[-1]
    name = layer_name(base.path, fold.target, new_id())
    layers = (fold.into.id, *(i.id for i in reversed(fold.gone)))
    return Item(fold.into.id, directory / name, layers, after(catalog, deletion).images[fold.into.id].backing)


async def check(vm: VM, deletions: Sequence[Deletion], found: Sequence[Item]) -> None:
    """Raise what stands in the way, as a delete does; NoSpace where the new files go."""
    await delete_plan.check(vm, deletions, space=False)
    await elsewhere.check(vm, found)


def to_plan(vm: VM, found: Sequence[Item], plan: Plan) -> Plan:
    """Return the plan of the deletions with what is written elsewhere in place of the merges."""
    images, count = vm.catalog.images, elsewhere.need(vm.catalog, found)
    steps = [
        f"{images[i.id].target}: write {', '.join(images[n].path.name for n in i.layers)} into {i.path}" for i in found
    ]
    kept = [images[i.id] for i in found if not images[i.id].ours]
    steps += [f"{i.target}: let go of {i.path}; the file stays (diskchain did not make it)" for i in kept]
    steps += [step for step in plan.steps if ": fold " not in step]
    return replace(plan, steps=tuple(steps), bytes=count, space_needed=count, needs=elsewhere.needs(vm.catalog, found),
                   point_of_no_return="when the new files are whole")  # fmt: skip


async def delete_to(vm: VM, deletion: Deletion, found: Sequence[Item], progress: Progress) -> list[Merged]:
    """Carry it out; a deletion that merges nothing goes its usual way. The lock is held, the journal is empty."""
    if not found:
        return await delete.delete(vm, deletion, progress)
    images = vm.catalog.images
    old = [i for fold in deletion.folds for i in (*fold.gone, fold.into)] + list(deletion.unlinks)
    data = {**delete.journal_data(deletion), **elsewhere.journal_data(vm, found, [images[i.id] for i in old])}
    entry = journal.begin(vm.home, "delete-to", new_id(), now_utc(), data)
    merged = await elsewhere.carry_out(vm, entry, progress)
    return merged + [Merged(u.target, str(u.path), "", 0, 0.0, "unlink") for u in deletion.unlinks]


def ways_out(vm: VM, error: NoSpace, deletions: Sequence[Deletion], words: str) -> NoSpace:
    """Given that a delete has no room, return the error with every way that would fit. `words`: the names, as typed."""
    wanted: list[tuple[str, int]] = []
    with contextlib.suppress(DiskchainError):
        there = items(vm.catalog, deletions, vm.home.disks_dir)
        wanted.append((f"diskchain delete {vm.name} {words} --to", elsewhere.need(vm.catalog, there)))
    with contextlib.suppress(DiskchainError):
        base = detach.plan(vm, vm.home.disks_dir)
        wanted.append((f"diskchain detach {vm.name} --to", elsewhere.need(vm.catalog, base.items, flat=True)))
    wanted.append((f"diskchain move {vm.name} --to", move.need(vm)))
    return NoSpace(error.message, hint=(error.hint or "") + room.ways(vm, wanted))
