"""What stands in the way of a snapshot of a domain is said before anything changes; files belong to whom libvirt needs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.console import Console
from tests.support.domain import DomainRig
from tests.support.guest import qemu_version
from tests.support.libvirtd import Libvirtd
from tests.support.refusals import picture, refused
from tests.support.rig import MiB, wait_for

SMALL = 8 * MiB
Make = Callable[..., DomainRig]


@pytest.fixture(scope="module")
def plain() -> Iterator[Libvirtd]:
    """A daemon as Debian has it: QEMU is libvirt-qemu, which may not use userfaultfd."""
    found = Libvirtd(user="libvirt-qemu", settings=('lock_manager="nop"',))
    found.start()
    yield found
    found.destroy()


def let_others_in(directory: Path) -> None:
    """Let everybody search a directory and what it is in: pytest's are private."""
    for place in (directory, *directory.parents):
        if not place.stat().st_mode & 0o001:
            place.chmod(place.stat().st_mode | 0o011)


@pytest.fixture
def confined(plain: Libvirtd, tmp_path: Path) -> Iterator[Make]:
    """Domains whose QEMU runs as libvirt-qemu, in a directory that it can reach."""
    made: list[DomainRig] = []
    let_others_in(tmp_path)

    def make(**options: Any) -> DomainRig:
        rig = DomainRig(tmp_path / f"d{len(made)}", daemon=plain, size=SMALL, **options)
        made.append(rig)
        rig.build(guest=False)
        rig.dir.chmod(0o755)
        return rig

    yield make
    for rig in made:
        rig.destroy()


def owners(rig: DomainRig) -> set[str]:
    """Who owns the active layers."""
    return {f"{path.owner()} {path.stat().st_mode & 0o777:o}" for path in rig.active().values()}


def test_qemu_without_the_right_to_userfaultfd_is_refused_with_every_way_out(confined: Make) -> None:
    """Exit 6 names --disk-only, --memory=paused with its pause, and the sysctl; nothing has changed, not even records."""
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.fail("this host lets everybody use userfaultfd: sysctl vm.unprivileged_userfaultfd=0")
    rig = confined(memory="128 MiB")
    rig.virsh("start", "vm", "--paused")
    rig.virsh("resume", "vm")
    findings = {f["code"]: f for f in rig.run("doctor", "--json").json["findings"]}
    assert "runs as libvirt-qemu" in findings["libvirt-user"]["evidence"]
    if qemu_version() < (10, 0):  # from then on it depends on /dev/userfaultfd, which only a running QEMU shows
        assert "libvirt-qemu" in findings["libvirt-userfaultfd-unusable"]["evidence"]
    before = picture(rig.dir)
    for words in (["create", "vm", "s0"], ["create", "vm", "s0", "-n"], ["create", "vm", "s0", "--memory"]):
        error = refused(rig, *words, code=6, says="libvirt-qemu")
        assert "--disk-only" in error["hint"] and "--memory=paused (it stands still for up to 0.1 s)" in error["hint"]
        assert "sysctl vm.unprivileged_userfaultfd=1" in error["hint"]
        assert picture(rig.dir) == before and rig.virsh("domstate", "vm") == "running"


def test_a_domain_of_libvirt_qemu_lives_through_create_revert_delete_and_start(confined: Make) -> None:
    """Private images (0600) too: every layer can be opened by QEMU at every start, and the data is right."""
    rig = confined()
    for path in rig.active().values():
        path.chmod(0o600)
    rig.write(1, 0, MiB)
    rig.ok("create", "vm", "off")  # made of root's files
    rig.remember("off")
    rig.virsh("start", "vm", "--paused")
    assert owners(rig) == {"libvirt-qemu 600"}
    rig.ok("create", "vm", "on", "--disk-only")  # made of libvirt-qemu's
    assert owners(rig) == {"libvirt-qemu 600"}
    rig.virsh("destroy", "vm")
    rig.remember("on")
    rig.write(2, MiB, MiB)
    rig.remember("before-revert-1")
    rig.ok("revert", "vm", "off", "-y")
    rig.expected["now"] = rig.expected["off"]
    rig.virsh("start", "vm", "--paused")
    rig.virsh("destroy", "vm")
    assert rig.verdict(present="now") == []
    rig.ok("undo", "vm", "-y")
    rig.expected["now"] = rig.expected["before-revert-1"]
    for name in ("before-revert-2", "on", "off"):
        rig.ok("delete", "vm", name, "-y")
        rig.expected.pop(name, None)
    assert rig.verdict(present="now") == []
    rig.virsh("start", "vm", "--paused")
    assert owners(rig) == {"libvirt-qemu 600"}


def test_a_directory_that_qemu_may_not_search_is_named_before_the_pause(confined: Make) -> None:
    """An overlay in it could be made by root and opened by nobody; `check` says it too."""
    rig = confined()
    rig.dir.chmod(0o700)
    before = picture(rig.dir)
    error = refused(rig, "create", "vm", "s0", code=6, says=f"may not search {rig.dir}")
    assert f"setfacl -m u:libvirt-qemu:x '{rig.dir}'" in error["hint"] and picture(rig.dir) == before
    assert "files-out-of-reach" in {f["code"] for f in rig.run("check", "vm", "--json").json["findings"]}
    rig.dir.chmod(0o711)
    rig.ok("create", "vm", "s0")
    rig.virsh("start", "vm", "--paused")


def test_without_dynamic_ownership_an_image_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """libvirt leaves owners alone then: the overlay is as its base, and QEMU must be able to open that. A lock manager
    is told of."""
    let_others_in(tmp_path)
    daemon = Libvirtd(user="libvirt-qemu", settings=("dynamic_ownership=0",))
    daemon.start()
    rig = DomainRig(tmp_path / "d", daemon=daemon, size=SMALL)
    try:
        rig.build(guest=False)
        rig.dir.chmod(0o755)
        base = rig.active()["vda"]
        base.chmod(0o600)
        before = picture(rig.dir)
        refused(rig, "create", "vm", "s0", code=6, says=f"may not read {base}")
        assert picture(rig.dir) == before
        for path in rig.active().values():
            shutil.chown(path, "libvirt-qemu", "kvm")
        rig.ok("create", "vm", "s0")
        assert owners(rig) == {"libvirt-qemu 600", "libvirt-qemu 644"}
        rig.virsh("start", "vm", "--paused")
        config = daemon.dir / "etc" / "qemu.conf"
        config.write_text(config.read_text() + 'lock_manager = "lockd"\n')
        plan = rig.ok("create", "vm", "s1", "--disk-only", "-n", "--json").json["plan"]
        assert any("lock manager (lockd)" in text for text in plan["warnings"])
    finally:
        rig.destroy()
        daemon.destroy()


def test_a_device_whose_state_can_not_be_saved_is_named_before_anything_changes(confined: Make) -> None:
    """QEMU's own list of blockers is asked, for a save in background and for a paused one; disks alone go."""
    rig = confined()
    text = (
        (rig.dir / "vm.xml")
        .read_text()
        .replace("<domain ", "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0' ")
    )
    extra = "<qemu:commandline><qemu:arg value='-device'/><qemu:arg value='nvme,serial=x,addr=0x1e'/></qemu:commandline></domain>"
    (rig.dir / "vm.xml").write_text(text.replace("</domain>", extra))
    rig.virsh("undefine", "vm")
    rig.virsh("define", str(rig.dir / "vm.xml"))
    rig.virsh("start", "vm", "--paused")
    before = picture(rig.dir)
    for words in ([], ["--memory=paused"]):
        error = refused(rig, "create", "vm", "s0", *words, code=6, says="nvme")
        assert "--disk-only" in error["hint"] and picture(rig.dir) == before
    rig.ok("create", "vm", "s0", "--disk-only", "-n")
    assert picture(rig.dir) == before  # a plan of a domain that has no records yet
    rig.ok("create", "vm", "s0", "--disk-only")
    assert rig.agreement() == []


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("<encryption format='luks'><secret type='passphrase' uuid='5a3f8f6e-0000-4000-8000-00000000000a'/></encryption>",
         "encrypted"),
        ("<slices><slice type='storage' offset='1048576' size='4194304'/></slices>", "<slices>"),
    ],
)  # fmt: skip
def test_a_disk_that_is_more_than_its_file_is_refused_and_can_be_left_out(domain: Make, more: str, says: str) -> None:
    """LUKS and slices: the domain would not start on an overlay."""
    rig = domain(guest=False, size=SMALL, raw=("vdb",))
    rig.broken = True  # vdb is in no catalog
    path = rig.dir / "vm.xml"
    path.write_text(path.read_text().replace("vdb.raw'/>", f"vdb.raw'>{more}</source>"))
    rig.virsh("undefine", "vm")
    rig.virsh("define", str(path))
    before = picture(rig.dir)
    error = refused(rig, "create", "vm", "s0", code=6, says=says)
    assert "--skip-disk vdb" in error["hint"] and picture(rig.dir) == before
    rig.ok("create", "vm", "s0", "--skip-disk", "vdb")
    rig.ok("revert", "vm", "s0", "-y")
    assert rig.sources(inactive=True)["vdb"] == rig.dir / "vdb.raw" and more.split(">")[0].split()[0] in rig.virsh(
        "dumpxml", "vm"
    )


def test_a_floppy_that_can_be_written_is_refused_and_said_by_show_and_check_when_it_is_left_out(domain: Make) -> None:
    """The guest writes to it like to a disk."""
    rig = domain(guest=False, size=SMALL, targets=("vda",))
    rig.broken = True  # the floppy is in no catalog
    floppy = rig.dir / "floppy.img"
    floppy.write_bytes(bytes(1474560))
    path = rig.dir / "vm.xml"
    drive = f"<disk type='file' device='floppy'><source file='{floppy}'/><target dev='fda' bus='fdc'/></disk>"
    path.write_text(path.read_text().replace("</devices>", f"{drive}</devices>"))
    rig.virsh("undefine", "vm")
    rig.virsh("define", str(path))
    error = refused(rig, "create", "vm", "s0", code=6, says="a floppy that can be written")
    assert "--skip-disk fda" in error["hint"]
    rig.ok("create", "vm", "s0", "--skip-disk", "fda")
    assert rig.ok("show", "vm", "s0", "--json").json["snapshot"]["partial"] == ["fda"]
    assert "vm fda" in [f["subject"] for f in rig.run("check", "vm", "--json").json["findings"]]


@pytest.mark.timeout(300)
def test_suspended_domain_is_refused_before_anything_changes_and_resume_wakes_it(domain: Make) -> None:
    """libvirt makes no snapshot of a guest that sleeps, not of its disks either; no file is made before that is said."""
    rig = domain(size=SMALL, agent=True, modes="tick,agent")
    xml = rig.dir / "vm.xml"  # an unpacked kernel QEMU loads anew when the guest wakes, over the guest
    xml.write_text(xml.read_text().replace("/vmlinux<", "/vmlinuz<"))
    rig.virsh("undefine", "vm")
    rig.virsh("define", str(xml))
    rig.virsh("start", "vm")
    with Console(rig.console()) as console:
        console.wait("GUEST AGENT")
        rig.ok("create", "vm", "s", "--disk-only")
        rig.virsh("dompmsuspend", "vm", "mem")
        wait_for(lambda: rig.virsh("domstate", "vm") == "pmsuspended", "it sleeps")
        assert rig.ok("list", "vm", "--json").json["state"] == "suspended"
        before = picture(rig.dir)
        for words in ("--memory=paused", "--memory", "--disk-only", "--quiesce"):
            refused(rig, "create", "vm", "t", words, code=6, says="sleeps")
        refused(rig, "pause", "vm", code=6, says="sleeps")
        refused(rig, "revert", "vm", "s", "--keep-memory", "-y", code=6, says="sleeps")
        assert picture(rig.dir) == before and rig.virsh("domstate", "vm") == "pmsuspended"
        mark = console.mark()
        assert rig.ok("resume", "vm", "--json").json["state"] == "running"
        console.wait(r"^T ", after=mark)
        assert not [line for _, line in console.lines(mark) if line.startswith("GUEST UP")]
        rig.ok("create", "vm", "t", "--memory=paused")
    rig.virsh("destroy", "vm")
