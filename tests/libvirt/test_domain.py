"""The main job on libvirt domains: what virsh sees, what the catalog says and what the files hold agree after every step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support.console import Console
from tests.support.domain import DomainRig
from tests.support.refusals import refused
from tests.support.rig import MiB, wait_for

KiB = 1024
Make = Callable[..., DomainRig]


def test_stopped_domain_create_revert_undo_delete(domain: Make) -> None:
    """qcow2 and raw: every state keeps its bytes, libvirt's definition names the active layers."""
    rig = domain(guest=False, size=8 * MiB, raw=("vdb",))
    assert "no snapshots" in rig.ok("list", "vm").out or rig.ok("list", "vm", "--json").json["snapshots"] == []
    assert not list(rig.dir.glob(".diskchain")), "a look writes nothing"
    rig.ok("create", "vm", "s0")
    rig.expected["s0"] = {t: rig.digest(p) for t, p in rig.snapshots()["s0"].items()}
    rig.write(1, 0, MiB)
    rig.remember("s1")
    rig.ok("create", "vm", "s1")
    rig.write(2, 512 * KiB, MiB)
    rig.remember("now")
    assert rig.verdict(present="now") == []
    rig.expected["before-revert-1"] = rig.expected["now"]
    rig.ok("revert", "vm", "s0", "-y")
    assert rig.verdict(present="s0") == []
    rig.expected["before-revert-2"] = rig.expected["s0"]
    rig.ok("undo", "vm", "-y")
    assert rig.verdict(present="now") == []
    for name in ("before-revert-2", "s1", "before-revert-1", "s0"):
        rig.ok("delete", "vm", name, "-y")
        assert rig.verdict(present="now") == [], name
    assert sorted(p.name for p in rig.active().values()) == ["vda.qcow2", "vdb.raw"]


def test_domain_on_an_image_with_a_colon_in_its_name(domain: Make) -> None:
    """Off and on: libvirt follows the same names to the same files, live and when it starts the domain."""
    rig = domain(guest=False, size=8 * MiB, targets=("vda",))
    (rig.dir / "vda.qcow2").rename(rig.dir / "web:1.qcow2")
    disk = rig.disk_xml().replace("vda.qcow2", "web:1.qcow2")
    (rig.dir / "vm.xml").write_text(rig.xml(guest=False, disks=disk))
    rig.virsh("undefine", "vm")
    rig.virsh("define", str(rig.dir / "vm.xml"))
    for number, state in enumerate(("one", "two"), 1):
        rig.write(number, number * MiB, MiB)
        rig.remember(state)
        rig.ok("create", "vm", state)
    rig.virsh("start", "vm", "--paused")
    rig.remember("three")
    rig.ok("create", "vm", "three", "--disk-only")
    assert rig.agreement() == []
    rig.virsh("destroy", "vm")
    rig.remember("now")
    rig.ok("start", "vm", "--paused")
    rig.virsh("destroy", "vm")
    rig.ok("delete", "vm", "two", "three", "-y")
    assert rig.verdict(present="now") == []
    rig.expected["before-revert-1"] = rig.expected["now"]
    rig.ok("revert", "vm", "one", "-y")
    assert rig.verdict(present="one") == [] and rig.ok("check", "vm").code == 0


def test_start_of_a_domain_stops_the_merge_of_another_command(domain: Make) -> None:
    """As of a machine; libvirt starts it on the layers of before."""
    rig = domain(guest=False, targets=("vda",), size=64 * MiB)
    rig.write(1, 0, MiB)
    rig.remember("s1")
    rig.ok("create", "vm", "s1")
    rig.write(2, 512 * KiB, 48 * MiB)
    rig.remember("now")
    merge = rig.popen("delete", "vm", "s1", "-y", "--rate", "1M")
    (records,) = rig.dir.glob(".diskchain/*")
    wait_for(lambda: "merging" in (records / "lock").read_text(), "the merge moves data")
    rig.ok("start", "vm", "--paused")
    out, err = merge.communicate(timeout=150)
    assert merge.returncode == 3 and "merge interrupted: vm was started by pid" in err, (out, err)
    assert rig.virsh("domstate", "vm") == "paused" and rig.verdict(present="now") == []
    rig.ok("stop", "vm", "--force", "-y")
    assert rig.verdict(present="now") == [] and rig.ok("list", "vm", "--json").json["pending"] == []
    assert sorted(p.name for p in rig.active().values()) == ["vda.qcow2"]


def test_running_domain_memory_revert_undo_and_delete(domain: Make) -> None:
    """Memory and two disks are one instant; virsh sees a running domain all the time; the merge is done with it off."""
    rig = domain()
    rig.virsh("start", "vm")
    with Console(rig.console()) as console:
        console.wait(r"^C 30 bad=")
        made = rig.ok("create", "vm", "one", "--json").json
        assert made["snapshot"]["state"] == "memory" and rig.agreement() == []
        frozen_at = console.counter() or 0
        console.wait(rf"^C {frozen_at + 50} bad=0")
        assert rig.virsh("domstate", "vm") == "running"
        rig.ok("pause", "vm")  # what it says from now on, it says after the revert
        assert rig.virsh("domstate", "vm") == "paused"
        mark = console.mark()
        rig.ok("revert", "vm", "one", "-y")
        first = int(console.wait(r"^C (\d+) bad=0", after=mark)[1])
        assert first <= frozen_at + 1 and rig.agreement() == []
        console.wait(rf"^C {first + 50} bad=0")
        assert console.bad() == [] and rig.virsh("domstate", "vm") == "running"
        assert not [line for _, line in console.lines(mark) if line.startswith("C START")]
        rig.ok("undo", "vm", "-y")
        console.wait(r"^C START \d+$", after=console.mark() - 5)
        assert rig.agreement() == []
        rig.ok("stop", "vm")
        assert rig.virsh("domstate", "vm") == "shut off"
        rig.ok("delete", "vm", "before-revert-2", "before-revert-1", "one", "-y")
        assert rig.agreement() == [] and rig.file_verdict() == []
        mark = console.mark()
        rig.virsh("start", "vm")
        console.wait(r"^C START \d+$", after=mark)
    assert rig.ok("list", "vm", "--json").json["state"] == "running"


def test_layer_between_live_snapshots_is_merged_and_the_domain_starts(domain: Make) -> None:
    """libvirt notes the chain in the definition when it switches a running domain, and believes it at the next start."""
    rig = domain(guest=False, size=8 * MiB)
    rig.write(1, 0, MiB)
    rig.remember("now")
    rig.expected["one"] = rig.expected["two"] = rig.expected["now"]
    rig.virsh("start", "vm", "--paused")
    for name in ("one", "two"):
        rig.ok("create", "vm", name, "--disk-only")
    rig.virsh("destroy", "vm")
    rig.ok("delete", "vm", "one", "-y")
    rig.virsh("start", "vm", "--paused")
    assert rig.verdict(present="now") == []


def test_reading_writes_nothing_and_names_what_is_odd(domain: Make) -> None:
    """status, check and list on a domain that we never saw, with a chain of virsh's own and a managed save."""
    rig = domain(size=8 * MiB, targets=("vda",))
    rig.virsh("start", "vm")
    rig.virsh("snapshot-create-as", "vm", "theirs", "--disk-only", "--atomic")
    before = sorted(p.name for p in rig.dir.iterdir())
    codes = {f["code"] for f in rig.run("check", "vm", "--json").json["findings"]}
    assert {"not-adopted", "libvirt-snapshots"} <= codes
    (vm,) = rig.run("status", "vm", "--json").json["vms"]
    assert (vm["name"], vm["driver"], vm["state"], vm["depth"]) == ("vm", "libvirt", "running", 2)
    assert rig.ok("list", "vm", "--json").json["snapshots"] == []
    rig.virsh("managedsave", "vm")
    assert "managed-save" in {f["code"] for f in rig.run("check", "vm", "--json").json["findings"]}
    refused(rig, "create", "vm", "s", code=6, says="managed save")
    assert sorted(p.name for p in rig.dir.iterdir()) == before
    rig.virsh("start", "vm")
    rig.ok("adopt", "vm")
    assert rig.agreement() == []


def differing(rig: DomainRig, command: str) -> list[str]:
    """What it says of definitions that name other files than the catalog."""
    answer = rig.run(command, "vm", "--json").json
    findings = answer["findings"] if command == "check" else answer["vms"][0]["findings"]
    return [f["evidence"].partition(",")[0] for f in findings if f["code"] == "active-differs"]


def test_layers_put_on_top_by_virsh_are_noticed_and_adopted(domain: Make) -> None:
    """The next create says so and changes nothing; adopt takes the new layer up; the snapshots before it stay whole."""
    rig = domain(guest=False, size=8 * MiB)
    rig.ok("create", "vm", "s1")
    rig.expected["s1"] = {t: rig.digest(p) for t, p in rig.snapshots()["s1"].items()}
    rig.write(2, MiB, MiB)
    rig.virsh("start", "vm", "--paused")
    specs = [w for t in rig.targets for w in ("--diskspec", f"{t},file={rig.dir}/{t}.theirs.qcow2")]
    rig.virsh("snapshot-create-as", "vm", "theirs", "--disk-only", "--atomic", "--no-metadata", *specs)
    assert differing(rig, "status") == [
        f"its live and persistent definitions name {rig.dir}/{t}.theirs.qcow2" for t in rig.targets
    ]
    rig.virsh("destroy", "vm")
    refused(rig, "create", "vm", "s2", code=8, says="diskchain adopt vm")
    refused(rig, "start", "vm", code=8)
    assert differing(rig, "check") == [
        f"its persistent definition names {rig.dir}/{t}.theirs.qcow2" for t in rig.targets
    ]
    rig.ok("adopt", "vm")
    assert rig.agreement() == []
    rig.remember("now")
    assert rig.verdict(present="now") == []
    rig.ok("delete", "vm", "s1", "-y")
    assert rig.verdict(present="now") == []


def test_snapshots_that_virsh_merged_into_are_named_and_no_others(domain: Make) -> None:
    """`blockcommit --pivot`: the file that the snapshot froze is still there, and holds what came after it."""
    rig = domain(guest=False, size=8 * MiB, targets=("vda",))
    rig.broken = True  # the layers that the catalog knows are merged
    rig.ok("create", "vm", "s0")
    rig.write(2, 0, MiB)
    rig.ok("create", "vm", "s1")
    rig.write(3, MiB, MiB)
    rig.ok("create", "vm", "s2")
    rig.virsh("start", "vm", "--paused")
    s1 = rig.snapshots()["s1"]["vda"]
    rig.virsh("blockcommit", "vm", "vda", "--base", str(s1), "--active", "--pivot", "--wait")
    error = refused(rig, "adopt", "vm", code=8, says="of the snapshots s1, s2 it can't be said what they hold")
    assert "diskchain forget vm" in error["hint"]
    rig.virsh("blockcommit", "vm", "vda", "--active", "--pivot", "--wait")
    refused(rig, "adopt", "vm", code=8, says="of the snapshots s0, s1, s2 it can't")


def test_forget_lets_go_and_leaves_a_recover_text(domain: Make) -> None:
    """No image is touched; the domain still starts; create adopts it anew."""
    rig = domain(guest=False, size=8 * MiB)
    rig.ok("create", "vm", "s1")
    active = rig.active()
    contents = {p: rig.digest(p) for p in active.values()}
    answer = rig.ok("forget", "vm", "-y", "--json").json
    assert "s1" in Path(answer["recover"]).read_text() and not list(rig.dir.glob(".diskchain/*"))
    assert {p: rig.digest(p) for p in active.values()} == contents
    rig.ok("start", "vm", "--paused")
    rig.ok("stop", "vm", "--force", "-y")
    rig.ok("create", "vm", "again")
    assert rig.agreement() == []


def test_disks_defined_through_a_symlinked_directory_are_the_same_disks(domain: Make) -> None:
    """Off and running; adopted with a layer on top that is named so, too."""
    rig = domain(guest=False, size=8 * MiB)
    link = rig.dir.with_name("link")
    link.symlink_to(rig.dir)

    def define(text: str) -> None:
        (rig.dir / "through.xml").write_text(text.replace(f"file='{rig.dir}/vd", f"file='{link}/vd"))
        rig.virsh("define", str(rig.dir / "through.xml"))

    rig.write(1, 0, MiB)
    rig.remember("off")
    define(rig.virsh("dumpxml", "vm"))
    rig.virsh("start", "vm", "--paused")
    rig.ok("create", "vm", "first", "--disk-only", "-n")
    rig.virsh("destroy", "vm")
    rig.ok("create", "vm", "off")
    define(rig.virsh("dumpxml", "vm"))
    rig.virsh("start", "vm", "--paused")
    rig.ok("create", "vm", "on", "--disk-only")
    assert rig.agreement() == []
    rig.virsh("destroy", "vm")
    text = rig.virsh("dumpxml", "vm")
    for target, image in rig.active().items():
        layer = rig.dir / f"{target}.theirs.qcow2"
        rig.qemu_img("create", "-q", "-f", "qcow2", "-b", str(image), "-F", "qcow2", str(layer))
        text = text.replace(f"{image.name}'", f"{layer.name}'")
    define(text)
    refused(rig, "create", "vm", "s", code=8, says="adopt")
    rig.ok("adopt", "vm")
    rig.ok("create", "vm", "last")
    rig.expected |= dict.fromkeys(("on", "last", "now"), rig.expected["off"])
    assert rig.verdict(present="now") == []
