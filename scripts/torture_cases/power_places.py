"""The power goes while layers are written into another directory: move, detach, delete --to (power.py has the rest).

A case is a number, or COMMAND:N: all but the last N changes were made, and no name is there that was not synced.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from scripts.torture_cases.campaign import Campaign, Result, Worker
from scripts.torture_cases.power import Cut, LoggedWorker, any_cut, cut
from scripts.torture_cases.shim import Record
from scripts.torture_cases.tree import SIZE, PlacesRig
from tests.support.places_cases import CASES, grow, is_done, judge, words


class PowerPlaces(Campaign):
    """Power loss in a move, detach or delete --to."""

    name: ClassVar[str] = "power-places"
    unit: ClassVar[str] = "power cuts"
    counts: ClassVar[tuple[int, int, int]] = (10, 300, 1500)

    def worker(self, place: Path) -> Worker:
        return PowerPlacesWorker(self.seed, place)


class PowerPlacesWorker(LoggedWorker[PlacesRig]):
    """One tree in two directories, on somebody else's template."""

    def __init__(self, seed: int, place: Path) -> None:
        rig = PlacesRig(place / "vm", size=SIZE)
        super().__init__(seed, place, rig)
        grow(rig)
        self._template = self._rig.save_template()

    def run(self, case: str) -> Result:
        rng = random.Random(f"power-places {self._seed} {case}")
        chosen, _, last = case.rpartition(":")
        name = chosen or rng.choice(sorted(CASES))
        command = CASES[name]
        self._rig.restore_template(self._template)

        def choose(log: Sequence[Record], rng: random.Random) -> Cut:
            return (len(log) - int(last), "all", "none") if chosen else any_cut(log, rng)

        answer, note = cut(self._rig, self._shim, words(self._rig, command), self._template, rng, choose=choose)
        recovered = self._rig.run("recover", "vm")
        wrong = [] if recovered.code == 0 else [f"recover ended with {recovered.code}: {recovered.err.strip()}"]
        try:
            seen = judge(self._rig, command)
            seen += ["it had said that it is done"] if answer.code == 0 and not is_done(self._rig, command) else []
            lost = self._rig.lost(command) if any("content" in w for w in seen) else 0
        except (AssertionError, OSError, ValueError, KeyError) as error:
            seen, lost = [f"can't be read: {type(error).__name__}: {error}"], 0
        return Result(case, True, [*wrong, *seen], lost, bool(seen) and not wrong, bool(wrong), 1, f"{name}: {note}")
