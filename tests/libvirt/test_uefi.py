"""UEFI domains as virt-install makes them: `<os firmware='efi'>`, and libvirt chooses where the variables are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.console import Console
from tests.support.domain import DomainRig
from tests.support.libvirtd import Libvirtd
from tests.support.refusals import picture, refused
from tests.support.rig import MiB

Make = Callable[..., DomainRig]
UEFI = "<os firmware='efi'><firmware><feature enabled='no' name='secure-boot'/></firmware>"  # the guest is not signed


@pytest.fixture(autouse=True)
def no_variables_of_others(daemon: Libvirtd) -> None:
    """All domains of these tests have one name."""
    for path in (daemon.dir / "lib" / "qemu" / "nvram").glob("*"):
        path.unlink()


def with_uefi(domain: Make, *, guest: bool = False, more: str = "", devices: str = "") -> DomainRig:
    """A domain that does not say where its variables are, unless `more` does."""
    rig = domain(guest=False, size=8 * MiB, targets=("vda",), modes="cnt,efi", memory="256 MiB" if guest else "64 MiB")
    path = rig.dir / "vm.xml"
    text = rig.xml(guest=guest).replace("<os>", UEFI).replace("vmlinux", "vmlinuz")
    path.write_text(text.replace("</os>", f"{more}</os>").replace("</devices>", f"{devices}</devices>"))
    rig.virsh("undefine", "vm")
    rig.virsh("define", str(path))
    return rig


def nvram_of(daemon: Libvirtd, name: str = "vm") -> Path:
    """Where this daemon puts the variables."""
    return daemon.dir / "lib" / "qemu" / "nvram" / f"{name}_VARS.fd"


@pytest.mark.timeout(400)
def test_variables_of_a_running_domain_go_back_with_its_memory(domain: Make, daemon: Libvirtd) -> None:
    """The guest counts its boots in an EFI variable, and looks whether that fits its memory; live, and at the next boot."""
    rig = with_uefi(domain, guest=True)
    rig.virsh("start", "vm")
    with Console(rig.console()) as console:

        def boots(after: int) -> int:
            return int(console.wait(r"^E (\d+)$", after=after, timeout=150)[1])

        def restart() -> int:
            rig.virsh("destroy", "vm")
            mark = console.mark()
            rig.virsh("start", "vm")
            return mark

        assert boots(0) == 1
        one = rig.ok("create", "vm", "one", "--json").json["snapshot"]
        assert one["captured"] == ["disks", "configuration", "nvram", "memory"] and one["state"] == "memory"
        at_one = nvram_of(daemon).read_bytes()
        assert boots(restart()) == 2
        rig.virsh("suspend", "vm")  # what it says from now on, it says after the revert
        mark = console.mark()
        rig.ok("revert", "vm", "one", "-y")
        assert boots(mark) == 1 and nvram_of(daemon).read_bytes() == at_one
        assert boots(restart()) == 2  # of that branch, not the third of all
        rig.virsh("destroy", "vm")
        mark = console.mark()
        rig.ok("revert", "vm", "one", "--cold", "--start", "-y")
        assert boots(mark) == 2
        assert [line for _, line in console.lines() if "MISMATCH" in line] == []
        rig.virsh("destroy", "vm")
    assert rig.agreement() == []


def test_variables_at_the_usual_place_are_captured_of_a_domain_that_is_off_or_renamed(
    domain: Make, daemon: Libvirtd
) -> None:
    """None before the first start; a snapshot from before a rename goes to where libvirt looks now."""
    rig = with_uefi(domain)
    assert "nvram" not in rig.ok("create", "vm", "never-ran", "--json").json["snapshot"]["captured"]
    rig.virsh("start", "vm", "--paused")
    assert "nvram" in rig.ok("create", "vm", "on", "--json").json["snapshot"]["captured"]
    rig.virsh("destroy", "vm")
    at_first = nvram_of(daemon).read_bytes()
    assert "nvram" in rig.ok("create", "vm", "off", "--json").json["snapshot"]["captured"]
    rig.virsh("domrename", "vm", "other")
    rig.name = "other"
    rig.virsh("start", "other", "--paused")
    rig.virsh("destroy", "other")
    here = next(path for path in (nvram_of(daemon, "other"), nvram_of(daemon)) if path.exists())  # by libvirt's version
    for name in ("on", "off"):
        here.write_bytes(at_first[:4096] + name.encode() * 8 + at_first[4096 + 8 * len(name) :])
        rig.ok("revert", "other", name, "-y")  # the first with its memory
        assert here.read_bytes() == at_first, name
        rig.ok("stop", "other", "--force", "-y")


def test_variables_of_a_running_domain_that_are_gone_are_named(domain: Make, daemon: Libvirtd) -> None:
    """The domain is on, so it has some: a snapshot without them is none."""
    rig = with_uefi(domain)
    rig.virsh("start", "vm", "--paused")
    rig.virsh("destroy", "vm")
    rig.ok("start", "vm", "--paused")  # it has no records, and gets none by that
    nvram_of(daemon).unlink()
    before = picture(rig.dir)
    refused(rig, "create", "vm", "s", "--disk-only", code=8, says="NVRAM can't be read")
    assert picture(rig.dir) == before


@pytest.mark.parametrize(
    ("more", "devices", "says"),
    [
        ("<nvram type='block'><source dev='/dev/loop9'/></nvram>", "", "of type block"),
        (
            "<nvram type='network'><source protocol='nbd' name='x'><host name='localhost'/></source></nvram>",
            "",
            "of type network",
        ),
        (
            "",
            "<tpm model='tpm-tis'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>",
            "passthrough",
        ),
        (
            "",
            "<tpm model='tpm-tis'><backend type='external'><source type='unix' mode='connect' path='/x/tpm.sock'/></backend>"
            "</tpm>",
            "external",
        ),
    ],
)
def test_state_that_is_in_no_plain_file_is_refused_by_name(domain: Make, more: str, devices: str, says: str) -> None:
    """UEFI variables on a block device or a server, a TPM of the host's or of somebody else's."""
    rig = with_uefi(domain, more=more, devices=devices)
    before = picture(rig.dir)
    refused(rig, "create", "vm", "s", code=6, says=says)
    assert picture(rig.dir) == before
