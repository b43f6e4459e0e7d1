"""detach: a VM that stands on images which are not its own gets what it needs of them, and lets go of them.

Which those are: at the bottom of a chain the images that diskchain did not make and that no snapshot of the VM froze; and any
frozen layer that others use too, or that is sealed. The first are copied up into the overlays on them; the
others, and with --to all of them, into one new file in their place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diskchain.chain.deletion import Deletion, Pull
from diskchain.chain.model import Catalog, Image, layer_name
from diskchain.chain.plan import Plan
from diskchain.chain.text import size
from diskchain.errors import HasSharers, NotFound
from diskchain.ops import delete, delete_plan, elsewhere, layers, merge, room, sharers
from diskchain.ops.elsewhere import Item
from diskchain.ops.merge import Merged
from diskchain.ops.progress import Progress
from diskchain.ops.vm import VM, new_id, now_utc
from diskchain.ops.written import refuse_unwritable
from diskchain.store import journal


@dataclass(frozen=True)
class Detach:
    """What is to be done: copied up in place, or written into new files; `let_go`: the images that are not needed after it."""

    pulls: tuple[Pull, ...]
    items: tuple[Item, ...]
    let_go: tuple[Image, ...]


def plan(vm: VM, directory: Path | None) -> Detach:
    """Return what a detach does. Raise NotFound when the VM stands on nothing but its own, BadName."""
    catalog = vm.catalog
    if directory is not None:
        refuse_unwritable(directory)
    bases = bases_of(vm)
    tops = [image for image in bases if _is_top(catalog, image, bases)]
    if not tops:
        raise NotFound(f"{vm.name} stands on no image but its own", hint=f"diskchain check {vm.name}")
    copied = [top for top in tops if directory is not None or _is_own(catalog, top)]
    pulls = [pull for top in tops if top not in copied for pull in _pulls(catalog, top, bases)]
    items = [_item(catalog, top, bases, directory) for top in copied]
    return Detach(tuple(pulls), tuple(items), tuple(bases))


def bases_of(vm: VM) -> list[Image]:
    """Return the images of the catalog that are somebody else's, too, with all that those stand on."""
    found = {below.id for i in vm.catalog.images.values() if _is_base(vm, i) for below in vm.catalog.chain(i.id)}
    return [image for image in vm.catalog.images.values() if image.id in found]


def _is_base(vm: VM, image: Image) -> bool:
    catalog = vm.catalog
    if image.id in catalog.active.values():
        return False
    if not any(i.ours or catalog.frozen_by(i.id) for i in catalog.chain(image.id)):
        return True
    try:
        sharers.refuse_overlays(vm, image, catalog.images.values())
    except HasSharers:
        return True
    return False


def _is_top(catalog: Catalog, image: Image, bases: Sequence[Image]) -> bool:
    """Whether something that stays stands on it: an overlay that is no base, or a snapshot that froze it."""
    return bool(catalog.frozen_by(image.id) or _staying(catalog, image, bases))


def _staying(catalog: Catalog, image: Image, bases: Sequence[Image]) -> list[Image]:
    """The overlays on it that are the VM's own. A base that stands on it is not: others stand on that."""
    ids = {base.id for base in bases}
    return [overlay for overlay in catalog.overlays_on(image.id) if overlay.id not in ids]


def _is_own(catalog: Catalog, top: Image) -> bool:
    """Whether it is a state of this VM, or stands on one: then it can't be copied up into what stands on it."""
    return any(image.ours or catalog.frozen_by(image.id) for image in catalog.chain(top.id))


def _pulls(catalog: Catalog, top: Image, bases: Sequence[Image]) -> Iterator[Pull]:
    """One for each disk that stands on it."""
    overlays = _staying(catalog, top, bases)
    for target in dict.fromkeys(overlay.target for overlay in overlays):
        those = tuple(overlay for overlay in overlays if overlay.target == target)
        yield Pull(target, tuple(catalog.chain(top.id)), those, None)


def _item(catalog: Catalog, top: Image, bases: Sequence[Image], directory: Path | None) -> Item:
    """One file that shows all that the base shows."""
    above = _staying(catalog, top, bases)
    place = directory or (above[0] if above else top).path.parent
    name = layer_name(top.path, top.target, new_id())
    return Item(top.id, place / name, (top.id,), None)


async def check(vm: VM, found: Detach) -> None:
    """Raise what stands in the way, as a delete and a write elsewhere do."""
    await elsewhere.require_off(vm)
    if found.pulls:
        await delete_plan.check(vm, [_deletion(found.pulls)])
    if found.items:
        await elsewhere.check(vm, found.items, flat=True)


def to_plan(vm: VM, found: Detach) -> Plan:
    """Return the plan in words and figures. Raise HostileImage, ChainDamaged: what is measured is verified before."""
    delete_plan.verify(vm.catalog, _deletion(found.pulls))
    for item in found.items:
        layers.verify_chain(vm.catalog, item.id)
    images = vm.catalog.images
    needs: list[tuple[Path, int]] = []
    steps: list[str] = []
    for pull in found.pulls:
        for overlay in pull.overlays:
            more = merge.pulled(pull, overlay)
            needs.append((overlay.path.parent, more))
            steps.append(f"{pull.target}: copy up to {size(more)} of {pull.gone[0].path} up into {overlay.path.name}")
    for item in found.items:
        more = elsewhere.need(vm.catalog, [item], flat=True)
        needs.append((item.path.parent, more))
        steps.append(f"{images[item.id].target}: copy what {images[item.id].path} shows into {item.path}; everything "
                     "that stands on it is linked to that")  # fmt: skip
    steps += [f"{image.target}: let go of {image.path}; the file stays" for image in found.let_go]
    count = sum(more for _, more in needs)
    return Plan(f"{vm.name}: detach", tuple(steps), bytes=count, space_needed=count, needs=room.needs(needs))


def _deletion(pulls: Iterable[Pull]) -> Deletion:
    return Deletion((), (), tuple(pulls))


async def detach(vm: VM, found: Detach, progress: Progress) -> list[Merged]:
    """Carry it out: first the new files, then what is copied up. The lock is held, the journal is empty. Raise as `check`."""
    merged: list[Merged] = []
    if found.items:
        images = [vm.catalog.images[item.id] for item in found.items]
        data = {
            **elsewhere.journal_data(vm, found.items, []),
            "name": vm.name,
            "dropped": _dropped(vm.catalog, found, images),
        }
        entry = journal.begin(vm.home, "detach-to", new_id(), now_utc(), data)
        merged += await elsewhere.carry_out(vm, entry, progress)
    if found.pulls:
        merged += await delete.delete(vm, _deletion(found.pulls), progress, name=f"detach {vm.name}")
    return merged


def _dropped(catalog: Catalog, found: Detach, copied: Sequence[Image]) -> list[str]:
    """What the copied images stood on, unless it is still read from: copied itself, or copied up afterwards."""
    needed = {image.id for pull in found.pulls for image in pull.gone} | {image.id for image in copied}
    bases = {image.id for image in found.let_go} - needed
    return [i.id for image in copied for i in catalog.chain(image.id)[1:] if i.id in bases]
