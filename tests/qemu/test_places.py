"""A volume without room: what needs none works at 0 bytes, what needs some says how much and where there is it; and it works."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.refusals import SmallDisk, grow_tree, refused, unchanged
from tests.support.rig import MiB
from tests.support.roaming import Roaming

Small = tuple[Roaming, SmallDisk, Path]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    """The usual tree, vda on a template, on an ext4 of 64 MiB; and a directory on another filesystem."""
    disk = SmallDisk(tmp_path, 64 * MiB)
    roomy = tmp_path / "roomy"
    roomy.mkdir()
    rig = Roaming(disk.path / "vm", size=8 * MiB)
    try:
        grow_tree(rig)
        rig.configure(f'image_roots = ["{rig.dir}", "{roomy}"]\n')
        yield rig, disk, roomy
    finally:
        rig.destroy()
        disk.close()


def without_free(error: dict[str, str]) -> str:
    """An error without how much room is free in other places: that changes by itself."""
    return re.sub(r"[0-9.]+[KMGT]? free", "", json.dumps(error))


def test_no_space_names_the_need_and_every_way_out_and_each_of_them_works_at_zero_bytes(small: Small) -> None:
    """Exit 7; then detach --to, delete --to and move --to as the hint has them, on a full filesystem."""
    rig, disk, roomy = small
    disk.fill()
    with unchanged(rig):
        error = refused(rig, "delete", "vm", "s3", "-y", code=7, says="needs up to")
        hint, tried = error["hint"], rig.run("--json", "delete", "vm", "s3", "-n")
        assert tried.code == 7 and without_free(tried.json["error"]) == without_free(error)
        assert tried.json["plan"]["space_needed"] > 0
        tried = rig.run("--json", "detach", "vm", "-n")
        assert tried.code == 7 and without_free(tried.json["error"]) == without_free(
            refused(rig, "detach", "vm", code=7)
        )
    assert f"diskchain delete vm s3 --to {roomy} (needs " in hint
    assert f"diskchain detach vm --to {roomy} (needs " in hint and f"diskchain move vm --to {roomy} (needs " in hint
    assert re.search(r"needs [\d.]+[KM], [\d.]+[GT] free", hint)
    detached = rig.ok("--json", "detach", "vm", "--to", str(roomy)).json
    assert detached["let_go"] == [str(rig.template)] and os.statvfs(disk.path).f_bavail < 2 * MiB // 4096
    assert rig.verdict(present="now") == ["orphan base/template.qcow2"]
    disk.fill()
    rig.ok("delete", "vm", "s3", "--to", str(roomy), "-y")
    assert rig.verdict(present="now") == ["orphan base/template.qcow2"] and "s3" not in rig.snapshots()
    disk.fill()
    rig.ok("move", "vm", "--to", str(roomy))
    assert os.statvfs(disk.path).f_bavail > 1024
    wrong = [rig.digest(p) == rig.expected["now"][t] for t, p in rig_at(rig, roomy).active().items()]
    assert wrong == [True, True] and rig_at(rig, roomy).verdict(present="now") == []
    rig.ok("revert", "vm", "s1", "-y")  # whose configuration names the old places
    assert rig_at(rig, roomy).active().keys() == {"vda", "vdb"}
    assert "definition-differs" not in rig.run("--json", "check", "vm").out


def rig_at(rig: Roaming, place: Path) -> Roaming:
    """The same machine where it lies now."""
    found = Roaming(place, size=rig.size, expected=rig.expected)
    os.rmdir(found.run_dir)
    return found


@pytest.fixture(scope="module")
def gaps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Roaming, Path]]:
    """s1 - s2 with the children s3 - s4 - s5 - before-revert-1 and s6 - s7 - (now); and a copy of it all."""
    rig = Roaming(tmp_path_factory.mktemp("gaps") / "vm", size=8 * MiB)
    rig.build(guest=False)
    for number in range(1, 6):
        grow_one(rig, number)
    rig.expected["before-revert-1"] = rig.expected["now"]
    rig.ok("revert", "vm", "s2", "-y")
    for number in (6, 7):
        grow_one(rig, number)
    template = rig.save_template()
    yield rig, template
    rig.destroy()
    shutil.rmtree(template)


def grow_one(rig: Roaming, number: int) -> None:
    """A snapshot; then some clusters are written, the first and the last in part."""
    rig.write(number, number * 700 * 1000, 300 * 1000)
    rig.remember(f"s{number}")
    rig.ok("create", "vm", f"s{number}")
    rig.write(number + 10, number * 600 * 1000, 200 * 1000)
    rig.remember("now")


@pytest.mark.parametrize("names", ["s3 s5", "s1 s3", "s1 s3 s6", "s1 s3 s5 s7", "s2 s3 s5", "s1 s4 s5 s7"])
def test_delete_to_with_survivors_between_keeps_the_contents_of_each(gaps: tuple[Roaming, Path], names: str) -> None:
    """In a line, across the fork at s2, up to the present: the upper new file stands on the lower one."""
    rig, template = gaps
    rig.restore_template(template)
    there = rig.dir / "there"
    rig.ok("delete", "vm", *names.split(), "--to", str(there), "-y")
    assert set(names.split()).isdisjoint(rig.snapshots()) and list(there.glob("*.qcow2"))
    assert [w for w in rig.verdict(present="now") if w not in ("orphan vda.qcow2", "orphan vdb.raw")] == []
    rig.ok("list", "vm")
    rig.ok("create", "vm", "s8")


def test_create_on_a_full_volume_goes_to_another_one(small: Small) -> None:
    """--overlay-dir; the layers come back into the old place by a delete."""
    rig, disk, roomy = small
    disk.fill()
    with unchanged(rig):
        hint = refused(rig, "create", "vm", "s4", code=7)["hint"]
    assert f"diskchain create vm --overlay-dir {roomy} (needs " in hint
    rig.ok("create", "vm", "s4", "--overlay-dir", str(roomy))
    rig.expected["s4"] = rig.expected["now"]
    assert {p.parent for p in rig.active().values()} == {roomy}
    rig.write(9, 5 * MiB, MiB)
    rig.remember("now")
    assert rig.verdict(present="now") == []
    disk.free()
    rig.ok("delete", "vm", "s4", "-y")
    assert rig.verdict(present="now") == [] and not list(roomy.iterdir())


def test_snapshot_with_memory_is_dropped_at_zero_bytes_free(tmp_path: Path) -> None:
    """The memory goes first, and pays for the merge. No guest: what the firmware touches is memory, too."""
    disk = SmallDisk(tmp_path, 160 * MiB)
    rig = Roaming(disk.path / "vm", size=8 * MiB)
    try:
        rig.build(guest=False)
        rig.write(1, 0, MiB)
        rig.ok("start", "vm", "--paused")
        rig.ok("create", "vm", "m1", "--memory")
        rig.ok("stop", "vm", "--force", "-y")
        rig.write(2, 2 * MiB, 64 * 1024)
        rig.remember("now")
        saved = rig.ok("--json", "show", "vm", "m1").json["snapshot"]["memory"]
        assert saved["status"] == "saved" and saved["bytes"] > 256 * 1024
        disk.fill()
        rig.ok("delete", "vm", "m1", "-y")
        assert os.statvfs(disk.path).f_bavail > 0
        assert rig.verdict(present="now") == []
    finally:
        rig.destroy()
        disk.close()


@pytest.mark.parametrize("command", [("merge", "vm"), ("create", "vm", "s4"), ("recover", "vm")])
def test_merge_that_stopped_by_an_io_error_goes_on_with_the_next_command(
    tree: Roaming, command: tuple[str, ...]
) -> None:
    """EIO once: exit 3, nothing is lost; whatever is typed next finishes it."""
    answer = tree.run("--json", "delete", "vm", "s3", "-y", fault="fail:merge.committed#1")
    assert answer.code == 3 and "nothing is lost" in answer.json["error"]["message"], answer.out
    assert tree.digest(tree.active()["vda"]) == tree.expected["now"]["vda"]
    tree.ok(*command)
    expected = dict(tree.expected)
    tree.expected["s4"] = tree.expected["now"]
    assert tree.verdict(present="now") == [] and "s3" not in tree.snapshots()
    tree.expected.clear()
    tree.expected.update(expected)
