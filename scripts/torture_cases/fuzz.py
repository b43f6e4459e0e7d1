"""Damaged inputs for all our parsers: only errors in words may come out, quickly and without much memory."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from scripts.torture_cases.campaign import Campaign, Result, Worker
from scripts.torture_cases.parsers import NAMES
from tests.support.rig import ROOT, MiB

BATCH = 10_000
SLOW = 0.05  # seconds of processor
LARGE = 64 * MiB


class Fuzz(Campaign):
    """A case is PARSER:NUMBER, a batch of 10 000 inputs."""

    name: ClassVar[str] = "fuzz"
    unit: ClassVar[str] = "inputs"
    counts: ClassVar[tuple[int, int, int]] = (9, 108, 220)

    def cases(self) -> Iterator[str]:
        return (f"{name}:{n}" for n in itertools.count() for name in NAMES)

    def worker(self, place: Path) -> Worker:
        return FuzzWorker(self.seed, BATCH)


class FuzzWorker(Worker):
    """Runs the batches in processes of their own, so that a parser that eats all memory is seen."""

    def __init__(self, seed: int, batch: int) -> None:
        self._seed, self._batch = seed, batch

    def run(self, case: str) -> Result:
        argv = [
            sys.executable,
            "-m",
            "scripts.torture_cases.parsers",
            case.split(":")[0],
            f"{self._seed} {case}",
            str(self._batch),
        ]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=600)
        if done.returncode:
            return Result(case, wrong=[f"ended with {done.returncode}: {done.stderr[-600:]}"], silent=True)
        found = json.loads(done.stdout)
        wrong = list(found["wrong"])
        wrong += [f"{found['slowest']:.3f} s of processor for one input"] if found["slowest"] > SLOW else []
        wrong += [f"{found['grown'] / MiB:.0f} MiB of memory"] if found["grown"] > LARGE else []
        note = f"slowest {found['slowest'] * 1000:.1f} ms, {found['grown'] / MiB:.1f} MiB, {found['bad']} wrong"
        return Result(case, wrong=wrong, faults=self._batch, note=note)

    def close(self) -> None:
        """Nothing is kept."""
