"""A domain that migrates: to a second libvirtd that takes itself for another host, before our commands and in them.

Both are on this host and see the same files, as hosts with shared storage do; the memory goes through a socket.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.libvirt.live import LiveDomain
from tests.libvirt.test_interop import stopped_at
from tests.libvirt.test_memory_file import paused
from tests.support.domain import DomainRig
from tests.support.guest import qemu_version
from tests.support.libvirtd import Libvirtd
from tests.support.refusals import refused
from tests.support.rig import MiB, wait_for

Make = Callable[..., DomainRig]
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def far() -> Iterator[Libvirtd]:
    """The other host's."""
    found = Libvirtd(host="6c8d2a36-3f5e-4c57-9d0e-0d5a8b1f2c11")
    found.start()
    yield found
    found.destroy()


@pytest.fixture
def other(far: Libvirtd, daemon: Libvirtd) -> Iterator[Libvirtd]:
    """The other host's; to be asked for before the domain, which may be left on either."""
    yield far
    for each in (far, daemon):
        each.virsh("destroy", "vm", ok=False)
        each.virsh("undefine", "vm", ok=False)


def words(rig: DomainRig, to: Libvirtd, *more: str) -> list[str]:
    """The virsh command. `--unsafe`: libvirt takes our directories for local ones."""
    kind = ["--live", "--p2p", "--unsafe", "--migrateuri", f"unix://{to.dir}/memory{next(NUMBERS)}"]
    return ["migrate", rig.name, to.uri, "--persistent", *more, *([] if "--offline" in more else kind)]


def migrate(rig: DomainRig, to: Libvirtd, *more: str) -> None:
    """As an admin would; the domain stays defined here unless there is `--undefinesource`."""
    rig.virsh(*words(rig, to, *more))


def go_along(rig: DomainRig, to: Libvirtd) -> None:
    """From now on the rig's commands are given on that host; on the old one the domain is forgotten."""
    assert rig.daemon
    rig.daemon.virsh("undefine", rig.name, ok=False)
    rig.daemon, rig.uri = to, to.uri


def seen(rig: DomainRig) -> tuple[object, list[str]]:
    """The records and the names of all files."""
    return rig.catalog(), sorted(str(p) for p in rig.dir.rglob("*"))


@pytest.mark.timeout(300)
def test_domain_that_migrated_has_its_snapshots_there_and_is_left_alone_here(
    other: Libvirtd, domain: Make, daemon: Libvirtd
) -> None:
    """Under way, there, and back again in our pause: the guest counts on, and goes back to memory that was saved there."""
    live = LiveDomain(domain())
    rig = live.rig
    rig.ok("create", "vm", "one")
    mark = live.console.mark()
    under_way = subprocess.Popen(["virsh", "-c", rig.uri, *words(rig, other, "--bandwidth", "1")])
    wait_for(lambda: re.search(r"Data processed: +[1-9]", rig.virsh("domjobinfo", "vm")), "memory is on its way")
    before = seen(rig)
    for command in (["create", "vm", "no"], ["revert", "vm", "one", "-y"]):
        refused(rig, *command, code=6, says="libvirt is at work")
    assert seen(rig) == before
    rig.virsh("migrate-setspeed", "vm", "10000")
    assert under_way.wait(60) == 0

    for command in (
        ["create", "vm", "no"],
        ["revert", "vm", "one", "-y"],
        ["delete", "vm", "one", "-y"],
        ["start", "vm"],
    ):
        error = refused(rig, *command, code=6, says="migrated")
        assert "other host" in error["message"] + error["hint"]
    assert seen(rig) == before and rig.virsh("domstate", "vm") == "shut off"

    go_along(rig, other)
    assert live.wrong(mark) == []
    rig.ok("create", "vm", "two")
    code, err = stopped_at(rig, "create.disks-switched", "create", "vm", "three", "--disk-only",
                           meanwhile=lambda: migrate(rig, daemon, "--undefinesource"))  # fmt: skip
    assert code == 3 and "libvirt has no such domain" in err and "Traceback" not in err, (code, err)
    refused(rig, "create", "vm", "no", code=4)
    go_along(rig, daemon)
    rig.ok("recover", "vm")
    assert live.wrong(mark) == [] and set(live.states()) == {"one", "two", "three"}
    live.go_back_to("two")
    live.console.close()


CASES = {
    "create.prepared.after": ["create", "vm", "no", "--disk-only"],
    "create.disks-switched": ["create", "vm", "made", "--memory=paused"],
    "revert.stopping": ["revert", "vm", "base", "-y"],
}


def check_memory_before_it_ran(rig: DomainRig, name: str) -> None:
    """QEMU 7.2 ends when its state is saved, or migrated, twice without having run meanwhile; QEMU 10 does not."""
    before = seen(rig)
    if qemu_version() < (10, 0):
        error = refused(rig, "create", "vm", name, code=6, says="was migrated while it was paused")
        assert "virsh resume vm" in error["hint"] and seen(rig) == before
    else:
        rig.expected[name] = rig.expected["now"]
        assert rig.ok("create", "vm", name, "--json").json["snapshot"]["state"] == "memory"
        assert rig.verdict(present="now") == []


@pytest.mark.timeout(300)
def test_domain_that_migrates_in_our_command_is_whole_there(other: Libvirtd, domain: Make, daemon: Libvirtd) -> None:
    """To and fro: the error says it, nothing is started here, QEMU there goes on as it is, `recover` there ends it."""
    rig = paused(domain)
    rig.remember("now")
    rig.expected["base"] = rig.expected["made"] = rig.expected["now"]
    rig.ok("create", "vm", "base", "--disk-only")
    for (point, command), there in zip(CASES.items(), (other, daemon, other), strict=True):
        here = rig.daemon
        assert here
        code, err = stopped_at(rig, point, *command, meanwhile=lambda to=there: migrate(rig, to))  # type: ignore[misc]
        assert code == 3 and "migrated to another host" in err and "Traceback" not in err, (point, code, err)
        refused(rig, "recover", "vm", code=6, says="migrated to another host")
        assert here.virsh("domstate", "vm") == "shut off", point
        go_along(rig, there)
        pid = rig.pid()
        rig.ok("recover", "vm")
        assert rig.verdict(present="now") == [], point
        assert ("made" in rig.snapshots()) is (point != "create.prepared.after"), point
        assert rig.pid() == pid and rig.virsh("domstate", "vm") == "paused", point
        check_memory_before_it_ran(rig, f"then-{point}")
        assert rig.pid() == pid
        rig.virsh("resume", "vm")
        rig.virsh("suspend", "vm")


def test_domain_that_is_off_and_moves_in_our_merge_is_finished_there(other: Libvirtd, domain: Make) -> None:
    """`virsh migrate --offline`: exit 3, and `recover` there, which puts the definition there right."""
    rig = domain(guest=False, size=8 * MiB)
    rig.write(1, 0, MiB)
    rig.ok("create", "vm", "s0")
    rig.write(2, 512 * 1024, MiB)
    rig.remember("now")
    code, err = stopped_at(rig, "merge.committed", "delete", "vm", "s0", "-y",
                           meanwhile=lambda: migrate(rig, other, "--offline", "--undefinesource"))  # fmt: skip
    assert code == 3 and "libvirt has no such domain" in err and "Traceback" not in err, (code, err)
    go_along(rig, other)
    rig.ok("recover", "vm")
    assert rig.verdict(present="now") == [] and not rig.snapshots()
    assert sorted(p.name for p in rig.active().values()) == ["vda.qcow2", "vdb.qcow2"]
    rig.ok("start", "vm", "--paused")
