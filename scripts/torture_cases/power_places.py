"""The power goes while layers are written into another directory: move, detach, delete --to (power.py has the rest).

A case is a number, or COMMAND:N: all but the last N changes were made, and no name is there that was not synced.
"""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from scripts.torture_cases.campaign import Campaign, Result, Worker
from scripts.torture_cases.power import Cut, any_cut, cut
from scripts.torture_cases.shim import Record, Shim
from scripts.torture_cases.tree import SIZE, TreeRig
from tests.support import tree_cases
from tests.support.places_cases import CASES, grow, is_done, judge, words
from tests.support.roaming import Roaming
from tests.support.zygote import Zygote


class PlacesRig(TreeRig, Roaming):
    """The oracle that knows every byte, and files in any directory."""


class PowerPlaces(Campaign):
    """Power loss in a move, detach or delete --to."""

    name: ClassVar[str] = "power-places"
    unit: ClassVar[str] = "power cuts"
    counts: ClassVar[tuple[int, int, int]] = (10, 300, 1500)

    def cases(self) -> Iterator[str]:
        return (str(n) for n in itertools.count())

    def worker(self, place: Path) -> Worker:
        return PowerPlacesWorker(self.seed, place)


class PowerPlacesWorker(Worker):
    """One tree in two directories, on somebody else's template."""

    def __init__(self, seed: int, place: Path) -> None:
        shutil.rmtree(place, ignore_errors=True)
        self._seed, self._place = seed, place
        self._shim = Shim(place / "shim", place / "vm")
        self._rig = PlacesRig(place / "vm", size=SIZE)
        self._rig.prepare(place, Zygote(env=self._shim.env), self._shim.env)
        grow(self._rig)
        self._template = self._rig.save_template()

    def run(self, case: str) -> Result:
        rng = random.Random(f"power-places {self._seed} {case}")
        name, _, last = case.rpartition(":")
        name = name or rng.choice(sorted(CASES))
        command = CASES[name]
        self._rig.restore_template(self._template)

        def choose(log: Sequence[Record], rng: random.Random) -> Cut:
            return any_cut(log, rng) if name not in case else (len(log) - int(last), "all", "none")

        answer, note = cut(self._rig, self._shim, words(self._rig, command), self._template, rng, choose=choose)
        recovered = self._rig.run("recover", "vm")
        wrong = [] if recovered.code == 0 else [f"recover ended with {recovered.code}: {recovered.err.strip()}"]
        try:
            seen = judge(self._rig, command)
            seen += ["it had said that it is done"] if answer.code == 0 and not is_done(self._rig, command) else []
            lost = self._rig.lost(tree_cases.Case((), ("now",), 0)) if any("content" in w for w in seen) else 0
        except (AssertionError, OSError, ValueError, KeyError) as error:
            seen, lost = [f"can't be read: {type(error).__name__}: {error}"], 0
        return Result(case, True, [*wrong, *seen], lost, bool(seen) and not wrong, bool(wrong), 1, f"{name}: {note}")

    def keep(self, to: Path) -> None:
        shutil.copytree(self._rig.dir, to, dirs_exist_ok=True)

    def close(self) -> None:
        self._rig.destroy()
        shutil.rmtree(self._place, ignore_errors=True)
