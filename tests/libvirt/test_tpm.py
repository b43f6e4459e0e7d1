"""The TPM of a domain: its state is in every snapshot and comes back, owned by whom libvirt's swtpm runs as."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support.console import Console
from tests.support.domain import DomainRig
from tests.support.libvirtd import Libvirtd
from tests.support.refusals import picture, refused
from tests.support.rig import MiB

Make = Callable[..., DomainRig]
TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"


def with_tpm(domain: Make) -> DomainRig:
    """A domain with one; it was never started. (Booted uncompressed, the guest does not find a TPM of libvirt's.)"""
    rig = domain(guest=False, size=8 * MiB, targets=("vda",), modes="tpm")
    path = rig.dir / "vm.xml"
    path.write_text(rig.xml(guest=True).replace("</devices>", f"{TPM}</devices>").replace("vmlinux", "vmlinuz"))
    rig.virsh("undefine", "vm")
    rig.virsh("define", str(path))
    return rig


def state_of(rig: DomainRig, daemon: Libvirtd) -> Path:
    """The chip's permanent state, where this daemon keeps it."""
    (path,) = (daemon.dir / "lib" / "swtpm" / rig.virsh("domuuid", "vm")).glob("tpm2/tpm2-00.permall")
    return path


def said(rig: DomainRig, *, after: int = 0) -> tuple[int, int]:
    """Wait for the guest's next word on its TPM, from this line on; return how often it extended a register, and its resets."""
    with Console(rig.console()) as console:
        found = console.wait(r"^P (\d+) resets=(\d+)", timeout=120, after=after)
        return int(found[1]), int(found[2])


def lines(rig: DomainRig) -> int:
    """How many lines the console has."""
    with Console(rig.console()) as console:
        return console.mark()


def test_tpm_state_is_captured_and_comes_back_with_owner_and_mode(domain: Make, daemon: Libvirtd) -> None:
    """With memory its registers too (the guest says so); cold, from a snapshot of the domain off, what lies on the disk."""
    rig = with_tpm(domain)
    before = picture(rig.dir)
    refused(rig, "create", "vm", "never-ran", code=6, says="virsh start vm")
    assert picture(rig.dir) == before
    rig.virsh("start", "vm")
    _, resets = said(rig)
    refused(rig, "create", "vm", "s", "--disk-only", code=6, says="TPM state")
    snapshot = rig.ok("create", "vm", "on", "--json").json["snapshot"]
    assert snapshot["captured"] == ["disks", "configuration", "tpm", "memory"]
    rig.virsh("destroy", "vm")
    state = state_of(rig, daemon)
    first, owner, mode = state.read_bytes(), state.owner(), state.stat().st_mode & 0o777
    assert owner != "root" and mode == 0o600
    rig.ok("create", "vm", "off")
    place = lines(rig)
    rig.virsh("start", "vm")  # the chip counts its starts: its permanent state is another one then
    assert said(rig, after=place)[1] > resets
    rig.virsh("destroy", "vm")
    assert state.read_bytes() != first
    rig.ok("revert", "vm", "off", "-y")
    assert state.read_bytes() == first and (state.owner(), state.stat().st_mode & 0o777) == (owner, mode)
    assert state.parent.owner() == owner and state.parent.stat().st_mode & 0o777 == 0o700
    place = lines(rig)
    rig.ok("revert", "vm", "on", "-y")  # the same chip, with the registers that the guest left in it
    count, again = said(rig, after=place)
    assert count > 1 and again == resets and "MISMATCH" not in rig.console().read_text()
    rig.virsh("destroy", "vm")
    assert rig.agreement() == []
