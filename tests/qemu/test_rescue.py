"""A background save that fails must not hang the guest (QEMU 7.2 leaks its write protection; facts.md).

The reservation that normally prevents it is left away (`skip:memory.reserve`), and a small filesystem fills up while
memory is being saved. The guest rewrites its memory before and after; the snapshot stays as a disk snapshot; a later save works.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.bare_qmp import Qmp
from tests.support.console import Console
from tests.support.guest import qemu_version
from tests.support.refusals import SmallDisk
from tests.support.rig import MiB, Rig, process_state, wait_for, watchdogs
from tests.support.sample import FULL

ROUND = r"^D round (\d+)"
SAVES = int(os.environ.get("DISKCHAIN_RESCUES", "4"))  # how many failed saves the campaign makes
SEED = os.environ.get("DISKCHAIN_SEED", "1")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[tuple[Rig, SmallDisk]]:
    """A guest that rewrites 100 MiB of its memory for ever, on a filesystem of 600 MiB."""
    disk = SmallDisk(tmp_path, 600 * MiB)
    rig = Rig(disk.path / "vm", memory="256 MiB", modes="dirty100", targets=("vda",))
    rig.build(guest=True)
    rig.ok("start", "vm")
    yield rig, disk
    rig.destroy()
    disk.close()


def fill_but(disk: SmallDisk, left: int) -> None:
    """Take the room on the disk, except about `left` bytes."""
    status = os.statvfs(disk.path)
    size = status.f_bavail * status.f_frsize - left
    subprocess.run(["fallocate", "-l", str(size), str(disk.path / "filler")], check=True)


def failed_save(rig: Rig, disk: SmallDisk, name: str) -> tuple[int, str]:
    """Create a snapshot whose memory does not fit: room is taken away behind the back of the check."""
    fault = "skip:memory.reserve;stop:create.intent.after"
    process = rig.popen("create", "vm", name, "--memory", fault=fault)
    wait_for(lambda: process_state(process.pid) in ("T", "t") or process.poll() is not None, "create has begun")
    fill_but(disk, 60 * MiB)
    os.kill(process.pid, signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    disk.free()
    return process.returncode, err


def works_on(console: Console) -> None:
    """The guest goes on rewriting its memory, now: that is what hangs."""
    mark = console.mark()
    console.wait(ROUND, after=mark, timeout=30)
    console.wait(ROUND, after=console.mark(), timeout=30)


@pytest.mark.timeout(300)
def test_failed_saves_in_a_row_leave_a_running_guest(small: tuple[Rig, SmallDisk]) -> None:
    """Exit 12 each time, the guest works on without a boot; then a save works, and a revert to it."""
    (rig, disk), count = small, 10 if FULL else 4
    with Console(rig.console()) as console:
        console.wait(r"^D round 2$")
        works_on(console)
        for number in range(count):
            mark = console.mark()
            code, err = failed_save(rig, disk, f"f{number}")
            assert code == 12 and "without memory" in err, (code, err)
            works_on(console)
            assert not [line for _, line in console.lines(mark) if line.startswith("GUEST UP")]
            assert rig.ok("list", "vm", "--json").json["state"] == "running"
        rig.ok("create", "vm", "good", "--memory")
        works_on(console)
        mark = console.mark()
        rig.ok("revert", "vm", "good", "--discard", "-y")
        works_on(console)
        assert not [line for _, line in console.lines(mark) if line.startswith("GUEST UP")]
    states = {s["name"]: s["state"] for s in rig.ok("list", "vm", "--json").json["snapshots"]}
    assert states == {**{f"f{i}": "disk" for i in range(count)}, "good": "memory"}
    assert rig.file_verdict() == []


def write_protected(pid: int) -> int:
    """How many ranges of a process's memory userfaultfd write-protects."""
    return sum("uw" in line.split() for line in Path(f"/proc/{pid}/smaps").read_text().splitlines())


def killed_in_a_save_that_fails(rig: Rig, disk: SmallDisk, *, watched: bool) -> None:
    """Kill a create whose memory does not fit, once the guest runs again; and the watchdog before it, if it is not `watched`."""
    process = rig.popen("create", "vm", "f", "--memory",
                        fault="skip:memory.reserve;stop:create.intent.after;stop:create.saving.after")  # fmt: skip
    wait_for(lambda: process_state(process.pid) in ("T", "t"), "create has begun")
    fill_but(disk, 60 * MiB)
    os.kill(process.pid, signal.SIGCONT)
    wait_for(lambda: process_state(process.pid) not in ("T", "t"), "it goes on")
    wait_for(lambda: process_state(process.pid) in ("T", "t"), "memory is being saved")
    (watchdog,) = watchdogs(rig)
    if not watched:
        os.kill(watchdog, signal.SIGKILL)
    process.kill()
    process.communicate(timeout=60)


@pytest.mark.timeout(120)
def test_diskchain_killed_in_a_save_that_fails_the_watchdog_frees_the_guest(small: tuple[Rig, SmallDisk]) -> None:
    """Without `recover`, which then finds a guest that works. The watchdog does not stay longer than it is needed."""
    rig, disk = small
    with Console(rig.console()) as console:
        console.wait(r"^D round 2$")
        killed_in_a_save_that_fails(rig, disk, watched=True)
        wait_for(lambda: not watchdogs(rig), "the watchdog has done its work")
        works_on(console)
        disk.free()
        assert rig.run("recover", "vm").code == 0
        works_on(console)
        rig.ok("create", "vm", "good", "--memory")
        wait_for(lambda: not watchdogs(rig), "the save is over")
        works_on(console)


@pytest.mark.timeout(120)
def test_control_without_the_rescue_the_guest_hangs(small: tuple[Rig, SmallDisk]) -> None:
    """Known bad on QEMU < 10: if the guest went on by itself, the tests above would prove nothing.

    QEMU 10 takes its write protection back by itself: the guest goes on, and the rescue finds nothing to do.
    """
    rig, disk = small
    leaks = qemu_version() < (10, 0)
    with Console(rig.console()) as console:
        console.wait(r"^D round 2$")
        killed_in_a_save_that_fails(rig, disk, watched=False)
        hangs = False
        try:
            for _ in range(3):
                console.wait(ROUND, after=console.mark(), timeout=12)
        except TimeoutError:
            hangs = True
        disk.free()
        assert hangs == leaks
        if not leaks:
            wait_for(lambda: not write_protected(rig.pid() or 0), "QEMU has taken back its write protection")
        assert bool(write_protected(rig.pid() or 0)) == leaks
        assert rig.run("recover", "vm").code == 0
        works_on(console)


class MemoryDisk:
    """A filesystem of its own for the memory files: what happens to it does not happen to the guest's disks.

    It lies on a file on a disk (`below`) that may take less than it promises.
    """

    def __init__(self, place: Path, rig: Rig) -> None:
        (home,) = rig.dir.glob(".diskchain/*")
        self._place, self._made = place, 0
        self.at = home / "snapshots"
        self.at.mkdir(exist_ok=True)
        self._make()

    def _make(self) -> None:
        self._made += 1
        self.below = SmallDisk(self._place / str(self._made), 500 * MiB)
        self.disk = SmallDisk(self.below.path, 400 * MiB)
        subprocess.run(["mount", "--bind", self.disk.path, self.at], check=True)

    def again(self) -> None:
        """As after a repair: a new one. (The broken one may live on in other mount namespaces, and mount would find it.)"""
        self.close()
        self._make()

    def close(self) -> None:
        """Unmount it, and remove it."""
        subprocess.run(["umount", "--lazy", self.at], check=True)
        self.disk.close(keep=True)
        subprocess.run(["umount", "--lazy", self.below.path], check=True)
        self.below.file.unlink()


def make_full(memory: MemoryDisk, rig: Rig, chance: random.Random) -> str:
    """The filesystem fills up after so much."""
    left = chance.randrange(1, 100) * MiB
    fill_but(memory.disk, left)
    return f"full after {left // MiB} MiB"


def break_down(memory: MemoryDisk, rig: Rig, chance: random.Random) -> str:
    """Every access fails from some moment on (EIO)."""
    wait_for_part(memory, chance.randrange(1, 100) * MiB)
    memory.disk.emergency()
    return "EIO"


def cancel(memory: MemoryDisk, rig: Rig, chance: random.Random) -> str:
    """Somebody cancels the save: an admin at the monitor, another tool."""
    wait_for_part(memory, chance.randrange(1, 100) * MiB)
    (socket,) = rig.run_dir.glob("*/info.sock")
    monitor = Qmp(socket)
    monitor("migrate_cancel")
    monitor.close()
    return "cancelled"


def lose_writes(memory: MemoryDisk, rig: Rig, chance: random.Random) -> str:
    """The disk takes less than it promised: QEMU hears of no error, only who syncs the file does."""
    left = chance.randrange(1, 60) * MiB
    fill_but(memory.below, left)
    return f"EIO when it is synced, after {left // MiB} MiB"


def wait_for_part(memory: MemoryDisk, size: int) -> None:
    """Wait until so much of the memory was written."""
    wait_for(lambda: any(p.stat().st_size >= size for p in memory.at.glob("*/memory.part")), f"{size} bytes written")


CAUSES: tuple[Callable[[MemoryDisk, Rig, random.Random], str], ...] = (make_full, break_down, cancel, lose_writes)


def fail_once(rig: Rig, memory: MemoryDisk, number: int, chance: random.Random) -> str:
    """Let one save fail; return what was done to it. The snapshot stays, without memory, at the latest by `recover`."""
    cause = CAUSES[number % len(CAUSES)]
    halt = ";stop:create.intent.after" if cause in (make_full, lose_writes) else ""
    process = rig.popen("create", "vm", f"f{number}", "--memory", fault=f"skip:memory.reserve{halt}")
    if halt:
        wait_for(lambda: process_state(process.pid) in ("T", "t") or process.poll() is not None, "create has begun")
    what = cause(memory, rig, chance)
    if halt:
        os.kill(process.pid, signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in ((1, 3, 12) if cause is break_down else (12,)), (what, process.returncode, err)
    if cause is make_full:
        memory.disk.free()
    if cause is lose_writes:
        memory.below.free()
    if cause in (break_down, lose_writes):
        memory.again()
    return f"{what}: exit {process.returncode}"


@pytest.mark.timeout(120 + 60 * SAVES)
def test_many_failed_saves_of_many_causes_never_hang_the_guest(small: tuple[Rig, SmallDisk], tmp_path: Path) -> None:
    """DISKCHAIN_RESCUES saves on one guest: full, EIO, cancelled, lost, any moment. It works on after each, never booted."""
    rig, _ = small
    chance = random.Random(SEED)
    memory = MemoryDisk(tmp_path / "memory", rig)
    try:
        with Console(rig.console()) as console:
            console.wait(r"^D round 2$")
            for number in range(SAVES):
                works_on(console)
                what = fail_once(rig, memory, number, chance)
                print(f"{number + 1} of {SAVES}: {what}", flush=True)
                works_on(console)
                rig.ok("recover", "vm")
            assert len([line for _, line in console.lines() if line.startswith("GUEST UP")]) == 1
            rig.ok("create", "vm", "good", "--memory")
            works_on(console)
        states = {s["name"]: s["state"] for s in rig.ok("list", "vm", "--json").json["snapshots"]}
        assert states == {**{f"f{i}": "disk" for i in range(SAVES)}, "good": "memory"}
        assert rig.file_verdict() == []
    finally:
        rig.destroy()
        memory.close()
