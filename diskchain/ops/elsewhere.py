"""Layers that are written anew in another directory, then switched to: delete --to, detach --to, and the layers of move.

-         VM off; layers verified; nobody else writes; space there                    nothing changed
intent    new files are made, filled, synced, compared with what they replace         undo: those with our marks go
switch    a domain's definition names them (where its active layer is one of them);   definition of before = undo
          overlays are relinked, the catalog is written                               else forward
switched  what they replace goes to the trash, if it was ours; the marks go           redo
done      journal removed

What a new file shows is what it replaces shows, and that is unlinked last: an overlay may name the one or the other.
Which files are the new ones is said by their marks (marks.py), in both directions: a name may be somebody else's by now.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from diskchain.chain.deletion import after as deletion_after
from diskchain.chain.model import Catalog, Image, MiB
from diskchain.chain.plan import Need
from diskchain.chain.text import size
from diskchain.errors import ChainDamaged, NoSpace, Refused, Unfinished, UnsupportedDisk, VMRunning
from diskchain.host import copy, files, locks, qemu_img, qemu_img_copy
from diskchain.host.fault import point
from diskchain.host.locks import ImageGuard
from diskchain.host.writeback import writing_back
from diskchain.ops import delete, layers, marks, redefine, room
from diskchain.ops.approve import approve_chain
from diskchain.ops.merge import Merged
from diskchain.ops.progress import Progress
from diskchain.ops.vm import VM, new_id, remove_snapshot_dir
from diskchain.store import catalog as catalog_store
from diskchain.store.journal import Entry

METADATA = 4 * MiB  # tables of a new image


@dataclass(frozen=True)
class Item:
    """One image of the catalog that lies in a new file afterwards.

    `layers`: the images of which it takes what they hold, lowest first; `exact`: the file as it is, byte for byte;
    `mark`: by which it is known to be ours.
    """

    id: str
    path: Path
    layers: tuple[str, ...]
    backing: str | None
    exact: bool = False
    mark: str = field(default_factory=new_id)

    @property
    def made(self) -> Path:
        """The name that it is made and written to under: nobody else has it."""
        return marks.mark_of(self.path, self.mark)

    def to_json(self) -> dict[str, Any]:
        """Return the form that the journal keeps."""
        return {"id": self.id, "path": str(self.path), "layers": list(self.layers), "backing": self.backing,
                "exact": self.exact, "mark": self.mark}  # fmt: skip


def items_of(entry: Entry) -> list[Item]:
    """Return the items of a journal entry."""
    return [
        Item(i["id"], Path(i["path"]), tuple(i["layers"]), i["backing"], i["exact"], i.get("mark", ""))
        for i in entry.data["items"]
    ]


# -- before ------------------------------------------------------------------------------------------------------------


async def check(vm: VM, items: Sequence[Item], more: int = 0, *, flat: bool = False) -> None:
    """Raise what stands in the way: VMRunning, ChainDamaged, Busy, UnsupportedDisk, Refused for a name that is taken, NoSpace.

    `more`: bytes that are needed there besides; `flat`: as in `need`.
    """
    if not (await vm.driver.state()).is_off:
        raise VMRunning(
            f"{vm.name} is on; its layers can't be replaced", hint=f"diskchain stop {vm.name}, then try again"
        )
    await vm.driver.refuse("merge")
    await vm.verify_definition()
    for item in items:
        for image_id in item.layers:
            await asyncio.to_thread(layers.verify_chain, vm.catalog, image_id)
        if not item.exact:
            _refuse_other_sizes(vm.catalog, item)
        if os.path.lexists(item.path):
            raise Refused(f"{item.path} exists already", hint="move it away, or choose another directory")
    _refuse_unnameable(vm.catalog, items)
    layers.refuse_foreign_writers(vm.catalog)
    needed = need(vm.catalog, items, flat=flat) + more
    free = files.free_bytes(items[0].path.parent) if items else 0
    if items and needed > free:
        raise NoSpace(f"{size(needed)} are needed in {items[0].path.parent}, {size(free)} are free",
                      hint=f"another directory, or free {size(needed - free)} there")  # fmt: skip


def _refuse_unnameable(catalog: Catalog, items: Sequence[Item]) -> None:
    """Raise Refused when a header could not name what it stands on afterwards."""
    new = {item.id: item for item in items}
    for item in items:
        if below := _below(catalog, item, items):
            qemu_img.refuse_unnameable(qemu_img.backing_name_for(item.path, below.path))
    for image in catalog.images.values():
        if image.id not in new and image.backing in new:
            qemu_img.refuse_unnameable(qemu_img.backing_name_for(image.path, new[image.backing].path))


def need(catalog: Catalog, items: Sequence[Item], *, flat: bool = False) -> int:
    """Return how many bytes the new files take at most; `flat`: with all that their layers stand on."""
    read = [
        image for item in items for i in item.layers for image in (catalog.chain(i) if flat else [catalog.images[i]])
    ]
    return sum(files.allocated_bytes(image.path) for image in read) + METADATA * len(items)


def needs(catalog: Catalog, items: Sequence[Item]) -> tuple[Need, ...]:
    """Return how many bytes the new files take at most, and where."""
    return room.needs((item.path.parent, need(catalog, [item])) for item in items)


def _refuse_other_sizes(catalog: Catalog, item: Item) -> None:
    sizes = {approve_chain(catalog.images[i].path, catalog.images[i].fmt)[0].virtual_size for i in item.layers}
    if len(sizes) > 1:
        raise UnsupportedDisk(f"{catalog.images[item.id].target} was resized; its layers can't be written together elsewhere",
                              hint="without --to they are merged where they are")  # fmt: skip


# -- the work ----------------------------------------------------------------------------------------------------------


async def carry_out(vm: VM, entry: Entry, progress: Progress) -> list[Merged]:
    """From `intent` to the end. Raise what failed; until the switch everything is put back then."""
    items, began = items_of(entry), time.monotonic()
    tops = {item.id: vm.catalog.images[item.layers[-1]].path for item in items}
    count = need(vm.catalog, items) - METADATA * len(items)
    with contextlib.ExitStack() as stack:
        try:
            catalog_store.verify(after(vm, entry))
            guard = stack.enter_context(guarded(vm, items))
            await make_all(vm, items, guard, progress)
            await require_off(vm)
        except BaseException:
            undo(vm, entry)
            raise
        entry.advance("switch")
        await forward(vm, entry, guard)
    seconds = round(time.monotonic() - began, 3)
    return [
        Merged(vm.catalog.images[i.id].target, str(tops[i.id]), str(i.path), count, seconds, "convert") for i in items
    ]


async def require_off(vm: VM) -> None:
    """Look again: a QEMU that takes no locks was not held off by the guard. Raise VMRunning."""
    if not (await vm.driver.state()).is_off:
        raise VMRunning(
            f"{vm.name} is on; its layers can't be replaced", hint=f"diskchain stop {vm.name}, then try again"
        )


@contextlib.contextmanager
def guarded(vm: VM, items: Sequence[Item]) -> Iterator[ImageGuard]:
    """Nobody writes to what is copied; nobody at all opens the active layers, and what is going to name the new files."""
    catalog, read = vm.catalog, {i for item in items for i in item.layers}
    ours = [*catalog.active.values(), *(o.id for i in read for o in catalog.overlays_on(i) if o.id not in read)]
    alone = list(dict.fromkeys(catalog.images[i].path for i in ours))
    below = dict.fromkeys(image.path for i in read for image in catalog.chain(i))
    readers = [path for path in below if path not in alone]
    with locks.guard_images(alone, wait=locks.GUARD_WAIT, users=locks.open_by, readers=readers) as guard:
        yield guard


async def make_all(vm: VM, items: Sequence[Item], guard: ImageGuard, progress: Progress) -> None:
    """Make every new file, whole and on its disk, and compare it with what it replaces."""
    for item in items:
        if item.exact:
            await _copy(vm.catalog, item, items, progress)
        else:
            await _write(vm.catalog, item, items, guard, progress)
        point("elsewhere.made-one")
    for directory in {item.path.parent for item in items}:
        files.fsync_dir(directory)
    for item in items:
        marks.verify(item.path, item.mark)
    await vm.driver.check_files([item.path for item in items], written=True)


async def _copy(catalog: Catalog, item: Item, items: Sequence[Item], progress: Progress) -> None:
    """The file as it is; then it names what it stands on where that is afterwards."""
    image = catalog.images[item.id]
    source, target = files.open_untrusted(image.path), marks.create(item.path, item.mark)
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress.update(done)

    progress.begin(f"copying {image.path.name}", files.allocated_bytes(image.path), note="safe to interrupt")
    try:
        point("elsewhere.created")
        await copy.copy(source, target, item.path, on_bytes)
        await copy.compare(source, target, item.path)
        files.copy_owner(image.path, item.made)
        os.fchmod(target, stat.S_IMODE(os.fstat(target).st_mode) | stat.S_IRUSR | stat.S_IWUSR)
        os.utime(target, ns=(os.fstat(source).st_atime_ns, os.fstat(source).st_mtime_ns))
        os.fsync(target)
    finally:
        progress.end()
        os.close(source)
        os.close(target)
    await _name_backing(catalog, item, items)


async def _name_backing(catalog: Catalog, item: Item, items: Sequence[Item]) -> None:
    below = _below(catalog, item, items)
    if below is None:
        return
    name = qemu_img.backing_name_for(item.path, below.path)
    with files.synced(item.made):
        await qemu_img.rebase(item.made, name, below.fmt)
    layers.verify_reference(replace(catalog.images[item.id], path=item.made), below)


def _below(catalog: Catalog, item: Item, items: Sequence[Item]) -> Image | None:
    """What the new file stands on: an image as it lies afterwards."""
    if item.backing is None:
        return None
    image = catalog.images[item.backing]
    new = next((other for other in items if other.id == item.backing), None)
    return image if new is None else replace(image, path=new.path, fmt=image.fmt if new.exact else "qcow2")


async def _write(catalog: Catalog, item: Item, items: Sequence[Item], guard: ImageGuard, progress: Progress) -> None:
    """A new qcow2 image that takes what the layers hold, one after the other. What it stands on is whole by now."""
    top = catalog.images[item.layers[-1]]
    below = _below(catalog, item, items)
    fd = marks.create(item.path, item.mark)
    try:
        point("elsewhere.created")
        virtual_size = approve_chain(top.path, top.fmt)[0].virtual_size
        if below is None:
            await qemu_img_copy.create_alone(fd, virtual_size)
        else:
            await qemu_img.create(fd, qemu_img.backing_name_for(item.path, below.path), below.fmt, virtual_size)
        files.copy_owner(top.path, item.made)
        os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) | stat.S_IRUSR | stat.S_IWUSR)
        into = qemu_img.unlocked(item.made, "qcow2", _new_below(catalog, item, items))
        async with writing_back(fd):
            await _fill(catalog, item, into, guard, progress)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    found = await qemu_img.check(into)
    if not found.clean:
        raise ChainDamaged(f"{item.path} is not clean ({found.corruptions} errors, {found.leaks} leaks)")
    await qemu_img.compare(_node(catalog, item.layers[-1]) or {}, into, direct=False)
    point("elsewhere.compared")


async def _fill(catalog: Catalog, item: Item, into: dict[str, Any], guard: ImageGuard, progress: Progress) -> None:
    for image_id in item.layers:
        image = catalog.images[image_id]
        count = files.allocated_bytes(image.path)
        progress.begin(f"writing {item.path.name}", count, note="safe to interrupt")
        alone = image.backing is None or (item.backing is None and len(item.layers) == 1)
        try:
            await qemu_img_copy.add(_node(catalog, image_id) or {}, into, own_layer=not alone, guard=guard.fds,
                                    on_percent=partial(_show, progress, count))  # fmt: skip
        finally:
            progress.end()
        point("elsewhere.filled-one")


def _show(progress: Progress, count: int, percent: float) -> None:
    progress.update(int(count * percent / 100))


def _node(catalog: Catalog, image_id: str | None) -> dict[str, Any] | None:
    """An image on what it stands on, as nodes; we hold the locks."""
    node: dict[str, Any] | None = None
    for image in reversed(catalog.chain(image_id)) if image_id else ():
        node = {**qemu_img.unlocked(image.path, image.fmt, node), "read-only": True}
    return node


def _new_below(catalog: Catalog, item: Item, items: Sequence[Item]) -> dict[str, Any] | None:
    """What the new file stands on, as nodes: new files, too."""
    new = next((other for other in items if other.id == item.backing), None)
    if new is None:
        return _node(catalog, item.backing)
    return {**qemu_img.unlocked(new.made, "qcow2", _new_below(catalog, new, items)), "read-only": True}


# -- the switch --------------------------------------------------------------------------------------------------------


def after(vm: VM, entry: Entry) -> Catalog:
    """Return the catalog of afterwards, fingerprints of what is frozen included. Can be asked for again."""
    catalog, items = vm.catalog, [i for i in items_of(entry) if i.id in vm.catalog.images]
    if entry.op == "delete-to":
        catalog = deletion_after(catalog, delete.of_entry(catalog, entry))
    catalog = catalog.without_images(entry.data.get("dropped", []))
    for item in items:
        image = catalog.images[item.id]
        fmt = image.fmt if item.exact else "qcow2"
        catalog = catalog.with_images([replace(image, path=item.path, fmt=fmt, backing=item.backing, ours=True)])
    return catalog


async def forward(vm: VM, entry: Entry, guard: ImageGuard | None = None) -> None:
    """From `switch` to the end. Can be repeated. Without a guard (recovery) one is taken for what is relinked."""
    verify_new(entry)
    if entry.state == "switch":
        catalog, new = after(vm, entry), {item.id for item in items_of(entry)}
        was = [Path(path) for path in entry.data["was"]]
        if vm.registered is None:
            await vm.driver.align(catalog.active_chains(), was)
        point("elsewhere.defined")
        catalog = await relink_rest(catalog, new, guard)
        active = set(catalog.active.values())
        catalog = layers.freeze(catalog, (new & set(catalog.images)) - active)
        vm.save(catalog.with_images(replace(catalog.images[i], fingerprint=None) for i in new & active))
        await redefine.follow(vm, {Path(p): vm.catalog.images[i] for p, i in entry.data["named"].items()
                                   if i in vm.catalog.images})  # fmt: skip
        entry.advance("switched")
    old = [Path(path) for path in entry.data["old"]]
    await layers.put_away(entry, old)
    for snapshot_id in (*entry.data.get("snapshots", []), *entry.data.get("waits", [])):
        remove_snapshot_dir(vm, snapshot_id)
    forget_marks(entry)
    entry.close()
    vm.home.fill_reserve()


def verify_new(entry: Entry) -> None:
    """Before anything relies on the new files, and before what they replace goes: they are those that were made. Raise
    Refused, ChainDamaged.
    """
    if not entry.data.get("away"):
        for item in items_of(entry):
            marks.verify(item.path, item.mark)


def forget_marks(entry: Entry) -> None:
    """What they replace is gone: the new files keep their names only. Can be repeated."""
    for item in items_of(entry):
        marks.forget(item.path, item.mark)
    point("elsewhere.marks-forgotten")


async def relink_rest(catalog: Catalog, new: set[str], guard: ImageGuard | None) -> Catalog:
    """Let the images that stay in their files, and stand on one that does not, name that where it is; return the catalog
    with their fingerprints. Can be repeated.
    """
    relinked = [i for i in catalog.images.values() if i.backing in new and i.id not in new]
    with _held([i.path for i in relinked], guard):
        for overlay in relinked:
            await _relink(overlay, catalog.images[overlay.backing or ""])
            point("elsewhere.relinked-one")
    return layers.freeze(catalog, {i.id for i in relinked} - set(catalog.active.values()))


def _held(paths: Sequence[Path], guard: ImageGuard | None) -> contextlib.AbstractContextManager[ImageGuard]:
    return (
        contextlib.nullcontext(guard)
        if guard
        else locks.guard_images(paths, wait=locks.GUARD_WAIT, users=locks.open_by)
    )


async def _relink(overlay: Image, below: Image) -> None:
    if not layers.names_backing(overlay.path, below):
        name = qemu_img.backing_name_for(overlay.path, below.path)
        with files.synced(overlay.path):
            await qemu_img.rebase_node(qemu_img.unlocked(overlay.path, overlay.fmt), name, below.fmt)
    layers.verify_reference(overlay, below)


# -- back --------------------------------------------------------------------------------------------------------------


def undo(vm: VM, entry: Entry) -> None:
    """Unlink the new files, which nothing names; nobody else's that have such a name by now. Can be repeated."""
    for item in items_of(entry):
        marks.unmake(item.path, item.mark)
        point("elsewhere.unmade-one")
    entry.close()


async def is_switched(vm: VM, entry: Entry) -> bool:
    """Whether an entry in `switch` can only go forward: unless a domain's definition has to name a new file and does not."""
    new = {item.id: item.path for item in items_of(entry)}
    named = await vm.driver.next_files() or {}
    catalog = after(vm, entry)
    waited = [t for t, i in catalog.active.items() if i in new and t in named and not files.is_same(named[t], new[i])]
    return not waited


async def resume(vm: VM, entry: Entry) -> tuple[str, str]:
    """Recovery, from whatever state: forward after the switch, else back."""
    if entry.state == "intent" or (entry.state == "switch" and not await is_switched(vm, entry)):
        undo(vm, entry)
        return "undone", "the layers are where they were"
    if entry.state == "switch" and not (await vm.driver.state()).is_off:
        raise Unfinished(f"the switch to the new files waits until {vm.name} is off", hint=f"diskchain stop {vm.name}")
    await forward(vm, entry)
    return "finished", "the new files are in use"


def journal_data(vm: VM, items: Sequence[Item], old: Sequence[Image]) -> dict[str, Any]:
    """Return what an entry needs. `old`: the images that nothing needs afterwards; those that are ours are removed."""
    images = vm.catalog.images
    return {
        "items": [item.to_json() for item in items],
        "was": [str(images[i].path) for item in items for i in item.layers],
        "named": {str(images[i].path): item.id for item in items for i in item.layers},
        "old": [str(image.path) for image in old if image.ours],
    }
