"""SIGKILL of the command line on a domain whose guest counts: create and revert with memory, then `recover` alone.

The guest, libvirt, the headers and the catalog say whether anything is wrong; every memory that was reported is loaded.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.libvirt.live import LiveDomain
from tests.support.counted import count_on
from tests.support.domain import DomainRig
from tests.support.sample import some

Make = Callable[..., DomainRig]


def killed_and_recovered(live: LiveDomain, point: str, *args: str, may_boot: bool = False) -> list[str]:
    """Kill a command at a point and recover; return what is wrong then."""
    mark, wrong = live.console.mark(), []
    if not live.rig.killed(*args, at=point):
        wrong.append("was not reached")
    answer = live.rig.run("recover", "vm")
    if answer.code != 0:
        wrong.append(f"recover ended with {answer.code}: {answer.err}")
    return [f"{point}: {w}" for w in [*wrong, *live.wrong(mark, may_boot=may_boot)]]


@pytest.mark.timeout(900)
def test_create_killed_anywhere_the_guest_counts_on_and_all_sides_agree(
    domain: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is never booted by it, and never sees memory and disks of different instants."""
    live, wrong = LiveDomain(domain()), []
    live.rig.ok("create", "vm", "first", "--disk-only")  # makes the records; those after it do not
    points = live.rig.points("create", "vm", "traced", "--memory")
    assert len(points) >= 20
    tried = some(points, 3)
    for index, point in enumerate(tried):
        wrong += killed_and_recovered(live, point, "create", "vm", f"k{index}", "--memory")
    for name, disks in live.rig.snapshots().items():
        counts = {count_on(path) for path in disks.values()}
        wrong += [f"{name}: its disks are of different instants: {counts}"] if max(counts) - min(counts) > 1 else []
    loaded = live.go_back_to_all()
    with capsys.disabled():
        print(f" [{len(tried)} of {len(points)} points, {loaded} memories loaded]", end="")
    live.console.close()
    assert not wrong, "\n".join(wrong)


@pytest.mark.timeout(900)
def test_revert_killed_anywhere_ends_in_one_of_two_whole_states(
    domain: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the snapshot, or back on its disks of before, booted."""
    live, wrong = LiveDomain(domain()), []
    live.rig.ok("create", "vm", "s", "--memory")
    points = live.rig.points("revert", "vm", "s", "-y")
    assert len(points) >= 17
    tried = some(points, 3)
    for point in tried:
        wrong += killed_and_recovered(live, point, "revert", "vm", "s", "-y", may_boot=True)
    live.go_back_to("s")
    with capsys.disabled():
        print(f" [{len(tried)} of {len(points)} points]", end="")
    live.console.close()
    assert not wrong, "\n".join(wrong)
