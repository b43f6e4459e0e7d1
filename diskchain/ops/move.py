"""move: all layers of a VM, and its records, to another directory, which may be on another filesystem.

-         VM off; layers verified; space there                                        nothing changed
intent    layers and records are copied, synced, compared                             undo: what has our marks is removed
switch    the new records are whole: catalog and a journal entry of this move in      definition of before = undo
          them; then the definition names the new layers (and, of a machine of ours,  else forward, from the new
          the new records) in one write: from that on the new place counts            records
switched  old layers (if ours) and old records are removed                            redo
done      journal removed

Images that are not ours, and that no snapshot of the VM froze, or that others use too, stay where they are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from diskchain.chain.model import Catalog, Image
from diskchain.chain.plan import Plan
from diskchain.chain.text import name_with, size
from diskchain.errors import ChainDamaged, NotFound, Refused
from diskchain.host import copy, files, locks
from diskchain.host.fault import point
from diskchain.host.locks import ImageGuard, vm_lock
from diskchain.ops import detach, elsewhere, layers, marks, redefine, room, sharers
from diskchain.ops.elsewhere import Item
from diskchain.ops.progress import Progress
from diskchain.ops.vm import VM, new_id, now_utc
from diskchain.ops.written import refuse_unwritable
from diskchain.store import catalog as catalog_store
from diskchain.store import journal
from diskchain.store.catalog import Home
from diskchain.store.journal import Entry

_NOT_COPIED = ("lock", "start-waits", "reserve", "journal", "catalog.json", "RECOVER.txt")


@dataclass(frozen=True)
class Move:
    """What is moved where. `stays`: images of the chain that are not the VM's alone."""

    directory: Path
    items: tuple[Item, ...]
    stays: tuple[Image, ...]
    home: Home  # the new records; the old ones where they need not move
    record_bytes: int


def plan_move(vm: VM, directory: Path) -> Move:
    """Return what a move does. Raise NotFound without that directory, BadName, Refused when everything is there already."""
    if not directory.is_dir():
        raise NotFound(
            f"{directory} is no directory", hint=f"mkdir '{directory}'; QEMU's user must be able to search it"
        )
    directory = directory.resolve()
    refuse_unwritable(directory)
    stays = tuple(detach.bases_of(vm))
    moved = [i for i in vm.catalog.images.values() if i not in stays and i.path.parent.resolve() != directory]
    home = Home(directory / catalog_store.HOME / vm.home.path.name)
    if not moved and home.path == vm.home.path:
        raise Refused(f"{vm.name} lies in {directory} already", hint=f"diskchain show {vm.name} NAME")
    items = [Item(i.id, directory / _name(i, moved), (i.id,), i.backing, exact=True) for i in moved]
    return Move(directory, tuple(items), stays, home, sum(files.allocated_bytes(p) for p, _ in _records(vm.home, home)))


def need(vm: VM) -> int:
    """Return how many bytes a move to another filesystem takes there at most."""
    stays = detach.bases_of(vm)
    moved = [image for image in vm.catalog.images.values() if image not in stays]
    records = _records(vm.home, Home(Path("/nonexistent")))
    held = sum(files.allocated_bytes(p) for p in (*(i.path for i in moved), *(p for p, _ in records)))
    return held + elsewhere.METADATA * len(moved)


def _name(image: Image, moved: list[Image]) -> str:
    same = [i for i in moved if i.path.name == image.path.name]
    return image.path.name if len(same) == 1 else name_with(f"{image.target}-", image.path.name, "")


def to_plan(vm: VM, move: Move) -> Plan:
    """Return the plan in words and figures."""
    images, count = vm.catalog.images, elsewhere.need(vm.catalog, move.items) + move.record_bytes
    steps = [f"{images[i.id].target}: copy {images[i.id].path} to {i.path}" for i in move.items]
    steps += (
        [f"copy the records ({size(move.record_bytes)}) to {move.home.path}"] if move.home.path != vm.home.path else []
    )
    steps.append("let the definition name the new files, then remove the old ones that diskchain made")
    steps += [f"{i.target}: {i.path} stays: others may stand on it" for i in move.stays]
    left = [images[i.id].path for i in move.items if not images[i.id].ours]
    warnings = [f"{path} was not made by diskchain: it is copied, and the old file stays" for path in left]
    return Plan(f"{vm.name}: move to {move.directory}", tuple(steps), bytes=count, space_needed=count,
                needs=room.needs([(move.directory, count)]),
                point_of_no_return="when the definition names the new files", warnings=tuple(warnings))  # fmt: skip


async def check(vm: VM, move: Move) -> None:
    """Raise what stands in the way."""
    await elsewhere.check(vm, move.items, move.record_bytes)
    for image in (vm.catalog.images[item.id] for item in move.items):
        if image.ours:  # its old file goes
            sharers.refuse_overlays(vm, image, vm.catalog.images.values())
    if move.home.path == vm.home.path:
        return
    if move.home.path.exists():
        raise Refused(f"there are records of this VM already: {move.home.path}", hint="move them away")
    if vm.registered is None and any(
        p.parent.resolve() == move.directory for p in (await vm.driver.next_files() or {}).values()
    ):
        raise Refused(f"a disk of {vm.name} lies in {move.directory} already: its records could not be told apart while they "
                      "move", hint="choose another directory")  # fmt: skip


async def move(vm: VM, found: Move, progress: Progress) -> None:
    """Carry it out. The lock is held, the journal is empty. Raise what failed; then everything is where it was."""
    images = vm.catalog.images
    data = {
        **elsewhere.journal_data(vm, found.items, [images[i.id] for i in found.items]),
        "name": vm.name, "from": str(vm.home.path), "to": str(found.home.path), "mark": new_id(),
    }  # fmt: skip
    entry = journal.begin(vm.home, "move", new_id(), now_utc(), data)
    with contextlib.ExitStack() as stack:
        try:
            guard = stack.enter_context(elsewhere.guarded(vm, found.items))
            await elsewhere.make_all(vm, found.items, guard, progress)
            await _copy_records(vm.home, found.home, entry.data["mark"])
            await elsewhere.require_off(vm)
        except BaseException:
            undo(vm, entry)
            raise
        entry.advance("switch")
        await _forward(vm, entry, guard)


async def _forward(vm: VM, entry: Entry, guard: ImageGuard | None = None) -> None:
    """From `switch` to the end."""
    home = Home(Path(entry.data["to"]))
    elsewhere.verify_new(entry)
    if home.path == vm.home.path:
        await _switch(vm, entry)
        await _clear(vm, entry, guard)
        return
    marks.verify_directory(home.path, entry.data.get("mark", ""))
    files.fsync_dir(home.path)
    with vm_lock(home.lock, f"move {vm.name}", wait=locks.GUARD_WAIT):
        entry = await _switch_records(vm, entry, home)
        await _clear(vm, entry, guard)


async def _switch(vm: VM, entry: Entry) -> None:
    catalog = _frozen(elsewhere.after(vm, entry), entry)
    await _define(vm, entry, catalog, None)
    vm.save(catalog)
    entry.advance("switched")


async def _switch_records(vm: VM, entry: Entry, home: Home) -> Entry:
    """Make the new records whole, then let the definition lead to them. Return the entry that counts then."""
    catalog = _frozen(elsewhere.after(vm, entry), entry)
    there = journal.open_entry(home) or replace(entry, home=home, state="switched")
    there.note()
    catalog_store.save(home, catalog)
    point("move.records-whole")
    await _define(vm, entry, catalog, home.path)
    point("move.defined")
    vm.home, vm.catalog = home, catalog
    return there


async def _define(vm: VM, entry: Entry, catalog: Catalog, home: Path | None) -> None:
    if vm.registered is None:
        await vm.driver.align(catalog.active_chains(), [Path(p) for p in entry.data["was"]])
        return
    await redefine.follow(vm, {Path(p): catalog.images[i] for p, i in entry.data["named"].items()}, home)


def _frozen(catalog: Catalog, entry: Entry) -> Catalog:
    """Headers were written anew: what is frozen gets its fingerprint again."""
    moved = [item.id for item in elsewhere.items_of(entry)]
    return layers.freeze(catalog, [i for i in moved if catalog.images[i].fingerprint is not None])


async def _clear(vm: VM, entry: Entry, guard: ImageGuard | None = None) -> None:
    """The new place counts: let what was there already name it, then remove what was ours in the old one. Can be repeated."""
    elsewhere.verify_new(entry)
    vm.save(await elsewhere.relink_rest(vm.catalog, {item.id for item in elsewhere.items_of(entry)}, guard))
    point("move.relinked")
    old = [Path(path) for path in entry.data["old"]]
    await layers.put_away(entry, old)
    left = Path(entry.data["from"])
    if left != vm.home.path and left.is_dir():
        catalog_store.remove(left)
        point("move.records-removed")
    elsewhere.forget_marks(entry)
    if left != vm.home.path:
        marks.forget_directory(vm.home.path, entry.data.get("mark", ""))
    entry.close()
    vm.home.fill_reserve()


# -- records -----------------------------------------------------------------------------------------------------------


def _records(old: Home, new: Home) -> Iterator[tuple[Path, Path]]:
    """Yield the files of the records that are copied, with their new places."""
    if old.path == new.path:
        return
    for root, names, found in os.walk(old.path):
        inside = Path(root).relative_to(old.path)
        if inside == Path():
            names[:] = [name for name in names if name not in _NOT_COPIED]
        for name in found:
            path = Path(root) / name
            skipped = name.startswith(files.TEMPORARY) or (inside == Path() and name in _NOT_COPIED)
            if path.is_file() and not path.is_symlink() and not skipped:
                yield path, new.path / inside / name


async def _copy_records(old: Home, new: Home, mark: str) -> None:
    if old.path == new.path:
        return
    marks.make_directory(new.path, mark)
    new.make()
    for path, place in _records(old, new):
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        source, target = files.open_untrusted(path), files.create_exclusive(place)
        try:
            await copy.copy(source, target, place, lambda _: None)
            await copy.compare(source, target, place)
            files.copy_owner(path, place)
            os.fsync(target)
        finally:
            os.close(source)
            os.close(target)
        point("move.record-copied")
    for root, _, _ in os.walk(new.path):
        files.fsync_dir(Path(root))


# -- recovery ----------------------------------------------------------------------------------------------------------


def undo(vm: VM, entry: Entry) -> None:
    """The definition still leads to the old place: remove the new one, as far as this move made it. Can be repeated."""
    new = Path(entry.data["to"])
    if new != Path(entry.data["from"]):
        marks.unmake_records(new, entry.data.get("mark", ""))
        point("move.records-unmade")
    elsewhere.undo(vm, entry)


async def resume(vm: VM, entry: Entry) -> tuple[str, str]:
    """Recovery: forward where the definition leads to the new place, else back."""
    if entry.state == "intent" or not await _counts(vm, entry):
        if entry.state == "switched":
            raise ChainDamaged(f"{vm.name} was moved, and is not defined with its new layers",
                               hint=f"something else defined it anew; keep every file: {', '.join(entry.data['was'])}")  # fmt: skip
        undo(vm, entry)
        return "undone", "the VM is where it was"
    if entry.state == "switch":
        await _forward(vm, entry)
    else:
        await _clear(vm, entry)
    return "finished", f"the VM is in {Home(Path(entry.data['to'])).disks_dir}"


async def _counts(vm: VM, entry: Entry) -> bool:
    """Whether the new place counts already."""
    if vm.registered is not None:  # its definition leads to the records: to the new ones, if those count
        return entry.state == "switched" or entry.data["from"] == entry.data["to"]
    return await elsewhere.is_switched(vm, entry)
