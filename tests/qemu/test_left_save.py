"""A save of memory with the VM paused, left in the middle: the VM goes on, and nothing stops it afterwards.

The save is made slow, so that it is surely at work when diskchain is gone. Nothing boots in these machines: what QEMU
says of them is the oracle.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.bare_qmp import Qmp
from tests.support.rig import MiB, Rig, process_state, wait_for, watchdogs


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A running machine without a system, and a snapshot of it."""
    found = Rig(tmp_path / "vm", targets=("vda",), size=8 * MiB)
    found.build(guest=False)
    found.ok("start", "vm")
    found.ok("create", "vm", "s", "--disk-only")
    yield found
    found.destroy()


def asked(rig: Rig, command: str, **arguments: Any) -> Any:
    """Ask QEMU, as somebody besides diskchain."""
    (socket,) = rig.run_dir.glob("*/info.sock")
    monitor = Qmp(socket)
    try:
        return monitor(command, **arguments)
    finally:
        monitor.close()


def run_state(rig: Rig) -> str:
    """QEMU's word for what the machine does."""
    return str(asked(rig, "query-status")["status"])


def saves(rig: Rig) -> bool:
    """Whether a save is at work."""
    return asked(rig, "query-migrate").get("status") in ("setup", "active", "device", "cancelling")


def in_a_slow_save(rig: Rig, point: str, *args: str) -> subprocess.Popen[str]:
    """Start a command that passes this point before it saves memory; return when the save is at work, for minutes."""
    process = rig.popen(*args, fault=f"stop:{point}")
    wait_for(lambda: process_state(process.pid) in ("T", "t") or process.poll() is not None, "diskchain stops there")
    assert process.poll() is None, process.communicate()
    asked(rig, "migrate-set-parameters", max_bandwidth=16384)
    os.kill(process.pid, signal.SIGCONT)
    wait_for(lambda: saves(rig), "the save is at work")
    return process


def let_it_end(rig: Rig) -> None:
    """A save that is still at work comes to its end now."""
    asked(rig, "migrate-set-parameters", max_bandwidth=1 << 40)
    wait_for(lambda: not saves(rig), "no save is at work")


def stays_running(rig: Rig) -> None:
    """The machine runs, and no save is at work that would stop it."""
    wait_for(lambda: run_state(rig) == "running", f"it runs: {run_state(rig)}", timeout=30)
    let_it_end(rig)
    time.sleep(0.3)
    assert run_state(rig) == "running"
    assert rig.ok("list", "vm", "--json").json["state"] == "running" and rig.file_verdict() == []


def test_ctrl_c_in_the_save_of_revert_keep_memory_the_vm_runs_on(rig: Rig) -> None:
    """Nothing was changed, and the save that was given up does not stop it later."""
    process = in_a_slow_save(rig, "revert.saving", "revert", "vm", "s", "--keep-memory", "-y")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "nothing is left half-done" in err, err
    stays_running(rig)


def test_revert_keep_memory_killed_in_the_save_recover_lets_the_vm_run_on(rig: Rig) -> None:
    """Its memory is still being saved when `recover` comes."""
    process = in_a_slow_save(rig, "revert.saving", "revert", "vm", "s", "--keep-memory", "-y")
    process.kill()
    process.communicate(timeout=60)
    rig.ok("recover", "vm")
    stays_running(rig)


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("command", ["create", "revert"])
def test_a_paused_vm_whose_save_was_killed_is_paused_and_holds_its_disks_again(
    rig: Rig, command: str, over: bool
) -> None:
    """`over`: the save had come to its end before `recover`, and QEMU had let go of the disks."""
    rig.ok("pause", "vm")
    words = {"create": ("create.disks-switched", "create", "vm", "t", "--memory=paused"),
             "revert": ("revert.saving", "revert", "vm", "s", "--keep-memory", "-y")}[command]  # fmt: skip
    process = in_a_slow_save(rig, *words)
    process.kill()
    process.communicate(timeout=60)
    if over:
        let_it_end(rig)
    rig.ok("recover", "vm")
    let_it_end(rig)
    assert run_state(rig) == "paused" and rig.file_verdict() == []


def test_a_vm_left_by_a_save_is_found_refused_and_put_right(rig: Rig) -> None:
    """QEMU's `postmigrate`, made by hand: nobody's journal knows of it."""
    target = rig.dir.parent / "stream"
    asked(rig, "stop")
    asked(rig, "migrate", uri=f"exec:cat > {target}")
    wait_for(lambda: run_state(rig) == "postmigrate", "it was saved")
    for command in ("check", "status"):
        answer = rig.run(command, "vm", "--json")
        findings = answer.json["findings"] if command == "check" else answer.json["vms"][0]["findings"]
        assert answer.code == 11 and "left-by-save" in [f["code"] for f in findings], answer
    answer = rig.run("create", "vm", "t", "--disk-only")
    assert answer.code == 6 and "diskchain recover vm" in answer.err and rig.file_verdict() == []
    assert rig.ok("recover", "--json").json["results"][0]["outcome"] == "resumed"
    assert run_state(rig) == "running" and rig.run("check", "vm").code != 11
    rig.ok("create", "vm", "t", "--disk-only")


def test_create_memory_paused_killed_in_the_save_the_watchdog_lets_the_vm_run_on(rig: Rig) -> None:
    """At once, without `recover`, and to stay; the snapshot is made, without memory."""
    process = in_a_slow_save(rig, "create.disks-switched", "create", "vm", "t", "--memory=paused")
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: run_state(rig) == "running", "it runs", timeout=30)
    wait_for(lambda: not watchdogs(rig), "the watchdog has done its work", timeout=30)
    let_it_end(rig)
    time.sleep(0.3)
    assert run_state(rig) == "running"
    rig.ok("recover", "vm")
    stays_running(rig)
    states = {s["name"]: s["state"] for s in rig.ok("list", "vm", "--json").json["snapshots"]}
    assert states == {"s": "disk", "t": "disk"}
