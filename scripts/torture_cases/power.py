"""The power goes at a random instant of a command: what was not synced is lost, kept or torn, names too.

The command runs undisturbed under the shim, which logs every change with its data; a simulator (sim.py) makes of the
log what a disk could hold at any instant. A case is a number: it chooses command, instant, and what became of data and
names; in every fifth the power goes once more in the recovery.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, TypeVar

from scripts.torture_cases import sim
from scripts.torture_cases.campaign import Campaign, Result, Worker
from scripts.torture_cases.faults import ShimTree
from scripts.torture_cases.shim import DATASYNC, LOG, SYNC, Record, Shim
from scripts.torture_cases.tree import EVERY, RigWorker, TreeRig, TreeWorker
from tests.support.rig import Answer, Rig
from tests.support.zygote import Zygote

NOT_SAID = Answer(-1, "", "")
Cut = tuple[int, str, str]


class Power(Campaign):
    """Power loss."""

    name: ClassVar[str] = "power"
    unit: ClassVar[str] = "power cuts"
    counts: ClassVar[tuple[int, int, int]] = (100, 2000, 10000)

    def worker(self, place: Path) -> Worker:
        return PowerWorker(self.seed, ShimTree(place))


class PowerWorker(TreeWorker[ShimTree]):
    """One tree, and the logs of its commands."""

    def __init__(self, seed: int, tree: ShimTree) -> None:
        super().__init__(tree)
        self._seed = seed

    def run(self, case: str) -> Result:
        rng = random.Random(f"power {self._seed} {case}")
        name = rng.choice(sorted(EVERY))
        command = EVERY[name]
        before = self._tree.template(command)
        answer, note = self._cut(command.args, before, rng)
        notes, cuts = [f"{name}: {note}"], 1
        if rng.random() < 0.2:
            second = self._tree.rig.save_template("second")
            again, note = self._cut(("recover", "vm"), second, rng)
            shutil.rmtree(second)
            answer = answer if answer.code == 0 else NOT_SAID
            notes.append(f"recover, which said {again.code}: {note}")
            cuts += 1
        wrong, lost, silent, stuck = self._tree.recovered(command, answer)
        return Result(case, True, wrong, lost, silent, stuck, cuts, "; ".join(notes))

    def _cut(self, args: Sequence[str], before: Path, rng: random.Random) -> tuple[Answer, str]:
        return cut(self._tree.rig, self._tree.shim, args, before, rng)


L = TypeVar("L", bound=TreeRig)


class LoggedWorker(RigWorker[L]):
    """A worker whose machine's commands, and the QEMU that they start, run under the shim."""

    def __init__(self, seed: int, place: Path, rig: L) -> None:
        super().__init__(seed, place, rig)
        self._shim = Shim(place / "shim", rig.dir)
        rig.prepare(place, Zygote(env=self._shim.env), self._shim.env)


def cut(rig: Rig, shim: Shim, args: Sequence[str], before: Path, rng: random.Random, *,
        choose: Callable[[Sequence[Record], random.Random], Cut] | None = None,
        end: Callable[[], None] | None = None) -> tuple[Answer, str]:  # fmt: skip
    """Run a command, which is logged, from the state that `before` is a copy of; leave what the power cut leaves.

    `end`: what else the power ends. The answer is the command's own if it had ended by then.
    """
    disk = sim.Disk(rig.dir)
    shim.arm(LOG)
    answer = rig.run(*args)
    if end:
        end()
    shim.disarm()
    log = shim.logged()
    at, data, names = (choose or any_cut)(log, rng)
    disk.replay(log[:at])
    found = disk.cut(rng, data, names, before)
    rig.restore_template(before)
    sim.put(found, rig.dir, before)
    last = f"{log[at - 1].kind} {Path(log[at - 1].path).name}" if at else "-"
    note = f"{answer.code}, cut after {at} of {len(log)} changes ({last}), unsynced data: {data}, names: {names}"
    return answer if at == len(log) else NOT_SAID, note


def any_cut(log: Sequence[Record], rng: random.Random) -> Cut:
    """Choose how many changes were made, and what became of data and names that were not synced."""
    return instant(log, rng), rng.choice(sim.DATA), rng.choice(sim.NAMES)


def instant(log: Sequence[Record], rng: random.Random) -> int:
    """Choose how many changes were made: any number, or all until just before a sync, or all there are."""
    before_sync = [n for n, record in enumerate(log) if record.kind in (SYNC, DATASYNC)]
    what = rng.random()
    if what < 0.1 or not log:
        return len(log)
    if what < 0.5 and before_sync:
        return rng.choice(before_sync)
    return rng.randrange(1, len(log) + 1)
