"""Rounds of create and revert, with memory, of a domain that counts: the guest goes on where its frozen disks are."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.libvirt.live import COUNT, LiveDomain
from tests.support.counted import SLACK, count_on
from tests.support.domain import DomainRig
from tests.support.sample import FULL

ROUNDS = 30 if FULL else 3


@pytest.mark.timeout(1800)
def test_rounds_of_create_and_revert_on_a_domain_never_mismatch(
    domain: Callable[..., DomainRig], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each round takes a snapshot and goes back: to it, or (every other round) to any older one."""
    choice, live = random.Random(4), LiveDomain(domain(modes="cnt"))
    instants: dict[str, int] = {}
    for number in range(ROUNDS):
        name = f"r{number}"
        made = live.rig.ok("create", "vm", name, "--memory", "--json").json["snapshot"]
        assert made["state"] == "memory", made
        counts = [count_on(path) for path in live.rig.snapshots()[name].values()]
        assert max(counts) - min(counts) <= 1, counts
        instants[name] = min(counts)
        live.counts(10)
        to = name if number % 2 == 0 else choice.choice(list(instants))
        live.rig.ok("pause", "vm")
        mark = live.console.mark()
        live.rig.ok("revert", "vm", to, "--discard", "-y")
        first = int(live.console.wait(COUNT, after=mark + 1)[1])  # the first line may be cut in two
        assert instants[to] <= first <= instants[to] + SLACK, (to, first, instants[to])
        assert live.wrong(mark) == [], to
    assert live.console.bad() == []
    with capsys.disabled():
        print(f" [{ROUNDS} rounds]", end="")
    live.console.close()
