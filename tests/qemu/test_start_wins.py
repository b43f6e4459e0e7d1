"""`start` while another command merges, on real images: it does not wait, and no state is hurt; the settings that let it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.refusals import grow_tree
from tests.support.rig import Answer, MiB, Rig, wait_for
from tests.support.roaming import Roaming

# s1 - before-revert-1, s1 - s3 - (now)
MERGES = {
    "delete": (("delete", "vm", "s3", "-y"), {"s3"}),
    "accept": (("accept", "vm", "--drop-branches", "-y"), {"s1", "s3", "before-revert-1"}),
    "copy": (("delete", "vm", "s1", "--copy", "-y"), {"s1"}),
    "merge": (("merge", "vm"), {"s3"}),
}
SLOW = ("--rate", "1M")  # a minute and more


def grow(rig: Rig) -> None:
    """Two branches, and much in the layers that are moved."""
    rig.build(guest=False)
    for pattern, name, offset, length in (
        (1, "s1", 0, 32),
        (2, "before-revert-1", 8, 1),
        (3, "s3", 16, 1),
        (4, "now", 24, 64),
    ):
        rig.write(pattern, offset * MiB, length * MiB)
        rig.remember(name)
        if name == "before-revert-1":
            rig.ok("revert", "vm", "s1", "-y")
        elif name != "now":
            rig.ok("create", "vm", name)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """One disk."""
    made = Rig(tmp_path / "vm", targets=("vda",), memory="64 MiB", size=128 * MiB)
    yield made
    made.destroy()


def in_records(rig: Rig, name: str) -> Path:
    """A file of the VM's records."""
    (path,) = rig.dir.glob(".diskchain/*/catalog.json")
    return path.with_name(name)


def at_work(rig: Rig) -> bool:
    """Whether data is being moved, and somebody could be told how far it is."""
    return "merging" in in_records(rig, "lock").read_text()


def end_of(process: subprocess.Popen[str]) -> Answer:
    """Wait for a command's end."""
    out, err = process.communicate(timeout=150)
    return Answer(process.returncode, out, err)


def starts_by_hand(rig: Rig) -> subprocess.Popen[str]:
    """A start that has come so far that it asks for its way."""
    start = rig.popen("start", "vm", "--paused")
    wait_for(lambda: in_records(rig, "start-waits").exists() or start.poll() is not None, "it asks")
    return start


def check_pending_then_merged(rig: Rig, gone: set[str]) -> None:
    """The VM is on, and every state is right; stop carries the merge out."""
    assert rig.pid() and rig.verdict(present="now") == [] and gone.isdisjoint(rig.snapshots())
    assert {one["snapshot"] for one in rig.ok("list", "vm", "--json").json["pending"]} <= gone
    rig.ok("stop", "vm", "--force", "-y")
    left = [one["op"] for one in rig.ok("list", "vm", "--json").json["pending"]]
    assert rig.verdict(present="now") == [] and left == ["wait"] * len(left)  # at a fork
    assert not in_records(rig, "start-waits").exists()


@pytest.mark.parametrize("name", MERGES)
def test_start_stops_the_merge_of_another_command_and_it_is_pending(rig: Rig, name: str) -> None:
    """Down, up, several at once, and one that was put off before."""
    grow(rig)
    words, gone = MERGES[name]
    if name == "merge":
        rig.ok("delete", "vm", "s3", "--when-stopped", "-y")
    merge = rig.popen(*words, *SLOW, "--json")
    wait_for(lambda: at_work(rig), "the merge moves data")
    start = rig.popen("start", "vm", "--paused", "--wait", "0s")
    answer, started = end_of(merge), end_of(start)
    assert (answer.code, started.code) == (3, 0), (answer, started)
    error = json.loads(answer.out)["error"]
    assert error["message"] == f"merge interrupted: vm was started by pid {start.pid}; it is pending"
    assert (error["code"], error["kind"]) == (3, "Unfinished") and "diskchain stop vm" in error["hint"]
    assert f"gives way to the start: {words[0]} vm (pid {merge.pid}" in started.err
    check_pending_then_merged(rig, gone)


@pytest.mark.parametrize(
    ("point", "codes"),
    [
        ("delete.tombstoned", {3}),  # before data is moved
        ("merge.committing", {0, 3}),  # so little data can be moved before it is looked again whether a start waits
        ("merge.committed", {0, 3}),
        ("delete.committed-one", {0}),  # as good as done: nothing waits any more
        ("delete.relink.before", {0}),
        ("delete.relink.after", {0}),  # only forward
        ("delete.trashed", {0}),
        ("delete.done.after", {0}),
    ],
)
def test_start_that_asks_at_any_step_is_right(rig: Rig, point: str, codes: set[int]) -> None:
    """Before data is moved and while it is, the merge is put off; afterwards it ends, and the start waits for that."""
    grow_tree(rig)
    merge = rig.popen("delete", "vm", "s3", "-y", fault=f"stop:{point}")
    os.waitid(os.P_PID, merge.pid, os.WSTOPPED | os.WNOWAIT)
    start = starts_by_hand(rig)
    merge.send_signal(signal.SIGCONT)
    answer, started = end_of(merge), end_of(start)
    assert answer.code in codes and started.code == 0, (answer, started)
    pending = [one["snapshot"] for one in rig.ok("list", "vm", "--json").json["pending"]]
    assert ("s3" in pending) == (answer.code == 3), pending
    check_pending_then_merged(rig, {"s3"})


def test_start_that_is_killed_while_it_asks_leaves_nothing_that_stops_a_merge(rig: Rig) -> None:
    """The file that it asked with is left; nobody holds it."""
    grow_tree(rig)
    merge = rig.popen("delete", "vm", "s3", "-y", fault="stop:merge.committing")
    os.waitid(os.P_PID, merge.pid, os.WSTOPPED | os.WNOWAIT)
    start = starts_by_hand(rig)
    start.kill()
    start.communicate()
    assert in_records(rig, "start-waits").exists()
    merge.send_signal(signal.SIGCONT)
    assert end_of(merge).code == 0
    assert rig.verdict(present="now") == [] and "s3" not in rig.snapshots()


def test_start_waits_for_an_operation_that_is_no_merge_as_ever(rig: Rig) -> None:
    """A create is not disturbed."""
    grow_tree(rig)
    create = rig.popen("create", "vm", "s4", fault="stop:create.intent.after")
    os.waitid(os.P_PID, create.pid, os.WSTOPPED | os.WNOWAIT)
    answer = rig.run("start", "vm", "--paused", "--wait", "1s", "--json")
    assert answer.code == 5 and "create vm" in answer.json["error"]["message"], answer
    create.send_signal(signal.SIGCONT)
    assert end_of(create).code == 0 and "s4" in rig.snapshots() and rig.pid() is None


def test_start_under_wait_lets_the_merge_end(rig: Rig) -> None:
    """One line tells what it waits for, then how far that is."""
    grow(rig)
    rig.configure('[merge]\non_start = "wait"\n')
    merge = rig.popen("delete", "vm", "s3", "-y", "--rate", "12M")
    wait_for(lambda: at_work(rig), "the merge moves data")
    started = rig.ok("start", "vm", "--paused", "--wait", "0s")
    assert end_of(merge).code == 0
    assert f"waiting for the end of a merge: delete vm (pid {merge.pid}" in started.err
    assert rig.verdict(present="now") == [] and rig.pid() and "s3" not in rig.snapshots()
    assert rig.ok("list", "vm", "--json").json["pending"] == []


def test_start_under_refuse_names_the_merge_and_how_far_it_is(rig: Rig) -> None:
    """Exit 5; the merge goes on. One that nobody is at work on is put off as ever."""
    grow(rig)
    rig.configure('[merge]\non_start = "refuse"\n')
    merge = rig.popen("delete", "vm", "s3", "-y", *SLOW)
    wait_for(lambda: at_work(rig), "the merge moves data")
    answer = rig.run("start", "vm", "--paused", "--json")
    message = answer.json["error"]["message"]
    assert answer.code == 5 and f"delete vm (pid {merge.pid}" in message and " %" in message, message
    assert rig.pid() is None and merge.poll() is None
    merge.terminate()
    assert end_of(merge).code == 128 + signal.SIGTERM
    rig.ok("start", "vm", "--paused")
    check_pending_then_merged(rig, {"s3"})


def test_start_makes_a_detach_that_was_not_done_forgotten(tmp_path: Path) -> None:
    """The VM stands on its base, as before."""
    rig = Roaming(tmp_path / "vm", size=8 * MiB)
    try:
        grow_tree(rig)
        detach = rig.popen("detach", "vm", fault="stop:merge.committing")
        os.waitid(os.P_PID, detach.pid, os.WSTOPPED | os.WNOWAIT)
        start = starts_by_hand(rig)
        detach.send_signal(signal.SIGCONT)
        answer, started = end_of(detach), end_of(start)
        if answer.code == 0 and started.code == 0:  # it was done before it looked: the start waited for that
            assert rig.template not in rig.images() and rig.verdict(present="now") == ["orphan base/template.qcow2"]
            return
        assert (answer.code, started.code) == (3, 0), (answer, started)
        assert f"detach interrupted: vm was started by pid {start.pid}" in answer.err
        assert rig.verdict(present="now") == [] and rig.template in rig.images()
        rig.ok("stop", "vm", "--force", "-y")
        rig.ok("detach", "vm")
        assert rig.template not in rig.images() and rig.verdict(present="now") == ["orphan base/template.qcow2"]
    finally:
        rig.destroy()


# -- create carries out what is pending --------------------------------------------------------------------------------


def put_off(rig: Rig) -> None:
    """A deleted s3 of a VM that is off."""
    grow_tree(rig)
    rig.ok("delete", "vm", "s3", "--when-stopped", "-y")
    rig.expected["s4"] = rig.expected["now"]


def pending(rig: Rig) -> list[str]:
    """What waits for its merge."""
    return [one["snapshot"] for one in rig.ok("list", "vm", "--json").json["pending"]]


def test_create_on_a_vm_that_is_off_merges_what_is_pending_first(rig: Rig) -> None:
    """With --no-merge it does not; the plan says so; a name that is taken is refused before."""
    put_off(rig)
    steps = rig.ok("create", "vm", "s4", "-n", "--json").json["plan"]["steps"]
    assert steps[0] == "merge what was deleted: s3"
    assert rig.run("create", "vm", "s1").code == 2 and pending(rig) == ["s3"]
    rig.ok("create", "vm", "s4", "--no-merge")
    assert pending(rig) == ["s3"] and rig.verdict(present="now") == []
    rig.ok("delete", "vm", "s4", "--when-stopped", "-y")
    body = rig.ok("create", "vm", "s4", "--json").json
    assert {m["disk"] for m in body["merged"]} == {"vda"} and body["snapshot"]["name"] == "s4"
    assert pending(rig) == [] and rig.verdict(present="now") == []


@pytest.mark.parametrize("fault", ["full:delete.intent.before", "fail:merge.committing", "full:merge.committed"])
def test_create_goes_on_when_the_pending_merge_fails(rig: Rig, fault: str) -> None:
    """It is pending again, whatever it came to."""
    put_off(rig)
    answer = rig.run("create", "vm", "s4", "--json", fault=fault)
    assert answer.code == 0, answer
    assert "s3" in pending(rig) and "is not merged yet" in answer.json["warnings"][0]
    assert rig.verdict(present="now") == []
    rig.ok("merge", "vm")
    assert rig.verdict(present="now") == [] and pending(rig) == [] and "s4" in rig.snapshots()


def test_create_goes_on_when_the_pending_merge_is_refused(rig: Rig) -> None:
    """Somebody else stands on what is merged into."""
    put_off(rig)
    into = next(rig.path_of(i) for s in rig.catalog()["snapshots"].values() if s["name"] == "s3"
                for key, i in rig.catalog()["images"].items() if key == s["disks"]["vda"])  # fmt: skip
    stranger = rig.dir / "stranger"
    rig.qemu_img("create", "-q", "-f", "qcow2", "-b", str(into), "-F", "qcow2", str(stranger))
    answer = rig.ok("create", "vm", "s4")
    assert "warning: what was deleted of vm is not merged yet" in answer.err and "stranger" in answer.err
    assert pending(rig) == ["s3"] and rig.verdict(present="now") == []


def test_create_makes_its_snapshot_when_a_start_stops_its_merge(rig: Rig) -> None:
    """The start gets a VM that is off, and the snapshot is there."""
    put_off(rig)
    create = rig.popen("create", "vm", "s4", fault="stop:merge.committing")
    os.waitid(os.P_PID, create.pid, os.WSTOPPED | os.WNOWAIT)
    start = starts_by_hand(rig)
    create.send_signal(signal.SIGCONT)
    answer, started = end_of(create), end_of(start)
    assert (answer.code, started.code) == (0, 0), (answer, started)
    assert "s4" in rig.snapshots()
    check_pending_then_merged(rig, {"s3"})


def test_create_of_a_running_vm_and_revert_leave_what_is_pending(rig: Rig) -> None:
    """Nobody who goes back, or starts, waits for a merge."""
    put_off(rig)
    rig.ok("start", "vm", "--paused")
    rig.ok("create", "vm", "s4", "--disk-only")
    rig.ok("stop", "vm", "--force", "-y", "--no-merge")
    rig.ok("revert", "vm", "s1", "-y", "--keep-as", "kept")
    assert pending(rig) == ["s3"]
