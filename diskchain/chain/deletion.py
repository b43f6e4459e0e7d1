"""What deleting snapshots does to the files, decided on the catalog alone. Pure.

A layer goes when every snapshot that froze it goes. What becomes of it is said by the overlays that are left on it:

none      it is unlinked, if we made it
one       a run of such layers is folded with the overlay on top of it: in one pass down into the lowest of the run,
          or (pull) up into the overlay
several   it waits, unnamed, until one is left; or (copy) it is pulled up into each of them
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from diskchain.chain.model import Catalog, Image, Memory, Snapshot
from diskchain.errors import HasChildren, Protected, Refused


@dataclass(frozen=True)
class Fold:
    """One disk's merge downwards: `top` and the layers `through` below it go into `into`. `overlays` stand on `top`.

    `through`: top first; each of them has no other overlay than the one above it.
    """

    target: str
    top: Image
    into: Image
    overlays: tuple[Image, ...] = ()
    through: tuple[Image, ...] = ()
    below: tuple[Image, ...] = ()  # what `into` stands on: a write into a part of a cluster reads the rest from there
    method: str = "commit"

    @property
    def gone(self) -> tuple[Image, ...]:
        """The layers that are unlinked afterwards, top first."""
        return (self.top, *self.through)


@dataclass(frozen=True)
class Pull:
    """One disk's merge upwards: what `gone` (top first) shows is copied into each overlay on it, which then stands on
    `below`, or on nothing.
    """

    target: str
    gone: tuple[Image, ...]
    overlays: tuple[Image, ...]
    below: Image | None
    beneath: tuple[Image, ...] = ()  # what `gone` stands on until then, all of it, top first
    method: str = "stream"


@dataclass(frozen=True)
class Deletion:
    """What becomes of the files of some snapshots that go at once."""

    snapshots: tuple[Snapshot, ...]
    folds: tuple[Fold, ...] = ()
    pulls: tuple[Pull, ...] = ()
    unlinks: tuple[Image, ...] = ()
    kept: tuple[Image, ...] = ()  # not ours: let go of, never unlinked
    waits: tuple[Snapshot, ...] = ()  # name, configuration and memory go; the layers stay until one overlay is left
    later: tuple[Snapshot, ...] = ()  # recorded; merged when the VM is off, can be undeleted until then

    @property
    def moves_data(self) -> bool:
        """Whether layers are merged: the VM must be off for it."""
        return bool(self.folds or self.pulls)

    @property
    def does_something(self) -> bool:
        """Whether anything is to be done now."""
        return bool(self.snapshots or self.waits or self.later)


# -- which snapshots ---------------------------------------------------------------------------------------------------


def subtree(catalog: Catalog, ids: Collection[str]) -> list[str]:
    """Return the snapshots and all that follow them, deleted ones in between passed through, oldest first."""
    found = set(ids)
    while True:
        more = {s.id for s in catalog.snapshots.values() if s.parent in found and s.id not in found}
        if not more:
            return [s.id for s in catalog.visible() if s.id in found]
        found |= more


def line_to_accept(catalog: Catalog, *, drop_branches: bool) -> list[str]:
    """Return the snapshots that `accept` deletes: those of the present's line, with `drop_branches` all others too.

    None: there are none. Raise HasChildren for branches that nobody said may go.
    """
    line = {s.id for s in catalog.line(catalog.current)}
    branches = [s for s in catalog.visible() if s.id not in line]
    if branches and not drop_branches:
        names = ", ".join(s.name for s in branches)
        raise HasChildren(f"not in the line of the present: {names}",
                          hint=f"they go too with: diskchain accept {catalog.name} --drop-branches")  # fmt: skip
    return [s.id for s in catalog.visible()]


# -- the plan ----------------------------------------------------------------------------------------------------------


def plan_deletion(catalog: Catalog, wanted: Collection[str], *, data: bool = True) -> Deletion:
    """Given ids of snapshots, return what their deletion does, together with what was deleted before and waits.

    `data=False`: nothing is merged now (the VM is on): what would be is recorded for later. Raise Protected, Refused.
    """
    for snapshot_id in wanted:
        _refuse_protected(catalog, catalog.snapshots[snapshot_id])
    dead = {s.id for s in catalog.pending()} | set(wanted)
    ready = _ready(catalog, dead, most=1 if data else 0)
    going = _going(catalog, ready)
    leaves = _leaves(catalog, going)
    folds, pulls = _merges(catalog, going, leaves)
    blocked = [catalog.snapshots[i] for i in dead - ready]
    movable = set() if data else _ready(catalog, dead, most=1)
    unlinks = [catalog.images[i] for i in leaves]
    return Deletion(
        _in_order(catalog, ready), tuple(folds), tuple(pulls),
        tuple(i for i in unlinks if i.ours), tuple(i for i in unlinks if not i.ours),
        waits=_in_order(catalog, {s.id for s in blocked if s.id not in movable and (s.id in wanted or s.memory.saved)}),
        later=_in_order(catalog, {s.id for s in blocked if s.id in movable and s.id in wanted}),
    )  # fmt: skip


def plan_copy(catalog: Catalog, snapshot_id: str) -> Deletion:
    """Given a snapshot, return its deletion by copying its layers into each overlay that stands on them."""
    snapshot = catalog.snapshots[snapshot_id]
    _refuse_protected(catalog, snapshot)
    pulls: list[Pull] = []
    unlinks: list[Image] = []
    kept: list[Image] = []
    for target, image_id in snapshot.disks.items():
        image, overlays = catalog.images[image_id], tuple(catalog.overlays_on(image_id))
        _refuse_active(catalog, image)
        if overlays:
            pulls.append(Pull(target, (image,), overlays, catalog.images[image.backing] if image.backing else None))
        else:
            (unlinks if image.ours else kept).append(image)
    return Deletion((snapshot,), (), tuple(pulls), tuple(unlinks), tuple(kept))


def plan_all(catalog: Catalog, wanted: Sequence[str], *, data: bool = True, copy: bool = False) -> list[Deletion]:
    """Return the deletions that carry out what was asked for, in order, each planned on what the ones before it leave."""
    first = plan_deletion(catalog, wanted, data=data)
    copied = [s.id for s in first.waits if s.id in wanted] if copy else []
    if copied:
        first = plan_deletion(catalog, [i for i in wanted if i not in copied], data=data)
    found = [first] if first.does_something else []
    for snapshot_id in copied:
        catalog = after(catalog, found[-1]) if found else catalog
        found.append(plan_copy(catalog, snapshot_id))
    return found


def with_survivors(folds: Sequence[Fold], pulls: Sequence[Pull]) -> list[Pull]:
    """Return the pulls with what their overlays stand on once the folds of the same deletion are done."""
    into = {layer.id: fold.into for fold in folds for layer in fold.gone}
    return [replace(p, below=into.get(p.below.id, p.below)) if p.below else p for p in pulls]


def after(catalog: Catalog, deletion: Deletion) -> Catalog:
    """Return the catalog as it is when the deletion is done (fingerprints aside)."""
    for snapshot in deletion.waits:
        catalog = catalog.with_snapshot(replace(catalog.snapshots[snapshot.id], deleted=True, memory=Memory()))
    for snapshot in deletion.later:
        catalog = catalog.with_snapshot(replace(catalog.snapshots[snapshot.id], deleted=True))
    return without_snapshots(moved(catalog, deletion), [s.id for s in deletion.snapshots])


def moved(catalog: Catalog, deletion: Deletion) -> Catalog:
    """Return the catalog with the images as they are when the deletion is done: who names what."""
    for fold in deletion.folds:
        for layer in reversed(fold.gone):
            if layer.id in catalog.images:
                catalog = catalog.folded(fold.target, layer.id, fold.into.id)
    for pull in deletion.pulls:
        below = pull.below.id if pull.below else None
        catalog = catalog.with_images(
            replace(catalog.images[o.id], backing=below) for o in pull.overlays if o.id in catalog.images
        )
        catalog = catalog.without_images(i.id for i in pull.gone)
    return catalog.without_images(i.id for i in (*deletion.unlinks, *deletion.kept))


def without_snapshots(catalog: Catalog, ids: Collection[str]) -> Catalog:
    """Return the catalog without the snapshots; those already gone are passed over."""
    for snapshot_id in ids:
        if snapshot_id in catalog.snapshots:
            catalog = catalog.without_snapshot(snapshot_id)
    return catalog


# -- how it is found ---------------------------------------------------------------------------------------------------


def _in_order(catalog: Catalog, ids: Collection[str]) -> tuple[Snapshot, ...]:
    return tuple(s for s in catalog.snapshots.values() if s.id in ids)


def _refuse_protected(catalog: Catalog, snapshot: Snapshot) -> None:
    if snapshot.protected and not snapshot.deleted:
        raise Protected(f"snapshot {snapshot.name!r} is protected",
                        hint=f"diskchain unprotect {catalog.name} {snapshot.name}")  # fmt: skip


def _refuse_active(catalog: Catalog, image: Image) -> None:
    if image.id in catalog.active.values():
        raise Refused(f"{image.path} is an active layer; this catalog contradicts itself",
                      hint="keep every file; see RECOVER.txt")  # fmt: skip


def _ready(catalog: Catalog, dead: Collection[str], *, most: int) -> set[str]:
    """The snapshots of which every layer has at most so many overlays left, once the others of them are gone."""
    ready = set(dead)
    while True:
        leaves = _leaves(catalog, _going(catalog, ready))
        blocked = {i for i in ready if any(
            len(_left(catalog, image, leaves)) > most for image in catalog.snapshots[i].disks.values())}  # fmt: skip
        if not blocked:
            return ready
        ready -= blocked


def _going(catalog: Catalog, ready: Collection[str]) -> set[str]:
    """The layers that no snapshot but these froze, and that are not the last ones of a detached disk."""
    stays = {image for s in catalog.snapshots.values() if s.id not in ready for image in s.disks.values()}
    going = {image for i in ready for image in catalog.snapshots[i].disks.values()} - stays - set(catalog.detached)
    for image_id in going:
        _refuse_active(catalog, catalog.images[image_id])
    return going


def _leaves(catalog: Catalog, going: Collection[str]) -> list[str]:
    """Those of the layers on which nothing stands, once the others of them are gone; upper ones first."""
    above = _overlays(catalog)
    waiting = {i: len(above.get(i, ())) for i in going}
    found = [i for i in catalog.images if waiting.get(i) == 0]
    for image_id in found:  # grows while it is walked
        below = catalog.images[image_id].backing
        if below is not None and below in waiting:
            waiting[below] -= 1
            if waiting[below] == 0:
                found.append(below)
    return found


def _overlays(catalog: Catalog) -> dict[str, list[Image]]:
    above: dict[str, list[Image]] = {}
    for image in catalog.images.values():
        if image.backing is not None:
            above.setdefault(image.backing, []).append(image)
    return above


def _left(catalog: Catalog, image_id: str, leaves: Collection[str]) -> list[Image]:
    gone = set(leaves)
    return [o for o in catalog.overlays_on(image_id) if o.id not in gone]


def _merges(catalog: Catalog, going: set[str], leaves: Sequence[str]) -> tuple[list[Fold], list[Pull]]:
    folds: list[Fold] = []
    pulls: list[Pull] = []
    run = going - set(leaves)
    for image in (i for i in catalog.images.values() if i.id in run and i.backing not in run):
        members = list(_upwards(catalog, image, run, leaves))  # lowest first, what they are folded with last
        top, through = members[-1], tuple(reversed(members[1:-1]))
        overlays = tuple(_left(catalog, top.id, leaves))
        if all(i.ours for i in (top, *through)):
            below = tuple(catalog.chain(image.id)[1:])
            folds.append(Fold(top.target, top, image, overlays, through, below))
        else:  # somebody else's overlay is never unlinked: the layers below go up into it
            base = catalog.images[image.backing] if image.backing else None
            pulls.append(Pull(top.target, (*through, image), (top,), base))
    return folds, with_survivors(folds, pulls)


def _upwards(catalog: Catalog, image: Image, run: set[str], leaves: Sequence[str]) -> Iterator[Image]:
    while True:
        yield image
        if image.id not in run:
            return
        (image,) = _left(catalog, image.id, leaves)
