"""Every call that changes a file, of diskchain and of its qemu-img: killed there, or told EIO or ENOSPC.

A case is COMMAND:N:KIND[+N:KIND]: the n-th such call of the command, and perhaps one of the recovery that follows.
Numbers are those of an undisturbed run; one that is never reached does not count.
"""

from __future__ import annotations

import errno
import random
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from scripts.torture_cases import shim
from scripts.torture_cases.campaign import Campaign, Result, Worker
from scripts.torture_cases.shim import Shim
from scripts.torture_cases.tree import EVERY, PLACES, SIZE, PlacesRig, PlacesTree, Tree, Trees, TreesWorker
from tests.support.rig import Answer, Rig
from tests.support.tree_cases import Case, without_let_go
from tests.support.zygote import Zygote

KINDS = {
    "kill": (shim.KILL, 0, False),
    "kill-all": (shim.KILL_ALL, 0, False),
    "EIO": (shim.FAIL, errno.EIO, False),
    "EIO-sticky": (shim.FAIL, errno.EIO, True),
    "ENOSPC": (shim.FAIL, errno.ENOSPC, False),
    "ENOSPC-sticky": (shim.FAIL, errno.ENOSPC, True),
}
DOCUMENTED = {0, 1, 3, 5, 6, 7, 8, 12, -signal.SIGKILL}
FOUND = {10, 11}  # of check: something is still wrong
AGAIN = 0.75  # share of the kills whose recovery meets a fault, too


class ShimTree(Tree):
    """A tree whose commands run under the shim; armed only when a case says so."""

    def __init__(self, place: Path, root: Path | None = None) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.shim = Shim(place.with_name(place.name + "-shim"), place / "vm")
        self.zygote = Zygote(env=self.shim.env) if root is None else Zygote(root, self.shim.env)
        super().__init__(place, self.zygote, self.shim.env)

    def count(self, case: Case, *, syncs_only: bool = False) -> int:
        """Return how many calls a case's command makes."""
        self.restore(case)
        self.shim.arm(shim.COUNT, syncs_only=syncs_only)
        self.rig.ok(*case.args)
        return self.shim.disarm()[0]

    def struck(self, args: tuple[str, ...], at: int, kind: str, *, syncs_only: bool = False) -> tuple[Answer, str]:
        """Run a command that meets a fault; return its answer and which call it was, or nothing."""
        action, error, sticky = KINDS[kind]
        self.shim.arm(action, at=at, error=error, sticky=sticky, syncs_only=syncs_only)
        answer = self.rig.run(*args)
        _, hits, what = self.shim.disarm()
        return answer, what if hits else ""


class ShimPlaces(ShimTree, PlacesTree):
    """The same for the tree in two directories."""

    rig: PlacesRig


def shim_trees(place: Path) -> Trees[ShimTree]:
    """Return the trees of all commands on a stopped VM."""
    return Trees[ShimTree]((EVERY, lambda: ShimTree(place / "usual")), (PLACES, lambda: ShimPlaces(place / "places")))


class Faults(Campaign):
    """A fault at an exact call."""

    name: ClassVar[str] = "faults"
    unit: ClassVar[str] = "points"
    counts: ClassVar[tuple[int, int, int]] = (60, 1000, 2000)

    def cases(self) -> Iterator[str]:
        trees = shim_trees(self.place / f"{self.name}-count")
        try:
            every = points(trees, trees.names)
        finally:
            trees.close()
        yield from shuffled(every, random.Random(f"{self.name} {self.seed}"))

    def worker(self, place: Path) -> Worker:
        return FaultsWorker(shim_trees(place))


def points(trees: Trees[ShimTree], names: Sequence[str]) -> list[str]:
    """Return every call of these commands with every kind of fault."""
    return [f"{case}:{kind}" for case in _counted(trees, names) for kind in KINDS]


def _counted(trees: Trees[ShimTree], names: Sequence[str], *, syncs_only: bool = False) -> Iterator[str]:
    for name in names:
        tree = trees.of(name)
        count = tree.count(tree.cases[name], syncs_only=syncs_only)
        yield from (f"{name}:{n}" for n in range(1, count + 1))


def shuffled(every: list[str], rng: random.Random) -> Iterator[str]:
    """Yield them in some order, some of the kills with another fault in the recovery."""
    rng.shuffle(every)
    for case in every:
        again = case.split(":")[2].startswith("kill") and rng.random() < AGAIN
        yield case + (f"+{rng.randrange(1, 40)}:{rng.choice(sorted(KINDS))}" if again else "")


def sync_points(trees: Trees[ShimTree], names: Sequence[str]) -> list[str]:
    """Return every sync of these commands with every way to fail."""
    kinds = ("EIO", "EIO-sticky", "ENOSPC")
    return [f"{case}:{kind}" for case in _counted(trees, names, syncs_only=True) for kind in kinds]


class FaultsWorker(TreesWorker[ShimTree]):
    """Trees that are struck again and again."""

    def run(self, case: str) -> Result:
        first, _, second = case.partition("+")
        name, n, kind = first.split(":")
        tree = self._trees.of(name)
        command = tree.cases[name]
        tree.restore(command)
        answer, what = tree.struck(command.args, int(n), kind)
        wrong, notes, faults = undocumented(answer, command.args), [f"{what} -> {answer.code}"], int(bool(what))
        if second and what:
            n, kind = second.split(":")
            again, what2 = tree.struck(("recover", "vm"), int(n), kind)
            wrong += undocumented(again)
            notes.append(f"recover: {what2} -> {again.code}")
            faults += bool(what2)
        found, lost, silent, stuck = tree.recovered(command, answer)
        return Result(case, bool(what), [*wrong, *found], lost, silent, stuck, faults, "; ".join(notes))


def undocumented(answer: Answer, args: Sequence[str] = ()) -> list[str]:
    """What is wrong with how a command ended."""
    documented = DOCUMENTED | (FOUND if args[:1] == ("check",) else set())
    if answer.code not in documented or "Traceback" in answer.err or "this is a bug" in answer.err:
        return [f"ended with {answer.code}: {answer.err.strip()[-600:]}"]
    return []


class Flushes(Campaign):
    """A failed fsync at an exact call, and writes of the guest afterwards: they must not meet what was merged."""

    name: ClassVar[str] = "flushes"
    unit: ClassVar[str] = "failed fsyncs"
    counts: ClassVar[tuple[int, int, int]] = (15, 200, 500)

    def cases(self) -> Iterator[str]:
        """Each sync of each command, then all of them with other writes of the guest."""
        trees = shim_trees(self.place / f"{self.name}-count")
        try:
            found = sync_points(trees, trees.names)
        finally:
            trees.close()
        random.Random(f"{self.name} {self.seed}").shuffle(found)
        for turn in range(100):
            yield from (f"{case}:{turn}" for case in found)

    def worker(self, place: Path) -> Worker:
        return FlushesWorker(self.seed, shim_trees(place))


class FlushesWorker(TreesWorker[ShimTree]):
    """Trees whose syncs fail."""

    def __init__(self, seed: int, trees: Trees[ShimTree]) -> None:
        super().__init__(trees)
        self._seed = seed

    def run(self, case: str) -> Result:
        name, n, kind, _ = case.split(":")
        tree = self._trees.of(name)
        command = tree.cases[name]
        tree.restore(command)
        answer, what = tree.struck(command.args, int(n), kind, syncs_only=True)
        wrong, lost, silent, stuck = tree.recovered(command, answer)
        wrong = [*undocumented(answer, command.args), *wrong]
        if not wrong:
            wrong, lost = guest_writes(tree, command, random.Random(f"guest {self._seed} {case}"))
            silent = bool(wrong)
        return Result(case, bool(what), wrong, lost, silent, stuck, int(bool(what)), f"{what} -> {answer.code}")


def guest_writes(tree: Tree, case: Case, rng: random.Random) -> tuple[list[str], int]:
    """Write to the present as a guest would, and look whether it and every other state show what they must."""
    rig = tree.rig
    now = {target: rig.digest(path) for target, path in rig.active().items()}
    present = next(p for p in case.presents if rig.expected[p] == now)
    rig.expected["written"] = {}
    for target, path in rig.active().items():
        flat = bytearray((rig.flat / rig.expected[present][target]).read_bytes())
        commands = []
        for _ in range(12):
            length = rng.choice((512, 4096, 65536, 200 << 10))
            offset, pattern = rng.randrange(0, (SIZE - length) // 512) * 512, rng.randrange(1, 255)
            flat[offset : offset + length] = bytes([pattern]) * length
            commands.append(f"write -P {pattern} {offset} {length}")
        _qemu_io(rig, path, commands)
        rig.expected["written"][target] = rig.known(bytes(flat))
    wrong = [f"after writes of the guest: {w}" for w in without_let_go(rig.verdict(present="written"), case)]
    return wrong, rig.lost(Case((), ("written",), 0)) if wrong else 0


def _qemu_io(rig: Rig, path: Path, commands: list[str]) -> None:
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", rig.fmt(path), *words, str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("wrote") == len(commands), done.stdout + done.stderr
