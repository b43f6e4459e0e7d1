"""Domains that others touch: renamed, undefined, transient, redefined onto a frozen layer; UEFI variables, generation id."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

from tests.support.domain import DomainRig
from tests.support.libvirtd import Libvirtd
from tests.support.refusals import picture, refused
from tests.support.rig import MiB, process_state, wait_for

Make = Callable[..., DomainRig]
SMALL = 8 * MiB


def stopped_at(rig: DomainRig, point: str, *args: str, meanwhile: Callable[[], object]) -> tuple[int, str]:
    """Run diskchain; at a fault point do something else; return its exit code and what it said."""
    process = rig.popen(*args, fault=f"stop:{point}")
    wait_for(lambda: process_state(process.pid) in ("T", "Z"), f"it stands at {point}")
    assert process_state(process.pid) == "T"
    meanwhile()
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_domain_undefined_in_the_middle_is_said_and_nothing_is_lost(domain: Make) -> None:
    """The journal stays; defined again, `recover` alone brings all into line."""
    rig = domain(guest=False, size=SMALL)
    rig.write(1, 0, MiB)
    rig.ok("create", "vm", "s0")
    rig.remember("s0")
    rig.remember("now")
    xml = rig.dir / "old.xml"
    xml.write_text(rig.virsh("dumpxml", "vm", "--inactive"))
    rig.expected["s1"] = rig.expected["now"]
    code, err = stopped_at(rig, "create.named", "create", "vm", "s1", meanwhile=lambda: rig.virsh("undefine", "vm"))
    assert code == 3 and "libvirt has no such domain" in err and "Traceback" not in err, (code, err)
    rig.virsh("define", str(xml))
    rig.ok("recover", "vm")
    assert rig.verdict(present="now") == []


def test_domain_renamed_keeps_its_snapshots_and_its_name(domain: Make) -> None:
    """A snapshot from before carries the old name; a revert to it keeps the one of now."""
    rig = domain(guest=False, size=SMALL)
    rig.write(1, 0, MiB)
    rig.ok("create", "vm", "s0")
    rig.remember("s0")
    rig.write(2, MiB, MiB)
    rig.remember("before-revert-1")
    rig.virsh("domrename", "vm", "other")
    rig.name = "other"
    answer = rig.ok("revert", "other", "s0", "-y", "--json").json
    assert answer["config_changes"] == []
    assert rig.virsh("list", "--all", "--name").split() == ["other"]
    rig.expected["now"] = rig.expected["s0"]
    assert rig.verdict(present="now") == []


def test_memory_of_a_renamed_domain_is_loaded_under_its_new_name(domain: Make) -> None:
    """libvirt compares the name in front of the memory; a label that a power cut tore while it was written is made anew."""
    rig = domain(guest=False, size=SMALL, targets=("vda",), memory="64 MiB")
    rig.virsh("start", "vm", "--paused")
    rig.ok("create", "vm", "s0")
    rig.virsh("destroy", "vm")
    (memory,) = rig.dir.glob(".diskchain/*/snapshots/*/memory")
    for name in ("a-much-longer-name", "b"):
        rig.virsh("domrename", rig.name, name)
        rig.name = name
        refused(rig, "start", "vm", code=4)
        rig.ok("revert", name, "s0", "-y")
        assert rig.virsh("domstate", name) == "paused" and rig.agreement() == []
        assert f"<name>{name}</name>" in rig.virsh("save-image-dumpxml", str(memory))
        rig.virsh("destroy", name)
    with memory.open("r+b") as file:
        file.seek(200)
        file.write(bytes(300))
    rig.ok("revert", "b", "s0", "-y")
    rig.virsh("destroy", "b")
    assert "<name>b</name>" in rig.virsh("save-image-dumpxml", str(memory)) and rig.file_verdict() == []


def test_transient_domain_is_snapshotted_but_never_ended(domain: Make) -> None:
    """What libvirt forgets at its end could not be started again: revert and delete --restart refuse, all stays."""
    rig = domain(guest=False, size=SMALL)
    rig.virsh("undefine", "vm")
    rig.virsh("create", str(rig.dir / "vm.xml"), "--paused")
    rig.ok("create", "vm", "s0", "--disk-only")
    assert rig.agreement() == []
    before, pid = picture(rig.dir), rig.pid()
    refused(rig, "revert", "vm", "s0", "-y", code=6, says="virsh define")
    refused(rig, "delete", "vm", "s0", "--restart", "-y", code=6, says="transient")
    assert picture(rig.dir) == before and rig.pid() == pid
    (xml := rig.dir / "kept.xml").write_text(rig.virsh("dumpxml", "vm", "--migratable"))
    rig.virsh("define", str(xml))
    rig.ok("revert", "vm", "s0", "-y", "--stopped")
    assert rig.agreement() == [] and rig.virsh("domstate", "vm") == "shut off"


def test_device_of_the_host_keeps_memory_out_before_anything_changes(domain: Make, daemon: Libvirtd) -> None:
    """What is passed to the guest has a state of its own: exit 6 and the way without memory."""
    rig = domain(guest=False, size=SMALL)
    rig.ok("create", "vm", "before")
    rig.virsh("start", "vm", "--paused")
    daemon.stop()
    device = (
        "<hostdev mode='subsystem' type='scsi_host'><source protocol='vhost' wwpn='naa.5123456789abcde0'/></hostdev>"
    )
    status = daemon.dir / "run" / "qemu" / "vm.xml"  # what a daemon knows of a domain that runs
    above, end, below = status.read_text().rpartition("</devices>")
    status.write_text(above + device + end + below)
    daemon.start()
    assert "scsi_host" in rig.virsh("dumpxml", "vm") and rig.virsh("domstate", "vm") == "paused"
    before = picture(rig.dir)
    for words in ("--memory", "--memory=paused"):
        refused(rig, "create", "vm", "s0", words, code=6, says="--disk-only")
        assert picture(rig.dir) == before
    rig.ok("create", "vm", "s0", "--disk-only")


def test_generation_id_is_new_after_a_revert(domain: Make) -> None:
    """The guest must notice that it went back in time; disks and name stay as they are."""
    rig = domain(guest=False, size=SMALL)
    path = rig.dir / "vm.xml"
    path.write_text(path.read_text().replace("<memory ", "<genid/><memory ", 1))
    rig.virsh("undefine", "vm")
    rig.virsh("define", str(path))

    def genid() -> str:
        return str(re.findall(r"<genid>(.*)</genid>", rig.virsh("dumpxml", "vm", "--inactive"))[0])

    rig.ok("create", "vm", "s0")
    first = genid()
    rig.ok("revert", "vm", "s0", "-y")
    second = genid()
    rig.ok("revert", "vm", "s0", "-y")
    assert len({first, second, genid()}) == 3 and rig.agreement() == []


def test_uefi_variables_go_back_with_the_disks(domain: Make, daemon: Libvirtd) -> None:
    """What libvirt made at the first start is captured at create, and put back by the revert."""
    rig = domain(guest=False, size=SMALL, targets=("vda",))
    path, nvram = rig.dir / "vm.xml", rig.dir / "vars.fd"
    text = path.read_text().replace("<os>", "<os firmware='efi'>", 1)
    path.write_text(text.replace("</os>", f"<nvram>{nvram}</nvram></os>", 1))
    rig.virsh("undefine", "vm")
    rig.virsh("define", str(path))
    rig.virsh("start", "vm", "--paused")
    rig.virsh("destroy", "vm")
    at_first = nvram.read_bytes()
    rig.ok("create", "vm", "s0")
    changed = bytearray(at_first)
    changed[4096:4112] = b"other variables!"
    nvram.write_bytes(changed)
    mode = nvram.stat().st_mode
    rig.ok("revert", "vm", "s0", "-y")
    assert nvram.read_bytes() == at_first and nvram.stat().st_mode == mode
    rig.ok("undo", "vm", "-y")
    assert nvram.read_bytes() == bytes(changed) and rig.agreement() == []
    rig.virsh("start", "vm", "--paused")


def test_hook_refuses_a_domain_on_a_frozen_layer_and_no_other(domain: Make, daemon: Libvirtd) -> None:
    """Another tool redefines the domain onto its old base: libvirt does not start it, and says in our words why."""
    rig = domain(guest=False, size=SMALL)
    base = rig.sources()["vda"]
    hooks = daemon.dir / "etc" / "hooks"
    rig.ok("setup", "--hook", "--hooks-dir", str(hooks))
    daemon.stop()
    daemon.start()
    try:
        rig.ok("create", "vm", "s0")
        rig.virsh("start", "vm", "--paused")
        rig.virsh("destroy", "vm")
        right, wrong = rig.dir / "right.xml", rig.dir / "wrong.xml"
        right.write_text(rig.virsh("dumpxml", "vm", "--inactive"))
        wrong.write_text(right.read_text().replace(str(rig.active()["vda"]), str(base)))
        rig.virsh("define", str(wrong))
        before = rig.digest(base)
        said = rig.virsh("start", "vm", "--paused", ok=False)
        assert f"{base} is frozen: snapshot s0 of vm" in said and "diskchain check vm" in said
        assert rig.virsh("domstate", "vm") == "shut off" and rig.digest(base) == before
        rig.virsh("define", str(right))
        rig.virsh("start", "vm", "--paused")
    finally:
        (hooks / "qemu.d" / "diskchain").unlink()
        daemon.stop()
        daemon.start()
    assert Path(base).is_file()


def test_machine_on_a_layer_of_a_domain_is_refused(domain: Make) -> None:
    """Its base, its active layer, wherever its records are, and before there are any; they are not taken over either."""
    rig = domain(guest=False, size=16 * MiB)
    base = rig.active()["vda"]
    refused(rig, "machine", "import", "evil", "--disk", f"{base},format=qcow2", code=6, says="the domain vm")
    (rig.dir / "elsewhere").mkdir()
    rig.ok("create", "vm", "s0", "--disk-only", "--overlay-dir", str(rig.dir / "elsewhere"))
    records = list(rig.dir.glob(".diskchain/*"))
    assert rig.active()["vda"].parent != base.parent
    error = refused(rig, "machine", "import", "evil", "--disk", f"{base},format=qcow2", code=6, says="the domain vm")
    assert "copy it" in error["hint"]
    assert list(rig.dir.glob(".diskchain/*")) == records
