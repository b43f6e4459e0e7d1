"""Catalog and plans as values: names, trees, and what a deletion does to images."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskchain.chain.model import Catalog, Image, Snapshot, snapshot_name
from diskchain.chain.plan import plan_delete
from diskchain.errors import BadName, ChainDamaged, HasChildren, NotFound, Protected


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
    plan = plan_delete(catalog, catalog.find("s2"))
    (fold,) = plan.folds
    assert (fold.top.id, fold.into.id, fold.overlays) == ("b", "a", ())
    after = catalog.folded("vda", "b", "a").without_snapshot("s2")
    assert after.active == {"vda": "a"} and after.current == "s1" and "b" not in after.images


def test_delete_a_leaf_unlinks_only_what_we_made() -> None:
    catalog = tree()
    assert [i.id for i in plan_delete(catalog, catalog.find("s3")).unlinks] == ["c"]
    foreign = catalog.with_images([image("c", "base", ours=False)])
    plan = plan_delete(foreign, foreign.find("s3"))
    assert not plan.unlinks and [i.id for i in plan.kept] == ["c"]


def test_delete_with_several_children_names_them() -> None:
    with pytest.raises(HasChildren, match=r"name-s2 and name-s3"):
        plan_delete(tree(), tree().find("s1"))


def test_delete_a_protected_one_is_refused() -> None:
    catalog = tree().with_snapshot(Snapshot("s3", "name-s3", "", "s1", {"vda": "c"}, protected=True))
    with pytest.raises(Protected):
        plan_delete(catalog, catalog.find("s3"))


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
