"""Several diskchain processes at once on one VM, some of them killed; what each was told must fit one order of all.

The model: a present, and snapshots by name, each with a content. A history is right if its commands can be put in an
order that fits their times, in which every answer is true and at the end everything holds what the model says.
A command that was killed, or is unfinished, may have happened at any later time, or not at all.
A case is a number, or virsh:N: a domain, which one of the three starts, ends and looks at with virsh. What `domblklist`
names must hold the present of that moment.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from scripts.torture_cases.campaign import Campaign, Result, Worker
from scripts.torture_cases.faults import undocumented
from scripts.torture_cases.kills import Killer, Shot
from scripts.torture_cases.tree import EVERY, DomainTree, Tree, Trees, TreesWorker
from tests.support.rig import Answer
from tests.support.zygote import Zygote

CLIENTS, COMMANDS = 3, 20
SNAPSHOTS = ("s1", "s2", "s3", "before-revert-1")
PRESENTS = (*SNAPSHOTS, "now")  # what the tree holds
FOREVER = float("inf")
World = tuple[str, frozenset[tuple[str, str]]]  # the present, and the snapshots with what they hold


@dataclass(frozen=True)
class Event:
    """One command: what it was, when it ran, what it answered. `seen`: names, or the present; nothing where it is not known."""

    what: str
    name: str
    begun: float
    ended: float
    code: int
    seen: frozenset[str] = frozenset()


def outcomes(event: Event, world: World) -> list[World]:
    """Return the worlds that the command can leave behind, given its answer; none when the answer is not true."""
    present, snapshots = world
    held = dict(snapshots)
    if event.what == "list":
        return [world] if event.code != 0 or event.seen == frozenset(held) else []
    if event.what == "domblklist":
        return [world] if event.seen <= {present} else []
    if event.what in ("start", "destroy"):  # the guest writes nothing
        return [world]
    if event.code not in (0, 3, 12, -signal.SIGKILL):
        return [world] if event.code != 4 or event.name not in held else []
    done = _done(event, present, held)
    if event.code in (0, 12):
        return [done] if done else []
    return [world, done] if done else [world]


def _done(event: Event, present: str, held: dict[str, str]) -> World | None:
    if event.what == "create":
        return None if event.name in held else (present, frozenset({**held, event.name: present}.items()))
    if event.name not in held:
        return None
    if event.what == "revert":
        return held[event.name], frozenset(held.items())
    return present, frozenset((n, c) for n, c in held.items() if n != event.name)


def ends(events: Sequence[Event], start: World) -> set[World]:
    """Return every world in which a right history can end."""
    found: set[World] = set()
    seen: set[tuple[frozenset[int], World]] = set()

    def go(left: frozenset[int], world: World) -> None:
        if (left, world) in seen:
            return
        seen.add((left, world))
        if not left:
            found.add(world)
            return
        first_end = min(events[i].ended for i in left)
        for i in left:
            if events[i].begun <= first_end:
                for after in outcomes(events[i], world):
                    go(left - {i}, after)

    go(frozenset(range(len(events))), start)
    return found


class Histories(Campaign):
    """Commands at the same time."""

    name: ClassVar[str] = "histories"
    unit: ClassVar[str] = "histories of 20 commands"
    counts: ClassVar[tuple[int, int, int]] = (4, 200, 1000)

    def cases(self) -> Iterator[str]:
        """Every tenth with virsh."""
        return (f"virsh:{n}" if n % 10 == 3 else str(n) for n in itertools.count())

    def worker(self, place: Path) -> Worker:
        zygote = Zygote()
        trees = Trees[Tree](
            (["machine"], lambda: Tree(place / "machine", zygote)),
            (["domain"], lambda: DomainTree(place / "domain", zygote)),
        )
        return HistoriesWorker(self.seed, trees)


class HistoriesWorker(TreesWorker[Tree]):
    """A tree of a machine and one of a domain, several clients."""

    def __init__(self, seed: int, trees: Trees[Tree]) -> None:
        super().__init__(trees)
        self._seed = seed

    def run(self, case: str) -> Result:
        with_virsh = case.startswith("virsh:")
        self._tree = self._trees.of("domain" if with_virsh else "machine")
        self._power_off()
        self._tree.restore(EVERY["create"])
        expected = self._tree.rig.expected
        self._content = {"|".join(want.values()): name for name, want in expected.items() if name in PRESENTS}
        events: list[Event] = []
        problems: list[str] = []
        clients = [
            threading.Thread(
                target=self._admin if with_virsh and n == CLIENTS - 1 else self._client,
                args=(random.Random(f"history {self._seed} {case} {n}"), n, events, problems),
            )
            for n in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        self._power_off()
        recovered = self._tree.rig.run("recover", "vm")
        stuck = recovered.code != 0
        wrong = [*problems, *([f"recover ended with {recovered.code}: {recovered.err}"] if stuck else [])]
        merged = self._tree.rig.run("merge", "vm")  # what was deleted while it ran
        wrong += [f"merge ended with {merged.code}: {merged.err}"] if merged.code else []
        world = self._world()
        possible = ends(events, self._first())
        if world not in possible:
            wrong.append(f"no order of the commands ends like this: {world}")
        wrong += self._tree.rig.file_verdict()
        if isinstance(self._tree, DomainTree):
            wrong += self._tree.rig.agreement()
        note = "; ".join(f"{e.what} {e.name} -> {e.code}" for e in sorted(events, key=lambda e: e.begun))
        return Result(
            case, True, wrong, 0, bool(wrong) and not stuck, stuck, 1, note if wrong else f"{len(possible)} ends"
        )

    def _client(self, rng: random.Random, number: int, events: list[Event], problems: list[str]) -> None:
        names = [*SNAPSHOTS, *(f"c{n}-{k}" for n in range(CLIENTS) for k in range(2))]
        for k in range(COMMANDS // CLIENTS + (number < COMMANDS % CLIENTS)):
            what = rng.choice(("create", "create", "delete", "delete", "revert", "revert", "list"))
            name = f"c{number}-{k}" if what == "create" else "" if what == "list" else rng.choice(names)
            args = {"create": ("create", "vm", name), "delete": ("delete", "vm", name, "-y"),
                    "revert": ("revert", "vm", name, "--discard", "-y"), "list": ("list", "vm", "--json")}[what]  # fmt: skip
            begun = time.monotonic()
            answer = self._run(
                args, Shot("diskchain", rng.random(), 0, 0) if rng.random() < 0.15 and what != "list" else None
            )
            code, ended = answer.code, time.monotonic()
            seen = (
                frozenset(s["name"] for s in answer.json["snapshots"])
                if what == "list" and code == 0
                else frozenset[str]()
            )
            events.append(Event(what, name, begun, ended if code not in (3, -9) else FOREVER, code, seen))
            problems += undocumented(answer) if code != 4 else []  # 4: somebody else had deleted it

    def _admin(self, rng: random.Random, _: int, events: list[Event], problems: list[str]) -> None:
        """One of the clients knows virsh only."""
        for _ in range(COMMANDS // CLIENTS):
            time.sleep(rng.random())
            what = rng.choice(("start", "start", "destroy", "domblklist", "domblklist", "domblklist"))
            begun = time.monotonic()
            done = self._virsh(what)
            seen = self._shown(done.stdout) if what == "domblklist" else frozenset[str]()
            events.append(Event(what, "", begun, time.monotonic(), done.returncode, seen))
            if what == "domblklist" and done.returncode:
                problems.append(f"domblklist: {done.stderr.strip()}")

    def _virsh(self, what: str) -> subprocess.CompletedProcess[str]:
        argv = ["virsh", "-q", "-c", self._tree.rig.uri, what, self._tree.rig.name]
        return subprocess.run(argv, capture_output=True, text=True)

    def _power_off(self) -> None:
        if self._tree.rig.pid():
            self._virsh("destroy")

    def _shown(self, listed: str) -> frozenset[str]:
        """What the disks hold that virsh has listed; nothing where a merge, or a VM that starts or ends, is in the way."""
        rig, running = self._tree.rig, self._tree.rig.pid()
        paths = [Path(line.split(maxsplit=1)[1]) for line in listed.splitlines()]
        try:
            digests = [rig.shown(path, locked=not running) for path in paths]
        except (AssertionError, OSError):
            return frozenset()
        return frozenset([self._content.get("|".join(digests), "unknown")]) if rig.pid() == running else frozenset()

    def _run(self, args: Sequence[str], shot: Shot | None) -> Answer:
        rig, killers = self._tree.rig, list[Killer]()

        def started(pid: int) -> None:
            if shot:
                with contextlib.suppress(ProcessLookupError):  # it was quicker
                    killers.append(Killer(pid, shot, 0.5))
                    killers[0].start()

        answer = Answer(*rig.zygote.run(args, rig.env, 150, started))
        for killer in killers:
            killer.end()
        return answer

    def _first(self) -> World:
        return "now", frozenset((n, n) for n in SNAPSHOTS)

    def _world(self) -> World:
        rig = self._tree.rig
        present = self._named(rig.active())
        return present, frozenset((name, self._named(disks)) for name, disks in rig.snapshots().items())

    def _named(self, disks: dict[str, Path]) -> str:
        digest = "|".join(self._tree.rig.digest(path) for path in disks.values())
        return self._content.get(digest, "unknown")
