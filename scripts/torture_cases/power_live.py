"""The power goes while a running VM is snapshotted with its memory, or reverted: QEMU's own writes are lost, too.

The log is that of the command and of the QEMU in it (power.py has the rest). After `recover` every state reads as it was
written, and each memory that is said to be saved loads; what the command had said is done must be there. A case is a
number, or tail:N: `create` with all but its last N changes, all names are there, and of unsynced data any sector or none.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from scripts.torture_cases import sim
from scripts.torture_cases.campaign import Campaign, Result, Worker
from scripts.torture_cases.live import CREATE, REVERT, LiveRig
from scripts.torture_cases.power import Cut, LoggedWorker, cut, instant
from scripts.torture_cases.shim import Record
from scripts.torture_cases.tree import SIZE
from tests.support.rig import Answer
from tests.support.tree_cases import Case


class PowerLive(Campaign):
    """Power loss in a snapshot of a running VM."""

    name: ClassVar[str] = "power-live"
    unit: ClassVar[str] = "power cuts"
    counts: ClassVar[tuple[int, int, int]] = (10, 200, 1000)

    def worker(self, place: Path) -> Worker:
        return PowerLiveWorker(self.seed, place, ('firmware = "uefi"',))


class PowerLiveWorker(LoggedWorker[LiveRig]):
    """A bare VM (no more than its firmware runs) with a snapshot with memory, which is started for each case."""

    def __init__(self, seed: int, place: Path, parts: Sequence[str] = ()) -> None:
        memory = "128 MiB" if parts else "64 MiB"
        super().__init__(seed, place, LiveRig(place / "vm", size=SIZE, raw=("vdb",), memory=memory, parts=parts))
        self._rig.grow()
        self._template = self._rig.save_template()

    def run(self, case: str) -> Result:
        rng = random.Random(f"power-live {self._seed} {case}")
        rig = self._rig
        rig.begin(self._template, rng)
        command = CREATE if case.startswith("tail:") or rng.random() < 0.6 else REVERT
        answer, note = self._cut(case, command, rng)
        recovered = rig.run("recover", "vm")
        wrong = [] if recovered.code == 0 else [f"recover ended with {recovered.code}: {recovered.err.strip()}"]
        seen = rig.seen(command, answer.code)
        lost = rig.lost(command) if any("content" in w for w in seen) else 0
        loads = rig.loads() if not seen else []
        wrong = [*wrong, *seen, *loads]
        return Result(
            case, True, wrong, lost, bool(seen or loads) and recovered.code == 0, recovered.code != 0, 1, note
        )

    def _cut(self, case: str, command: Case, rng: random.Random) -> tuple[Answer, str]:
        def choose(log: Sequence[Record], rng: random.Random) -> Cut:
            if last := case.partition("tail:")[2]:
                return len(log) - int(last), "512", "all"
            return beside_memory(log, rng), rng.choice(sim.DATA), rng.choice(sim.NAMES)

        before = self._rig.save_template("before")
        answer, note = cut(self._rig, self._shim, command.args, before, rng, choose=choose, end=self._rig.power_off)
        return answer, f"{command.args[0]} -> {note}"


def beside_memory(log: Sequence[Record], rng: random.Random) -> int:
    """Choose how many changes were made; not always amid the thousands that are the writing of the memory."""
    busiest = Counter(record.inode for record in log).most_common(1)
    others = [n for n, record in enumerate(log, 1) if record.inode != busiest[0][0]] if busiest else []
    return rng.choice(others) if others and rng.random() < 0.6 else instant(log, rng)
