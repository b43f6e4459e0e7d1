"""libvirtd ends in the middle of a create: at every place where it knows less afterwards than QEMU does.

Without a guest where a paused domain tells as much: what matters is which files QEMU has open.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.libvirt.live import LiveDomain
from tests.libvirt.test_interop import stopped_at
from tests.libvirt.test_memory_file import paused
from tests.support.domain import DomainRig
from tests.support.libvirtd import Libvirtd
from tests.support.monitor_tap import MonitorTap
from tests.support.refusals import refused
from tests.support.rig import has_ended, wait_for
from tests.support.sample import some

Make = Callable[..., DomainRig]


@pytest.fixture
def tapped(domain: Make, daemon: Libvirtd) -> Iterator[tuple[DomainRig, MonitorTap]]:
    """A paused domain, and a proxy between the daemon and its QEMU."""
    rig = paused(domain)
    rig.remember("now")
    rig.expected["before"] = rig.expected["s0"] = rig.expected["now"]
    rig.ok("create", "vm", "before", "--disk-only")
    daemon.stop()
    tap = MonitorTap(rig.monitor())
    try:
        daemon.start()
        yield rig, tap
    finally:
        daemon.stop(signal.SIGKILL)
        tap.close()
        daemon.start()


def created_while_killed(rig: DomainRig, tap: MonitorTap, command: str, then: Callable[[], None]) -> tuple[int, str]:
    """Create a snapshot; SIGKILL libvirtd after QEMU carried that command out; do something; start a new daemon."""
    daemon = rig.daemon
    assert daemon
    killed: list[bool] = []

    def kill() -> None:
        daemon.stop(signal.SIGKILL)
        killed.append(True)

    tap.once(command, kill)
    process = rig.popen("create", "vm", "s0", "--disk-only")
    wait_for(lambda: killed, f"libvirtd is killed at {command}")
    then()
    daemon.start()
    _, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return process.returncode, err


def test_libvirtd_killed_when_qemu_had_switched_the_layers_in_use_are_kept(
    tapped: tuple[DomainRig, MonitorTap],
) -> None:
    """The new daemon believes in the old layers; we ask QEMU: the snapshot stands, and no file that is in use goes."""
    rig, tap = tapped
    code, err = created_while_killed(rig, tap, "transaction", lambda: None)
    assert code == 0, err
    assert rig.verdict(present="now") == [f"live {t}: {p}" for t, p in rig.snapshots()["s0"].items()]
    refused(rig, "create", "vm", "s1", code=8, says="libvirt believes")
    codes = {f["code"] for f in rig.run("check", "vm", "--json").json["findings"]}
    assert "libvirt-stale" in codes and "active-differs" not in codes
    rig.ok("stop", "vm", "--force", "-y")
    rig.ok("start", "vm", "--paused")
    assert rig.verdict(present="now") == []
    rig.expected["s1"] = rig.expected["now"]
    rig.ok("create", "vm", "s1", "--disk-only")
    assert rig.verdict(present="now") == []


def test_libvirtd_and_qemu_killed_when_it_had_switched_what_the_guest_wrote_is_kept(
    tapped: tuple[DomainRig, MonitorTap],
) -> None:
    """libvirt's definition names the old layers, nobody runs; the overlays hold writes: they are the truth."""
    rig, tap = tapped
    pid = rig.pid()

    def end_qemu_which_had_written() -> None:
        assert pid
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: has_ended(pid), "QEMU is gone")
        command = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", str(rig.active()["vda"])]
        subprocess.run(command, check=True, capture_output=True)
        rig.expected["now"] = {t: rig.digest(p) for t, p in rig.active().items()}

    code, err = created_while_killed(rig, tap, "transaction", end_qemu_which_had_written)
    if code:
        assert code == 3, err
        rig.ok("recover", "vm")
    assert rig.expected["now"] != rig.expected["s0"]
    assert rig.verdict(present="now") == [] and "s0" in rig.snapshots()


def test_libvirtd_killed_when_qemu_had_only_opened_the_overlays_nothing_is_left(
    tapped: tuple[DomainRig, MonitorTap],
) -> None:
    """The create is undone; what QEMU has open of it is closed, so that the next one can be made."""
    rig, tap = tapped
    code, err = created_while_killed(rig, tap, "blockdev-add", lambda: None)
    assert code in (1, 9) and "libvirt" in err, (code, err)
    assert rig.verdict(present="now") == [] and "s0" not in rig.snapshots()
    rig.ok("create", "vm", "s0", "--disk-only")
    assert rig.verdict(present="now") == []


STEPS = ["create.prepared.after", "create.paused", "create.disks-switched", "create.captured", "create.saving.after"]


@pytest.mark.timeout(600)
def test_libvirtd_ends_in_a_create_with_memory_the_guest_counts_on(domain: Make, daemon: Libvirtd) -> None:
    """SIGTERM and SIGKILL before the pause, in it and in the save: success or a clear error, and `recover` ends it."""
    live = LiveDomain(domain())
    live.rig.ok("create", "vm", "first", "--disk-only")
    cases = [(sig, point) for point in STEPS for sig in (signal.SIGKILL, signal.SIGTERM)]
    for number, (sig, point) in enumerate(some(cases, 3)):

        def restart(sig: signal.Signals = sig) -> None:
            daemon.stop(sig)
            daemon.start()

        mark = live.console.mark()
        code, err = stopped_at(live.rig, point, "create", "vm", f"s{number}", "--memory", meanwhile=restart)
        assert code in (0, 3, 9, 12) and "Traceback" not in err, (sig, point, code, err)
        if code == 3:
            live.rig.ok("recover", "vm")
        assert live.wrong(mark) == [], (sig, point)
    live.go_back_to_all()
    live.console.close()


REVERT_STEPS = [
    "revert.stopping",
    "revert.stopped.after",
    "revert.catalog",
    "revert.definition",
    "revert.loaded.before",
]


def test_libvirtd_killed_in_a_revert_with_memory_ends_in_one_of_two_whole_states(
    domain: Make, daemon: Libvirtd
) -> None:
    """At our steps, and while libvirt starts the QEMU that loads the memory: no second QEMU is left, all sides agree."""
    rig = paused(domain)
    rig.remember("now")
    rig.expected["s0"] = rig.expected["now"]
    rig.ok("create", "vm", "s0", "--memory=paused")

    def restart() -> None:
        daemon.stop(signal.SIGKILL)
        daemon.start()

    def is_whole() -> None:
        if rig.journal():
            rig.ok("recover", "vm")
        assert rig.verdict(present="now") == [] and rig.virsh("domstate", "vm") == "paused"
        assert len(qemus(rig)) == 1

    for point in some(REVERT_STEPS, 3):
        code, err = stopped_at(rig, point, "revert", "vm", "s0", "--discard", "-y", meanwhile=restart)
        assert code in (0, 1, 3, 9) and "Traceback" not in err, (point, code, err)
        is_whole()
    before = qemus(rig)
    process = rig.popen("revert", "vm", "s0", "--discard", "-y")
    wait_for(lambda: qemus(rig) - before, "libvirt starts another QEMU")
    restart()
    _, err = process.communicate(timeout=120)
    assert process.returncode in (0, 1, 3, 9) and "Traceback" not in err, (process.returncode, err)
    is_whole()


def qemus(rig: DomainRig) -> set[int]:
    """Every QEMU of the domain, whether libvirt knows it or not."""
    (home,) = rig.dir.glob(".diskchain/*")
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"qemu-system" in words[0] and os.fsencode(home.name) in words:
                found.add(int(process.name))
    return found
