"""Our snapshots in virsh snapshot-list, where that was asked for; disk-role; and what check and status see of any domain."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.domain import DomainRig
from tests.support.refusals import picture, refused
from tests.support.rig import MiB

Make = Callable[..., DomainRig]
SMALL = 8 * MiB


def tree(rig: DomainRig) -> str:
    """What virsh shows."""
    return "\n".join(
        line.rstrip() for line in rig.virsh("snapshot-list", "vm", "--tree").splitlines() if line.strip(" |")
    )


def codes(rig: DomainRig, *words: str) -> dict[str, Any]:
    """What check finds, by code."""
    return {f["code"]: f for f in rig.run("check", "vm", "--json", *words).json["findings"]}


def test_registered_snapshots_are_in_virsh_and_follow_every_change(domain: Make) -> None:
    """create, rename, revert, delete, forget; what virsh takes out is found by check; nothing of virsh's is touched."""
    rig = domain(guest=False, size=SMALL)
    rig.write(1, 0, MiB)
    said = rig.ok("create", "vm", "s0", "--register")
    assert "virsh snapshot-delete would commit and delete" in said.err
    rig.remember("s0")
    rig.write(2, MiB, MiB)
    rig.virsh("start", "vm", "--paused")
    rig.ok("create", "vm", "s1", "--register", "-d", "with memory")
    assert (
        tree(rig) == "s0\n  |\n  +- s1".replace("\n  |", "") and rig.virsh("snapshot-current", "vm", "--name") == "s1"
    )
    described = rig.virsh("snapshot-dumpxml", "vm", "s1")
    assert "with memory [diskchain" in described and f"{rig.dir}/.diskchain" in described
    assert str(rig.active()["vda"]) in described
    rig.ok("create", "vm", "unlisted", "--disk-only")
    rig.ok("rename", "vm", "s1", "renamed")
    assert (
        tree(rig) == "s0\n  +- renamed"
        and "register-differs" not in codes(rig)
        and "libvirt-snapshots" not in codes(rig)
    )
    rig.ok("revert", "vm", "s0", "-y", "--stopped")
    assert rig.virsh("snapshot-current", "vm", "--name") == "s0" and rig.agreement() == []
    rig.virsh("snapshot-delete", "vm", "renamed", "--metadata")
    assert "lacks renamed" in codes(rig)["register-differs"]["evidence"]
    rig.ok("describe", "vm", "s0", "first")
    assert tree(rig) == "s0\n  +- renamed" and "register-differs" not in codes(rig)
    for name in ("before-revert-1", "unlisted", "renamed"):
        rig.ok("delete", "vm", name, "-y")
    assert tree(rig) == "s0"
    rig.expected["now"] = rig.expected["s0"]
    assert rig.verdict(present="now") == []
    rig.ok("forget", "vm", "-y")
    assert tree(rig) == "" and rig.sources()["vda"].exists()


def test_the_setting_registers_every_snapshot_and_a_machine_refuses(domain: Make) -> None:
    """libvirt.register = true: the kept present too. A name that libvirt has already is refused."""
    rig = domain(guest=False, size=SMALL)
    rig.configure("[libvirt]\nregister = true\n")
    rig.ok("create", "vm", "s0")
    rig.ok("revert", "vm", "s0", "-y")
    assert set(rig.virsh("snapshot-list", "vm", "--name").split()) == {"s0", "before-revert-1"}
    refused(rig, "create", "vm", ".hidden", "--register", code=6, says="libvirt can't list")


def test_disk_role_is_kept_and_shown(domain: Make) -> None:
    """The first disk is os unless something was said; show and status tell it, a wrong disk is named."""
    rig = domain(guest=False, size=SMALL)
    (seen,) = rig.run("status", "vm", "--json").json["vms"]
    assert seen["roles"] == {"vda": "os", "vdb": "data"}
    assert rig.ok("disk-role", "vm", "vdb", "os", "--json").json["changed"] is True
    assert "vdb is os already" in rig.ok("disk-role", "vm", "vdb", "os").out
    refused(rig, "disk-role", "vm", "vdz", "os", code=4, says="no disk vdz")
    rig.ok("create", "vm", "s0")
    layers = rig.ok("show", "vm", "s0", "--json").json["snapshot"]["layers"]
    assert {layer["target"]: layer["role"] for layer in layers} == {"vda": "os", "vdb": "os"}
    shown = rig.ok("show", "vm", "s0").out
    assert "vdb  os" in shown and "can't be read" not in shown
    assert "vda=os,vdb=os" in rig.run("status", "vm", "-o", "VM,ROLES").out


def test_looking_at_domains_of_others_finds_all_and_writes_nothing(domain: Make) -> None:
    """virsh's chains, an orphan, a raw disk that is none, a base that another writes to, internal snapshots, a stale
    <backingStore>: doctor, status and check name them, and directory and XML are as before."""
    rig = domain(guest=False, size=SMALL)
    other = domain(guest=False, size=SMALL, name="other", targets=("vda",))
    base = rig.sources()["vda"]
    rig.qemu_img("snapshot", "-c", "inside", str(rig.sources()["vdb"]))
    rig.virsh("snapshot-create-as", "vm", "old", "--disk-only", "--diskspec", f"vda,file={rig.dir}/vda.old",
              "--diskspec", "vdb,snapshot=no")  # fmt: skip
    month_ago = time.time() - 30 * 86400
    os.utime(base, (month_ago, month_ago))
    rig.qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(rig.dir / "vda.orphan"))
    rig.qemu_img("create", "-q", "-f", "qcow2", str(rig.dir / "vda.somewhere"), "1M")
    note = f"<backingStore type='file'><format type='qcow2'/><source file='{rig.dir}/vda.somewhere'/><backingStore/></backingStore>"
    edited = rig.virsh("dumpxml", "vm", "--inactive")
    place = f"<source file='{rig.dir}/vda.old'/>"
    start = edited.index(place) + len(place)
    stale = edited.index("</disk>", start)
    inner = edited[start:stale]
    end = inner.index("</backingStore>\n      <target") if "</backingStore>\n      <target" in inner else -1
    inner = note + (inner[end + len("</backingStore>") :] if end >= 0 else inner)
    (rig.dir / "edited.xml").write_text(edited[:start] + inner + edited[stale:])
    rig.virsh("define", str(rig.dir / "edited.xml"))
    path = other.dir / "vm.xml"
    path.write_text(path.read_text().replace(str(other.sources()["vda"]), str(base)))
    rig.virsh("undefine", "other")
    rig.virsh("define", str(path))
    before, xml = picture(rig.dir) | picture(other.dir), _xml(rig)
    found = codes(rig)
    everywhere = {f["code"] for f in rig.run("check", "--json").json["findings"]}
    status = rig.run("status")
    doctor = {f["code"]: f for f in rig.run("doctor", "--json").json["findings"]}
    assert picture(rig.dir) | picture(other.dir) == before and _xml(rig) == xml
    assert "the oldest layer is 30 days old" in found["layers-of-others"]["evidence"]
    assert "the domain other and vm both use it" in found["shared-layer"]["evidence"]
    assert found["foreign-overlay"]["subject"].endswith("vda.orphan")
    assert "internal snapshots in it: 1;" in found["internal-snapshots"]["evidence"]
    assert "(old) of 0 days ago" in found["libvirt-snapshots"]["evidence"]
    assert "vda.somewhere <- vda.old" in found["backing-store-differs"]["evidence"]
    assert {"shared-layer", "foreign-overlay"} <= everywhere
    assert "other" in status.out and "libvirt itself has 1 of it" in status.out + status.err
    assert "2 domains, 0 on" in doctor["libvirt"]["evidence"] and "libvirt-hook" in doctor
    assert doctor["libvirt-user"]["evidence"].startswith("runs as root")


def _xml(rig: DomainRig) -> str:
    said = [rig.virsh("dumpxml", name, "--inactive") for name in ("vm", "other")]
    return hashlib.sha256("".join(said).encode()).hexdigest()


def test_a_qcow2_that_is_called_raw_is_told_of(domain: Make) -> None:
    """The guest would see its header and write over it."""
    rig = domain(guest=False, size=SMALL, raw=("vdb",))
    Path(rig.sources()["vdb"]).write_bytes(Path(rig.sources()["vda"]).read_bytes())
    assert "calls" in codes(rig)["format-differs"]["evidence"]
