"""The cases. Each is a function: Bench -> rows; its first line is what --list says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from diskchain.ops.approve import approve_chain
from scripts.bench_cases import domains, merges
from scripts.bench_cases.bench import SETTLE, Bench, Both, MiB, in_turns, say, silence, timed
from scripts.bench_cases.figures import Goal, Row
from tests.support.own_machine import Guest, OwnMachine
from tests.support.ram import guest_ram

ROOT = Path(__file__).resolve().parents[2]
LIKE_BARE = Goal(1.50, 5.0)
Case = Callable[[Bench], Iterator[Row]]


def pause(bench: Bench) -> Iterator[Row]:
    """Pause of `create` with memory against the bare QMP sequence, by guest size."""
    for mib in bench.sizes(quick=[256], usual=[256, 1024], full=[256, 1024, 2048, 4096]):
        guest = Guest(mib * MiB, modes=f"touch{_most_of(mib)}")
        count = bench.pairs(16, 7) if mib <= 1024 else 7
        yield _pause_row(bench, guest, f"pause, {mib} MiB of memory, 2 disks", count)


def disks(bench: Bench) -> Iterator[Row]:
    """Pause of `create` with memory against the bare QMP sequence, by number of disks."""
    ours: dict[str, Sequence[float]] = {}
    for count, scsi in ((1, False), (4, False), (16, False), (1, True), (16, True)):
        if bench.quick and count == 4:
            continue
        guest = Guest(256 * MiB, disks=count, modes="touch64", scsi=scsi)
        name = f"{count} {'SCSI' if scsi else 'virtio'} disk{'s'[: count - 1]}"
        row = _pause_row(bench, guest, f"pause, {name}, 256 MiB", bench.pairs(9, 3))
        ours[name] = row.ours
        yield row
    for kind in ("virtio", "SCSI"):
        yield Row(f"pause, 16 {kind} disks, 256 MiB", ours[f"16 {kind} disks"], ours[f"1 {kind} disk"],
                  f"1 {kind} disk", goal=Goal(0.0, 10))  # fmt: skip


def tenth(bench: Bench) -> Iterator[Row]:
    """Pause of the later snapshots of a guest against its first, with huge_pages on and off; resident memory."""
    last = 5 if bench.quick else 10
    for mib in bench.sizes(quick=[256], usual=[1024], full=[256, 1024, 2048, 4096]):
        guest = Guest(mib * MiB, modes=f"touch{_most_of(mib)}")
        say(f"tenth, {mib} MiB: {last} snapshots with huge_pages on, as many with off, 2 first ones more")
        on, touched, resident = _series(bench, guest, last, huge_pages=True)
        off, _, _ = _series(bench, guest, last, huge_pages=False)
        more = [] if bench.quick else [_series(bench, guest, 1, huge_pages=True)[0][0] for _ in range(2)]
        firsts = [on[0], off[0], *more]
        first = [firsts[n % len(firsts)] for n in range(last - 1)]
        what = f"pause of snapshots 2-{last}, {mib} MiB, huge_pages"
        yield Row(f"{what} on", on[1:], first, f"the first ({len(firsts)} guests)", goal=Goal(1.5))
        yield Row(f"{what} off", off[1:], first, f"the first ({len(firsts)} guests)")
        yield Row(f"resident after {last} snapshots, {mib} MiB", [resident], [touched], "before", "MiB", Goal(1.05))


def _series(bench: Bench, guest: Guest, count: int, *, huge_pages: bool) -> tuple[list[float], float, float]:
    """Take so many snapshots of a fresh guest; return their pauses, and its resident MiB before and after."""
    with bench.own(guest, "^M touched", huge_pages=huge_pages) as own:
        before = guest_ram(own.pid).resident
        pauses = []
        for _ in range(count):
            time.sleep(SETTLE)
            pauses.append(one_pause(own))
        say(f"huge_pages {'on' if huge_pages else 'off'}: {', '.join(f'{p:.1f}' for p in pauses)} ms")
        return pauses, before / MiB, guest_ram(own.pid).resident / MiB


def _most_of(mib: int) -> int:
    return mib * 7 // 10 if mib <= 1024 else mib * 9 // 10  # what is never touched: see docs/benchmarks.md


def _pause_row(bench: Bench, guest: Guest, what: str, count: int) -> Row:
    """Both guests take the same number of snapshots in turns: later snapshots are slower than the first."""
    say(f"{what}: {count} pairs")
    with bench.both(guest, "^M touched") as both:
        ours, bare = in_turns(count, lambda: own_pause(both), lambda: bare_pause(both))
    return Row(what, ours, bare, "bare QMP", goal=LIKE_BARE)


def own_pause(both: Both) -> float:
    """Make a snapshot with diskchain; return its pause."""
    return one_pause(both.own)


def one_pause(own: OwnMachine) -> float:
    """Make a snapshot; return its pause."""
    snapshot = own.create("")
    own.forget_memory(snapshot)
    assert snapshot.pause_ms is not None
    return snapshot.pause_ms


def bare_pause(both: Both) -> float:
    """Make a snapshot by hand; return its pause."""
    memory = both.bare.dir / "memory"
    taken = both.bare.create(memory)
    memory.unlink()
    return taken


def gap(bench: Bench) -> Iterator[Row]:
    """Longest silence of a busy guest during `create` with memory, against savevm and stop-migrate-cont."""
    for mib in bench.sizes(quick=[256], usual=[1024], full=[256, 1024, 2048, 4096]):
        yield from _gap_rows(
            bench, mib, 60 if mib == 256 else mib * 300 // 1024, bench.pairs(7, 2) if mib <= 1024 else 3
        )


def _gap_rows(bench: Bench, mib: int, dirty: int, count: int) -> Iterator[Row]:
    say(f"gap, {mib} MiB: {count} triples")
    modes = f"tick,dirty{dirty}"
    with bench.both(Guest(mib * MiB, modes=modes), "^D round 2") as both:
        memory = both.bare.dir / "memory"
        quiet = [silence(both.own.console, lambda: time.sleep(2)) for _ in range(count)]
        ours, savevm = in_turns(count, lambda: _own_gap(both), lambda: _bare_gap(both, lambda: both.bare.savevm("s")))
        again, stopped = in_turns(
            count, lambda: _own_gap(both), lambda: _bare_gap(both, lambda: both.bare.stop_migrate_cont(memory))
        )
    guest = f"longest gap, {mib} MiB, {dirty} MiB rewritten all the time"
    yield Row(guest, ours, savevm, "savevm", goal=Goal(0.2))
    yield Row(guest, again, stopped, "stop-migrate-cont", goal=Goal(0.5))
    yield Row(guest, ours, quiet, "no snapshot at all")


def _own_gap(both: Both) -> float:
    """The other guest is held meanwhile: there are hardly more processors than one guest keeps busy."""
    both.bare.hold()
    try:
        return silence(both.own.console, lambda: own_pause(both))
    finally:
        both.bare.release()


def _bare_gap(both: Both, work: Callable[[], object]) -> float:
    both.own.hold()
    try:
        return silence(both.bare.console, work)
    finally:
        both.own.release()


def size(bench: Bench) -> Iterator[Row]:
    """Size of the memory file against the guest's touched RAM, at rest and while it is rewritten."""
    mib = 256 if bench.quick else 1024
    for what, modes, ready in (
        ("at rest", f"touch{_most_of(mib)}", "^M touched"),
        ("rewritten meanwhile", f"dirty{_most_of(mib)}", "^D round 2"),
    ):
        say(f"size, {mib} MiB {what}")
        with bench.own(Guest(mib * MiB, modes=modes), ready) as own:
            files, touched = zip(*(_sizes(own) for _ in range(bench.pairs(5, 2))), strict=True)
        yield Row(f"memory file, {mib} MiB guest, {what}", files, touched, "touched RAM", "MiB", Goal(1.03))


def _sizes(own: OwnMachine) -> tuple[float, float]:
    touched = guest_ram(own.pid).resident
    snapshot = own.create("")
    assert snapshot.memory.saved, snapshot.memory.reason
    own.forget_memory(snapshot)
    return snapshot.memory.bytes / MiB, touched / MiB


def chain(bench: Bench) -> Iterator[Row]:
    """Approving chains of 10 to 200 layers against `qemu-img info --backing-chain`."""
    say("chain: making 200 layers")
    layers = make_chain(bench.place(), 200)
    count = bench.pairs(31, 21)
    for depth in (10, 50, 100, 200):
        top = layers[depth - 1]
        ours, qemu_img = [], []
        for _ in range(count):
            ours.append(timed(lambda top=top: approve_chain(top, "qcow2")))  # type: ignore[misc]
            qemu_img.append(timed(lambda top=top: _info(top)))  # type: ignore[misc]
        yield Row(f"chain of {depth} layers read", ours, qemu_img, "qemu-img info", goal=Goal(0.1))


def make_chain(directory: Path, depth: int) -> list[Path]:
    """Make a chain; return its images, base first."""
    directory.mkdir(parents=True)
    paths = [directory / f"{n}.qcow2" for n in range(depth)]
    for below, path in zip([None, *paths], paths, strict=False):
        on = [] if below is None else ["-u", "-b", below.name, "-F", "qcow2"]
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *on, path, "1G"], check=True)
    return paths


def _info(top: Path) -> None:
    argv = ["qemu-img", "info", "--backing-chain", "--output=json", "-f", "qcow2", str(top)]
    json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)


def start(bench: Bench) -> Iterator[Row]:
    """Wall time of `diskchain --help` against an empty Python."""
    count = bench.pairs(21, 11)
    say(f"start: {count} pairs")
    ours, empty = in_turns(count, lambda: _python("-m", "diskchain", "--help"), lambda: _python("-c", "pass"))
    yield Row("diskchain --help", ours, empty, "python -c pass", goal=Goal(0.0, 150))


def _python(*words: str) -> float:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return timed(lambda: subprocess.run([sys.executable, *words], env=env, capture_output=True, check=True))


def revert(bench: Bench) -> Iterator[Row]:
    """`revert` with memory against quit, qemu-img create and a bare -incoming: whole time, and how long no guest ran."""
    for mib in [256] if bench.quick else [256, 1024]:
        count = bench.pairs(9, 4)
        say(f"revert, {mib} MiB: {count} pairs")
        with bench.both(Guest(mib * MiB, modes=f"tick,touch{_most_of(mib)}"), "^M touched") as both:
            yield from _revert_rows(both, mib, count)


def _revert_rows(both: Both, mib: int, count: int) -> Iterator[Row]:
    memory = both.bare.dir / "memory"
    both.own.create("s")
    both.bare.create(memory)
    own_gaps: list[float] = []
    bare_gaps: list[float] = []

    def own() -> float:
        return _timed_and_gap(both.own.console, lambda: both.own.revert("s"), own_gaps)

    def bare() -> float:
        return _timed_and_gap(both.bare.console, lambda: both.bare.restore(memory), bare_gaps)

    ours, reference = in_turns(count, own, bare)
    yield Row(f"revert, {mib} MiB, whole time", ours, reference, "bare -incoming", goal=Goal(1.5, 250))
    yield Row(f"revert, {mib} MiB, no guest runs", own_gaps, bare_gaps, "bare -incoming", goal=Goal(1.25, 50))


def _timed_and_gap(console: Path, work: Callable[[], object], gaps: list[float]) -> float:
    took = 0.0

    def measured() -> None:
        nonlocal took
        took = timed(work)

    gaps.append(silence(console, measured))
    return took


def libvirt(bench: Bench) -> Iterator[Row]:
    """`create` with memory on a libvirt domain against virsh snapshot-create-as --memspec and save + restore; as root."""
    if not domains.available():
        say("libvirt: left out; it needs root, libvirtd, virsh and unshare")
        return
    yield from domains.domains(bench)


def libvirt_revert(bench: Bench) -> Iterator[Row]:
    """`revert` of a domain to a snapshot with memory against virsh snapshot-revert; as root, with libvirt 9.9 or newer."""
    if not domains.can_revert():
        say("libvirt-revert: left out; it needs root, virsh, unshare, and a libvirtd that can revert (9.9)")
        return
    yield from domains.reverts(bench)


CASES: dict[str, Case] = {
    "pause": pause, "disks": disks, "tenth": tenth, "gap": gap, "size": size, "chain": chain, "start": start, "revert": revert,
    "libvirt": libvirt, "libvirt-revert": libvirt_revert, **merges.CASES,
}  # fmt: skip
