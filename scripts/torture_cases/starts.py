"""Somebody starts the VM while it is merged: by diskchain, or a plain QEMU (qemu-io) that knows only the file's name.

Nobody may get in while data is moved; what a QEMU wrote and was told is written must be there at the end, and nothing
else may have changed.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from scripts.torture_cases.campaign import Campaign, Result, Worker
from scripts.torture_cases.tree import EVERY, SIZE, Tree, TreeWorker
from tests.support.rig import Answer
from tests.support.tree_cases import Case
from tests.support.zygote import Zygote

MERGES = ("delete-into-now", "delete-fork-copy", "delete-many", "accept", "merge")


class Starts(Campaign):
    """Starts that race a merge."""

    name: ClassVar[str] = "starts"
    unit: ClassVar[str] = "races"
    counts: ClassVar[tuple[int, int, int]] = (20, 500, 2000)

    def cases(self) -> Iterator[str]:
        return (f"{who}:{n}" for n in itertools.count() for who in ("qemu", "diskchain"))

    def worker(self, place: Path) -> Worker:
        return StartsWorker(self.seed, Tree(place, Zygote()))


class StartsWorker(TreeWorker[Tree]):
    """One tree that is merged, and those who disturb."""

    def __init__(self, seed: int, tree: Tree) -> None:
        super().__init__(tree)
        self._seed = seed

    def run(self, case: str) -> Result:
        rng = random.Random(f"starts {self._seed} {case}")
        name = rng.choice(MERGES)
        command, rig = EVERY[name], self._tree.rig
        usual = self._tree.usual_time(name)
        self._tree.restore(command)
        merged: list[Answer] = []
        thread = threading.Thread(target=lambda: merged.append(rig.run(*command.args)))
        path, target = rig.active()["vda"], "vda"
        thread.start()
        time.sleep(rng.random() * usual)
        flat = bytearray((rig.flat / rig.expected["now"][target]).read_bytes())
        if case.startswith("qemu"):
            said = written(path, flat, rng)
        else:
            answer = rig.run("start", "vm", "--paused", "--wait", "0")
            said = f"start: {answer.code}"
        thread.join()
        stopped = rig.run("stop", "vm", "--force", "-y") if rig.pid() else Answer(0, "", "")
        wrong = [] if stopped.code == 0 else [f"stop ended with {stopped.code}: {stopped.err}"]
        rig.expected["raced"] = {**rig.expected["now"], target: rig.known(bytes(flat))}
        raced = Case(command.args, ("raced",), 0, gone=command.gone, let_go=command.let_go)
        found, lost, silent, stuck = self._tree.recovered(raced, Answer(-1, "", ""))
        return Result(case, True, [*wrong, *found], lost, silent, stuck, 1, f"{name} -> {merged[0].code}, {said}")


def written(path: Path, flat: bytearray, rng: random.Random) -> str:
    """Open an image as a QEMU does, write twice with a pause between; note in `flat` what was acknowledged."""
    writes = []
    for _ in range(2):
        length = rng.choice((512, 4096, 65536))
        writes.append((rng.randrange(1, 255), rng.randrange(0, (SIZE - length) // 512) * 512, length))
    words = [f"write -P {p} {o} {n}" for p, o, n in writes]
    words.insert(1, f"sleep {rng.choice((0, 5, 50, 200))}")
    argv = ["qemu-io", "-f", "qcow2", *(w for word in words for w in ("-c", word)), str(path)]
    done = subprocess.run(argv, capture_output=True, text=True)
    count = done.stdout.count("wrote ")
    for pattern, offset, length in writes[:count]:
        flat[offset : offset + length] = bytes([pattern]) * length
    return f"qemu wrote {count} times" if count else f"qemu: {done.stderr.strip()[-90:]}"
