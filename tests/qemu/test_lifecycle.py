"""The main job on a real guest, through the real command line, with the guest's own verdict."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.console import Console
from tests.support.rig import MiB, Rig, wait_for

COUNT = r"^C (\d+) bad="


class Guest:
    """A rig with a counting guest, and its console."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        rig.ok("start", "vm")
        self.console = Console(rig.console())
        self.console.wait(r"^C 30 bad=")

    def count(self, rounds: int = 30) -> int:
        """Let it count on; return the last number."""
        mark = self.console.mark()
        first = int(self.console.wait(COUNT, after=mark)[1])
        wait_for(lambda: (self.console.counter() or 0) >= first + rounds, "the guest counts on")
        return self.console.counter() or 0

    def frozen_at(self, name: str, target: str = "vda") -> int:
        """The counter in a snapshot's frozen disk, read by qemu-io."""
        path = self.rig.snapshots()[name][target]
        words = ["qemu-io", "-U", "-r", "-f", "qcow2", "-c", "read -v 0 16", str(path)]
        done = subprocess.run(words, capture_output=True, text=True)
        found = re.search(r"^0+:\s+((?:[0-9a-f]{2} +){16})", done.stdout, re.MULTILINE)
        assert found, done.stdout
        block = bytes.fromhex(found[1].replace(" ", ""))
        return min(int.from_bytes(block[i : i + 8], "little") for i in (0, 8))

    def back_to(self, name: str, *options: str) -> None:
        """Revert with memory; the guest must go on from the very instant, without a boot."""
        self.rig.run("pause", "vm")
        mark = self.console.mark()
        self.rig.ok("revert", "vm", name, "-y", *options)
        first = int(self.console.wait(COUNT, after=mark)[1])
        at = self.frozen_at(name)
        assert at <= first <= at + 3, f"{name} froze {at}, the guest went on with {first}"
        self.count(10)
        lines = [line for _, line in self.console.lines(mark)]
        assert not [line for line in lines if line.startswith("C START")] and self.console.bad(after=mark) == []


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Guest]]:
    """Make guests; clean up after."""
    made: list[Guest] = []

    def build(**options: object) -> Guest:
        rig = Rig(tmp_path / "vm", **options)  # type: ignore[arg-type]
        rig.build(guest=True)
        made.append(Guest(rig))
        return made[-1]

    yield build
    for guest in made:
        guest.console.close()
        guest.rig.destroy()


def test_memory_of_survivors_is_restorable_after_every_merge(make: Callable[..., Guest]) -> None:
    """Snapshots with memory; delete them one after the other; the others come back with memory each time."""
    guest = make(cpus=2)
    rig = guest.rig
    for name in ("a", "b", "c"):
        guest.count()
        rig.ok("create", "vm", name, "--memory")
    guest.count()
    for gone, left in (("b", ["a", "c"]), ("c", ["a"])):
        rig.ok("stop", "vm", "--force", "-y")
        rig.ok("delete", "vm", gone, "-y")
        assert rig.file_verdict() == []
        for name in left:
            guest.back_to(name, "--discard")
        guest.back_to(left[-1], "--discard")
    rig.ok("stop", "vm", "--force", "-y")
    rig.ok("delete", "vm", "a", "-y")
    assert {t: p.name for t, p in rig.active().items()} == {"vda": "vda.qcow2", "vdb": "vdb.qcow2"}
    assert rig.file_verdict() == [] and rig.ok("list", "vm", "--json").json["snapshots"] == []
    mark = guest.console.mark()
    rig.ok("start", "vm")
    guest.console.wait(r"^C START \d+$", after=mark)
    guest.count()
    assert guest.console.bad(after=mark) == []


def test_a_paused_vm_is_saved_with_memory_and_stays_paused(make: Callable[..., Guest]) -> None:
    """No boot, no running on; and back to it means paused again."""
    guest = make()
    rig = guest.rig
    rig.ok("pause", "vm")
    answer = rig.ok("create", "vm", "s", "--memory", "--json").json
    assert answer["snapshot"]["state"] == "memory"
    assert rig.ok("list", "vm", "--json").json["state"] == "paused"
    rig.ok("create", "vm", "t", "--disk-only")
    rig.ok("resume", "vm")
    guest.count()
    rig.ok("revert", "vm", "s", "--discard", "-y")
    assert rig.ok("list", "vm", "--json").json["state"] == "paused"
    mark = guest.console.mark()
    rig.ok("resume", "vm")
    guest.count(10)
    assert guest.console.bad(after=mark) == []


def test_memory_paused_on_a_running_vm_says_so_and_goes_on(make: Callable[..., Guest]) -> None:
    """--memory=paused: one long pause, said openly; the guest runs afterwards."""
    guest = make()
    answer = guest.rig.run("create", "vm", "s", "--memory=paused", "--json")
    assert answer.code == 0 and answer.json["snapshot"]["state"] == "memory" and "stands still" in answer.err
    guest.count()
    guest.back_to("s")


def test_keep_memory_and_undo_bring_the_present_back_with_its_programs(make: Callable[..., Guest]) -> None:
    """revert --keep-memory, then undo: the guest goes on where it was left."""
    guest = make()
    rig = guest.rig
    rig.ok("create", "vm", "s", "--memory")
    guest.count(50)
    answer = rig.ok("revert", "vm", "s", "--keep-memory", "-y", "--json").json
    assert answer["kept_as"] == "before-revert-1" and answer["state"] == "running"
    guest.count()
    mark = guest.console.mark()
    rig.ok("undo", "vm", "-y")
    guest.count(10)
    lines = [line for _, line in guest.console.lines(mark)]
    assert not [line for line in lines if line.startswith("C START")] and guest.console.bad(after=mark) == []
    assert guest.frozen_at("before-revert-1") > guest.frozen_at("s")


def test_cold_revert_boots_from_the_disks_and_loses_nothing_that_was_on_them(make: Callable[..., Guest]) -> None:
    """--cold: like after a power cut at the snapshot."""
    guest = make()
    guest.rig.ok("create", "vm", "s", "--memory")
    at = guest.frozen_at("s")
    guest.count()
    mark = guest.console.mark()
    guest.rig.ok("revert", "vm", "s", "--cold", "-y")
    started = int(guest.console.wait(r"^C START (\d+)$", after=mark)[1])
    assert at <= started <= at + 1
    guest.count()


def test_delete_on_a_running_vm_is_recorded_and_merged_at_stop_or_done_with_a_restart(
    make: Callable[..., Guest],
) -> None:
    """Two more snapshots come on top before the merge: disks and memory of both are right afterwards."""
    guest = make()
    rig = guest.rig
    rig.ok("create", "vm", "s", "--memory")
    body = rig.ok("delete", "vm", "s", "-y", "--json").json
    assert body["deferred"] and body["pending"] == ["s"] and body["merged"] == [] and "s" not in rig.snapshots()
    rig.ok("undelete", "vm", "s")
    guest.back_to("s")
    rig.ok("delete", "vm", "s", "before-revert-1", "-y")
    for name in ("t", "u"):
        guest.count()
        rig.ok("create", "vm", name, "--memory")
    stopped = rig.ok("stop", "vm", "--json").json
    assert {m["method"] for m in stopped["merged"]} == {"commit"} and rig.file_verdict() == []
    assert rig.ok("list", "vm", "--json").json["pending"] == [] and set(rig.snapshots()) == {"t", "u"}
    for name in ("t", "u"):
        guest.back_to(name)
    counted, mark = guest.count(), guest.console.mark()
    done = rig.ok("delete", "vm", "u", "--children", "--restart", "-y", "--json").json
    assert {m["disk"] for m in done["merged"]} == {"vda", "vdb"}
    assert int(guest.console.wait(r"^C START (\d+)$", after=mark)[1]) >= counted
    guest.count()
    assert rig.file_verdict() == [] and guest.console.bad(after=mark) == []


def test_sixteen_disks_are_one_instant(make: Callable[..., Guest]) -> None:
    """All overlays in one transaction; the guest compares all sixteen."""
    guest = make(targets=[f"vd{chr(ord('a') + i)}" for i in range(16)], size=32 * MiB)
    answer = guest.rig.ok("create", "vm", "s", "--memory", "--json").json
    assert len(answer["snapshot"]["disks"]) == 16
    guest.count()
    guest.back_to("s")


def test_the_machine_outlives_the_command_and_its_session(make: Callable[..., Guest]) -> None:
    """It has a session of its own, and diskchain is no parent of it any more."""
    guest = make()
    pid = guest.rig.pid()
    assert pid and os.getsid(pid) == pid
    time.sleep(0.1)
    guest.count()


def test_a_guest_that_ignores_the_power_button_goes_on_running(make: Callable[..., Guest]) -> None:
    """stop with a time limit: exit 1, nothing forced."""
    guest = make(modes="cnt,nopower")
    answer = guest.rig.run("stop", "vm", "--timeout", "2s")
    assert answer.code == 1 and "--force" in answer.err
    guest.count()
    guest.rig.ok("stop", "vm", "--force", "-y")
    assert guest.rig.pid() is None


def test_uuid_mac_and_machine_type_are_kept_when_defined_again(make: Callable[..., Guest]) -> None:
    """The machine file defined again after snapshots changes no layer; the VM starts on its top."""
    guest = make()
    rig = guest.rig
    before = rig.ok("machine", "list", "--json").json["machines"][0]
    rig.ok("create", "vm", "s", "--disk-only")
    counted = guest.count()
    rig.ok("stop", "vm", "--force", "-y")
    rig.ok("machine", "define", str(rig.dir / "vm.toml"))
    after = rig.ok("machine", "list", "--json").json["machines"][0]
    assert (before["uuid"], before["macs"]) == (after["uuid"], after["macs"])
    assert all(d["active"] != d["base"] for d in after["disks"])
    frozen = {t: rig.digest(p) for t, p in rig.snapshots()["s"].items()}
    mark = guest.console.mark()
    rig.ok("start", "vm")
    assert int(guest.console.wait(r"^C START (\d+)$", after=mark)[1]) >= counted - 1
    guest.count()
    rig.ok("stop", "vm", "--force", "-y")
    assert {t: rig.digest(p) for t, p in rig.snapshots()["s"].items()} == frozen


def test_memory_file_is_libvirts_format_and_private(make: Callable[..., Guest]) -> None:
    """0600, sealed magic, and nothing reserved beyond its end is left."""
    guest = make()
    answer = guest.rig.ok("create", "vm", "s", "--memory", "--json").json
    path = Path(json.loads(guest.rig.ok("show", "vm", "s", "--json").out)["snapshot"]["memory_file"])
    status = path.stat()
    assert status.st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    assert status.st_size == answer["snapshot"]["memory"]["bytes"]
    assert status.st_blocks * 512 <= status.st_size + MiB
    with path.open("rb") as file:
        assert file.read(16) == b"LibvirtQemudSave"


def test_stop_after_an_interrupted_revert_leaves_the_vm_off(make: Callable[..., Guest]) -> None:
    """What is recovered on the way must not start again what was told to stop."""
    guest = make()
    rig = guest.rig
    rig.ok("create", "vm", "s", "--memory")
    at = guest.frozen_at("s")
    guest.count()
    assert rig.killed("revert", "vm", "s", "-y", at="revert.switched.after#1")
    rig.ok("stop", "vm", "--force", "-y")
    assert rig.pid() is None and rig.file_verdict() == []
    mark = guest.console.mark()
    rig.ok("start", "vm")
    assert at <= int(guest.console.wait(r"^C START (\d+)$", after=mark)[1]) <= at + 1
    guest.count()


def test_start_after_an_interrupted_revert_goes_on_with_its_memory(make: Callable[..., Guest]) -> None:
    """The next command finishes the revert, with memory; there is nothing left to start."""
    guest = make()
    rig = guest.rig
    rig.ok("create", "vm", "s", "--memory")
    guest.count()
    mark = guest.console.mark()
    assert rig.killed("revert", "vm", "s", "-y", at="revert.switched.after#1")
    rig.ok("start", "vm")
    guest.count(10)
    lines = [line for _, line in guest.console.lines(mark)]
    assert not [line for line in lines if line.startswith("C START")] and guest.console.bad(after=mark) == []
    assert rig.file_verdict() == []
