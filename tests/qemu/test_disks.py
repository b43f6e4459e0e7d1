"""Disks that are skipped, reverted alone, added, removed and resized between snapshots: every byte stays where it belongs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.console import Console
from tests.support.refusals import refused, unchanged
from tests.support.rig import MiB, Rig

KiB = 1024


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A stopped machine with vda (qcow2) and vdb (raw), and the snapshots s1 and s2."""
    rig = Rig(tmp_path / "vm", size=8 * MiB, raw=("vdb",))
    rig.build(guest=False)
    rig.write(1, 0, MiB)
    rig.remember("s1")
    rig.ok("create", "vm", "s1")
    rig.write(2, 512 * KiB, MiB)
    rig.remember("s2")
    rig.ok("create", "vm", "s2")
    rig.write(3, 2 * MiB, 64 * KiB)
    rig.remember("now")
    yield rig
    rig.destroy()


def mixed(rig: Rig, name: str, **states: str) -> None:
    """Note that the present must hold, for each disk, what it held in that state."""
    rig.expected[name] = {target: rig.expected[state][target] for target, state in states.items()}


def machine_file(rig: Rig, *targets: str, memory: str = "128 MiB") -> None:
    """Write the machine file anew, with these disks."""
    lines = ['name = "vm"', f'memory = "{memory}"', 'accel = "tcg"']
    for target in targets:
        image = next(
            p.name for p in sorted(rig.dir.glob(f"{target}.*")) if p.name in (f"{target}.raw", f"{target}.qcow2")
        )
        lines += ["[[disk]]", f'target = "{target}"', f'image = "{image}"']
    (rig.dir / "vm.toml").write_text("\n".join(lines) + "\n")


def define(rig: Rig, *targets: str, memory: str = "128 MiB") -> None:
    """Define the machine again with these disks."""
    machine_file(rig, *targets, memory=memory)
    rig.ok("machine", "define", str(rig.dir / "vm.toml"))


def write_into(rig: Rig, target: str, pattern: int, offset: int, length: int) -> None:
    """Write a pattern into one active layer, as a guest would."""
    path = rig.active()[target]
    command = f"write -P {pattern} {offset} {length}"
    done = subprocess.run(["qemu-io", "-f", rig.fmt(path), "-c", command, str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and "wrote" in done.stdout, done.stdout + done.stderr


def virtual_size(rig: Rig, path: Path) -> int:
    """The disk's size as a guest sees it."""
    return int(json.loads(rig.qemu_img("info", "-f", rig.fmt(path), "--output=json", str(path)))["virtual-size"])


# -- partial snapshots -------------------------------------------------------------------------------------------------


def test_create_skip_disk_covers_the_others_and_says_so(rig: Rig) -> None:
    """vdb goes on in the same layer; the snapshot says that it is partial, in words and in JSON."""
    before = rig.active()
    answer = rig.ok("create", "vm", "part", "--skip-disk", "vdb")
    assert "partial: without vdb" in answer.out
    rig.expected["part"] = rig.expected["now"]
    assert rig.active()["vdb"] == before["vdb"] and rig.active()["vda"] != before["vda"]
    (snapshot,) = (s for s in rig.ok("list", "vm", "--json").json["snapshots"] if s["name"] == "part")
    assert snapshot["partial"] == ["vdb"] and [d["target"] for d in snapshot["disks"]] == ["vda"]
    assert "partial: without vdb" in rig.ok("list", "vm").out
    assert "vdb" in rig.ok("show", "vm", "part").out
    assert rig.verdict(present="now") == []


@pytest.mark.parametrize(("words", "code"), [
    (("--skip-disk", "vdz"), 4),
    (("--skip-disk", "vda", "--skip-disk", "vdb"), 6),
    (("--skip-disk", "vdb", "--memory"), 2),
])  # fmt: skip
def test_create_skip_disk_of_nonsense_is_refused(rig: Rig, words: tuple[str, ...], code: int) -> None:
    """No such disk; all of them; with memory."""
    with unchanged(rig):
        refused(rig, "create", "vm", "x", *words, code=code)


@pytest.mark.parametrize("discard", [True, False])
def test_revert_to_a_partial_snapshot_leaves_the_skipped_disk_alone(rig: Rig, discard: bool) -> None:
    """vda goes back, vdb holds what it holds now; undo brings all of the present back."""
    rig.ok("create", "vm", "part", "--skip-disk", "vdb")
    rig.expected["part"] = rig.expected["now"]
    rig.write(9, 3 * MiB, 200 * KiB)
    rig.remember("later")
    rig.expected["before-revert-1"] = rig.expected["later"]
    mixed(rig, "mix", vda="part", vdb="later")
    words = ["--discard"] if discard else []
    assert "vdb left as now" in rig.ok("revert", "vm", "part", *words, "-n").out
    rig.ok("revert", "vm", "part", *words, "-y")
    assert rig.verdict(present="mix") == []
    if not discard:
        rig.expected["before-revert-2"] = rig.expected["mix"]
        rig.ok("undo", "vm", "-y")
        assert rig.verdict(present="later") == []
        return
    rig.ok("delete", "vm", "part", "-y")
    assert rig.verdict(present="mix") == []


# -- one disk alone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discard", [True, False])
def test_revert_only_one_disk(rig: Rig, discard: bool) -> None:
    """vdb goes back to s1, vda holds what it holds now; writes and merges afterwards hurt nobody."""
    mixed(rig, "mix", vda="now", vdb="s1")
    rig.expected["before-revert-1"] = rig.expected["now"]
    rig.ok("revert", "vm", "s1", "--only", "vdb", *(["--discard"] if discard else []), "-y")
    assert rig.verdict(present="mix") == []
    assert rig.ok("list", "vm", "--json").json["current"] == ("s2" if discard else "before-revert-1")
    if not discard:
        rig.expected["before-revert-2"] = rig.expected["mix"]
        rig.ok("undo", "vm", "-y")
        assert rig.verdict(present="now") == []
        rig.ok("undo", "vm", "-y")
        rig.expected["before-revert-3"] = rig.expected["now"]
        assert rig.verdict(present="mix") == []
    rig.write(8, 4 * MiB, 100 * KiB)
    rig.remember("after")
    rig.ok("delete", "vm", "s2", "-y")
    assert rig.verdict(present="after") == []


def test_revert_only_what_can_not_be_is_refused(rig: Rig) -> None:
    """No such disk in the snapshot; a contradiction."""
    rig.ok("create", "vm", "part", "--skip-disk", "vdb")
    with unchanged(rig):
        refused(rig, "revert", "vm", "part", "--only", "vdb", "-y", code=4, says="vda")
        refused(rig, "revert", "vm", "s1", "--only", "vdq", "-y", code=4)
        refused(rig, "revert", "vm", "s1", "--only", "vda", "--config", "restore", "-y", code=2)


# -- disks that come and go --------------------------------------------------------------------------------------------


def add_disk(rig: Rig) -> None:
    """A third disk, vdc, of 4 MiB."""
    rig.qemu_img("create", "-q", "-f", "qcow2", str(rig.dir / "vdc.qcow2"), str(4 * MiB))
    define(rig, "vda", "vdb", "vdc")
    write_into(rig, "vdc", 7, 0, MiB)


def test_added_disk_is_in_later_snapshots_and_detached_by_a_revert(rig: Rig) -> None:
    """The kept present has it; undo attaches it again."""
    add_disk(rig)
    rig.remember("s3")
    rig.ok("create", "vm", "s3")
    write_into(rig, "vdc", 8, MiB, MiB)
    rig.remember("now")
    rig.expected["before-revert-1"] = rig.expected["now"]
    assert "vdc detached, its file kept" in rig.ok("revert", "vm", "s1", "-n").out
    rig.ok("revert", "vm", "s1", "-y")
    assert sorted(rig.active()) == ["vda", "vdb"] and rig.verdict(present="s1") == []
    rig.expected["before-revert-2"] = rig.expected["s1"]
    rig.ok("undo", "vm", "-y")
    assert sorted(rig.active()) == ["vda", "vdb", "vdc"] and rig.verdict(present="now") == []
    rig.ok("start", "vm", "--paused")
    rig.ok("stop", "vm", "--force", "-y")


def test_discarding_revert_keeps_the_layer_of_an_added_disk(rig: Rig) -> None:
    """Disks that the snapshot does not know are detached and kept, also when the present is discarded."""
    add_disk(rig)
    rig.remember("s3")
    rig.ok("create", "vm", "s3")
    write_into(rig, "vdc", 8, MiB, MiB)
    rig.remember("now")
    last = rig.active()["vdc"]
    rig.ok("revert", "vm", "s1", "--discard", "-y")
    assert last.is_file() and rig.verdict(present="s1") == []
    found = rig.run("check", "vm", "--json").json["findings"]
    assert [f["code"] for f in found if "vdc" in f["subject"]] == ["disk-detached"]
    define(rig, "vda", "vdb", "vdc")
    mixed(rig, "again", vda="s1", vdb="s1", vdc="now")
    assert rig.active()["vdc"] == last and rig.verdict(present="again") == []


def test_config_keep_leaves_an_added_disk_attached(rig: Rig) -> None:
    """The configuration of now stays, and with it the disk that the snapshot does not have."""
    add_disk(rig)
    rig.remember("now")
    define(rig, "vda", "vdb", "vdc", memory="256 MiB")
    rig.expected["before-revert-1"] = rig.expected["now"]
    rig.expected["mix"] = {**rig.expected["s2"], "vdc": rig.expected["now"]["vdc"]}
    rig.ok("revert", "vm", "s2", "--config", "keep", "-y")
    assert rig.verdict(present="mix") == []
    assert rig.ok("machine", "list", "--json").json["machines"][0]["memory"] == 256 * MiB
    assert rig.ok("list", "vm", "--json").json["current"] == "s2"


def test_removed_disk_is_kept_merged_and_comes_back(rig: Rig) -> None:
    """Its last layer stays; a delete folds it like any other; added again it holds what it held."""
    define(rig, "vda")
    assert sorted(rig.active()) == ["vda"]
    now = rig.expected["now"]
    rig.write(6, 5 * MiB, 90 * KiB)
    rig.remember("alone")
    rig.ok("delete", "vm", "s2", "-y")
    assert rig.verdict(present="alone") == []
    define(rig, "vda", "vdb")
    rig.expected["again"] = {**rig.expected["alone"], "vdb": now["vdb"]}
    assert rig.verdict(present="again") == []
    rig.expected["before-revert-1"] = rig.expected["again"]
    rig.ok("revert", "vm", "s1", "-y")
    assert rig.verdict(present="s1") == []


def test_removed_disk_comes_back_with_a_revert(rig: Rig) -> None:
    """The snapshot had it: it is attached again, on the frozen image; its last layer is still there for an undo."""
    define(rig, "vda")
    rig.remember("alone")
    rig.expected["before-revert-1"] = rig.expected["alone"]
    rig.ok("revert", "vm", "s1", "-y")
    assert rig.verdict(present="s1") == []
    rig.expected["before-revert-2"] = rig.expected["s1"]
    rig.ok("undo", "vm", "-y")
    assert rig.verdict(present="alone") == []


def test_removed_disk_that_a_partial_snapshot_had_comes_back_with_its_last_layer(rig: Rig) -> None:
    """The snapshot's configuration has vdb, its disks have not: vdb goes on where it was left."""
    rig.ok("create", "vm", "part", "--skip-disk", "vdb")
    rig.expected["part"] = rig.expected["now"]
    define(rig, "vda")
    rig.expected["before-revert-1"] = {"vda": rig.expected["now"]["vda"]}
    rig.ok("revert", "vm", "part", "-y")
    assert rig.verdict(present="now") == []


def test_define_refuses_a_frozen_layer_as_a_new_disk(rig: Rig) -> None:
    """vdc = an image that a snapshot froze: it would be written."""
    frozen = rig.snapshots()["s2"]["vda"]
    text = (rig.dir / "vm.toml").read_text() + f'[[disk]]\ntarget = "vdc"\nimage = "{frozen.name}"\n'
    (rig.dir / "vm.toml").write_text(text)
    with unchanged(rig):
        refused(rig, "machine", "define", str(rig.dir / "vm.toml"), code=(2, 6))
    assert rig.verdict(present="now") == []


def test_define_other_disks_under_a_running_vm_is_refused(rig: Rig) -> None:
    """Its QEMU would write to others than the catalog says."""
    rig.ok("start", "vm", "--paused")
    machine_file(rig, "vda")
    refused(rig, "machine", "define", str(rig.dir / "vm.toml"), code=6, says="is on")
    rig.ok("stop", "vm", "--force", "-y")
    assert rig.verdict(present="now") == []


@pytest.mark.parametrize("at", ["define.catalog", "define.definition"])
@pytest.mark.parametrize("targets", [("vda",), ("vda", "vdb", "vdc"), ("vda", "vdc")])
def test_define_killed_in_the_middle_leaves_a_machine_that_starts(rig: Rig, at: str, targets: tuple[str, ...]) -> None:
    """Whichever definition is left, it starts; a second define finishes."""
    rig.qemu_img("create", "-q", "-f", "qcow2", str(rig.dir / "vdc.qcow2"), str(4 * MiB))
    machine_file(rig, *targets)
    assert rig.killed("machine", "define", str(rig.dir / "vm.toml"), at=at)
    rig.ok("start", "vm", "--paused")
    rig.ok("stop", "vm", "--force", "-y")
    rig.ok("machine", "define", str(rig.dir / "vm.toml"))
    assert list(rig.active()) == list(targets)
    rig.ok("start", "vm", "--paused")
    rig.ok("stop", "vm", "--force", "-y")
    define(rig, "vda", "vdb")
    assert rig.digest(rig.active()["vdb"]) == rig.expected["now"]["vdb"]


# -- sizes -------------------------------------------------------------------------------------------------------------


def resize(rig: Rig, size: int) -> None:
    """Resize every active layer, as an admin would."""
    for path in rig.active().values():
        rig.qemu_img("resize", "-q", "--shrink", "-f", rig.fmt(path), str(path), str(size))


@pytest.mark.parametrize("sizes", [(12, 16), (6, 4), (12, 6), (6, 12)])
def test_resized_disks_revert_undo_and_merge(rig: Rig, sizes: tuple[int, int]) -> None:
    """Each state has its own size; after a merge the VM sees what it saw, no longer and no shorter."""
    first, second = (n * MiB for n in sizes)
    resize(rig, first)
    rig.remember("s3")
    rig.ok("create", "vm", "s3")
    resize(rig, second)
    rig.write(9, second - MiB, MiB)
    rig.remember("now")
    rig.expected["before-revert-1"] = rig.expected["now"]
    rig.ok("revert", "vm", "s1", "-y")
    assert {virtual_size(rig, p) for p in rig.active().values()} == {8 * MiB} and rig.verdict(present="s1") == []
    rig.expected["before-revert-2"] = rig.expected["s1"]
    rig.ok("undo", "vm", "-y")
    assert rig.verdict(present="now") == []
    for name in ("s3", "s2", "s1"):
        rig.ok("delete", "vm", "before-revert-2" if name == "s1" else name, "-y")
        assert {virtual_size(rig, p) for p in rig.active().values()} == {second}, name
        assert rig.verdict(present="now") == []
    rig.ok("delete", "vm", "before-revert-1", "-y")
    rig.ok("delete", "vm", "s1", "-y")
    assert {virtual_size(rig, p) for p in rig.active().values()} == {second}
    assert rig.verdict(present="now") == []


# -- on a running guest ------------------------------------------------------------------------------------------------


def test_running_guest_partial_only_and_config_keep(tmp_path: Path) -> None:
    """One disk of two is switched under a counting guest; one goes back alone; memory insists on its configuration."""
    rig = Rig(tmp_path / "vm")
    rig.build(guest=True)
    try:
        rig.ok("start", "vm")
        with Console(rig.console()) as console:
            console.wait(r"^C 30 bad=")
            rig.ok("create", "vm", "m1", "--memory")
            vdb = rig.active()["vdb"]
            made = rig.ok("create", "vm", "part", "--skip-disk", "vdb", "--json").json["snapshot"]
            assert made["partial"] == ["vdb"] and made["state"] == "disk" and made["memory"]["status"] == "none"
            assert rig.active()["vdb"] == vdb
            now = console.counter() or 0
            console.wait(rf"^C {now + 100} bad=0")
            mark = console.mark()
            rig.ok("revert", "vm", "m1", "--only", "vda", "-y")
            torn = console.wait(r"^C START TORN vda=(\d+) vdb=(\d+)", after=mark)
            assert int(torn[1]) < now < int(torn[2])
            rig.ok("stop", "vm")
            text = (rig.dir / "vm.toml").read_text()
            (rig.dir / "vm.toml").write_text(text.replace("128 MiB", "192 MiB"))
            rig.ok("machine", "define", str(rig.dir / "vm.toml"))
            refused(rig, "revert", "vm", "m1", "--config", "keep", "-y", code=6, says="--cold")
            mark = console.mark()
            rig.ok("revert", "vm", "m1", "--config", "keep", "--cold", "--start", "-y")
            console.wait(r"^C START \d+", after=mark)
            assert rig.ok("machine", "list", "--json").json["machines"][0]["memory"] == 192 * MiB
            mark = console.mark()
            rig.ok("revert", "vm", "m1", "-y")
            console.wait(r"^C \d+ bad=0", after=mark)
            assert console.bad(after=mark) == []
            assert not [line for _, line in console.lines(mark) if line.startswith("C START")]
            assert rig.ok("machine", "list", "--json").json["machines"][0]["memory"] == 128 * MiB
            rig.ok("undo", "vm", "-y")
            assert rig.ok("machine", "list", "--json").json["machines"][0]["memory"] == 192 * MiB
    finally:
        rig.destroy()
