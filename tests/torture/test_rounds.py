"""Many rounds of create and revert, with memory, of a guest that counts in memory and on two disks: no mismatch, ever.

The guest must go on from the snapshot's instant, which its frozen disks tell: no new start, no complaint, the next count.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from diskchain.chain.model import Snapshot
from diskchain.store import catalog
from tests.support.console import COUNTER, Console
from tests.support.counted import SLACK, count_on
from tests.support.own_machine import Guest, MiB, OwnMachine
from tests.support.rig import wait_for
from tests.support.sample import FULL

ROUNDS = 25 if FULL else 7
SEED = 20261122


@dataclass(frozen=True)
class Instant:
    """A snapshot, and what its disks counted."""

    name: str
    count: int


class Rounds:
    """A counting machine and its console."""

    def __init__(self, machine: OwnMachine) -> None:
        self.machine = machine
        self.console = Console(machine.console)

    def counts_on(self, mark: int, lines: int) -> list[int]:
        """Wait for some counts after a mark; return them, the first (which may be cut in two) left out."""
        wait_for(lambda: len(self._counts(mark)) > lines, "the guest counts on")
        return self._counts(mark)[1:]

    def _counts(self, mark: int) -> list[int]:
        matches = (COUNTER.search(line) for _, line in self.console.lines(mark))
        return [int(match[1]) for match in matches if match]

    def create(self, name: str) -> Instant:
        """Make a snapshot while the guest counts."""
        snapshot = self.machine.create(name)
        assert snapshot.memory.saved, snapshot.memory.reason
        counts = {count_on(image) for image in self._frozen(snapshot)}
        assert max(counts) - min(counts) <= 1, f"{name}: the disks are of different instants: {counts}"
        return Instant(name, min(counts))

    def _frozen(self, snapshot: Snapshot) -> list[Path]:
        known = catalog.load(self.machine.home)
        return [known.images[image].path for image in snapshot.disks.values()]

    def revert(self, instant: Instant) -> list[str]:
        """Go back; return what is wrong with how the guest goes on."""
        self.machine.pause()  # so that no line of the present comes after the mark
        mark = self.console.mark()
        assert self.machine.revert(instant.name).state == "running"
        counts = self.counts_on(mark, 10)
        wrong = self.console.bad(mark)
        wrong += [line for _, line in self.console.lines(mark) if line.startswith("C START")]
        if not instant.count <= counts[0] <= instant.count + SLACK:
            wrong.append(f"went on with {counts[0]}, its disks were frozen at {instant.count}")
        return [f"{instant.name}: {line}" for line in wrong]


@pytest.fixture(params=[1, 2] if FULL else [2], ids=lambda cpus: f"{cpus}-cpu")
def rounds(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rounds]:
    """A started machine with two disks that counts."""
    machine = OwnMachine(Guest(128 * MiB, cpus=request.param, modes="cnt"), tmp_path / "vm")
    found = Rounds(machine)
    try:
        machine.start()
        found.console.wait(r"^C 50 bad=", timeout=120)
        yield found
    finally:
        found.console.close()
        machine.destroy()


@pytest.mark.timeout(900)
def test_rounds_of_create_and_revert_with_memory_never_mismatch(rounds: Rounds) -> None:
    """Each round takes a snapshot and goes back: to it, or (every other round) to any older one."""
    choice, instants, wrong = random.Random(SEED), [], []
    for number in range(ROUNDS):
        instants.append(rounds.create(f"r{number}"))
        rounds.counts_on(rounds.console.mark(), 10)
        wrong += rounds.revert(instants[-1] if number % 2 == 0 else choice.choice(instants))
    assert wrong == []
    assert rounds.console.bad() == []
