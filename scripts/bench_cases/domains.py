"""libvirt: `create` with memory on a domain against what libvirt itself has, on a private libvirtd of the bench."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from scripts.bench_cases.bench import Bench, MiB, in_turns, say, silence, timed, wait_until
from scripts.bench_cases.figures import Goal, Row
from tests.support.domain import DomainRig
from tests.support.libvirtd import Libvirtd

Work = Callable[["Side"], Path | None]


@dataclass
class Side:
    """One domain, and what each snapshot of it cost: longest gap of the guest (ms), time (s), size of the memory (MiB)."""

    rig: DomainRig
    count: int = 0
    gaps: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)  # of what was made, where something was

    def hold(self, on: bool) -> None:
        """Let its QEMU stand still while the other one is measured."""
        pid = self.rig.pid()
        assert pid
        os.kill(pid, signal.SIGSTOP if on else signal.SIGCONT)

    def measure(self, work: Work) -> float:
        """Do it once; return the gap."""
        self.count += 1
        took: list[float] = []
        made: list[Path | None] = []

        def once() -> None:
            took.append(timed(lambda: made.append(work(self))) / 1000)

        self.gaps.append(silence(self.rig.console(), once))
        self.seconds.append(took[0])
        if made[0]:
            self.sizes.append(made[0].stat().st_size / MiB)
            made[0].unlink()
        return self.gaps[-1]


def domains(bench: Bench) -> Iterator[Row]:
    """`create` with memory on a libvirt domain against virsh snapshot-create-as --memspec (--live, not live) and save + restore."""
    mib, dirty = (256, 60) if bench.quick else (1024, 300)
    count = bench.pairs(4, 2)
    say(f"libvirt, {mib} MiB: {count} pairs each against --live, not live, save + restore")
    guest = f"{mib} MiB, {dirty} MiB rewritten all the time"
    with _two(bench, mib, dirty) as (own, virsh):
        for against, work, fair in (("--memspec --live", _live, True), ("--memspec, not live", _not_live, True),
                                    ("save + restore", _save, False)):  # fmt: skip
            ours, theirs = Side(own), Side(virsh)
            ours.count = theirs.count = len(against)  # names of files; nothing more

            def mine(ours: Side = ours, theirs: Side = theirs) -> float:
                return _while_held(theirs, lambda: ours.measure(_create))

            def other(ours: Side = ours, theirs: Side = theirs, work: Work = work) -> float:
                return _while_held(ours, lambda: theirs.measure(work))

            in_turns(count, mine, other)
            yield Row(f"longest gap, {guest}", ours.gaps, theirs.gaps, against, goal=Goal(1 / 3) if fair else None)
            yield Row("whole time", ours.seconds, theirs.seconds, against, "s")
            goal = Goal(0.5) if work is _live else None
            yield Row("file of the memory", ours.sizes, theirs.sizes, against, "MiB", goal)


def reverts(bench: Bench) -> Iterator[Row]:
    """`revert` of a libvirt domain to a snapshot with memory against virsh snapshot-revert."""
    mib = 256 if bench.quick else 1024
    count = bench.pairs(5, 2)
    say(f"libvirt, {mib} MiB: {count} pairs of revert against snapshot-revert")
    with _two(bench, mib, mib // 4) as (own, virsh):
        own.ok("create", own.name, "s")
        virsh.virsh("snapshot-create-as", virsh.name, "s", "--memspec", f"file={virsh.dir}/s.memory,snapshot=external",
                    "--atomic", *_overlays(virsh, "s"))  # fmt: skip
        ours, theirs = Side(own), Side(virsh)
        in_turns(count, lambda: _while_held(theirs, lambda: ours.measure(_revert)),
                 lambda: _while_held(ours, lambda: theirs.measure(_snapshot_revert)), settle=1)  # fmt: skip
        guest = f"{mib} MiB, {mib // 4} MiB of it written"
        yield Row(f"no guest runs, {guest}", ours.gaps, theirs.gaps, "snapshot-revert")
        yield Row("whole time", ours.seconds, theirs.seconds, "snapshot-revert", "s")


def can_revert() -> bool:
    """Whether this libvirt reverts to external snapshots at all (since 9.9)."""
    return available() and tuple(map(int, _version().split(".")[:2])) >= (9, 9)


def _version() -> str:
    return subprocess.run(["libvirtd", "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]


def _while_held(other: Side, work: Callable[[], float]) -> float:
    other.hold(True)
    try:
        return work()
    finally:
        other.hold(False)


@contextlib.contextmanager
def _two(bench: Bench, mib: int, dirty: int) -> Iterator[tuple[DomainRig, DomainRig]]:
    """Two running domains of the same kind that rewrite their memory."""
    daemon = Libvirtd()
    rigs: list[DomainRig] = []
    try:
        daemon.start()
        for name in ("own", "virsh"):
            place = bench.place()
            rig = DomainRig(
                place,
                name=name,
                daemon=daemon,
                memory=f"{mib} MiB",
                modes=f"tick,dirty{dirty}",
                size=256 * MiB,
                forked=False,
            )
            rigs.append(rig)
            rig.build(guest=True)
            rig.virsh("start", name)
            wait_until("^D round 2", rig.console())
        yield rigs[0], rigs[1]
    finally:
        for rig in rigs:
            rig.destroy()
        daemon.destroy()


def _create(side: Side) -> Path:
    snapshot = side.rig.ok("create", side.rig.name, "--json").json["snapshot"]
    (path,) = side.rig.dir.glob(f".diskchain/*/snapshots/{snapshot['id']}/memory")
    return path


def _live(side: Side) -> Path:
    return _snapshot(side, "--live")


def _not_live(side: Side) -> Path:
    return _snapshot(side)


def _snapshot(side: Side, *words: str) -> Path:
    rig, name = side.rig, f"n{len(list(side.rig.dir.iterdir()))}"
    memory = rig.dir / f"memory.{name}"
    rig.virsh("snapshot-create-as", rig.name, name, "--memspec", f"file={memory},snapshot=external", "--atomic",
              "--no-metadata", *_overlays(rig, name), *words)  # fmt: skip
    return memory


def _overlays(rig: DomainRig, name: str) -> list[str]:
    return [w for t in rig.targets for w in ("--diskspec", f"{t},snapshot=external,file={rig.dir}/{t}.{name}.qcow2")]


def _revert(side: Side) -> None:
    side.rig.ok("revert", side.rig.name, "s", "--discard", "-y")


def _snapshot_revert(side: Side) -> None:
    side.rig.virsh("snapshot-revert", side.rig.name, "s")


def _save(side: Side) -> Path:
    memory = side.rig.dir / "saved"
    side.rig.virsh("save", side.rig.name, str(memory))
    side.rig.virsh("restore", str(memory))
    return memory


def available() -> bool:
    """Whether a private libvirtd can be run here: by root, with libvirt installed."""
    return os.geteuid() == 0 and all(shutil.which(program) for program in ("libvirtd", "virsh", "unshare"))
