"""Shared bases and layers elsewhere, of domains: who uses a base, what a kill and a `virsh start` behind us leave, drift."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.libvirt.test_crash_stopped import started_by_hand
from tests.support.domain import DomainRig
from tests.support.libvirtd import Libvirtd
from tests.support.refusals import grow_tree, refused
from tests.support.rig import MiB, wait_for
from tests.support.roaming import Roaming, io

CASES = {
    "move": (("move", "vm", "--to", "THERE"), {"vda.qcow2", "vdb.raw"}),
    "detach-to": (("detach", "vm", "--to", "THERE"), {"base/template.qcow2"}),
    "delete-to": (("delete", "vm", "s3", "--to", "THERE", "-y"), set()),
}


class RoamingDomain(Roaming, DomainRig):
    """A domain in place of the machine."""

    def build(self, *, guest: bool, fault: str = "") -> None:
        """Make the images, and define the domain with virsh."""
        self.make_images()
        (self.dir / "vm.xml").write_text(self.xml(guest=guest))
        self.virsh("define", str(self.dir / "vm.xml"))


class OneBase(DomainRig):
    """Two disks on one base that is not the domain's own; `mid`: between it and vda lies an image that is not, too."""

    mid = False

    def build(self, *, guest: bool, fault: str = "") -> None:
        """Make the images, and define the domain with virsh."""
        self.qemu_img("create", "-q", "-f", "qcow2", str(self.dir / "base.qcow2"), str(self.size))
        io(self.dir / "base.qcow2", "write -P 7 0 3M")
        if self.mid:
            self.stand("mid.qcow2", "base.qcow2", "write -P 8 1M 1M")
        self.stand("vda.qcow2", "mid.qcow2" if self.mid else "base.qcow2", "write -P 9 2M 64k")
        self.stand("vdb.qcow2", "base.qcow2", "write -P 10 2M 64k")
        (self.dir / "vm.xml").write_text(self.xml(guest=guest))
        self.virsh("define", str(self.dir / "vm.xml"))

    def stand(self, name: str, below: str, command: str) -> None:
        """Make an overlay, and write into it."""
        self.qemu_img("create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", str(self.dir / name))
        io(self.dir / name, command)


class Saved:
    """The usual tree, off, and how to bring files and definition back."""

    def __init__(self, rig: RoamingDomain) -> None:
        self.rig = rig
        grow_tree(rig)
        self.template = rig.save_template()
        self.xml = rig.dir.with_suffix(".back.xml")
        self.xml.write_text(rig.virsh("dumpxml", "vm", "--inactive"))
        self.now = dict(rig.expected["now"])

    def back(self) -> None:
        """Files and definition as they were."""
        self.rig.restore_template(self.template)
        self.rig.virsh("define", str(self.xml))
        self.rig.expected["now"] = dict(self.now)


@pytest.fixture(scope="module")
def saved(daemon: Libvirtd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    """One for all tests here."""
    rig = RoamingDomain(tmp_path_factory.mktemp("places") / "vm", daemon=daemon, size=8 * MiB, raw=("vdb",))
    found = Saved(rig)
    yield found
    rig.destroy()
    shutil.rmtree(found.template)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.timeout(300)
def test_killed_at_the_switch_and_started_by_hand_nothing_written_is_lost(saved: Saved, name: str) -> None:
    """`virsh start` knows nothing of our journal: whatever layer the guest wrote to, recover loses none of it."""
    rig, (args, let_go), wrong = saved.rig, CASES[name], []
    words = [str(rig.dir / "there") if word == "THERE" else word for word in args]
    saved.back()
    points = rig.points(*words)
    assert {w.removeprefix("orphan ") for w in rig.verdict(present="now")} <= let_go
    rig.virsh("start", "vm", "--paused")
    rig.virsh("destroy", "vm")
    middle = next(i for i, p in enumerate(points) if ".switch.before" in p)
    for number, point in enumerate((points[middle], points[middle + 1], points[middle + 2], points[-5])):
        saved.back()
        assert rig.killed(*words, at=point)
        started_by_hand(rig, 70 + number)
        answer = rig.run("recover", "vm")
        wrong += [] if answer.code == 0 else [f"{point}: recover ended with {answer.code}: {answer.err}"]
        found = {w.removeprefix("orphan ") for w in rig.verdict(present="now")} - let_go
        wrong += [f"{point}: {w}" for w in sorted(found)]
    assert not wrong, "\n".join(wrong)


def test_base_users_tells_defined_running_and_saved_domains(saved: Saved) -> None:
    """One domain through its three states; it is named once, not by each of its files."""
    saved.back()
    rig = saved.rig

    def said() -> list[tuple[str, str, str]]:
        users = rig.ok("--json", "base", "users", str(rig.template)).json["users"]
        return [(u["who"], u["how"], u["state"]) for u in users if not u["who"].startswith(("the process", "the name"))]

    assert said() == [("the domain vm", "stands on it", "defined")]
    rig.virsh("start", "vm", "--paused")
    assert said() == [("the domain vm", "stands on it", "running")]
    rig.virsh("managedsave", "vm")
    assert said() == [("the domain vm", "stands on it", "saved")]
    for words in (["detach", "vm"], ["move", "vm", "--to", str(rig.dir / "there")]):
        for more in ([], ["-n"]):
            refused(rig, *words, *more, code=6, says="managed save")
    rig.virsh("managedsave-remove", "vm")


def test_repair_defines_a_domain_anew_that_something_put_back_on_a_frozen_layer(saved: Saved) -> None:
    """Only as long as nothing was written there: then the catalog is right. Once it was, nothing is touched."""
    saved.back()
    rig = saved.rig
    frozen = rig.snapshots()["s3"]["vda"]
    wrong = saved.xml.read_text().replace(str(rig.active()["vda"]), str(frozen))
    (rig.dir / "wrong.xml").write_text(wrong)
    rig.virsh("define", str(rig.dir / "wrong.xml"))
    refused(rig, "start", "vm", code=8)
    assert "frozen layer of its own chain" in rig.ok("check", "vm", "--repair", "-n").out
    assert rig.run("check", "vm", "--repair", "-y").code == 0
    assert rig.verdict(present="now") == []
    rig.virsh("define", str(rig.dir / "wrong.xml"))
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 5M 1M", str(frozen)], check=True, capture_output=True)
    assert "nothing is to be repaired" in rig.ok("check", "vm", "--repair", "-n").out
    assert rig.sources(inactive=True)["vda"] == frozen
    saved.back()


def test_moved_domain_starts_with_virsh_and_is_found(saved: Saved) -> None:
    """Records go with it; the template stays; a create and a delete work there."""
    saved.back()
    rig = saved.rig
    there = rig.dir / "there"
    answer = rig.ok("--json", "move", "vm", "--to", str(there)).json
    assert answer["stays"] == [str(rig.template)] and Path(answer["home"]).parent.parent == there
    rig.virsh("start", "vm", "--paused")
    assert {p.parent for p in rig.sources().values()} == {there}
    rig.virsh("destroy", "vm")
    wait_for(lambda: rig.virsh("domstate", "vm") == "shut off", "it is off")
    rig.ok("create", "vm", "s4")
    rig.expected["s4"] = rig.expected["now"]
    rig.ok("delete", "vm", "s3", "-y")
    assert set(rig.verdict(present="now")) == {"orphan vda.qcow2", "orphan vdb.raw"}


def test_disk_of_a_domain_without_records_is_not_taken_for_a_lost_layer(saved: Saved) -> None:
    """Its content, its time: all fits, and it is another domain's."""
    saved.back()
    rig = saved.rig
    layer, copy = rig.snapshots()["s2"]["vda"], rig.dir / "other.qcow2"
    shutil.copy2(layer, copy)
    xml = rig.dir / "other.xml"
    text = re.sub(r"<uuid>.*</uuid>", "", rig.virsh("dumpxml", "vm", "--inactive"))
    text = re.sub(r"<disk .*</disk>", f"""<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
        <source file='{copy}'/><target dev='vda' bus='virtio'/></disk>""", text, flags=re.DOTALL)  # fmt: skip
    xml.write_text(text.replace("<name>vm</name>", "<name>other</name>"))
    rig.virsh("define", str(xml))
    try:
        layer.unlink()
        answer = rig.run("--json", "check", "vm", "--repair", "-y").json
    finally:
        rig.virsh("undefine", "other")
    assert answer["repaired"] == []
    assert ["the domain other uses it" in f["evidence"] for f in answer["findings"] if f["code"] == "layer-alike"] == [
        True
    ]


@pytest.mark.parametrize("killed", ["", "merge.committed#1", "merge.committed#2", "delete.relinked-one#1"])
def test_detach_of_disks_on_one_base_writes_into_none_of_the_images_below(
    daemon: Libvirtd, tmp_path: Path, killed: str
) -> None:
    """vda stands on another image that is not ours, and that on the base: both are as they were, and not needed."""
    rig = OneBase(tmp_path / "vm", daemon=daemon, name="one", size=8 * MiB)
    rig.mid = True
    try:
        rig.build(guest=False)
        rig.remember("now")
        below = {rig.dir / name: (rig.dir / name).read_bytes() for name in ("base.qcow2", "mid.qcow2")}
        plan = rig.ok("detach", "one", "-n").out
        assert "up into mid" not in plan and "vdb: copy up to" in plan
        if killed:
            assert rig.killed("detach", "one", at=killed)
            rig.ok("recover", "one")
        else:
            assert set(rig.ok("--json", "detach", "one").json["let_go"]) == set(map(str, below))
        assert {path: path.read_bytes() for path in below} == below
        for path in below:
            path.unlink()
        assert rig.verdict(present="now") == []
        rig.ok("create", "one", "s1")
    finally:
        rig.destroy()


def test_detach_that_copies_a_sealed_layer_keeps_the_base_for_the_disk_that_is_copied_up(
    daemon: Libvirtd, tmp_path: Path
) -> None:
    """One disk gets a new file for its sealed layer, the other takes what it needs of the base after that."""
    rig = OneBase(tmp_path / "vm", daemon=daemon, name="one", size=8 * MiB)
    try:
        rig.build(guest=False)
        rig.remember("s1")
        rig.remember("now")
        rig.ok("create", "one", "s1")
        rig.ok("base", "seal", str(rig.dir / "vda.qcow2"))
        below = [rig.dir / "base.qcow2", rig.dir / "vda.qcow2"]
        assert set(rig.ok("--json", "detach", "one").json["let_go"]) == set(map(str, below))
        for path in below:
            path.unlink()
        assert rig.verdict(present="now") == []
    finally:
        rig.destroy()
