"""create --quiesce of a libvirt domain, with the real guest agent behind libvirtd, and where there is none.

The agents that lie are in tests/qemu/test_quiesce.py; here libvirtd holds the channel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.domain import DomainRig
from tests.support.libvirtd import Libvirtd
from tests.support.quiet import Quiet
from tests.support.refusals import picture, refused
from tests.support.rig import wait_for

Make = Callable[..., DomainRig]
Boot = Callable[[str], Quiet]


@pytest.fixture
def boot(daemon: Libvirtd, tmp_path: Path) -> Iterator[Boot]:
    """Boot a domain whose guest has the agent, and writes to an ext4 all the time."""
    made: list[Quiet] = []

    def make(modes: str) -> Quiet:
        made.append(Quiet(tmp_path / "vm", modes, partial(DomainRig, daemon=daemon)))
        return made[0]

    yield make
    for quiet in made:
        quiet.destroy()


def kept(quiet: Quiet) -> tuple[object, object, list[str]]:
    """What must not change when nothing is changed: the guest goes on writing."""
    rig = quiet.rig
    assert isinstance(rig, DomainRig)
    return (
        rig.catalog() if list(rig.dir.glob(".diskchain/*")) else None,
        rig.sources(),
        sorted(p.name for p in rig.dir.iterdir()),
    )


def test_create_quiesced_the_file_system_is_clean_and_the_guest_thawed(boot: Boot) -> None:
    """Now, after a revert to its memory, and when diskchain is killed while all is frozen."""
    quiet = boot("cnt,tick,fsvdb,agent")
    rig = quiet.rig
    assert isinstance(rig, DomainRig)
    made = rig.ok("create", "vm", "q", "--quiesce", "--json").json["snapshot"]
    assert made["quiesced"] is True and made["state"] == "memory", made
    quiet.writes()
    rig.ok("create", "vm", "dirty", "--disk-only")
    assert quiet.needs_recovery("dirty") and not quiet.needs_recovery("q") and rig.agreement() == []
    assert rig.killed("create", "vm", "x", "--quiesce", "--disk-only", at="create.frozen")
    quiet.writes()
    wait_for(lambda: not quiet.watchdogs(), "the watchdog has thawed, and ends")
    rig.ok("recover", "vm")
    assert set(rig.snapshots()) == {"q", "dirty"} and rig.file_verdict() == [] and rig.agreement() == []
    rig.ok("pause", "vm")
    time.sleep(3)  # what the guest's clock will be behind
    mark = quiet.console.mark()
    assert "warnings" not in rig.ok("revert", "vm", "q", "-y", "--json").json
    assert abs(quiet.writes()[1] - time.time()) <= 3
    assert quiet.console.bad(after=mark) == [] and rig.agreement() == []


def test_create_quiesced_the_agent_hangs_and_nothing_is_changed(boot: Boot) -> None:
    """Its hook never ends: exit 1 after the time limit, the guest goes on; without --quiesce a snapshot can be made."""
    quiet = boot("tick,fsvdb,agenthang")
    quiet.configure("[create]\nfreeze_timeout = 1\n")
    quiet.rig.ok("adopt", "vm")
    before = kept(quiet)
    refused(quiet.rig, "create", "vm", "s", "--quiesce", "--disk-only", code=1, says="guest agent")
    assert kept(quiet) == before
    quiet.writes()
    quiet.rig.ok("create", "vm", "s", "--disk-only")
    quiet.writes()


@pytest.mark.parametrize(("agent", "says"), [(False, "has no channel"), (True, "no guest agent runs")])
def test_create_quiesced_without_an_agent_is_refused(domain: Make, agent: bool, says: str) -> None:
    """No channel, or nobody at its other end: exit 6, nothing is changed."""
    rig = domain(guest=False, agent=agent, targets=("vda",))
    rig.virsh("start", "vm")
    before = picture(rig.dir)
    error = refused(rig, "create", "vm", "s", "--quiesce", code=6, says=says)
    assert error["hint"] and picture(rig.dir) == before and rig.virsh("domstate", "vm") == "running"
