"""SIGKILL at every named step of create and revert on a machine with UEFI and TPM, each followed by `recover` alone.

The VM is off; what its guest would have written to NVRAM, TPM and disk is written by the test. Disk, NVRAM and TPM of the
present must be of one and the same state afterwards, those of every snapshot as they were. The last tests do some of the
points with a running guest, which itself says whether its memory fits what it reads.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support import states
from tests.support.rig import MiB, Rig
from tests.support.sample import some
from tests.support.states import TPM, UEFI, States

CASES = {
    "create": (("create", "vm", "s2"), ("now",), 18),
    "revert": (("revert", "vm", "s1", "-y"), ("now", "s1"), 27),
    "revert-discard": (("revert", "vm", "s1", "--discard", "-y"), ("now", "s1"), 8),
}


class Machine:
    """The machine, a copy of it all, and what each state holds besides the disk."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        rig.build(guest=False)
        self.states: dict[str, States] = {}
        self.become(1, "s1")
        rig.ok("create", "vm", "s1")
        self.become(2, "now")
        for name in ("s2", "before-revert-1"):
            self.states[name], rig.expected[name] = self.states["now"], rig.expected["now"]
        self.template = rig.save_template()

    def become(self, number: int, name: str) -> None:
        """Write another state to disk, NVRAM and TPM."""
        self.rig.write(number, 0, MiB)
        states.write_present(self.rig, f"state {number}".encode())
        self.rig.remember(name)
        self.states[name] = states.present(self.rig)

    def verdict(self, presents: Sequence[str]) -> list[str]:
        """What is wrong now: every snapshot's copies, and a present that is wholly one of the allowed."""
        wrong = [f"copies of {n} differ" for n, c in states.copies(self.rig).items() if c != self.states[n]]
        tries = [self._present(name) for name in presents]
        return [*wrong, *min(tries, key=len), *states.leftovers(self.rig)]

    def _present(self, name: str) -> list[str]:
        wrong = self.rig.verdict(present=name)
        return wrong + (
            ["present: NVRAM or TPM of another state"] if states.present(self.rig) != self.states[name] else []
        )


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """s1 - (now), off."""
    rig = Rig(tmp_path_factory.mktemp("states") / "vm", size=8 * MiB, targets=("vda",), parts=(UEFI, TPM))
    found = Machine(rig)
    yield found
    rig.destroy()
    shutil.rmtree(found.template)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.timeout(400)
def test_kill_at_every_step_then_recover_leaves_disk_nvram_and_tpm_of_one_state(
    machine: Machine, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every point of the command, killed; then `recover`."""
    args, presents, at_least = CASES[name]
    rig, wrong = machine.rig, []
    rig.restore_template(machine.template)
    points = [p for p in rig.points(*args) if name != "revert-discard" or "state" in p or "loaded" in p]
    assert machine.verdict(presents[-1:]) == []
    tried = some(points, 4)
    for point in tried:
        rig.restore_template(machine.template)
        if not rig.killed(*args, at=point):
            wrong.append(f"{point}: was not reached")
            continue
        answer = rig.run("recover", "vm")
        wrong += [] if answer.code == 0 else [f"{point}: recover ended with {answer.code}: {answer.err}"]
        wrong += [f"{point}: {w}" for w in machine.verdict(presents)]
    with capsys.disabled():
        print(f" [{len(tried)} of {len(points)} points]", end="")
    assert not wrong, "\n".join(wrong)
    assert len(points) >= at_least


@pytest.mark.timeout(400)
def test_kill_of_an_undo_then_recover_undoes(machine: Machine) -> None:
    """`recover --undo` of a revert that had switched, killed at every step: it never goes forward again."""
    rig, wrong = machine.rig, []
    rig.restore_template(machine.template)
    assert rig.killed("revert", "vm", "s1", "-y", at="revert.loaded.before")
    again = rig.save_template("again")
    points = rig.points("recover", "vm", "--undo", "-y")
    assert machine.verdict(["now"]) == []
    for point in some(points, 3):
        rig.restore_template(again)
        assert rig.killed("recover", "vm", "--undo", "-y", at=point)
        rig.ok("recover", "vm")
        allowed = ["now", "s1"] if point == points[0] else ["now"]  # before it was noted, it had not begun
        wrong += [f"{point}: {w}" for w in machine.verdict(allowed)]
    shutil.rmtree(again)
    assert not wrong, "\n".join(wrong)
    assert len(points) >= 5


@pytest.mark.parametrize("fault", ["fail", "full"])
@pytest.mark.parametrize("point", ["state.prepared", "state.copying", "state.unpacked-one", "revert.state-staged"])
def test_error_of_the_filesystem_leaves_one_state(machine: Machine, point: str, fault: str) -> None:
    """EIO and ENOSPC while copies are made: put back; after the switch it is tried once more, and done."""
    rig = machine.rig
    rig.restore_template(machine.template)
    args = ("revert", "vm", "s1", "-y") if point.startswith("revert") else ("create", "vm", "s2")
    answer = rig.run(*args, fault=f"{fault}:{point}")
    switched = point == "state.unpacked-one"
    assert (answer.code == 0) == switched and "Traceback" not in answer.err, answer
    assert machine.verdict(["now"]) == [] and ("s2" in states.copies(rig)) == switched


def test_power_cut_that_eats_the_copy_in_flight_takes_the_present(machine: Machine) -> None:
    """The file is there and its blocks are not: the VM is off since, so the present is what was to be copied."""
    rig = machine.rig
    rig.restore_template(machine.template)
    assert rig.killed("create", "vm", "s2", at="state.unpacked-one#1")
    (part,) = states.home(rig).glob("snapshots/*/state.part")
    with part.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(8192))
        os.fsync(file.fileno())
    rig.ok("recover", "vm")
    assert machine.verdict(["now"]) == [] and "s2" in states.copies(rig)


# -- with a running guest ----------------------------------------------------------------------------------------------

LIVE_CREATE = ["create.paused", "state.copied", "create.disks-switched", "create.resumed", "state.unpacked-one",
               "create.saving.after"]  # fmt: skip
LIVE_REVERT = ["revert.stopping", "revert.state-away#1", "revert.state-back#2", "revert.loaded.before"]


@pytest.mark.timeout(500)
def test_kill_with_a_running_guest_its_memory_fits_its_nvram_and_tpm(tmp_path: Path) -> None:
    """After each kill and `recover` the guest finds what it left; the copies are whole."""
    wrong: list[str] = []
    with states.running(tmp_path, "cnt,efi,tpm") as parts:
        rig = parts.rig
        parts.boots()
        parts.resets()
        rig.ok("create", "vm", "good", "--memory")
        for index, point in enumerate(LIVE_CREATE):
            mark = parts.console.mark()
            assert rig.killed("create", "vm", f"k{index}", "--memory", at=point), point
            rig.ok("recover", "vm")
            wrong += [f"{point}: {w}" for w in [*parts.rounds(mark, 2), *states.leftovers(rig)]]
        for point in LIVE_REVERT:
            mark = parts.console.mark()
            assert rig.killed("revert", "vm", "good", "--discard", "-y", at=point), point
            rig.ok("recover", "vm")
            wrong += [f"{point}: {w}" for w in [*parts.rounds(mark, 2), *states.leftovers(rig)]]
        findings = rig.run("check", "vm", "--json").json["findings"]
        wrong += [str(f) for f in findings if f["severity"] == "error"]
        assert all(sorted(c) == ["nvram", "tpm/tpm2-00.permall"] for c in states.copies(rig).values())
    assert not wrong, "\n".join(wrong)
