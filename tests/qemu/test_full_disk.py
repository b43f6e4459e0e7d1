"""A full and a read-only filesystem, real ones: a small ext4 of its own below the images."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.refusals import SmallDisk, check_error, grow_tree, picture, refused, unchanged
from tests.support.rig import Answer, MiB, Rig, process_state, wait_for

Small = tuple[Rig, SmallDisk]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    """The usual tree on 48 MiB."""
    disk = SmallDisk(tmp_path, 48 * MiB)
    rig = Rig(disk.path / "vm", size=8 * MiB, raw=("vdb",))
    try:
        grow_tree(rig)
        yield rig, disk
    finally:
        rig.destroy()
        disk.close()


def test_create_and_revert_at_zero_bytes_free_are_refused_and_change_nothing(small: Small) -> None:
    """Exit 7, measured beforehand; everything that only looks still works; with room again they work."""
    rig, disk = small
    disk.fill()
    with unchanged(rig):
        refused(rig, "create", "vm", "s4", code=7, says="free")
        refused(rig, "revert", "vm", "s2", "-y", code=7, says="free")
        refused(rig, "revert", "vm", "s2", "--discard", "-y", code=7, says="free")
        refused(rig, "delete", "vm", "s3", "-y", code=7, says="free")
        for args in (("list", "vm"), ("tree", "vm"), ("show", "vm", "s1")):
            rig.ok(*args)
        rig.ok("recover", "vm")
    assert rig.verdict(present="now") == []
    disk.free()
    rig.ok("create", "vm", "s4")
    rig.expected["s4"] = rig.expected["now"]
    assert rig.verdict(present="now") == []


def test_delete_of_a_leaf_at_zero_bytes_free_gives_room(small: Small) -> None:
    """The way out of a full disk must not need room: the reserve pays for the journal."""
    rig, disk = small
    disk.fill()
    rig.ok("delete", "vm", "before-revert-1", "-y")
    assert os.statvfs(disk.path).f_bavail > 0
    assert rig.verdict(present="now") == []
    assert "before-revert-1" not in rig.snapshots()
    rig.ok("delete", "vm", "s2", "-y")  # its overlay is gone: a leaf too
    assert rig.verdict(present="now") == []


@pytest.mark.parametrize(("point", "then"), [("merge.committing#1", "merge"), ("merge.committing#2", "recover")])
def test_disk_fills_up_in_the_middle_of_a_merge_nothing_is_lost(small: Small, point: str, then: str) -> None:
    """Filled after the check, before the commit of the first (qcow2) or second (raw) disk: exit 3; then it goes on."""
    rig, disk = small
    process = rig.popen("--json", "delete", "vm", "s3", "-y", fault=f"stop:{point}")
    wait_for(lambda: process_state(process.pid) in ("T", "t") or process.poll() is not None, "it stands at the point")
    disk.fill()
    os.kill(process.pid, signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    check_error(Answer(process.returncode, out, err), code=3, says="nothing is lost")
    assert rig.digest(rig.active()["vda"]) == rig.expected["now"]["vda"]
    assert rig.digest(rig.active()["vdb"]) == rig.expected["now"]["vdb"]
    before = {name: content for name, content in picture(rig.dir).items() if ".qcow2" in name}
    disk.fill()  # the reserve, which the journal gave back
    refused(rig, "recover", "vm", code=3)
    assert rig.digest(rig.active()["vda"]) == rig.expected["now"]["vda"]
    assert before.keys() == {name for name in picture(rig.dir) if ".qcow2" in name}
    disk.free()
    rig.ok(then, "vm")
    assert "s3" not in rig.snapshots()
    assert rig.verdict(present="now") == []


def test_start_on_a_disk_that_filled_up_in_the_middle_of_a_merge(small: Small) -> None:
    """`start` wins also then, or says clearly why not; nothing is lost either way."""
    rig, disk = small
    process = rig.popen("delete", "vm", "s3", "-y", fault="stop:merge.committing#1")
    wait_for(lambda: process_state(process.pid) in ("T", "t"), "it stands at the point")
    disk.fill()
    os.kill(process.pid, signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == 3
    rig.ok("start", "vm", "--paused")
    disk.free()
    rig.ok("stop", "vm", "--force", "-y")
    assert rig.verdict(present="now") == []
    assert "s3" not in rig.snapshots()


def test_disk_fills_up_during_create_and_revert_they_are_undone(small: Small) -> None:
    """Filled after the check: what was begun is taken back, at once or by `recover`."""
    rig, disk = small
    for args in (("create", "vm", "s4"), ("revert", "vm", "s2", "-y")):
        process = rig.popen("--json", *args, fault=f"stop:{args[0]}.intent.after")
        wait_for(lambda p=process: process_state(p.pid) in ("T", "t"), "it stands at the point")
        disk.fill()
        os.kill(process.pid, signal.SIGCONT)
        out, err = process.communicate(timeout=60)
        check_error(Answer(process.returncode, out, err), code=(1, 3, 7))
        assert rig.digest(rig.active()["vda"]) == rig.expected["now"]["vda"]
        disk.free()
        rig.ok("recover", "vm")
        assert rig.verdict(present="now") == []
        assert sorted(rig.snapshots()) == ["before-revert-1", "s1", "s2", "s3"]


def test_read_only_filesystem_is_said_and_looking_works(small: Small) -> None:
    """Exit 6 naming it; list, tree and show need no lock."""
    rig, disk = small
    disk.remount("ro")
    with unchanged(rig):
        for args in (("create", "vm", "s4"), ("revert", "vm", "s2", "-y"), ("delete", "vm", "s3", "-y"),
                     ("delete", "vm", "before-revert-1", "-y"), ("rename", "vm", "s1", "x"), ("start", "vm"),
                     ("recover", "vm"), ("machine", "define", str(rig.dir / "vm.toml"))):  # fmt: skip
            error = refused(rig, *args, code=6, says="ead-only")
            assert "read-only" in error["hint"]
        for args in (("list", "vm"), ("tree", "vm"), ("show", "vm", "s1"), ("machine", "list")):
            rig.ok(*args)
    disk.remount("rw")
    rig.ok("create", "vm", "s4")
    rig.expected["s4"] = rig.expected["now"]
    assert rig.verdict(present="now") == []


def test_filesystem_turns_read_only_in_the_middle_of_a_delete_is_unfinished(small: Small) -> None:
    """As ext4 does after an I/O error: exit 3, because something was changed; `recover` ends it."""
    rig, disk = small
    process = rig.popen("--json", "delete", "vm", "s3", "-y", fault="stop:delete.relink.after")
    wait_for(lambda: process_state(process.pid) in ("T", "t"), "it stands at the point")
    disk.emergency()
    os.kill(process.pid, signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    check_error(Answer(process.returncode, out, err), code=3)
    disk.close(keep=True)
    disk.mount()
    rig.ok("recover", "vm")
    assert rig.verdict(present="now") == [] and "s3" not in rig.snapshots()
