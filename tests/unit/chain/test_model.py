"""Catalog and plans as values: names, trees, and what a deletion does to images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskchain.chain.deletion import plan_deletion
from diskchain.chain.model import Catalog, Image, MiB, Snapshot, layer_name, snapshot_name
from diskchain.chain.plan import plan_revert_disks
from diskchain.errors import BadName, ChainDamaged, NotFound, Protected, Refused


def image(key: str, backing: str | None, *, ours: bool = True) -> Image:
    return Image(key, Path(f"/vm/{key}.qcow2"), "qcow2", "vda", 1 << 20, backing, ours=ours)


def tree() -> Catalog:
    """base(s1) <- a(s2) <- b(active); base <- c(s3)."""
    catalog = Catalog("u", "vm", active={"vda": "b"}, current="s2")
    catalog = catalog.with_images(
        [image("base", None, ours=False), image("a", "base"), image("b", "a"), image("c", "base")]
    )
    for key, parent, frozen in (("s1", None, "base"), ("s2", "s1", "a"), ("s3", "s1", "c")):
        catalog = catalog.with_snapshot(Snapshot(key, f"name-{key}", "2026-01-01T00:00:00Z", parent, {"vda": frozen}))
    return catalog


def test_chain_goes_from_the_active_layer_to_the_base() -> None:
    assert [i.id for i in tree().chain("b")] == ["b", "a", "base"]


def test_a_circle_in_the_record_is_noticed() -> None:
    catalog = tree().with_images([image("base", "b")])
    with pytest.raises(ChainDamaged):
        catalog.chain("b")


def test_find_by_name_and_id_and_not_at_all() -> None:
    assert tree().find("name-s2").id == tree().find("s2").id == "s2"
    with pytest.raises(NotFound):
        tree().find("nothing")


def test_delete_with_one_overlay_folds_it_down_and_keeps_every_other_state() -> None:
    catalog = tree()
    plan = plan_deletion(catalog, ["s2"])
    (fold,) = plan.folds
    assert (fold.top.id, fold.into.id, fold.overlays) == ("b", "a", ())
    after = catalog.folded("vda", "b", "a").without_snapshot("s2")
    assert after.active == {"vda": "a"} and after.current == "s1" and "b" not in after.images


def test_delete_a_leaf_unlinks_only_what_we_made() -> None:
    catalog = tree()
    assert [i.id for i in plan_deletion(catalog, ["s3"]).unlinks] == ["c"]
    foreign = catalog.with_images([image("c", "base", ours=False)])
    plan = plan_deletion(foreign, ["s3"])
    assert not plan.unlinks and [i.id for i in plan.kept] == ["c"]


def test_delete_with_several_children_lets_the_layer_wait() -> None:
    plan = plan_deletion(tree(), ["s1"])
    assert [s.id for s in plan.waits] == ["s1"] and not plan.moves_data and not plan.unlinks and not plan.snapshots


def test_delete_a_protected_one_is_refused() -> None:
    catalog = tree().with_snapshot(Snapshot("s3", "name-s3", "", "s1", {"vda": "c"}, protected=True))
    with pytest.raises(Protected):
        plan_deletion(catalog, ["s3"])


def test_folding_below_a_snapshot_moves_the_snapshot_and_its_overlays() -> None:
    catalog = tree().without_images(["c"]).without_snapshot("s3")
    after = catalog.folded("vda", "a", "base").without_snapshot("s1")
    assert after.snapshots["s2"].disks == {"vda": "base"} and after.snapshots["s2"].parent is None
    assert [i.id for i in after.chain("b")] == ["b", "base"]


def test_deleted_snapshots_are_hidden_and_pending() -> None:
    catalog = tree().with_snapshot(Snapshot("s1", "name-s1", "", None, {"vda": "base"}, deleted=True))
    assert [s.id for s in catalog.visible()] == ["s2", "s3"] and [s.id for s in catalog.pending()] == ["s1"]
    assert [s.id for s in catalog.children(None)] == ["s2", "s3"]


@pytest.mark.parametrize(
    "bad", ["", " ", "..", ".", "a/b", "a\nb", "-x", "x" * 121, "a\x1bb", "a\u202eb", " a", "a\u2028b", "\ud800"]
)
def test_hostile_names_are_refused(bad: str) -> None:
    with pytest.raises(BadName):
        snapshot_name(bad)


@pytest.mark.parametrize("good", ["before-upgrade", "a b", "ümläut", "日本", "x" * 120, "a:b,c", "100%"])
def test_ordinary_names_are_fine(good: str) -> None:
    assert snapshot_name(good) == good


@given(st.text(max_size=200))
def test_any_name_is_taken_or_refused_and_never_holds_a_control_character(text: str) -> None:
    try:
        name = snapshot_name(text)
    except BadName:
        return
    assert name and "/" not in name and all(ord(c) >= 32 for c in name)


def catalog_of(**changes: object) -> Catalog:
    """vda: a <- a2 (active), vdb: b <- b2 (active); S froze a and b, P froze a only (partial)."""
    images = {
        i: Image(i, Path(f"/vm/{i}.qcow2"), "qcow2", target, MiB, backing, ours=backing is not None)
        for i, target, backing in (("a", "vda", None), ("a2", "vda", "a"), ("b", "vdb", None), ("b2", "vdb", "b"))
    }
    snapshots = {
        "s": Snapshot("s", "s", "", None, {"vda": "a", "vdb": "b"}),
        "p": Snapshot("p", "p", "", "s", {"vda": "a"}, partial=("vdb",)),
    }
    catalog = Catalog("u", "vm", images, {"vda": "a2", "vdb": "b2"}, snapshots, "s", targets=("vda", "vdb"))
    return replace(catalog, **changes)  # type: ignore[arg-type]


def test_revert_disks_of_a_whole_snapshot_go_back() -> None:
    """Every disk gets an overlay on what the snapshot froze."""
    catalog = catalog_of()
    plan = plan_revert_disks(catalog, catalog.snapshots["s"], ["vda", "vdb"], [], keeps=True)
    assert plan.on == {"vda": "a", "vdb": "b"} and not plan.stays and plan.current == "s" and not plan.left_alone


@pytest.mark.parametrize(("keeps", "on", "stays"), [
    (True, {"vda": "a", "vdb": "b2"}, {}), (False, {"vda": "a"}, {"vdb": "b2"}),
])  # fmt: skip
def test_revert_disks_that_stay_depend_on_whether_the_present_is_kept(
    keeps: bool, on: dict[str, str], stays: dict[str, str]
) -> None:
    """A kept present freezes their layers, so they need overlays of their own; a discarded one does not."""
    catalog = catalog_of()
    for name, only in (("p", []), ("s", ["vda"])):
        plan = plan_revert_disks(catalog, catalog.snapshots[name], ["vda", "vdb"], only, keeps=keeps)
        assert (plan.on, plan.stays, plan.left_alone) == (on, stays, ["vdb"])
    assert plan.current == (None if keeps else "s")


def test_revert_disks_attach_a_detached_layer_that_the_snapshot_skipped() -> None:
    """Its configuration has vdb; the VM has not; one detached layer: that; none: refused."""
    catalog = catalog_of().without_disks(["vdb"])
    assert catalog.active == {"vda": "a2"} and catalog.detached == ("b2",)
    plan = plan_revert_disks(catalog, catalog.snapshots["p"], ["vda", "vdb"], [], keeps=True)
    assert plan.stays == {"vdb": "b2"}
    with pytest.raises(Refused):
        plan_revert_disks(replace(catalog, detached=()), catalog.snapshots["p"], ["vda", "vdb"], [], keeps=True)


def test_without_disks_lets_go_of_what_is_neither_ours_nor_frozen() -> None:
    """An imported disk of which no snapshot knows anything leaves no trace; detached ones follow a merge."""
    catalog = catalog_of(snapshots={}, current=None)
    alone = replace(catalog, images={k: replace(i, ours=False) for k, i in catalog.images.items()})
    assert set(alone.without_disks(["vdb"]).images) == {"a", "a2"} and not alone.without_disks(["vdb"]).detached
    assert catalog_of().without_disks(["vdb"]).folded("vdb", "b2", "b").detached == ("b",)


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("web1.qcow2", "web1.vda.0123456789ab.qcow2"),
        ("web1.raw", "web1.vda.0123456789ab.qcow2"),
        ("web1.vda.fedcba987654.qcow2", "web1.vda.0123456789ab.qcow2"),
        ("web1.vda.fedcba987654.vda.111111111111.qcow2", "web1.vda.0123456789ab.qcow2"),
        ("web1.vdb.fedcba987654.qcow2", "web1.vdb.fedcba987654.vda.0123456789ab.qcow2"),
        ("web1.vda.old.qcow2", "web1.vda.old.vda.0123456789ab.qcow2"),
        (".vda.fedcba987654.qcow2", ".vda.fedcba987654.vda.0123456789ab.qcow2"),
        ("x" * 200 + ".qcow2", "x" * 100 + ".vda.0123456789ab.qcow2"),
        ("€" * 80 + ".qcow2", "€" * 33 + ".vda.0123456789ab.qcow2"),
    ],
)
def test_names_of_layers_do_not_grow(base: str, name: str) -> None:
    """Neither with the chain nor with the times that its base was written anew."""
    assert layer_name(Path("/srv/vm") / base, "vda", "0123456789ab") == name
