"""Random SIGKILL of diskchain, of its qemu-img, of both, at random times in every command, the recovery included.

A case is a number, or live:N of a VM that runs: it chooses the command, who is killed when (as a share of the command's
usual time), and how many recoveries are killed before the last. Odd numbers merge as if all layers were large and not cached.
The machine may run on elsewhere: times are not exactly repeatable, the rest is.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from scripts.torture_cases.campaign import Campaign, Result, Worker
from scripts.torture_cases.live import LIVE, LiveTree
from scripts.torture_cases.mutation import ALL_IS_LARGE
from scripts.torture_cases.tree import EVERY, PLACES, PlacesTree, Tree, Trees, TreesWorker
from tests.support.rig import Answer, Rig
from tests.support.zygote import Zygote

T = TypeVar("T", bound=Tree)
WHO = ("diskchain", "child", "both")


@dataclass(frozen=True)
class Shot:
    """Who is killed; after which share of the usual time, or (`nth`) a moment after the n-th child appeared."""

    who: str
    share: float
    nth: int
    delay: float

    @classmethod
    def at_random(cls, rng: random.Random) -> Shot:
        """Half of all shots wait for a child: moving data is quick with disks this small, and would be missed."""
        nth = rng.randrange(1, 30) if rng.random() < 0.5 else 0
        return cls(rng.choice(WHO), rng.random(), nth, rng.random() * 0.02)


class Killer(threading.Thread):
    """Waits for the right moment in a command's life."""

    def __init__(self, pid: int, shot: Shot, usual: float) -> None:
        super().__init__(daemon=True)
        self._pid, self._shot, self._usual, self.hit, self._over = pid, shot, usual, False, threading.Event()
        self._fd = os.pidfd_open(pid)

    def run(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._shot.nth:
                self._await_child()
            elif self._over.wait(self._shot.share * self._usual):
                return
            self._shoot()

    def end(self) -> bool:
        """The command is over; return whether anybody was hit."""
        self._over.set()
        self.join()
        os.close(self._fd)
        return self.hit

    def _await_child(self) -> None:
        seen: set[int] = set()
        while len(seen) < self._shot.nth and not self._over.is_set():
            seen.update(children(self._pid))
            time.sleep(0.0005)
        self._over.wait(self._shot.delay)

    def _shoot(self) -> None:
        if self._over.is_set():
            return
        targets = children(self._pid) if self._shot.who != "diskchain" else []
        if self._shot.who == "child":
            while not targets and not self._over.wait(0.0005):
                targets = children(self._pid)
        for pid in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.hit = True
        if self._shot.who != "child":
            signal.pidfd_send_signal(self._fd, signal.SIGKILL)
            self.hit = True


def children(pid: int) -> list[int]:
    """Return the children of a process, those of all its threads."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += [int(word) for word in Path(f"/proc/{pid}/task/{thread}/children").read_text().split()]
    return found


class Kills(Campaign):
    """SIGKILL at random times."""

    name: ClassVar[str] = "kills"
    unit: ClassVar[str] = "kills"
    counts: ClassVar[tuple[int, int, int]] = (60, 1000, 5000)

    def cases(self) -> Iterator[str]:
        """Some with a running VM."""
        return (f"live:{n}" if n % 10 == 9 else str(n) for n in itertools.count())

    def worker(self, place: Path) -> Worker:
        zygote = Zygote()
        all_is_large = Zygote(ALL_IS_LARGE.copy_to(place / "copy"))
        trees = Trees[Tree](
            (EVERY, lambda: Tree(place / "usual", zygote)),
            (PLACES, lambda: PlacesTree(place / "places", zygote)),
            (LIVE, lambda: LiveTree(place / "live", zygote)),
        )
        large = Trees[Tree](
            (EVERY, lambda: Tree(place / "large", all_is_large)),
            (PLACES, lambda: PlacesTree(place / "large-places", all_is_large)),
        )
        return KillsWorker(self.seed, trees, large)


class KillsWorker(TreesWorker[T]):
    """Trees that are shot at again and again; `odd`: those that odd numbers take."""

    def __init__(self, seed: int, trees: Trees[T], odd: Trees[T] | None = None) -> None:
        super().__init__(trees)
        self._usual, self._odd = trees, odd or trees
        self._seed, self._names = seed, [name for name in trees.names if name not in LIVE]

    def run(self, case: str) -> Result:
        rng = random.Random(f"kills {self._seed} {case}")
        is_odd = not case.startswith("live:") and int(case) % 2
        self._trees = self._odd if is_odd else self._usual  # the one that is kept, should it go wrong
        name = rng.choice(sorted(LIVE) if case.startswith("live:") else self._names)
        tree = self._trees.of(name)
        command = tree.cases[name]
        usual = tree.usual_time(name)
        tree.restore(command)
        shots = [Shot.at_random(rng)]
        while rng.random() < 0.4:
            shots.append(Shot.at_random(rng))
        answer, hit = shot_at(tree.rig, command.args, shots[0], usual)
        hits = int(hit)
        for shot in shots[1:] if hit else ():
            hits += shot_at(tree.rig, ("recover", "vm"), shot, usual)[1]
        wrong, lost, silent, stuck = tree.recovered(command, answer)
        note = f"{name}: {shots}, the command ended with {answer.code}"
        return Result(case, bool(hits), wrong, lost, silent, stuck, hits, note)

    def close(self) -> None:
        self._usual.close()
        self._odd.close()


def shot_at(rig: Rig, args: Sequence[str], shot: Shot, usual: float) -> tuple[Answer, bool]:
    """Run a command that is shot at; return its answer, and whether anybody was hit."""
    killers: list[Killer] = []

    def started(pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it was quicker than we
            killers.append(Killer(pid, shot, usual))
            killers[0].start()

    answer = Answer(*rig.zygote.run(args, rig.env, 150, started))
    return answer, any(killer.end() for killer in killers)
