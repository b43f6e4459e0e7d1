"""The crash matrix on a running guest that counts in memory and on two disks: its own verdict is the oracle.

After each kill and `recover` alone: the guest runs, it never saw memory and disks from different instants, and every
snapshot that says it has memory brings back exactly its counter.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.console import Console
from tests.support.rig import Rig, process_state, wait_for
from tests.support.sample import some

COUNT = r"^C (\d+) bad="


class Live:
    """A running rig and its console."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.console = Console(rig.console())

    def counts(self, rounds: int = 20) -> int:
        """Wait until the guest has counted some more rounds; return the last."""
        mark = self.console.mark()
        first = int(self.console.wait(COUNT, after=mark)[1])
        wait_for(lambda: (self.console.counter() or 0) >= first + rounds, "the guest counts on")
        return self.console.counter() or 0

    def restarted(self) -> None:
        """Start over with a freshly booted guest."""
        mark = self.console.mark()
        self.rig.ok("start", "vm")
        self.console.wait(COUNT, after=mark)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    """A machine with two disks that counts."""
    rig = Rig(tmp_path / "vm", cpus=1)
    rig.build(guest=True)
    rig.ok("start", "vm")
    found = Live(rig)
    found.console.wait(r"^C 50 bad=")
    yield found
    found.console.close()
    rig.destroy()


def snapshot_states(rig: Rig) -> dict[str, str]:
    """Names of the snapshots and whether they have memory."""
    return {s["name"]: s["state"] for s in rig.ok("list", "vm", "--json").json["snapshots"]}


def killed_and_recovered(live: Live, point: str, *args: str) -> list[str]:
    """Kill a command at a point, recover, let the guest count on; return what is wrong then."""
    rig, mark, wrong = live.rig, live.console.mark(), []
    if not rig.killed(*args, at=point):
        wrong.append("was not reached")
    answer = rig.run("recover", "vm")
    if answer.code != 0:
        wrong.append(f"recover ended with {answer.code}: {answer.err}")
    live.counts(5)
    wrong += [*live.console.bad(after=mark), *rig.file_verdict()]
    return [f"{point}: {w}" for w in wrong]


@pytest.mark.timeout(600)
def test_create_killed_at_every_step_the_guest_counts_on(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL at every point of `create --memory`; the guest must not even notice."""
    rig, wrong = live.rig, []
    points = rig.points("create", "vm", "first", "--memory")
    tried = some(points, 5)
    for index, point in enumerate(tried):
        mark = live.console.mark()
        wrong += killed_and_recovered(live, point, "create", "vm", f"k{index}", "--memory")
        wrong += [
            f"{point}: the guest was restarted" for t, line in live.console.lines(mark) if line.startswith("C START")
        ]
    states = snapshot_states(rig)
    for name, state in states.items():
        if state == "memory":
            wrong += back_to(live, name)
    with capsys.disabled():
        print(
            f" [{len(tried)} of {len(points)} points, {len(states)} snapshots, "
            f"{list(states.values()).count('memory')} with memory]",
            end="",
        )
    assert not wrong, "\n".join(wrong)
    assert len(points) >= 20


def back_to(live: Live, name: str) -> list[str]:
    """Revert to a snapshot with memory; return what the guest has to say against it."""
    mark = live.console.mark()
    live.rig.ok("revert", "vm", name, "--discard", "-y")
    live.console.wait(COUNT, after=mark)
    live.counts(10)
    started = [line for t, line in live.console.lines(mark) if line.startswith("C START")]
    return [f"revert to {name}: {line}" for line in [*live.console.bad(after=mark), *started]]


@pytest.mark.timeout(600)
def test_revert_killed_at_every_step_ends_in_one_of_two_whole_states(
    live: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL at every point of a revert with memory: afterwards the guest is in the snapshot, or back (rebooted)."""
    rig, wrong = live.rig, []
    rig.ok("create", "vm", "s", "--memory")
    points = rig.points("revert", "vm", "s", "-y")
    live.counts()
    tried = some(points, 4)
    for point in tried:
        wrong += killed_and_recovered(live, point, "revert", "vm", "s", "-y")
    with capsys.disabled():
        print(f" [{len(tried)} of {len(points)} points]", end="")
    assert not wrong, "\n".join(wrong)
    assert len(points) >= 17


QEMU_KILLED_AT = ["create.prepared.after#1", "create.paused#1", "create.disks-switched#1", "create.captured#1",
                  "create.resumed#1", "create.saving.after#1", "revert.stopping#1", "revert.switched.after#1",
                  "revert.loaded.after#1"]  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize("point", some(QEMU_KILLED_AT, 4))
def test_qemu_killed_in_the_middle_nothing_is_lost(live: Live, point: str) -> None:
    """SIGKILL of QEMU while diskchain stands at a point; then diskchain goes on, then `recover`, then a cold start."""
    rig = live.rig
    args = ("create", "vm", "s2", "--memory") if point.startswith("create") else ("revert", "vm", "s1", "-y")
    rig.ok("create", "vm", "s1", "--memory")
    counted = live.counts()
    process = rig.popen(*args, fault=f"stop:{point}")
    wait_for(lambda: _stopped(process.pid) or process.poll() is not None, "diskchain stops at the point")
    assert process.poll() is None, f"{point} was not reached: {process.communicate()}"
    pid = rig.pid()
    if pid:
        os.kill(pid, signal.SIGKILL)
    os.kill(process.pid, signal.SIGCONT)
    _, err = process.communicate(timeout=120)
    assert "Traceback" not in err and "bug" not in err, err
    rig.ok("recover", "vm")
    assert rig.file_verdict() == []
    mark = live.console.mark()
    if rig.pid() is None:
        live.restarted()
    live.counts(5)
    assert live.console.bad(after=mark) == []
    started = [int(m[1]) for t, line in live.console.lines(mark) if (m := re.match(r"C START (\d+)", line))]
    if point.startswith("create") and started:
        assert started[-1] >= counted - 5, "writes that were on disk before the kill are gone"
    assert "s1" in snapshot_states(rig)


def _stopped(pid: int) -> bool:
    return process_state(pid) in ("T", "t")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("action", ["kill", "stop"])
@pytest.mark.parametrize("point", some(["create.paused#1", "create.disks-switched#1", "create.captured#1"], 2))
def test_diskchain_gone_while_the_guest_is_paused_the_guest_runs_within_ten_seconds(
    live: Live, action: str, point: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL and SIGSTOP between stop and cont: the watchdog lets the guest go on; its own clock measures the gap."""
    began = time.monotonic()
    mark = live.console.mark()
    process = live.rig.popen("create", "vm", "s1", "--memory", fault=f"{action}:{point}")
    wait_for(lambda: _stopped(process.pid) or process.poll() is not None, "diskchain is gone")
    time.sleep(0.2)
    live.console.wait(r"^T ", after=live.console.mark(), timeout=12)
    live.counts(5)
    gap = live.console.longest_gap(began, time.monotonic())
    with capsys.disabled():
        print(f" [{action} at {point}: the guest stood {gap * 1000:.0f} ms]", end="")
    if action == "stop":
        os.kill(process.pid, signal.SIGCONT)
    process.communicate(timeout=120)
    assert gap < 10
    live.rig.ok("recover", "vm")
    live.counts(5)
    assert live.console.bad(after=mark) == [] and live.rig.file_verdict() == []
    for name, state in snapshot_states(live.rig).items():
        if state == "memory":
            assert back_to(live, name) == []


@pytest.mark.timeout(120)
def test_ctrl_c_during_the_save_leaves_it_to_the_finisher(live: Live) -> None:
    """Ctrl-C detaches: exit 130, the guest runs, and a little later the snapshot has its memory."""
    process = live.rig.popen("create", "vm", "s1", "--memory", fault="stop:create.saving.after#1")
    wait_for(lambda: _stopped(process.pid) or process.poll() is not None, "the save begins")
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    wait_for(lambda: snapshot_states(live.rig).get("s1") == "memory", "the finisher finishes", timeout=30)
    assert back_to(live, "s1") == []
