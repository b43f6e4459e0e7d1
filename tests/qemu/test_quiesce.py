"""create --quiesce and what comes after it, with the real guest agent in the micro guest, and with agents that lie.

Real guest, real agent, real ext4: a frozen layer's file system is judged by e2fsck.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.quiet import Quiet
from tests.support.rig import Rig, wait_for


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quiet]:
    """One guest for all tests here; each leaves it running, thawed, without snapshots that matter to others."""
    found = Quiet(tmp_path_factory.mktemp("quiesce") / "vm")
    yield found
    found.destroy()


def picture(quiet: Quiet) -> tuple[Any, list[Path]]:
    """What must not change when nothing is changed."""
    return quiet.rig.catalog(), sorted(p for p in quiet.rig.dir.iterdir() if p.suffix in (".qcow2", ".raw"))


def test_create_quiesced_leaves_a_clean_file_system_and_without_it_the_journal_is_needed(quiet: Quiet) -> None:
    """The same guest, writing all the time: frozen = clean, not frozen = recovery needed (the control)."""
    answer = quiet.rig.ok("create", "vm", "clean", "--quiesce", "--disk-only", "--json").json
    assert answer["snapshot"]["consistency"] == "quiesced" and answer["snapshot"]["quiesced"] is True
    quiet.writes()
    assert quiet.rig.ok("create", "vm", "dirty", "--disk-only", "--json").json["snapshot"]["consistency"] == "crash"
    assert quiet.needs_recovery("dirty") and not quiet.needs_recovery("clean")
    assert quiet.console.bad() == []


def test_revert_to_quiesced_memory_the_guest_is_thawed_and_its_clock_is_right(quiet: Quiet) -> None:
    """Its memory holds frozen file systems: after the revert it writes, and knows what time it is."""
    answer = quiet.rig.ok("create", "vm", "q", "--quiesce", "--memory", "--json").json
    assert answer["snapshot"]["consistency"] == "memory" and answer["snapshot"]["quiesced"] is True
    assert not quiet.needs_recovery("q")
    quiet.writes()
    quiet.rig.ok("pause", "vm")
    time.sleep(4)  # what the guest's clock will be behind
    mark = quiet.console.mark()
    told = quiet.rig.ok("revert", "vm", "q", "-y", "--json").json
    assert "warnings" not in told
    assert abs(quiet.writes()[1] - time.time()) <= 3
    assert quiet.console.bad(after=mark) == []
    # the control: the same with the clock left alone, and paused: thawed when it runs
    quiet.configure("[revert]\nset_clock = false\n")
    quiet.rig.ok("revert", "vm", "q", "-y", "--discard", "--paused")
    quiet.configure("[revert]\nset_clock = false\n")
    quiet.rig.ok("resume", "vm")
    assert time.time() - quiet.writes()[1] > 5
    quiet.configure("")


def test_resume_after_a_paused_revert_thaws_and_sets_the_clock(quiet: Quiet) -> None:
    """`revert --paused` leaves it frozen; whoever resumes it wakes it, once."""
    quiet.rig.ok("create", "vm", "p", "--quiesce", "--memory=paused")
    assert quiet.snapshot("p")["quiesced"]
    quiet.rig.ok("revert", "vm", "p", "-y", "--paused")
    time.sleep(3)
    assert quiet.rig.catalog()["asleep"] is True
    quiet.rig.ok("resume", "vm")
    assert abs(quiet.writes()[1] - time.time()) <= 3
    assert quiet.rig.catalog()["asleep"] is False


def test_create_quiesced_of_a_paused_vm_is_refused(quiet: Quiet) -> None:
    """Nothing can be frozen in it."""
    quiet.rig.ok("pause", "vm")
    before = picture(quiet)
    answer = quiet.rig.run("create", "vm", "x", "--quiesce", "--json")
    assert answer.code == 6 and "paused" in answer.json["error"]["message"]
    assert picture(quiet) == before
    quiet.rig.ok("resume", "vm")


SILENT = {"guest-sync-delimited": None}
LIARS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "silent": (6, "did not answer", SILENT),
    "nonsense": (6, "nonsense", {"guest-info": b'{"return": {"supported_commands": 5}}\n'}),
    "without-freeze": (6, "does not carry out", {"guest-info": {"supported_commands": []}}),
    "frozen-already": (6, "frozen already", {"guest-fsfreeze-status": "frozen"}),
    "hangs-in-freeze": (1, "did not answer guest-fsfreeze-freeze", {"guest-fsfreeze-freeze": None}),
    "refuses": (1, "refused guest-fsfreeze-freeze: no", {"guest-fsfreeze-freeze": b'{"error": {"desc": "no"}}\n'}),
    "nothing-to-freeze": (1, "no file system", {"guest-fsfreeze-freeze": 0}),
    "thaws-before-the-pause": (1, "thawed before", {"guest-fsfreeze-status": "thawed"}),
}


@pytest.mark.parametrize("lie", LIARS)
def test_create_quiesced_with_an_agent_that_lies_changes_nothing(quiet: Quiet, lie: str) -> None:
    """An error that says it, everything as before; whatever was told to freeze was told to thaw."""
    code, words, answers = LIARS[lie]
    quiet.configure("[create]\nfreeze_timeout = 1\n")
    before = picture(quiet)
    with quiet.fake_agent(answers) as agent:
        answer = quiet.rig.run("create", "vm", "x", "--quiesce", "--json")
        if "guest-fsfreeze-freeze" in agent.asked:
            wait_for(lambda: agent.asked[-1] == "guest-fsfreeze-thaw", "it is told to thaw", timeout=30)
    quiet.configure("")
    assert (answer.code, words in answer.json["error"]["message"]) == (code, True), answer.out + answer.err
    assert picture(quiet) == before
    quiet.writes()
    wait_for(lambda: not quiet.watchdogs(), "the watchdog ends")


def test_create_quiesced_interrupted_in_the_freeze_is_thawed_and_nothing_is_changed(quiet: Quiet) -> None:
    """SIGTERM while the agent takes its time: exit 143; the thaw is sent behind the freeze."""
    before = picture(quiet)
    with quiet.fake_agent({"guest-fsfreeze-freeze": None}) as agent:
        process = quiet.rig.popen("create", "vm", "x", "--quiesce")
        wait_for(lambda: "guest-fsfreeze-freeze" in agent.asked, "it is told to freeze")
        process.terminate()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM, err
        wait_for(lambda: agent.asked[-1] == "guest-fsfreeze-thaw", "it is told to thaw", timeout=30)
    assert picture(quiet) == before
    quiet.writes()


def test_create_quiesced_with_a_flood_changes_nothing(quiet: Quiet) -> None:
    """Garbage without end."""
    before = picture(quiet)
    with quiet.fake_agent(flood=b"garbage\n\xff" * 8192):
        answer = quiet.rig.run("create", "vm", "x", "--quiesce", "--json")
    assert answer.code == 6 and "flood" in answer.json["error"]["message"]
    assert picture(quiet) == before
    quiet.writes()


def test_create_quiesced_the_agent_does_not_answer_the_thaw_says_so_and_recover_thaws(quiet: Quiet) -> None:
    """Exit 12 with the way out; the watchdog goes on trying, and thaws when the agent comes back."""
    with quiet.fake_agent({"guest-fsfreeze-thaw": None}) as agent:
        answer = quiet.rig.run("create", "vm", "t", "--quiesce", "--json", "--disk-only")
        told = answer.json
        assert answer.code == 12 and "may still be frozen" in told["error"]["message"], answer.out + answer.err
        assert "recover vm" in told["error"]["hint"]
        assert told["snapshot"]["consistency"] == "crash" and told["snapshot"]["quiesced"] is False
        agent.answer("guest-fsfreeze-thaw", 2)
        wait_for(lambda: not quiet.watchdogs(), "the watchdog thaws in the end")
    quiet.writes()


def test_recover_thaws_what_nobody_interrupted_froze_and_check_finds_it(quiet: Quiet) -> None:
    """Somebody froze it and went away: `check` says so, `recover` thaws; then nothing is found."""
    freeze(quiet)
    assert quiet.stands()
    answer = quiet.rig.run("check", "vm", "--json")
    (found,) = [f for f in answer.json["findings"] if f["code"] == "guest-frozen"]
    assert answer.code == 11 and found["severity"] == "error" and found["remedy"] == "diskchain recover vm"
    refused = quiet.rig.run("create", "vm", "x", "--quiesce", "--json")
    assert refused.code == 6 and "frozen already" in refused.json["error"]["message"]
    assert quiet.rig.ok("recover", "vm", "--json").json["outcome"] == "thawed"
    quiet.writes()
    assert [f for f in quiet.rig.run("check", "vm", "--json").json["findings"] if f["code"] == "guest-frozen"] == []


def freeze(quiet: Quiet) -> None:
    """Freeze the guest as a program of somebody else would."""
    (channel,) = quiet.rig.run_dir.glob("*/agent.sock")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(channel))
        client.settimeout(30)
        client.sendall(b'{"execute": "guest-fsfreeze-freeze"}\n')
        assert b"return" in client.recv(4096)


@pytest.mark.parametrize(
    ("modes", "agent", "words"), [("tick", False, "has no channel"), ("tick", True, "no guest agent")]
)
def test_create_quiesced_without_an_agent_is_refused(tmp_path: Path, modes: str, agent: bool, words: str) -> None:
    """Off: harmless. On, without channel or with nobody at its other end: exit 6 with what to do."""
    rig = Rig(tmp_path / "vm", modes=modes, agent=agent)
    rig.build(guest=True)
    try:
        off = rig.ok("create", "vm", "off", "--quiesce", "--json").json
        assert off["snapshot"]["consistency"] == "off" and "is off" in off["warnings"][0]
        rig.ok("start", "vm")
        answer = rig.run("create", "vm", "x", "--quiesce", "--json")
        assert answer.code == 6 and words in answer.json["error"]["message"] and answer.json["error"]["hint"]
        assert set(rig.snapshots()) == {"off"}
    finally:
        rig.destroy()


def test_create_quiesced_thawed_by_somebody_in_the_guest_is_kept_as_crash(tmp_path: Path) -> None:
    """The real agent says frozen, and believes it; a program in the guest has thawed it: exit 12, consistency crash."""
    quiet = Quiet(tmp_path / "vm", "tick,fsvdb,agent,selfthaw")
    try:
        answer = quiet.rig.run("create", "vm", "s", "--quiesce", "--disk-only", "--json")
        assert answer.code == 12 and "thawed its file systems by itself" in answer.json["error"]["message"]
        assert answer.json["snapshot"]["consistency"] == "crash" and answer.json["snapshot"]["quiesced"] is False
        assert quiet.needs_recovery("s")
        quiet.writes()
    finally:
        quiet.destroy()


def test_create_quiesced_the_real_agent_hangs_in_freeze_nothing_is_changed(tmp_path: Path) -> None:
    """Its hook never ends. Exit 1 after the time limit; the guest goes on, and another create works."""
    quiet = Quiet(tmp_path / "vm", "cnt,tick,fsvdb,agenthang")
    try:
        quiet.configure("[create]\nfreeze_timeout = 2\n")
        before = picture(quiet)
        answer = quiet.rig.run("create", "vm", "s", "--quiesce", "--json")
        assert answer.code == 1 and "did not answer guest-fsfreeze-freeze within 2 s" in answer.json["error"]["message"]
        assert picture(quiet) == before
        quiet.writes()
        quiet.rig.ok("create", "vm", "s", "--memory")
        assert quiet.console.bad() == []
    finally:
        quiet.destroy()
