"""Disks that a definition names as volumes of a storage pool: the files that they are, whether or not the pool is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.domain import DomainRig
from tests.support.libvirtd import Libvirtd
from tests.support.refusals import picture, refused
from tests.support.rig import MiB

Make = Callable[..., DomainRig]
POOL = "images"


@pytest.fixture
def rig(domain: Make, daemon: Libvirtd) -> Iterator[DomainRig]:
    """A domain that is off, its disks (qcow2, raw) volumes of an active pool; they hold the state s1."""
    found = domain(guest=False, size=8 * MiB, raw=("vdb",))
    found.write(1, 0, MiB)
    found.remember("s1")
    found.virsh("pool-define-as", POOL, "dir", "--target", str(found.dir))
    try:
        found.virsh("pool-start", POOL)
        define_on_volumes(found)
        yield found
    finally:
        daemon.virsh("pool-destroy", POOL, ok=False)
        daemon.virsh("pool-undefine", POOL)


def define_on_volumes(rig: DomainRig) -> None:
    """As it was in the beginning."""
    disks = (
        rig.disk_xml().replace("type='file'", "type='volume'").replace(f"file='{rig.dir}/", f"pool='{POOL}' volume='")
    )
    (rig.dir / "vm.xml").write_text(rig.xml(guest=False, disks=disks))
    rig.virsh("undefine", "vm")
    uuid = f"<uuid>{rig.catalog()['uuid']}</uuid>" if list(rig.dir.glob(".diskchain/*/catalog.json")) else ""
    text = (rig.dir / "vm.xml").read_text()
    (rig.dir / "vm.xml").write_text(text.replace("</name>", f"</name>{uuid}"))
    rig.virsh("define", str(rig.dir / "vm.xml"))
    assert rig.sources(inactive=True) == {}


def names_files(rig: DomainRig) -> bool:
    """Whether the definition names all active layers as files, and no pool any more."""
    return rig.sources(inactive=True) == rig.active() and "pool=" not in rig.virsh("dumpxml", "vm", "--inactive")


def test_domain_on_volumes_goes_the_whole_way_off_and_running(rig: DomainRig) -> None:
    """Every state keeps its bytes. From the first snapshot on the definition names files, in the end those of the volumes."""
    rig.ok("create", "vm", "s1")
    assert names_files(rig)
    rig.write(2, 512 * 1024, MiB)
    rig.remember("now")
    rig.expected |= {"before-revert-1": rig.expected["now"], "before-revert-2": rig.expected["s1"]}
    rig.ok("revert", "vm", "s1", "-y")
    assert names_files(rig) and rig.verdict(present="s1") == []
    rig.ok("undo", "vm", "-y")
    assert names_files(rig) and rig.verdict(present="now") == []
    rig.ok("delete", "vm", "before-revert-1", "before-revert-2", "s1", "-y")
    assert names_files(rig) and rig.verdict(present="now") == []
    assert sorted(p.name for p in rig.active().values()) == ["vda.qcow2", "vdb.raw"]

    define_on_volumes(rig)
    rig.virsh("start", "vm", "--paused")
    rig.expected["live"] = rig.expected["before-revert-3"] = rig.expected["now"]
    assert rig.ok("create", "vm", "live", "--json").json["snapshot"]["state"] == "memory"
    assert names_files(rig) and rig.sources() == rig.active()
    rig.ok("revert", "vm", "live", "-y")
    assert rig.virsh("domstate", "vm") == "paused" and names_files(rig) and rig.verdict(present="now") == []
    rig.virsh("destroy", "vm")
    rig.ok("delete", "vm", "live", "before-revert-3", "-y")
    assert names_files(rig) and rig.verdict(present="now") == [] and rig.ok("check", "vm").code == 0


def test_domain_on_volumes_of_a_pool_that_is_not_active_is_refused_and_says_which(rig: DomainRig) -> None:
    """Off and running; with the pool, or without one of its disks, it goes on."""
    for state in ("off", "running"):
        if state == "running":
            rig.ok("adopt", "vm")
            rig.virsh("start", "vm", "--paused")
        rig.virsh("pool-destroy", POOL)
        before, pid = picture(rig.dir), rig.pid()
        error = refused(rig, "create", "vm", "s1", code=6, says=f"pool {POOL}")
        assert f"virsh pool-start {POOL}" in error["hint"]
        assert picture(rig.dir) == before and rig.pid() == pid
        rig.virsh("pool-start", POOL)
    rig.ok("create", "vm", "s1", "--disk-only")
    rig.virsh("destroy", "vm")
    rig.virsh("pool-destroy", POOL)
    rig.virsh("start", "vm", "--paused")
    assert names_files(rig) and rig.verdict(present="s1") == []


def test_snapshots_of_volumes_need_no_pool(rig: DomainRig) -> None:
    """What the snapshot was made of is known: with the pool gone since, a revert puts every disk back, on new overlays."""
    rig.ok("create", "vm", "s1")
    rig.virsh("start", "vm", "--paused")
    rig.ok("create", "vm", "live")
    rig.virsh("destroy", "vm")
    rig.write(2, 512 * 1024, MiB)
    rig.remember("now")
    rig.virsh("pool-destroy", POOL)
    rig.expected["live"], rig.expected["before-revert-1"] = rig.expected["s1"], rig.expected["now"]
    rig.ok("revert", "vm", "s1", "-y")
    assert names_files(rig) and set(rig.active()) == {"vda", "vdb"} and rig.verdict(present="s1") == []
    rig.ok("undo", "vm", "-y")
    rig.expected["before-revert-2"] = rig.expected["s1"]
    assert names_files(rig) and rig.verdict(present="now") == []
