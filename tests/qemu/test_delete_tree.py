"""Any node of the tree is deleted: forks, subtrees, many at once, the whole line; what is left holds what it held.

s1 - s2 - before-revert-1, s1 - s3 - (now); vda is qcow2, vdb raw, and the lowest layers are not diskchain's.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.refusals import refused, unchanged
from tests.support.rig import MiB, Rig

LET_GO = {"orphan vda.qcow2", "orphan vdb.raw"}


def files(rig: Rig) -> set[str]:
    """The images in the directory."""
    return {p.name for p in rig.dir.iterdir() if p.suffix in (".qcow2", ".raw")}


def test_fork_waits_and_is_merged_by_the_delete_that_leaves_one_overlay(tree: Rig) -> None:
    """Name, configuration and memory go; the layer goes with the last branch but one."""
    before = files(tree)
    tree.ok("delete", "vm", "s1", "-y")
    assert "s1" not in tree.snapshots() and files(tree) == before
    assert tree.verdict(present="now") == []
    assert tree.ok("check", "vm").code == 0
    with unchanged(tree):
        assert tree.ok("merge", "vm", "--json").json["merged"] == []
    body = tree.ok("delete", "vm", "s2", "--children", "-y", "--json").json
    assert {m["method"] for m in body["merged"]} == {"commit", "unlink"} and body["pending"] == []
    assert set(tree.snapshots()) == {"s3"} and tree.verdict(present="now") == []
    assert len(files(tree)) == 4, "two layers for each disk: s3 and the present"


def test_copy_lets_every_child_stand_without_it(tree: Rig) -> None:
    """The base is not ours: it stays, untouched, and nothing stands on it."""
    bases = {name: (tree.dir / name).read_bytes() for name in ("vda.qcow2", "vdb.raw")}
    plan = tree.ok("delete", "vm", "s1", "--copy", "-n", "--json").json["plan"]
    assert 0 < plan["bytes"] <= plan["space_needed"] + 1 and any("up into" in step for step in plan["steps"])
    body = tree.ok("delete", "vm", "s1", "--copy", "-y", "--json").json
    assert [m["method"] for m in body["merged"]] == ["stream"] * 4 and body["pending"] == []
    assert set(tree.verdict(present="now")) == LET_GO
    assert {name: (tree.dir / name).read_bytes() for name in bases} == bases
    for name in bases:
        (tree.dir / name).unlink()
    assert tree.verdict(present="now") == []


def test_copy_of_a_layer_in_the_middle(tree: Rig) -> None:
    """Two branches on s3, which stands on s1: s3's layer is ours, and goes."""
    tree.ok("revert", "vm", "s3", "-y")
    tree.expected["before-revert-2"] = tree.expected["now"]
    gone = set(tree.snapshots()["s3"].values())
    tree.ok("delete", "vm", "s3", "--copy", "-y")
    assert not any(path.exists() for path in gone) and tree.verdict(present="s3") == []
    names = [tree.qemu_img("info", str(p)) for p in tree.active().values()]
    assert all("/vd" not in said.split("backing file: ")[1].splitlines()[0].split(" (")[0] for said in names), (
        "relative"
    )


def test_accept_folds_the_line_in_one_pass_into_the_oldest(tree: Rig) -> None:
    """Branches are refused, then dropped; the present is one file for each disk, by the name it had first."""
    with unchanged(tree):
        error = refused(tree, "accept", "vm", "-y", code=6, says="s2, before-revert-1")
        assert "--drop-branches" in error["hint"]
    body = tree.ok("accept", "vm", "--drop-branches", "-y", "--json").json
    assert [m["into"].rpartition("/")[2] for m in body["merged"] if m["into"]] == ["vda.qcow2", "vdb.raw"]
    assert files(tree) == {"vda.qcow2", "vdb.raw"} and tree.verdict(present="now") == []


def test_accept_refuses_a_protected_one(tree: Rig) -> None:
    tree.ok("protect", "vm", "s3")
    with unchanged(tree):
        refused(tree, "accept", "vm", "--drop-branches", "-y", code=6, says="protected")


def test_accept_leaves_what_the_first_snapshot_stood_on_alone(tmp_path: Path) -> None:
    """The image that we met stands on a template: it is not touched."""
    rig = Rig(tmp_path / "vm", targets=("vda",), size=16 * MiB)
    rig.build(guest=False)
    rig.ok("machine", "undefine", "vm", "-y")
    subprocess.run(["rm", "-r", str(rig.dir / ".diskchain")], check=True)
    template = (rig.dir / "vda.qcow2").rename(rig.dir / "template.qcow2")
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 4M", str(template)], check=True, capture_output=True)
    rig.qemu_img("create", "-q", "-f", "qcow2", "-b", template.name, "-F", "qcow2", str(rig.dir / "vda.qcow2"))
    before = template.read_bytes()
    rig.ok("machine", "define", str(rig.dir / "vm.toml"))
    for number in range(8):
        rig.write(number + 1, number * MiB, 2 * MiB)
        rig.ok("create", "vm", f"s{number}")
    rig.write(99, 9 * MiB + 512, 4096)
    rig.remember("now")
    body = rig.ok("accept", "vm", "-y", "--json").json
    assert len(body["merged"]) == 1 and len(body["deleted"]) == 8
    assert set(rig.verdict(present="now")) == {"orphan template.qcow2"} or rig.verdict(present="now") == []
    assert template.read_bytes() == before and rig.active()["vda"].name == "vda.qcow2"
    rig.destroy()


@pytest.mark.parametrize("names", [("s1", "s2"), ("s3", "s1"), ("s2", "s3", "before-revert-1")])
def test_many_at_once(tree: Rig, names: tuple[str, ...]) -> None:
    """Whatever is asked for together."""
    tree.ok("delete", "vm", *names, "-y")
    assert not set(names) & set(tree.snapshots()) and tree.verdict(present="now") == []
    rest = tree.ok("accept", "vm", "--drop-branches", "-y", "--json").json
    assert rest["pending"] == [] and files(tree) == {"vda.qcow2", "vdb.raw"} and tree.verdict(present="now") == []


def test_start_wins_over_a_copy_that_was_cut_off(tree: Rig) -> None:
    """What was copied up into one branch stands on the old layer again, and the VM starts; the copy is done later."""
    for point in ("merge.committing#3", "merge.committed#2", "delete.committed-one#4"):
        template = tree.save_template("again")
        assert tree.killed("delete", "vm", "s1", "--copy", "-y", at=point)
        try:
            tree.ok("start", "vm", "--paused")
            assert tree.verdict(present="now") == []
        finally:
            tree.ok("stop", "vm", "--force", "-y")
        assert tree.verdict(present="now") == [] and "s1" not in tree.snapshots()
        tree.restore_template(template)


BURDENS = {
    "bitmap": (["bitmap", "--add"], ["bitmap", "--remove"], "persistent dirty bitmaps"),
    "snapshot": (["snapshot", "-c"], ["snapshot", "-d"], "internal snapshots"),
}


def burden(tree: Rig, kind: str, layer: Path, *, away: bool = False) -> None:
    """Put a bitmap or an internal snapshot into a layer, or take it away."""
    words, last = BURDENS[kind][away], ["x", str(layer)] if kind == "snapshot" else [str(layer), "x"]
    tree.qemu_img(*words, *last)


@pytest.mark.parametrize("kind", BURDENS)
def test_layer_with_bitmaps_or_internal_snapshots_is_not_merged_and_is_when_they_are_gone(tree: Rig, kind: str) -> None:
    """Neither into it nor away; the remedy that is told leads to the merge."""
    layer = tree.active()["vda"]
    burden(tree, kind, layer)
    tree.write(8, MiB, MiB)  # with an internal snapshot every cluster moves, and their tables do
    tree.remember("now")
    tree.remember("s4")
    tree.ok("create", "vm", "s4")
    tree.write(9, 2 * MiB, MiB)
    tree.remember("now")
    with unchanged(tree):
        for name in ("s3", "s4"):
            refused(tree, "delete", "vm", name, "-y", code=6, says=BURDENS[kind][2])
    burden(tree, kind, layer, away=True)
    refused(tree, "delete", "vm", "s4", "-y", code=8, says="changed since it was frozen")
    tree.ok("check", "vm", "--repair", "-y")
    assert tree.verdict(present="now") == []
    tree.ok("delete", "vm", "s3", "s4", "-y")
    assert tree.verdict(present="now") == []


@pytest.mark.parametrize("kind", BURDENS)
def test_leaf_with_bitmaps_or_internal_snapshots_is_not_unlinked_and_is_when_they_are_gone(
    tree: Rig, kind: str
) -> None:
    """They would go with the file; the remedy is that of a merge."""
    layer = tree.active()["vda"]
    burden(tree, kind, layer)
    tree.ok("revert", "vm", "s3", "-y")
    tree.remember("now")
    with unchanged(tree):
        error = refused(tree, "delete", "vm", "before-revert-2", "-y", code=6, says=f"{BURDENS[kind][2]}; a delete")
        assert str(layer) in error["message"]
    burden(tree, kind, layer, away=True)
    tree.ok("check", "vm", "--repair", "-y")
    tree.ok("delete", "vm", "before-revert-2", "-y")
    assert not layer.exists() and tree.verdict(present="now") == []


@pytest.mark.parametrize("kind", BURDENS)
def test_copy_into_a_layer_keeps_its_bitmaps_and_refuses_internal_snapshots(tree: Rig, kind: str) -> None:
    """An internal snapshot shows what lies below wherever it holds nothing itself: it would show something else then."""
    layer = tree.active()["vda"]
    burden(tree, kind, layer)
    tree.remember("before-revert-2")
    tree.ok("revert", "vm", "s3", "-y")
    tree.remember("now")
    if kind == "snapshot":
        with unchanged(tree):
            refused(tree, "delete", "vm", "s3", "--copy", "-y", code=6, says="internal snapshots")
    else:
        tree.ok("delete", "vm", "s3", "--copy", "-y")
        assert '"name": "x"' in tree.qemu_img("info", "--output=json", str(layer))
    assert tree.verdict(present="now") == []


@pytest.mark.parametrize("kind", BURDENS)
def test_frozen_layer_that_was_written_to_as_well_is_not_taken_for_one_without_its_bitmaps(
    tree: Rig, kind: str
) -> None:
    """A cluster more is a change of what the snapshot shows."""
    layer = tree.active()["vda"]
    burden(tree, kind, layer)
    tree.ok("create", "vm", "s4")
    burden(tree, kind, layer, away=True)
    done = subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 6 6M 64k", str(layer)], capture_output=True)
    assert done.returncode == 0
    assert tree.run("check", "vm", "--repair", "-y").code == 11
    refused(tree, "delete", "vm", "s4", "-y", code=8, says="changed since it was frozen")
