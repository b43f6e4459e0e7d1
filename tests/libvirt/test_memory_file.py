"""A domain's saved memory with libvirt's own tools, and a libvirtd that is killed meanwhile. The domain stays paused."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.libvirt.test_interop import stopped_at
from tests.support.domain import DomainRig
from tests.support.libvirtd import Libvirtd
from tests.support.rig import MiB

Make = Callable[..., DomainRig]


def paused(domain: Make) -> DomainRig:
    """A domain whose CPUs stand; its disks hold something."""
    rig = domain(guest=False, size=8 * MiB)
    rig.write(1, 0, MiB)
    rig.virsh("start", "vm", "--paused")
    return rig


def overlay_commands(rig: DomainRig, memory: Path) -> list[str]:
    """The commands in RECOVER.txt that make the overlays of a snapshot's memory."""
    (text,) = rig.dir.glob(".diskchain/*/RECOVER.txt")
    found = [line.strip() for line in text.read_text().splitlines() if ".restore.qcow2" in line]
    made = [line for line in found if line.startswith("qemu-img create") and memory.parent.name in line]
    assert len(made) == len(rig.targets), text.read_text()
    return made


def test_memory_file_restores_twice_with_virsh_alone(domain: Make) -> None:
    """save-image-dumpxml names the overlays of RECOVER.txt; made, plain `virsh restore` runs on them, on nothing frozen."""
    rig = paused(domain)
    rig.ok("create", "vm", "s0", "--memory=paused")
    (memory,) = rig.dir.glob(".diskchain/*/snapshots/*/memory")
    frozen = rig.snapshots()["s0"]
    before = {p: rig.digest(p) for p in frozen.values()}
    named = re.findall(r"<source file='([^']*\.qcow2)'", rig.virsh("save-image-dumpxml", str(memory)))
    assert len(named) == 2 and all(name.endswith(".restore.qcow2") for name in named)
    rig.virsh("destroy", "vm")
    for _ in range(2):
        for command in overlay_commands(rig, memory):
            subprocess.run(command, shell=True, check=True, capture_output=True)
        rig.virsh("restore", str(memory))
        assert rig.virsh("domstate", "vm") == "paused"
        assert sorted(map(str, rig.sources().values())) == sorted(named)
        rig.virsh("destroy", "vm")
        for name in named:
            subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 9 0 1M", name], check=True, capture_output=True)
            Path(name).unlink()
        assert {p: rig.digest(p) for p in frozen.values()} == before
    rig.ok("revert", "vm", "s0", "-y")
    assert rig.virsh("domstate", "vm") == "paused" and rig.agreement() == []
    assert {p: rig.digest(p) for p in frozen.values()} == before


@pytest.mark.parametrize("point", ["create.prepared.after", "create.saving.after"])
def test_libvirtd_killed_in_the_middle_of_a_save_costs_nothing(domain: Make, daemon: Libvirtd, point: str) -> None:
    """A new daemon is found by the create itself, or by `recover`; QEMU was never ended."""
    rig = paused(domain)
    rig.remember("now")
    rig.expected["s0"] = rig.expected["now"]
    pid = rig.pid()

    def restart() -> None:
        daemon.stop(signal.SIGKILL)
        daemon.start()

    code, err = stopped_at(rig, point, "create", "vm", "s0", "--memory=paused", meanwhile=restart)
    assert code in (0, 3) and "Traceback" not in err, (code, err)
    if code:
        rig.ok("recover", "vm")
    assert rig.verdict(present="now") == [] and rig.pid() == pid
    assert rig.virsh("domstate", "vm") == "paused"
    if point == "create.saving.after":
        assert code == 0 and "s0" in rig.snapshots()
