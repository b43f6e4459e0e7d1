"""Disks that virsh attached to the running domain only, or to its definition only: no data of theirs goes astray."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.support.domain import DomainRig
from tests.support.refusals import refused
from tests.support.rig import MiB

Make = Callable[..., DomainRig]
SMALL = 8 * MiB
BYTE = 7


def running(domain: Make) -> DomainRig:
    """A domain that is on, with one disk and memory enough for one that is saved."""
    rig = domain(guest=False, size=SMALL, targets=("vda",), memory="64 MiB")
    rig.virsh("start", "vm", "--paused")
    return rig


def attach(rig: DomainRig, target: str, how: str) -> Path:
    """Attach a new disk with data, `--live` or `--config`."""
    path = rig.dir / f"{target}.qcow2"
    rig.qemu_img("create", "-q", "-f", "qcow2", str(path), str(SMALL))
    _qemu_io("-c", f"write -P {BYTE} 0 1M", str(path))
    rig.virsh("attach-disk", "vm", str(path), target, "--subdriver", "qcow2", how)
    return path


def holds_it(path: Path) -> bool:
    """Whether an image, with what it stands on, reads as a disk that `attach` made."""
    return "Pattern" not in _qemu_io("-r", "-U", "-c", f"read -P {BYTE} 0 1M", str(path))


def _qemu_io(*words: str) -> str:
    done = subprocess.run(["qemu-io", "-f", "qcow2", *words], capture_output=True, text=True)
    assert "1 MiB" in done.stdout or "Pattern" in done.stdout, done
    return done.stdout


def test_disk_of_the_running_domain_only_goes_back_and_is_defined_by_a_revert_without_memory(domain: Make) -> None:
    """The domain is started anew for it, and would come up without the disk."""
    rig = running(domain)
    attach(rig, "vdx", "--live")
    rig.ok("create", "vm", "s1", "--disk-only")
    assert set(rig.snapshots()["s1"]) == {"vda", "vdx"}
    frozen = rig.snapshots()["s1"]["vdx"]
    said = rig.ok("revert", "vm", "s1", "-y", "--json").json
    assert said["config_changes"] == ["vdx, attached to the running VM only, is in its definition from now on"]
    assert set(rig.sources()) == set(rig.sources(inactive=True)) == {"vda", "vdx"} and rig.agreement() == []
    assert frozen not in rig.sources().values() and holds_it(frozen)
    rig.ok("undo", "vm", "-y")
    assert set(rig.sources()) == {"vda", "vdx"} and rig.agreement() == []
    rig.virsh("destroy", "vm")
    assert rig.file_verdict() == []


def test_disk_of_the_running_domain_only_that_the_snapshot_has_not_is_kept_with_the_present(domain: Make) -> None:
    """The answer says that it is detached; undo attaches it again, with what it held."""
    rig = running(domain)
    rig.ok("create", "vm", "s1", "--disk-only")
    vdx = attach(rig, "vdx", "--live")
    said = rig.ok("revert", "vm", "s1", "-y", "--json").json
    assert said["config_changes"] == ["vdx detached, its file kept"]
    assert set(rig.sources()) == {"vda"} and set(rig.snapshots()["before-revert-1"]) == {"vda", "vdx"}
    rig.ok("undo", "vm", "-y")
    assert set(rig.sources()) == {"vda", "vdx"} and rig.sources()["vdx"] != vdx and holds_it(vdx)
    rig.virsh("destroy", "vm")
    assert rig.agreement() == [] and rig.file_verdict() == []
    assert holds_it(rig.active()["vdx"])


def test_disk_of_the_running_domain_only_is_on_a_new_layer_when_its_memory_is_loaded(domain: Make) -> None:
    """Not on the one that the snapshot froze. The definition stays without it."""
    rig = running(domain)
    vdx = attach(rig, "vdx", "--live")
    rig.ok("create", "vm", "s1")
    before = rig.digest(vdx)
    rig.ok("revert", "vm", "s1", "-y")
    assert set(rig.sources()) == {"vda", "vdx"} and set(rig.sources(inactive=True)) == {"vda"}
    assert vdx not in rig.sources().values() and rig.agreement() == []
    rig.virsh("destroy", "vm")
    assert rig.digest(vdx) == before and rig.file_verdict() == []
    rig.ok("start", "vm", "--paused")  # as any domain, it comes up without
    assert set(rig.sources()) == {"vda"} and rig.agreement() == []


def test_disk_of_the_running_domain_only_comes_back_when_a_revert_fails(domain: Make) -> None:
    """The domain was ended for it, and is started again."""
    rig = running(domain)
    vdx = attach(rig, "vdx", "--live")
    rig.ok("create", "vm", "s1", "--disk-only")
    assert rig.killed("revert", "vm", "s1", "-y", at="revert.catalog")
    rig.ok("recover", "vm", "--undo", "-y")
    assert set(rig.sources()) == {"vda", "vdx"} and rig.agreement() == []
    rig.virsh("destroy", "vm")
    assert rig.file_verdict() == [] and holds_it(vdx)


def test_disk_of_the_definition_only_keeps_no_command_off(domain: Make) -> None:
    """It is no part of a snapshot yet. After a revert it is there as it is defined, then it is like any other."""
    rig = running(domain)
    rig.broken = True  # the definition has a disk that the catalog has not
    vdy = attach(rig, "vdy", "--config")
    rig.ok("create", "vm", "memory")
    rig.ok("create", "vm", "disk", "--disk-only")
    assert set(rig.snapshots()["disk"]) == {"vda"}
    rig.ok("revert", "vm", "memory", "-y")
    assert set(rig.sources()) == {"vda"} and rig.sources(inactive=True)["vdy"] == vdy
    rig.ok("revert", "vm", "disk", "-y")
    assert rig.sources() == rig.sources(inactive=True) and rig.sources()["vdy"] == vdy
    rig.ok("undo", "vm", "-y")
    assert set(rig.snapshots()["before-revert-3"]) == {"vda", "vdy"} and rig.agreement() == []
    assert rig.sources()["vdy"] != vdy and holds_it(vdy)
    rig.virsh("destroy", "vm")
    assert rig.file_verdict() == []


def test_disk_of_the_definition_only_is_there_at_the_next_start(domain: Make) -> None:
    """`diskchain start` takes it up; on a frozen layer of ours it is refused as ever."""
    rig = running(domain)
    attach(rig, "vdy", "--config")
    rig.ok("create", "vm", "s1", "--disk-only")
    rig.virsh("destroy", "vm")
    rig.ok("start", "vm", "--paused")
    assert set(rig.sources()) == {"vda", "vdy"} and rig.agreement() == []
    frozen = rig.snapshots()["s1"]["vda"]
    rig.virsh("attach-disk", "vm", str(frozen), "vdz", "--subdriver", "qcow2", "--config")
    refused(rig, "create", "vm", "s2", "--disk-only", code=8, says="vdz")
    rig.virsh("detach-disk", "vm", "vdz", "--config")
    rig.ok("create", "vm", "s2", "--disk-only")


def test_disk_that_is_detached_until_the_next_start_keeps_its_present_when_memory_is_loaded(domain: Make) -> None:
    """The memory of then has no such disk, the definition of then an old layer of it, which is frozen now."""
    rig = running(domain)
    rig.virsh("destroy", "vm")
    vdy = attach(rig, "vdy", "--config")
    rig.virsh("start", "vm", "--paused")
    rig.ok("create", "vm", "both", "--disk-only")
    rig.virsh("destroy", "vm")
    layer = rig.active()["vdy"]
    rig.virsh("detach-disk", "vm", "vdy", "--config")
    rig.virsh("start", "vm", "--paused")
    rig.virsh("attach-disk", "vm", str(layer), "vdy", "--subdriver", "qcow2", "--config")
    rig.ok("create", "vm", "without")
    assert set(rig.snapshots()["without"]) == {"vda"}
    rig.virsh("destroy", "vm")
    rig.ok("start", "vm", "--paused")
    rig.ok("create", "vm", "later", "--disk-only")
    assert set(rig.snapshots()["later"]) == {"vda", "vdy"}
    rig.ok("revert", "vm", "without", "-y")
    assert set(rig.sources()) == {"vda"}
    layers = {image for disks in rig.snapshots().values() for image in disks.values()}
    waits = rig.sources(inactive=True)["vdy"]
    assert waits not in layers and holds_it(waits)
    rig.virsh("destroy", "vm")
    rig.ok("start", "vm", "--paused")
    assert rig.sources()["vdy"] == waits and rig.agreement() == []
    rig.virsh("destroy", "vm")
    assert rig.file_verdict() == [] and holds_it(vdy)
