"""status and check on a tree with branches and on a VM that runs; doctor against what this machine can really do."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diskchain.drivers import accel
from tests.support.bare_qmp import Qmp
from tests.support.console import Console
from tests.support.refusals import SmallDisk, unchanged
from tests.support.rig import MiB, Rig, wait_for

_ALIVE = ("console.log", "qemu.log")


def above_info(rig: Rig, *args: str, code: int) -> list[dict[str, str]]:
    """Check; return the findings above info."""
    answer = rig.run("check", *args, "--json")
    assert answer.code == code, (answer.out, answer.err)
    return [f for f in answer.json["findings"] if f["severity"] != "info"]


def codes(found: list[dict[str, str]]) -> set[str]:
    """The codes of findings."""
    return {f["code"] for f in found}


def times(rig: Rig) -> dict[str, tuple[int, int, int]]:
    """Mode, size and time of every file that a running guest does not write."""
    active = set(rig.active().values())
    found = {}
    for path in [*rig.dir.rglob("*"), *rig.run_dir.rglob("*")]:
        if path not in active and path.name not in _ALIVE:
            status = path.lstat()
            found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


def one_status(rig: Rig, *, code: int) -> dict[str, Any]:
    """The only VM of `status`."""
    answer = rig.run("status", "--json")
    assert answer.code == code, (answer.out, answer.err)
    (found,) = answer.json["vms"]
    assert isinstance(found, dict)
    return found


# -- off ---------------------------------------------------------------------------------------------------------------


def test_a_healthy_tree_has_no_findings_and_nothing_is_written(tree: Rig) -> None:
    """Two disks, one raw, a branch: exit 0, also with --deep."""
    before = times(tree)
    with unchanged(tree):
        assert above_info(tree, "vm", "--deep", code=0) == []
        found = one_status(tree, code=0)
        tree.ok("list", "vm")
    assert (found["snapshots"], found["depth"], found["state"]) == (4, 3, "stopped")
    assert times(tree) == before


def test_every_layer_that_is_taken_away_is_named(tree: Rig) -> None:
    """Each of them in turn; the others are not blamed."""
    for image in tree.catalog()["images"].values():
        path = tree.path_of(image)
        away = path.with_suffix(".away")
        path.rename(away)
        found = [f for f in above_info(tree, code=11) if f["code"] == "layer-missing"]
        assert [str(path) in f["subject"] for f in found] == [True]
        away.rename(path)
    assert above_info(tree, code=0) == []


def test_a_raw_base_that_was_touched_is_named(tree: Rig) -> None:
    """Its time tells."""
    os.utime(tree.dir / "vdb.raw")
    found = above_info(tree, code=11)
    assert codes(found) == {"layer-changed"} and "mtime_ns" in found[0]["evidence"]


@pytest.mark.parametrize("at", ["merge.committing#1", "delete.commit.after#1"])
def test_an_interrupted_merge_is_a_warning_and_not_blamed_on_layers(tree: Rig, at: str) -> None:
    """Half-merged layers are what recover expects; nothing says 'bring the right file back'."""
    if not tree.killed("delete", "vm", "s3", "-y", at=at):
        pytest.fail(f"{at} was not reached")
    found = above_info(tree, "--deep", code=10)
    assert codes(found) == {"interrupted"} and "diskchain recover vm" in found[0]["remedy"]
    assert "interrupted" in codes(one_status(tree, code=10)["findings"])
    tree.ok("recover", "vm")
    assert above_info(tree, code=0) == []


# -- running -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Rig]:
    """A guest that counts, with a snapshot that has memory."""
    rig = Rig(tmp_path / "vm", size=16 * MiB)
    rig.build(guest=True)
    rig.ok("start", "vm")
    with Console(rig.console()) as console:
        console.wait(r"^C 20 bad=")
    rig.ok("create", "vm", "one", "--memory")
    yield rig
    rig.destroy()


def test_a_running_vm_is_looked_at_through_the_socket_for_looks(live: Rig) -> None:
    """Healthy; its other sockets stay free; the guest counts on; damaged memory is named, by --deep to the bit."""
    before = times(live)
    with contextlib.closing(Qmp(next(live.run_dir.glob("*/qmp.sock")))) as qmp:  # somebody has the socket for changes
        assert above_info(live, "--deep", code=0) == []
        assert one_status(live, code=0)["state"] == "running"
        assert qmp("query-status")["status"] == "running"
    assert times(live) == before
    (memory,) = live.dir.glob(".diskchain/*/snapshots/*/memory")
    with memory.open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert above_info(live, code=0) == []
    assert codes(above_info(live, "--deep", code=11)) == {"memory-damaged"}
    os.truncate(memory, memory.stat().st_size - 1)
    memory.chmod(0o644)
    assert codes(above_info(live, code=11)) == {"memory-damaged", "memory-mode"}
    memory.unlink()
    assert codes(above_info(live, code=11)) == {"memory-missing"}


def test_a_running_vm_that_was_defined_anew_says_what_the_next_start_brings(live: Rig) -> None:
    """More memory in the definition: info, nothing to do now; without its run-time record: a warning."""
    file = live.dir / "vm.toml"
    file.write_text(file.read_text().replace("128 MiB", "192 MiB"))
    live.ok("machine", "define", str(file))
    (found,) = [f for f in live.ok("check", "vm", "--json").json["findings"] if f["code"] == "restart-needed"]
    assert "memory 128 MiB -> 192 MiB" in found["evidence"]
    (record,) = live.run_dir.glob("*/machine.json")
    record.unlink()
    (missing,) = above_info(live, code=10)
    assert missing["code"] == "run-record-missing" and "diskchain stop vm" in missing["remedy"]


def test_a_snapshot_behind_our_back_is_named(live: Rig) -> None:
    """Somebody else switches a disk: QEMU writes to another file than the catalog says."""
    disk = live.active()["vda"]
    with contextlib.closing(Qmp(next(live.run_dir.glob("*/qmp.sock")))) as qmp:
        nodes = [b["inserted"]["node-name"] for b in qmp("query-block") if "vda" in b.get("qdev", "")]
        qmp("blockdev-snapshot-sync", node_name=nodes[0], snapshot_file=str(live.dir / "other.qcow2"),
            snapshot_node_name="other", format="qcow2")  # fmt: skip
    found = above_info(live, code=11)
    assert any(f["code"] == "active-differs" and str(disk) in f["evidence"] for f in found)
    assert "foreign-writer" not in codes(found)  # it is the VM's own QEMU: nobody to be ended


def test_a_vm_that_stopped_itself_is_explained(tmp_path: Path) -> None:
    """No space on its volume: which disk, where, how much is free, what to type; with room it goes on."""
    disk = SmallDisk(tmp_path, 96 * MiB)
    rig = Rig(disk.path / "vm", size=16 * MiB)
    try:
        rig.build(guest=True)
        rig.ok("start", "vm")
        with Console(rig.console()) as console:
            console.wait(r"^C 20 bad=")
        rig.ok("pause", "vm")
        rig.ok("create", "vm", "one", "--disk-only")
        disk.fill()
        rig.ok("resume", "vm")
        wait_for(lambda: rig.run("status", "--json").json["vms"][0]["state"] == "paused-critical", "it stops itself")
        found = {f["code"]: f for f in one_status(rig, code=11)["findings"]}
        assert "no space (" in found["paused-critical"]["evidence"]
        assert (
            str(disk.path) in found["paused-critical"]["remedy"] and "resume vm" in found["paused-critical"]["remedy"]
        )
        assert "volume-nearly-full" in found
        assert "PAUSED-CRITICAL" in rig.run("status").out
        assert "paused-critical" in codes(above_info(rig, "vm", code=11))
        disk.free()
        rig.ok("resume", "vm")
        assert one_status(rig, code=10)["state"] == "running"  # the volume is small: a warning stays
    finally:
        rig.destroy()
        disk.close()


# -- the host ----------------------------------------------------------------------------------------------------------


def test_doctor_says_the_truth_about_kvm(tree: Rig) -> None:
    """Whatever this machine can: the same as a boot of the probe guest says, and without a trace in the state."""
    works = os.access("/dev/kvm", os.R_OK | os.W_OK) and asyncio.run(accel.boots("kvm")) is not None
    before = times(tree)
    answer = tree.run("doctor", "--json")
    found = {f["code"]: f for f in answer.json["findings"]}
    assert ("kvm" in found, "kvm-unusable" in found) == (works, not works)
    assert found["image-locks"]["severity"] == "info" and "qemu" in found
    assert answer.code == (0 if works else 10), answer.out
    assert times(tree) == before
