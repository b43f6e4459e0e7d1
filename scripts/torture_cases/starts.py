"""Somebody starts the VM while it is merged: diskchain, virsh, a plain QEMU, or qemu-io, which is quicker at it; or a
backup reads one of its layers.

Nobody may get in while data is moved; what a QEMU wrote and was told is written must be there at the end, and nothing
else may have changed. What was read must be one state.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from scripts.torture_cases.campaign import Campaign, Result, Worker
from scripts.torture_cases.intruders import Visit, Write, by_backup, by_monitor, by_qemu, by_qemu_io, by_virsh
from scripts.torture_cases.tree import EVERY, SIZE, DomainTree, Tree
from tests.support.rig import Answer
from tests.support.tree_cases import Case
from tests.support.zygote import Zygote

MERGES = ("delete-into-now", "delete-fork-copy", "delete-many", "accept", "merge")
Intruder = Callable[[Tree, Path, list[Write]], Visit]


class Starts(Campaign):
    """Starts that race a merge."""

    name: ClassVar[str] = "starts"
    unit: ClassVar[str] = "races"
    counts: ClassVar[tuple[int, int, int]] = (20, 500, 2000)

    def cases(self) -> Iterator[str]:
        return (f"{who}:{n}" for n in itertools.count() for who in INTRUDERS)

    def worker(self, place: Path) -> Worker:
        return StartsWorker(self.seed, place)


class StartsWorker(Worker):
    """Two trees that are merged, of a machine and of a domain, and those who disturb."""

    def __init__(self, seed: int, place: Path) -> None:
        self._seed, self._place, self._zygote = seed, place, Zygote()
        self._trees: dict[type[Tree], Tree] = {}
        self._tree: Tree | None = None

    def run(self, case: str) -> Result:
        rng = random.Random(f"starts {self._seed} {case}")
        who, name = case.partition(":")[0], rng.choice(MERGES)
        tree = self._tree = self._tree_of(DomainTree if who == "virsh" else Tree)
        command, rig, writes = EVERY[name], tree.rig, chosen_writes(rng)
        usual = tree.usual_time(name)
        tree.restore(command)
        flat = bytearray((rig.flat / rig.expected["now"]["vda"]).read_bytes())
        merged: list[Answer] = []
        thread = threading.Thread(target=lambda: merged.append(rig.run(*command.args)))
        layers = [disks["vda"] for disks in rig.snapshots().values()]
        path = rng.choice(layers) if who == "backup" else rig.active()["vda"]  # somebody looked at its name before
        thread.start()
        try:
            time.sleep(rng.random() * usual)
            visit = INTRUDERS[who](tree, path, writes)
        finally:
            thread.join()
        stopped = rig.run("stop", "vm", "--force", "-y") if rig.pid() else Answer(0, "", "")
        wrong = [*visit.wrong, *([] if stopped.code == 0 else [f"stop ended with {stopped.code}: {stopped.err}"])]
        for write in writes[: visit.count]:
            flat[write.offset : write.offset + write.length] = bytes([write.pattern]) * write.length
        rig.expected["raced"] = {**rig.expected["now"], "vda": rig.known(bytes(flat))}
        raced = Case(command.args, ("raced",), 0, gone=command.gone, let_go=command.let_go)
        found, lost, silent, stuck = tree.recovered(raced, Answer(-1, "", ""))
        note = f"{name} -> {merged[0].code}, {visit.words}"
        return Result(case, True, [*wrong, *found], lost, silent or bool(visit.wrong), stuck, 1, note)

    def _tree_of(self, kind: type[Tree]) -> Tree:
        if kind not in self._trees:
            self._trees[kind] = kind(self._place / kind.__name__.lower(), self._zygote)
        return self._trees[kind]

    def keep(self, to: Path) -> None:
        if self._tree:
            self._tree.keep(to)

    def close(self) -> None:
        for tree in self._trees.values():
            tree.close()


def chosen_writes(rng: random.Random) -> list[Write]:
    """Return two, the second some time after the first."""
    writes = []
    for wait in (0.0, rng.choice((0, 0.005, 0.05, 0.2))):
        length = rng.choice((512, 4096, 65536))
        writes.append(Write(rng.randrange(1, 255), rng.randrange(0, (SIZE - length) // 512) * 512, length, wait))
    return writes


def with_diskchain(tree: Tree, _: Path, writes: list[Write]) -> Visit:
    """`start` that waits for nothing, and writes if it may."""
    code = tree.rig.run("start", "vm", "--paused", "--wait", "0").code
    return Visit(by_monitor(tree.rig, writes) if code == 0 else 0, f"start: {code}")


def with_virsh(tree: Tree, _: Path, writes: list[Write]) -> Visit:
    """`virsh start`, which knows nothing of our journal."""
    assert isinstance(tree, DomainTree)
    return by_virsh(tree.daemon, tree.rig.name, writes)


def with_backup(tree: Tree, path: Path, _: list[Write]) -> Visit:
    """Whatever layer it is and whenever it is read: it shows one of the states that the VM was in."""
    return by_backup(path, tree.place / "backup", {disks["vda"] for disks in tree.rig.expected.values()})


INTRUDERS: Mapping[str, Intruder] = {
    "qemu": lambda _, path, writes: by_qemu(path, writes),
    "diskchain": with_diskchain,
    "virsh": with_virsh,
    "qemu-io": lambda _, path, writes: by_qemu_io(path, writes),
    "backup": with_backup,
}
