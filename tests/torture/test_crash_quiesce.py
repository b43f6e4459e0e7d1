"""Kills around frozen file systems: whoever dies, whenever, the guest's program writes again.

Of `create --quiesce` only the steps between `prepared` and `switched` differ from a create without it, whose matrix is
test_crash_live.py.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.support.quiet import Quiet
from tests.support.rig import process_state, wait_for
from tests.support.sample import some

CREATE = ("create", "vm")
WORST = ["create.frozen#1", "create.still-frozen#1", "create.paused#1", "create.captured#1", "create.resumed#1"]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quiet]:
    """One guest that counts, and writes to a file system."""
    found = Quiet(tmp_path_factory.mktemp("quiesce") / "vm")
    yield found
    found.destroy()


def sane(quiet: Quiet, mark: int) -> list[str]:
    """After `recover`: the guest writes, counts, was not restarted, and is not frozen."""
    answer = quiet.rig.run("recover", "vm", "--json")
    wrong = [] if answer.code == 0 else [f"recover ended with {answer.code}: {answer.err}"]
    wrong += ["recover found it frozen"] if answer.json.get("outcome") == "thawed" else []
    wrong += [] if not answer.json.get("warnings") else [str(answer.json["warnings"])]
    quiet.writes()
    wrong += ["it was restarted" for _, line in quiet.console.lines(mark) if line.startswith("C START")]
    found = quiet.rig.run("check", "vm", "--json").json["findings"]
    return [*wrong, *quiet.console.bad(after=mark), *quiet.rig.file_verdict(),
            *[f["code"] for f in found if f["code"] == "guest-frozen"]]  # fmt: skip


@pytest.mark.timeout(600)
def test_create_quiesced_killed_at_every_step_the_guest_writes_on(
    quiet: Quiet, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL at each point; the guest is thawed without `recover`, which then finds nothing frozen."""
    points = quiet.rig.points(*CREATE, "first", "--quiesce", "--disk-only")
    begin, end = points.index("create.prepared.after#1"), points.index("create.switched.after#1")
    chosen, wrong = points[begin : end + 1], []
    tried = some(chosen, 5)
    for index, point in enumerate(tried):
        mark = quiet.console.mark()
        if not quiet.rig.killed(*CREATE, f"k{index}", "--quiesce", "--disk-only", at=point):
            wrong.append(f"{point}: was not reached")
        quiet.writes(timeout=30)
        wrong += [f"{point}: {w}" for w in sane(quiet, mark)]
    for snapshot in quiet.rig.ok("list", "vm", "--json").json["snapshots"]:
        if snapshot["quiesced"]:
            assert not quiet.needs_recovery(snapshot["name"])
    with capsys.disabled():
        print(f" [{len(tried)} of {len(chosen)} points]", end="")
    assert not wrong, "\n".join(wrong)
    assert {"create.freezing#1", "create.frozen#1", "create.still-frozen#1", "create.thawed#1"} <= set(chosen)


def stopped_at(quiet: Quiet, point: str, *args: str) -> int:
    """Start a create and wait until it stands at the point; return its pid."""
    process = quiet.rig.popen(*CREATE, *args, fault=f"stop:{point}")
    wait_for(lambda: process_state(process.pid) in ("T", "t") or process.poll() is not None, "it stops at the point")
    assert process.poll() is None, f"{point} was not reached: {process.communicate()}"
    quiet.process = process
    return process.pid


@pytest.mark.timeout(300)
@pytest.mark.parametrize("point", WORST)
def test_watchdog_killed_while_frozen_diskchain_thaws(quiet: Quiet, point: str) -> None:
    """Then diskchain goes on: the guest writes, and the snapshot is whole or was never made."""
    mark = quiet.console.mark()
    pid = stopped_at(quiet, point, f"w-{point}".replace("#", "-"), "--quiesce", "--disk-only")
    (watchdog,) = quiet.watchdogs()
    os.kill(watchdog, signal.SIGKILL)
    os.kill(pid, signal.SIGCONT)
    out, err = quiet.process.communicate(timeout=120)
    assert "Traceback" not in err and "bug" not in err, err
    quiet.writes()
    assert sane(quiet, mark) == []
    name = f"w-{point}".replace("#", "-")
    if quiet.process.returncode == 0:
        assert quiet.snapshot(name)["quiesced"] and not quiet.needs_recovery(name)
    else:
        assert (quiet.process.returncode, name in quiet.rig.snapshots()) == (1, False), out + err


@pytest.mark.timeout(300)
@pytest.mark.parametrize("point", ["create.frozen#1", "create.paused#1", "create.resumed#1"])
def test_both_killed_while_frozen_recover_thaws(quiet: Quiet, point: str) -> None:
    """Nobody is left to thaw it: it stands (the control), until `recover`."""
    mark = quiet.console.mark()
    pid = stopped_at(quiet, point, f"b-{point}".replace("#", "-"), "--quiesce")
    (watchdog,) = quiet.watchdogs()
    os.kill(watchdog, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    quiet.process.communicate(timeout=60)
    if point != "create.paused#1":
        assert quiet.stands()
    assert sane(quiet, mark) == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("point", ["create.frozen#1", "create.disks-switched#1"])
def test_diskchain_stopped_while_frozen_the_guest_writes_within_ten_seconds(
    quiet: Quiet, point: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGSTOP: the watchdog thaws when the time is over; afterwards diskchain says that it was not quiesced."""
    began, mark = time.monotonic(), quiet.console.mark()
    name = f"s-{point}".replace("#", "-")
    pid = stopped_at(quiet, point, name, "--quiesce", "--disk-only", "--json")
    quiet.writes(timeout=30)
    gap = quiet.console.longest_gap(began, time.monotonic(), r"^F ")
    os.kill(pid, signal.SIGCONT)
    out, err = quiet.process.communicate(timeout=120)
    with capsys.disabled():
        print(f" [{point}: the guest did not write for {gap:.1f} s]", end="")
    assert gap < 10
    if quiet.process.returncode == 12:
        assert not quiet.snapshot(name)["quiesced"] and quiet.snapshot(name)["consistency"] == "crash"
    else:
        assert (quiet.process.returncode, name in quiet.rig.snapshots()) == (1, False), out + err
    assert sane(quiet, mark) == []


@pytest.mark.timeout(300)
def test_revert_to_quiesced_memory_killed_at_every_late_step_recover_wakes_the_guest(quiet: Quiet) -> None:
    """SIGKILL between loading the memory and the thaw: `recover` thaws and sets the clock."""
    wrong: list[str] = []
    quiet.rig.ok(*CREATE, "q", "--quiesce", "--memory")
    points = quiet.rig.points("revert", "vm", "q", "-y", "--discard")
    chosen = points[points.index("revert.loaded.before#1") : points.index("revert.thawed#1") + 1]
    assert {"revert.loaded.after#1", "revert.resumed#1"} <= set(chosen)
    for point in chosen:
        if not quiet.rig.killed("revert", "vm", "q", "-y", "--discard", at=point):
            wrong.append(f"{point}: was not reached")
        mark = quiet.console.mark()
        wrong += [f"{point}: {w}" for w in sane(quiet, mark)]
        if abs(quiet.writes()[1] - time.time()) > 3:
            wrong.append(f"{point}: its clock is wrong")
    assert not wrong, "\n".join(wrong)
