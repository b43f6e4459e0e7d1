"""virsh at work on a domain in the middle of our create or revert: a clear word, nothing lost, one instant or no memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.libvirt.live import LiveDomain
from tests.libvirt.test_interop import SMALL, stopped_at
from tests.libvirt.test_memory_file import paused
from tests.support.domain import DomainRig
from tests.support.refusals import refused
from tests.support.rig import MiB, wait_for

Make = Callable[..., DomainRig]


@pytest.mark.timeout(400)
def test_virsh_suspends_and_resumes_in_a_create_and_no_mixed_snapshot_is_kept(domain: Make) -> None:
    """Resumed in our pause: the disks are of one instant, the memory would be of another, so there is none."""
    live = LiveDomain(domain())
    for number, point in enumerate(["create.paused", "create.disks-switched"]):

        def go_on_counting() -> None:
            live.rig.virsh("resume", "vm")
            live.counts()

        mark = live.console.mark()
        code, err = stopped_at(live.rig, point, "create", "vm", f"r{number}", "--memory", meanwhile=go_on_counting)
        assert code == 12 and "resumed by something else" in err, (point, code, err)
        assert live.wrong(mark) == [], point
        assert live.states()[f"r{number}"] == "disk", live.states()
    code, err = stopped_at(live.rig, "create.saving.after", "create", "vm", "kept", "--memory",
                           meanwhile=lambda: live.rig.virsh("suspend", "vm"))  # fmt: skip
    assert code == 0, err
    assert live.rig.virsh("domstate", "vm") == "paused", "what virsh suspended stays so"
    live.rig.virsh("resume", "vm")
    assert live.wrong(live.console.mark()) == []
    assert live.go_back_to_all() == 1
    live.rig.virsh("destroy", "vm")
    mark = live.console.mark()
    live.rig.ok("start", "vm")
    assert live.wrong(mark, may_boot=True) == []
    live.console.close()


def theirs(rig: DomainRig, name: str = "theirs") -> dict[str, Path]:
    """An external snapshot by virsh, without metadata; return its overlays."""
    overlays = {t: rig.dir / f"{t}.{name}.qcow2" for t in rig.targets}
    specs = [w for t, p in overlays.items() for w in ("--diskspec", f"{t},file={p}")]
    rig.virsh("snapshot-create-as", rig.name, name, "--disk-only", "--atomic", "--no-metadata", *specs)
    return overlays


def taken_up(rig: DomainRig, overlays: dict[str, Path]) -> None:
    """The domain is on these, live and at its next start; we say so, take them up, and nothing is lost."""
    assert rig.sources() == rig.sources(inactive=True) == overlays
    refused(rig, "create", rig.name, "no", code=8, says="diskchain adopt")
    rig.virsh("destroy", rig.name)
    rig.ok("adopt", rig.name)
    assert rig.sources(inactive=True) == overlays and rig.active() == overlays
    assert rig.verdict(present="now") == []


@pytest.mark.parametrize("point", ["create.prepared.after", "create.disks-switched", "create.saving.after"])
def test_virsh_snapshots_in_our_create_and_its_layers_stay_on_top(domain: Make, point: str) -> None:
    """Before our switch: ours is given up. After it: theirs stands on ours, and no definition goes back below it."""
    rig = paused(domain)
    rig.remember("now")
    rig.expected["before"] = rig.expected["s0"] = rig.expected["now"]
    rig.ok("create", "vm", "before", "--disk-only")
    made: dict[str, Path] = {}
    code, err = stopped_at(
        rig, point, "create", "vm", "s0", "--memory=paused", meanwhile=lambda: made.update(theirs(rig))
    )
    before_ours = point == "create.prepared.after"
    assert code == (8 if before_ours else 0) and "Traceback" not in err, (code, err)
    assert ("s0" in rig.snapshots()) is not before_ours
    taken_up(rig, made)


def test_create_killed_then_virsh_snapshots_then_recover_leaves_its_layers_on_top(domain: Make) -> None:
    """What recovery finishes or undoes never puts the definition back below layers that others made since."""
    rig = paused(domain)
    rig.remember("now")
    for name, point in (("s0", "create.saving.after"), ("s1", "create.prepared.after")):
        rig.expected[name] = rig.expected["now"]
        assert rig.killed("create", "vm", name, "--memory=paused", at=point)
        made = theirs(rig, f"after-{name}")
        rig.ok("recover", "vm")
        taken_up(rig, made)
        rig.virsh("start", "vm", "--paused")


@pytest.mark.parametrize("point", ["create.prepared.after", "create.disks-switched", "create.saving.after"])
def test_virsh_destroys_in_our_create_and_nothing_is_lost(domain: Make, point: str) -> None:
    """Before the switch: undone. After it: the snapshot stays, without memory."""
    rig = paused(domain)
    rig.remember("now")
    rig.expected["before"] = rig.expected["s0"] = rig.expected["now"]
    rig.ok("create", "vm", "before", "--disk-only")
    destroy = lambda: rig.virsh("destroy", "vm")  # noqa: E731
    code, err = stopped_at(rig, point, "create", "vm", "s0", "--memory=paused", meanwhile=destroy)
    assert code != 0 and "Traceback" not in err, (code, err)
    rig.ok("recover", "vm")
    assert rig.verdict(present="now") == [] and rig.virsh("domstate", "vm") == "shut off"
    assert ("s0" in rig.snapshots()) is (point != "create.prepared.after")
    rig.virsh("start", "vm", "--paused")


def test_virsh_undefines_a_domain_in_our_create_it_runs_on_and_can_be_defined_again(domain: Make) -> None:
    """It is transient from then on; its snapshot is whole."""
    rig = paused(domain)
    rig.remember("now")
    rig.expected["s0"] = rig.expected["now"]
    pid = rig.pid()
    code, err = stopped_at(rig, "create.prepared.after", "create", "vm", "s0", "--disk-only",
                           meanwhile=lambda: rig.virsh("undefine", "vm"))  # fmt: skip
    assert code == 0, err
    assert rig.verdict(present="now") == [] and rig.pid() == pid
    (xml := rig.dir / "kept.xml").write_text(rig.virsh("dumpxml", "vm", "--migratable"))
    rig.virsh("define", str(xml))
    assert rig.agreement() == []


@pytest.mark.parametrize("what", ["domrename", "start", "undefine"])
def test_virsh_at_work_in_our_revert_of_a_domain_that_is_off(domain: Make, what: str) -> None:
    """Whole in one of its two states, or clearly stopped and then finished by `recover`."""
    rig = domain(guest=False, size=SMALL)
    rig.write(1, 0, MiB)
    rig.ok("create", "vm", "s0")
    rig.remember("s0")
    rig.write(2, MiB, MiB)
    rig.remember("now")
    rig.expected["before-revert-1"] = rig.expected["now"]
    (xml := rig.dir / "kept.xml").write_text(rig.virsh("dumpxml", "vm", "--inactive"))

    def meddle() -> None:
        if what == "domrename":
            rig.virsh("domrename", "vm", "other")
            rig.name = "other"
        elif what == "start":
            assert 'Failed to get "write" lock' in rig.virsh("start", "vm", "--paused", ok=False)
        else:
            rig.virsh("undefine", "vm")

    code, err = stopped_at(rig, "revert.catalog", "revert", "vm", "s0", "-y", meanwhile=meddle)
    assert "Traceback" not in err, err
    if what == "undefine":
        assert code == 3 and "libvirt has no such domain" in err, (code, err)
        rig.virsh("define", str(xml))
    if rig.journal():
        rig.ok("recover", rig.name)
    wait_for(lambda: rig.virsh("domstate", rig.name) == "shut off", "it is off")
    verdicts = [rig.verdict(present=present) for present in ("now", "s0")]
    assert [] in verdicts, (code, err, verdicts)


@pytest.mark.parametrize("memory", ["--memory", "--disk-only"])
def test_virsh_attaches_a_disk_in_our_create_and_the_snapshot_says_that_it_lacks_it(domain: Make, memory: str) -> None:
    """Its memory would know a device that its disks lack: libvirt could not load it. A revert works without it."""
    rig = domain(guest=False, size=SMALL)
    rig.virsh("start", "vm")
    more = rig.dir / "more.qcow2"
    rig.qemu_img("create", "-q", "-f", "qcow2", str(more), "8M")
    code, err = stopped_at(
        rig, "create.prepared.after", "create", "vm", "s1", memory,
        meanwhile=lambda: rig.virsh("attach-disk", "vm", str(more), "vdx", "--subdriver", "qcow2"),
    )  # fmt: skip
    assert code == 12 and "without vdx, attached meanwhile" in err, (code, err)
    snapshot = rig.ok("show", "vm", "s1", "--json").json["snapshot"]
    assert snapshot["partial"] == ["vdx"] and snapshot["state"] == "disk"
    rig.ok("create", "vm", "s2", memory)
    assert set(rig.snapshots()["s2"]) == {*rig.targets, "vdx"}
    rig.ok("revert", "vm", "s1", "-y")
    rig.virsh("destroy", "vm")
    assert rig.file_verdict() == []


def test_virsh_attaches_another_device_in_our_create_and_no_memory_is_kept_that_could_not_be_loaded(
    domain: Make,
) -> None:
    """The definition beside the memory lacks it. The next create has both, and goes back."""
    rig = domain(guest=False, size=SMALL)
    rig.virsh("start", "vm")
    device = rig.dir / "rng.xml"
    device.write_text("<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>")
    code, err = stopped_at(
        rig, "create.prepared.after", "create", "vm", "s1", "--memory",
        meanwhile=lambda: rig.virsh("attach-device", "vm", str(device), "--live"),
    )  # fmt: skip
    assert code == 12 and "rng0 was attached while the snapshot was made" in err, (code, err)
    assert rig.ok("show", "vm", "s1", "--json").json["snapshot"]["state"] == "disk"
    rig.ok("create", "vm", "s2", "--memory")
    rig.ok("revert", "vm", "s2", "-y")
    assert "<rng" in rig.virsh("dumpxml", "vm")
    rig.virsh("destroy", "vm")
    assert rig.file_verdict() == []


def test_create_that_was_killed_as_virsh_attached_a_disk_says_so_after_recover(domain: Make) -> None:
    """The journal knows of the disk before the catalog does."""
    rig = domain(guest=False, size=SMALL)
    rig.virsh("start", "vm")
    more = rig.dir / "more.qcow2"
    rig.qemu_img("create", "-q", "-f", "qcow2", str(more), "8M")
    code, err = stopped_at(
        rig, "create.prepared.after;kill:create.saving.after", "create", "vm", "s1", "--memory",
        meanwhile=lambda: rig.virsh("attach-disk", "vm", str(more), "vdx", "--subdriver", "qcow2"),
    )  # fmt: skip
    assert code == -9, (code, err)
    rig.ok("recover", "vm")
    snapshot = rig.ok("show", "vm", "s1", "--json").json["snapshot"]
    assert snapshot["partial"] == ["vdx"] and snapshot["state"] == "disk"
    rig.ok("create", "vm", "s2", "--memory")
    rig.virsh("destroy", "vm")
    assert rig.file_verdict() == []


@pytest.mark.parametrize("point", ["revert.intent.after", "revert.stopping"])
def test_virsh_snapshots_in_our_revert_and_nothing_that_was_written_is_lost(domain: Make, point: str) -> None:
    """It is given up; the domain goes on, on theirs."""
    rig = paused(domain)
    rig.remember("now")
    rig.expected["before"] = rig.expected["now"]
    rig.ok("create", "vm", "before", "--disk-only")
    made: dict[str, Path] = {}
    code, err = stopped_at(rig, point, "revert", "vm", "before", "-y", meanwhile=lambda: made.update(theirs(rig)))
    assert code == 8 and "theirs" in err and "Traceback" not in err, (code, err)
    assert rig.journal() == [] and set(rig.snapshots()) == {"before"}
    taken_up(rig, made)


def off_with_a_snapshot(domain: Make) -> DomainRig:
    """A domain that is off, with the snapshot `before`."""
    rig = domain(guest=False, size=8 * MiB)
    rig.remember("now")
    rig.expected["before"] = rig.expected["now"]
    rig.ok("create", "vm", "before")
    return rig


@pytest.mark.parametrize("point", ["create.intent.after", "create.prepared.before", "create.named"])
def test_virsh_starts_the_domain_in_our_create_while_it_was_off(domain: Make, point: str) -> None:
    """Started before we hold its layers: no snapshot, it runs. After that: the start is refused, and works later."""
    rig, said = off_with_a_snapshot(domain), list[str]()
    code, err = stopped_at(
        rig, point, "create", "vm", "s0", meanwhile=lambda: said.append(rig.virsh("start", "vm", "--paused", ok=False))
    )
    ours = point != "create.intent.after"
    assert code == (0 if ours else 5) and ("lock" in said[0]) is ours, (code, err, said)
    assert ("s0" in rig.snapshots()) is ours and rig.journal() == []
    if ours:
        rig.expected["s0"] = rig.expected["now"]
        rig.virsh("start", "vm", "--paused")
    assert rig.sources() == rig.sources(inactive=True) == rig.active()
    rig.virsh("destroy", "vm")
    assert rig.verdict(present="now") == [] and rig.ok("check", "vm").code == 0


@pytest.mark.parametrize("point", ["revert.intent.after", "revert.stopping"])
def test_virsh_starts_the_domain_in_our_revert_while_it_was_off(domain: Make, point: str) -> None:
    """The guest that was started is not ended: the revert is given up, or the start was refused."""
    rig, said = off_with_a_snapshot(domain), list[str]()
    code, err = stopped_at(
        rig, point, "revert", "vm", "before", "-y", "--stopped",
        meanwhile=lambda: said.append(rig.virsh("start", "vm", "--paused", ok=False)),
    )  # fmt: skip
    if "lock" not in said[0]:
        assert code == 5 and rig.virsh("domstate", "vm") == "paused", (code, err)
        rig.virsh("destroy", "vm")
    else:
        assert code == 0, (code, err)
        rig.expected["before-revert-1"] = rig.expected["now"]
    assert rig.journal() == [] and rig.verdict(present="now") == []
