"""Stopped machines with a branched tree that is put back in milliseconds, in one directory or two, and workers with them."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Generic, TypeVar

from scripts.torture_cases.campaign import Worker
from tests.support import places_cases
from tests.support.domain import DomainRig
from tests.support.libvirtd import Libvirtd
from tests.support.rig import Answer, MiB, Rig
from tests.support.roaming import Roaming
from tests.support.tree_cases import ALSO, CASES, Case, grow, judge, not_done, not_undone
from tests.support.zygote import Zygote

EVERY = {**CASES, **ALSO}
PLACES = {**places_cases.CASES, **places_cases.ALSO}  # those that need a tree in two directories
SIZE = 8 * MiB
UNCHANGED = (1, 4, 5, 6, 7, 8)  # exit codes that say that nothing changed (docs/exit-codes.md)


class TreeRig(Rig):
    """A rig whose oracle knows every byte that each state must show."""

    def prepare(self, place: Path, zygote: Zygote, env: Mapping[str, str] | None = None) -> None:
        """`place`: a directory outside the machine's. `env`: what every command finds in its environment."""
        self.zygote, self.flat, self.more_env = zygote, place / "flat", dict(env or {})
        self.flat.mkdir(parents=True, exist_ok=True)

    @property
    def env(self) -> dict[str, str]:
        return {**super().env, **self.more_env}

    def _flat_digest(self, path: Path) -> str:
        """As Rig's; the flat content stays in `flat`, under its digest."""
        return self.shown(path)

    def shown(self, path: Path, *, locked: bool = False) -> str:
        """As `digest`, of an image that may be at work: nothing is remembered. `locked`: not while somebody writes."""
        flat = self.flat / "new"
        words = [] if locked else ["-U"]
        self.qemu_img("convert", *words, "-f", self.fmt(path), "-O", "raw", str(path), str(flat))
        with flat.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        flat.rename(self.flat / digest)
        return digest

    def known(self, content: bytes) -> str:
        """Keep what a disk must show; return its digest."""
        digest = hashlib.sha256(content).hexdigest()
        (self.flat / digest).write_bytes(content)
        return digest

    def lost(self, case: Case) -> int:
        """Count the bytes that no state allows, in the present and in every snapshot."""
        wanted = [(disks, [name]) for name, disks in self.snapshots().items()] + [(self.active(), list(case.presents))]
        return sum(min(self._differing(disks, name) for name in names) for disks, names in wanted)

    def _differing(self, disks: Mapping[str, Path], name: str) -> int:
        want, total = self.expected.get(name), 0
        for target, path in disks.items():
            try:
                found = (self.flat / self.digest(path)).read_bytes()
            except (AssertionError, OSError):
                total += SIZE
                continue
            total += differing(found, (self.flat / want[target]).read_bytes() if want else b"")
        return total


def differing(one: bytes, other: bytes) -> int:
    """Count the bytes that differ; what one lacks differs."""
    if one == other:
        return 0
    short = min(len(one), len(other))
    pieces = (slice(at, at + 4096) for at in range(0, short, 4096))
    unequal = (sum(a != b for a, b in zip(one[p], other[p], strict=False)) for p in pieces if one[p] != other[p])
    return abs(len(one) - len(other)) + sum(unequal)


class Tree:
    """A rig with its tree, and a copy for each case's situation."""

    def __init__(self, place: Path, zygote: Zygote, env: Mapping[str, str] | None = None) -> None:
        shutil.rmtree(place, ignore_errors=True)
        self.place = place
        self.rig = self.make_rig(place / "vm")
        self.rig.prepare(place, zygote, env)
        self.grow()
        self._templates: dict[tuple[tuple[str, ...], ...], Path] = {(): self.rig.save_template()}
        self._usual: dict[str, float] = {}

    def make_rig(self, place: Path) -> TreeRig:
        """Return the machine that is not built yet."""
        return TreeRig(place, size=SIZE, raw=("vdb",))

    @property
    def cases(self) -> Mapping[str, Case]:
        """The commands that are tried on it."""
        return EVERY

    def grow(self) -> None:
        """Make the tree."""
        grow(self.rig)

    def arrange(self, case: Case) -> None:
        """Make a case's situation."""
        for command in case.before:
            self.rig.ok(*command)

    def judge(self, case: Case) -> list[str]:
        """What is wrong with contents and files, or half done."""
        return judge(self.rig, case)

    def broken_promises(self, case: Case, code: int) -> list[str]:
        """What is not as the command's exit code promised."""
        return not_done(self.rig, case) if code == 0 else not_undone(self.rig, case) if code in UNCHANGED else []

    def restore(self, case: Case) -> None:
        """Put everything back as it is before the case's command."""
        if case.before not in self._templates:
            self.rig.restore_template(self._templates[()])
            self.arrange(case)
            self._templates[case.before] = self.rig.save_template(f"template-{len(self._templates)}")
        self.rig.restore_template(self._templates[case.before])

    def usual_time(self, name: str) -> float:
        """Return how many seconds a command takes when nothing disturbs it; it is carried out for that once."""
        if name not in self._usual:
            case = self.cases[name]
            self.restore(case)
            began = time.monotonic()
            self.rig.ok(*case.args)
            self._usual[name] = time.monotonic() - began
            seen = self.seen(case, 0)
            assert seen == [], seen
        return self._usual[name]

    def template(self, case: Case) -> Path:
        """Return the copy that `restore` puts back."""
        self.restore(case)
        return self._templates[case.before]

    def recovered(self, case: Case, answer: Answer) -> tuple[list[str], int, bool, bool]:
        """After a fault in a command that answered so: recover, and look; return (wrong, lost, silent, stuck)."""
        recovered = self.rig.run("recover", "vm")
        wrong = [] if recovered.code == 0 else [f"recover ended with {recovered.code}: {recovered.err.strip()}"]
        seen = self.seen(case, answer.code)
        lost = self.rig.lost(case) if any("content" in w or "qemu-img" in w for w in seen) else 0
        return [*wrong, *seen], lost, bool(seen) and not wrong, bool(wrong)

    def seen(self, case: Case, code: int) -> list[str]:
        """What is wrong with the contents and the files, and with what the command's exit code promised."""
        try:
            broken = self.broken_promises(case, code)
            return self.judge(case) + broken
        except (AssertionError, OSError, ValueError, KeyError) as error:
            return [f"can't be read: content, {type(error).__name__}: {error}"]

    def keep(self, to: Path) -> None:
        """Copy the machine's directory."""
        shutil.rmtree(to, ignore_errors=True)
        to.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "--archive", "--sparse=always", str(self.rig.dir), str(to)], check=True)

    def close(self) -> None:
        """Remove everything."""
        self.rig.destroy()
        shutil.rmtree(self.place, ignore_errors=True)


class PlacesRig(TreeRig, Roaming):
    """The oracle that knows every byte, and files in any directory."""


class PlacesTree(Tree):
    """The tree in two directories, on somebody else's template."""

    rig: PlacesRig

    def make_rig(self, place: Path) -> TreeRig:
        return PlacesRig(place, size=SIZE)

    @property
    def cases(self) -> Mapping[str, Case]:
        return {name: replace(case, args=tuple(places_cases.words(self.rig, case))) for name, case in PLACES.items()}

    def grow(self) -> None:
        places_cases.grow(self.rig)

    def arrange(self, case: Case) -> None:
        places_cases.arrange(self.rig, case)

    def judge(self, case: Case) -> list[str]:
        return places_cases.judge(self.rig, case)

    def broken_promises(self, case: Case, code: int) -> list[str]:
        """The present is in `judge`."""
        traces = places_cases.traces(self.rig, case)
        if code == 0 and not all(traces):
            return ["it had said that it is done"]
        return ["nothing changed, but it is done"] if code in UNCHANGED and any(traces) else []


class DomainTreeRig(TreeRig, DomainRig):
    """The same oracle for a domain: libvirt's XML must agree, too."""


class DomainTree(Tree):
    """The tree of a libvirt domain, on a libvirtd of its own."""

    rig: DomainTreeRig

    def __init__(self, place: Path, zygote: Zygote) -> None:
        self.daemon = Libvirtd()
        self.daemon.start()
        self._xml: dict[tuple[tuple[str, ...], ...], str] = {}
        super().__init__(place, zygote)

    def make_rig(self, place: Path) -> TreeRig:
        return DomainTreeRig(place, size=SIZE, raw=("vdb",), daemon=self.daemon)

    def restore(self, case: Case) -> None:
        """As Tree's; and the definition."""
        if () not in self._xml:
            self._xml[()] = self.rig.virsh("dumpxml", self.rig.name, "--inactive")
        if case.before not in self._xml:
            self._define(self._xml[()])
            super().restore(case)
            self._xml[case.before] = self.rig.virsh("dumpxml", self.rig.name, "--inactive")
        super().restore(case)
        self._define(self._xml[case.before])

    def _define(self, xml: str) -> None:
        path = self.place / "back.xml"
        path.write_text(xml)
        self.rig.virsh("define", str(path))

    def close(self) -> None:
        super().close()
        self.daemon.destroy()


T = TypeVar("T", bound=Tree)


class TreeWorker(Worker, Generic[T]):
    """A worker with one tree."""

    def __init__(self, tree: T) -> None:
        self._tree = tree

    def keep(self, to: Path) -> None:
        self._tree.keep(to)

    def close(self) -> None:
        self._tree.close()


class Trees(Generic[T]):
    """Trees of several kinds: what each is for (commands, say), and how it is made when it is first needed."""

    def __init__(self, *kinds: tuple[Iterable[str], Callable[[], T]]) -> None:
        self._make = {name: make for names, make in kinds for name in names}
        self._made: dict[Callable[[], T], T] = {}
        self.names = sorted(self._make)
        self.last: T | None = None

    def of(self, name: str) -> T:
        """Return the one that is for this."""
        make = self._make[name]
        if make not in self._made:
            self._made[make] = make()
        self.last = self._made[make]
        return self.last

    def close(self) -> None:
        """Remove those that were made."""
        for tree in self._made.values():
            tree.close()


class TreesWorker(Worker, Generic[T]):
    """A worker with several trees."""

    def __init__(self, trees: Trees[T]) -> None:
        self._trees = trees

    def keep(self, to: Path) -> None:
        if self._trees.last:
            self._trees.last.keep(to)

    def close(self) -> None:
        self._trees.close()


R = TypeVar("R", bound=Rig)


class RigWorker(Worker, Generic[R]):
    """A worker with one machine, which is in a place of the worker's own."""

    def __init__(self, seed: int, place: Path, rig: R) -> None:
        self._seed, self._place, self._rig = seed, place, rig

    def keep(self, to: Path) -> None:
        shutil.copytree(self._rig.dir, to, dirs_exist_ok=True)

    def close(self) -> None:
        self._rig.destroy()
        shutil.rmtree(self._place, ignore_errors=True)
