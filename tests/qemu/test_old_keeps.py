"""revert.keep: the presents that reverts kept go by themselves, older ones first, and nothing else does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.rig import MiB, Rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A VM that is off, with a snapshot; every revert from it keeps something of its own."""
    made = Rig(tmp_path / "vm", targets=("vda",), memory="64 MiB", size=16 * MiB)
    made.build(guest=False)
    made.write(1, 0, MiB)
    made.remember("s")
    made.ok("create", "vm", "s")
    yield made
    made.destroy()


def revert(rig: Rig, number: int, to: str = "s") -> dict[str, object]:
    """Write, and go back."""
    rig.write(number + 10, number * MiB, MiB)
    rig.remember(f"before-revert-{number}")
    answer: dict[str, object] = rig.ok("revert", "vm", to, "-y", "--json").json
    rig.remember("now")
    return answer


def test_by_default_a_week_is_waited(rig: Rig) -> None:
    """Nothing that is younger goes."""
    for number in (1, 2, 3):
        assert revert(rig, number)["deleted"] == []
    assert set(rig.snapshots()) == {"s", "before-revert-1", "before-revert-2", "before-revert-3"}
    assert rig.verdict(present="now") == []


def test_older_ones_go_the_newest_stays_and_so_does_what_is_somebodys(rig: Rig) -> None:
    """Protected, renamed, or gone back to just now: they stay; the plan says beforehand which go."""
    for number in (1, 2, 3, 4):
        revert(rig, number)
    rig.ok("protect", "vm", "before-revert-1")
    rig.ok("rename", "vm", "before-revert-2", "tried")
    rig.expected["tried"] = rig.expected["before-revert-2"]
    rig.configure('[revert]\nkeep = "1s"\n')
    time.sleep(2.1)  # ages are whole seconds
    plan = rig.ok("revert", "vm", "before-revert-3", "-n", "--json").json["plan"]
    old = "'before-revert-4', kept by reverts, older than 1s (revert.keep)"
    assert f"delete {old}" in plan["steps"] and old in plan["lost"]
    assert revert(rig, 5, to="before-revert-3")["deleted"] == ["before-revert-4"]
    assert set(rig.snapshots()) == {"s", "before-revert-1", "tried", "before-revert-3", "before-revert-5"}
    assert rig.verdict(present="now") == []
    rig.remember("before-revert-6")
    rig.ok("undo", "vm", "-y")  # to the newest, which is never too old to go back to
    assert rig.verdict(present="before-revert-5") == []


def test_one_with_something_on_it_waits_for_a_merge_and_can_be_had_back(rig: Rig) -> None:
    """Only recorded, whatever the VM does."""
    revert(rig, 1)
    rig.ok("revert", "vm", "before-revert-1", "--discard", "-y")
    rig.write(7, 8 * MiB, MiB)
    rig.remember("s2")
    rig.ok("create", "vm", "s2")
    rig.configure("[revert]\nkeep = 0.5\n")
    time.sleep(1.1)
    assert revert(rig, 2)["deleted"] == ["before-revert-1"]
    assert [one["snapshot"] for one in rig.ok("list", "vm", "--json").json["pending"]] == ["before-revert-1"]
    rig.ok("undelete", "vm", "before-revert-1")
    assert rig.verdict(present="now") == []
    rig.configure("[revert]\nkeep = inf\n")
    assert revert(rig, 3)["deleted"] == []
    assert "before-revert-1" in rig.snapshots() and rig.verdict(present="now") == []


def test_what_cannot_be_deleted_is_warned_of(rig: Rig) -> None:
    """The revert is done, exit 0; the next one tries again."""
    revert(rig, 1)
    kept = rig.snapshots()["before-revert-1"]["vda"]
    rig.qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(kept), str(rig.dir / "other.qcow2"))
    rig.configure('[revert]\nkeep = "0s"\n')
    rig.write(12, 2 * MiB, MiB)
    rig.remember("before-revert-2")
    time.sleep(1.1)
    answer = rig.ok("revert", "vm", "s", "-y")
    assert "were not deleted" in answer.err and "before-revert-1" in rig.snapshots()
    rig.remember("now")
    (rig.dir / "other.qcow2").unlink()
    time.sleep(1.1)
    assert revert(rig, 3)["deleted"] == ["before-revert-1", "before-revert-2"]
    assert rig.verdict(present="now") == []
