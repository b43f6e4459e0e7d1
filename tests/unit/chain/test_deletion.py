"""The planner of deletions against a model: random trees, random operations, every state that is left keeps its content.

The model has files whose blocks are numbers; it carries a plan out as the engine would, and knows nothing of how it was made.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from diskchain.chain.deletion import (
    Deletion,
    after,
    line_to_accept,
    plan_all,
    plan_deletion,
    subtree,
)
from diskchain.chain.model import Catalog, Image, Memory, Snapshot
from diskchain.errors import HasChildren, Protected
from tests.support.sample import FULL

DISKS = ("vda", "vdb")
BLOCKS = 8


class Files:
    """Files with blocks, and what each stands on."""

    def __init__(self) -> None:
        self.data: dict[str, dict[int, int]] = {}
        self.backing: dict[str, str | None] = {}

    def make(self, name: str, backing: str | None) -> None:
        """A new, empty file."""
        assert name not in self.data
        self.data[name], self.backing[name] = {}, backing

    def content(self, name: str) -> tuple[int, ...]:
        """What a guest reads."""
        found: dict[int, int] = {}
        at: str | None = name
        while at is not None:
            found = {**self.data[at], **found}
            at = self.backing[at]
        return tuple(found.get(block, 0) for block in range(BLOCKS))

    def carry_out(self, deletion: Deletion) -> None:
        """What the engine does."""
        for fold in deletion.folds:
            assert self.backing[fold.gone[-1].id] == fold.into.id
            for lower, upper in zip(reversed(fold.gone), reversed(fold.gone[:-1]), strict=False):
                assert self.backing[upper.id] == lower.id
            for layer in reversed(fold.gone):
                self.data[fold.into.id].update(self.data[layer.id])
            for overlay in fold.overlays:
                assert self.backing[overlay.id] == fold.top.id
                self.backing[overlay.id] = fold.into.id
        for pull in deletion.pulls:
            below = pull.below.id if pull.below else None
            for overlay in pull.overlays:
                shown = self.content(overlay.id)
                self.backing[overlay.id] = below
                under = self.content(below) if below else (0,) * BLOCKS
                self.data[overlay.id].update({b: v for b, v in enumerate(shown) if v != under[b]})
        gone = [i for fold in deletion.folds for i in fold.gone]
        gone += [i for pull in deletion.pulls for i in pull.gone if i.ours]
        for image in (*gone, *deletion.unlinks):
            assert image.ours, "a file that is not ours was unlinked"
            del self.data[image.id], self.backing[image.id]


class Deletions(RuleBasedStateMachine):
    """A VM of two disks whose snapshots come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.files, self.counter = Files(), 0
        self.ours: set[str] = set()
        self.catalog = Catalog("u", "vm", targets=DISKS)
        self.expected: dict[str, dict[str, tuple[int, ...]]] = {}
        for target in DISKS:
            self._layer(target, None, ours=False)

    def _layer(self, target: str, backing: str | None, *, ours: bool = True) -> None:
        self.counter += 1
        name = f"{target}-{self.counter}"
        self.files.make(name, backing)
        image = Image(name, Path(f"/{name}"), "qcow2", target, BLOCKS, backing, ours=ours)
        self.ours |= {name} if ours else set()
        active = {**self.catalog.active, target: name}
        self.catalog = replace(self.catalog.with_images([image]), active=active)

    def _snapshot(self, targets: tuple[str, ...], *, protected: bool = False) -> None:
        self.counter += 1
        frozen = {t: self.catalog.active[t] for t in targets}
        memory = Memory("saved", 5)
        snapshot = Snapshot(f"s{self.counter}", f"s{self.counter}", "", self.catalog.current, frozen, memory=memory,
                            protected=protected)  # fmt: skip
        self.catalog = self.catalog.with_snapshot(snapshot)
        self.expected[snapshot.id] = {t: self.files.content(i) for t, i in frozen.items()}

    # -- what a VM does

    @rule(disk=st.sampled_from(DISKS), block=st.integers(0, BLOCKS - 1))
    def write(self, disk: str, block: int) -> None:
        self.counter += 1
        self.files.data[self.catalog.active[disk]][block] = self.counter

    @rule(covers=st.sampled_from([DISKS, DISKS, ("vda",)]), foreign=st.sampled_from([False] * 5 + [True]),
          protected=st.sampled_from([False] * 5 + [True]))  # fmt: skip
    def create(self, covers: tuple[str, ...], foreign: bool, protected: bool) -> None:
        self._snapshot(covers, protected=protected)
        current = f"s{self.counter}"
        for target in covers:
            self._layer(target, self.catalog.active[target], ours=not foreign)
        self.catalog = replace(self.catalog, current=current)

    @precondition(lambda self: self.catalog.visible())
    @rule(data=st.data(), keep=st.booleans(), only_vda=st.booleans())
    def revert(self, data: st.DataObject, keep: bool, only_vda: bool) -> None:
        to = data.draw(st.sampled_from(self.catalog.visible()))
        back = [t for t in to.disks if t == "vda" or not only_vda]
        if keep:
            self._snapshot(DISKS)
        left = dict(self.catalog.active)
        for target in DISKS if keep else back:
            self._layer(target, to.disks[target] if target in back else left[target])
        if not keep:
            gone = [left[t] for t in back if self.catalog.images[left[t]].ours]
            for image_id in gone:
                del self.files.data[image_id], self.files.backing[image_id]
            self.catalog = self.catalog.without_images(left[t] for t in back)
        self.catalog = replace(self.catalog, current=to.id)

    @rule(count=st.integers(2, 4), data=st.data())
    def grow_branches(self, count: int, data: st.DataObject) -> None:
        """Several presents kept on one snapshot: plain rules make too few forks."""
        self.create(DISKS, False, False)
        fork = self.catalog.current
        for _ in range(count):
            self.write(data.draw(st.sampled_from(DISKS)), data.draw(st.integers(0, BLOCKS - 1)))
            self._snapshot(DISKS)
            for target in DISKS:
                self._layer(target, self.catalog.snapshots[fork or ""].disks[target])
            self.catalog = replace(self.catalog, current=fork)

    # -- what is proven

    @precondition(lambda self: self.catalog.visible())
    @rule(data=st.data(), children=st.booleans(), copy=st.booleans(), on=st.booleans())
    def delete(self, data: st.DataObject, children: bool, copy: bool, on: bool) -> None:
        ids = data.draw(
            st.lists(st.sampled_from([s.id for s in self.catalog.visible()]), min_size=1, max_size=3, unique=True)
        )
        self._delete(subtree(self.catalog, ids) if children else ids, on=on, copy=copy and not on)

    @precondition(lambda self: len(self.catalog.visible()) > 4)
    @rule(drop=st.booleans())
    def accept(self, drop: bool) -> None:
        try:
            ids = line_to_accept(self.catalog, drop_branches=drop)
        except HasChildren:
            assert not drop
        else:
            if self._delete(ids, on=False, copy=False):
                assert not self.catalog.visible()
                assert not self.catalog.pending(), "accept leaves nothing to wait for"

    @rule()
    def merge(self) -> None:
        self._delete([], on=False, copy=False)

    def _delete(self, ids: list[str], *, on: bool, copy: bool) -> bool:
        names = {i: self.catalog.snapshots[i].name for i in ids}
        if any(self.catalog.snapshots[i].protected for i in ids):
            with pytest.raises(Protected):
                plan_all(self.catalog, ids, data=not on, copy=copy)
            return False
        before = self.catalog
        for deletion in plan_all(self.catalog, ids, data=not on, copy=copy):
            assert deletion.does_something and not (on and deletion.moves_data)
            self.files.carry_out(deletion)
            self.catalog = after(self.catalog, deletion)
        assert set(self.catalog.snapshots) <= set(before.snapshots)
        assert {s.id for s in before.visible()} - {s.id for s in self.catalog.visible()} == set(names)
        waiting = self.catalog.pending()
        if not on:
            assert not plan_deletion(self.catalog, []).snapshots, "something is left that could be merged"
            assert all(any(len(self.catalog.overlays_on(i)) > 1 for i in s.disks.values()) for s in waiting)
        if copy:
            assert not set(ids) & {s.id for s in waiting}
        return True

    @invariant()
    def every_state_that_is_left_is_what_it_was(self) -> None:
        for snapshot in self.catalog.visible():
            shown = {t: self.files.content(i) for t, i in snapshot.disks.items()}
            assert shown == self.expected[snapshot.id], snapshot.name
            assert snapshot.memory.saved, "the memory of one that was not deleted is gone"

    @invariant()
    def the_catalog_is_what_the_files_are(self) -> None:
        lost = set(self.files.data) - set(self.catalog.images)
        assert not lost & self.ours, "orphans"
        for image in self.catalog.images.values():
            assert self.files.backing[image.id] == image.backing
        for snapshot in self.catalog.snapshots.values():
            assert set(snapshot.disks.values()) <= set(self.catalog.images)
            assert snapshot.parent is None or snapshot.parent in self.catalog.snapshots

    def teardown(self) -> None:
        """The present is the same whatever is deleted: asked at the end by deleting everything."""
        present = {t: self.files.content(i) for t, i in self.catalog.active.items()}
        self.catalog = replace(
            self.catalog, snapshots={k: replace(s, protected=False) for k, s in self.catalog.snapshots.items()}
        )
        self._delete([s.id for s in self.catalog.visible()], on=False, copy=False)
        assert {t: self.files.content(i) for t, i in self.catalog.active.items()} == present
        assert not self.catalog.snapshots


Deletions.TestCase.settings = settings(
    max_examples=1000 if FULL else 50,
    stateful_step_count=40,
    deadline=None,
    derandomize=not FULL,
    suppress_health_check=list(HealthCheck),
)
TestDeletions = Deletions.TestCase


def comb(count: int) -> Catalog:
    """A line of snapshots with a branch on each."""
    catalog, below = Catalog("u", "vm", targets=("vda",)), None
    for n in range(count):
        line = Image(f"l{n}", Path(f"/l{n}"), "qcow2", "vda", 1, below, ours=n > 0)
        branch = Image(f"b{n}", Path(f"/b{n}"), "qcow2", "vda", 1, f"l{n}", ours=True)
        parent = f"s{n - 1}" if n else None
        catalog = catalog.with_images([line, branch]).with_snapshot(
            Snapshot(f"s{n}", f"s{n}", "", parent, {"vda": f"l{n}"})
        )
        catalog = catalog.with_snapshot(Snapshot(f"t{n}", f"t{n}", "", f"s{n}", {"vda": f"b{n}"}))
        below = f"l{n}"
    active = Image("now", Path("/now"), "qcow2", "vda", 1, below, ours=True)
    return replace(catalog.with_images([active]), active={"vda": "now"}, current=f"s{count - 1}")


def test_a_tree_of_500_images_is_planned_in_one_pass() -> None:
    """All at once, into one: 250 layers in one pass."""
    catalog = comb(250)
    (deletion,) = plan_all(catalog, line_to_accept(catalog, drop_branches=True))
    (fold,) = deletion.folds
    assert (fold.into.id, fold.top.id, len(fold.through)) == ("l0", "now", 249) and len(deletion.unlinks) == 250
    assert after(catalog, deletion).images.keys() == {"l0"}


def test_accept_never_goes_below_the_oldest_snapshot() -> None:
    """What the first snapshot stood on may be somebody's template."""
    catalog = comb(3)
    base = Image("template", Path("/template"), "qcow2", "vda", 1, None)
    catalog = catalog.with_images([base, replace(catalog.images["l0"], backing="template")])
    (deletion,) = plan_all(catalog, line_to_accept(catalog, drop_branches=True))
    assert deletion.folds[0].into.id == "l0" and deletion.folds[0].below == (base,)


def test_a_layer_that_is_not_ours_takes_what_is_below_it_instead_of_being_unlinked() -> None:
    """An overlay that virsh made is somebody's file."""
    catalog = comb(2)
    catalog = catalog.with_images([replace(catalog.images["l1"], ours=False)]).without_images(["b0"])
    catalog = catalog.without_snapshot("t0")
    deletion = plan_deletion(catalog, ["s0"])
    assert not deletion.folds and [i.id for i in deletion.pulls[0].gone] == ["l0"]
    assert [i.id for i in deletion.pulls[0].overlays] == ["l1"] and deletion.pulls[0].below is None


def test_what_goes_up_stands_on_what_took_the_layer_below_it() -> None:
    """s0 goes down into its own layer, s2 up into somebody's: that stood on what s0's merge takes away."""
    line = [Image(f"l{n}", Path(f"/l{n}"), "qcow2", "vda", 1, f"l{n - 1}" if n else None, ours=True) for n in range(4)]
    catalog = Catalog("u", "vm", targets=("vda",)).with_images([*line[:3], replace(line[3], ours=False)])
    for n in range(3):
        catalog = catalog.with_snapshot(Snapshot(f"s{n}", f"s{n}", "", f"s{n - 1}" if n else None, {"vda": f"l{n}"}))
    catalog = replace(catalog, active={"vda": "l3"}, current="s2")
    deletion = plan_deletion(catalog, ["s0", "s2"])
    assert [(f.top.id, f.into.id) for f in deletion.folds] == [("l1", "l0")]
    assert [(p.gone[0].id, p.below.id if p.below else None) for p in deletion.pulls] == [("l2", "l0")]
    assert after(catalog, deletion).images["l3"].backing == "l0"
