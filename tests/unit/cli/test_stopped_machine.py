"""The whole way on a real machine that is off: real images, patterns written and read back by qemu-io."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from diskchain.cli.context import wait_for
from tests.support.zygote import heed_signals

from .conftest import Web1, io
from .test_app import complete


def test_define_again_and_list(web1: Web1) -> None:
    again = web1.run("machine", "define", str(web1.directory / "web1.toml"), "--json").json
    assert again["machine"]["again"]
    (found,) = web1.run("machine", "list", "--json").json["machines"]
    assert set(found) >= {"name", "uuid", "state", "memory", "cpus", "disks", "macs", "home", "console", "snapshots"}
    assert found["disks"][0] == {"target": "vda", "active": str(web1.directory / "web1.qcow2"),
                                 "base": str(web1.directory / "web1.qcow2"), "format": "qcow2", "role": "os"}  # fmt: skip
    assert "web1  stopped" in web1.run("machine", "list").out


def test_create_answers_as_the_contract_says(web1: Web1) -> None:
    answer = web1.run("create", "web1", "one", "-d", "why", "--json").json
    snapshot = answer["snapshot"]
    assert (answer["schema"], answer["vm"], answer["pause_ms"]) == (1, "web1", None)
    assert set(snapshot) >= {"id", "name", "created", "parent", "description", "state", "consistency", "partial",
                             "disks", "memory"}  # fmt: skip
    assert (snapshot["state"], snapshot["consistency"], snapshot["memory"]["status"]) == ("disk", "off", "none")
    assert snapshot["disks"][0] == {"target": "vda", "frozen": str(web1.directory / "web1.qcow2"),
                                    "active": web1.active()}  # fmt: skip


def test_create_with_a_name_that_is_taken_exits_2(web1: Web1) -> None:
    web1.run("create", "web1", "one")
    assert web1.run("create", "web1", "one", "--json", code=2).json["error"]["kind"] == "BadName"


def test_revert_brings_both_disks_back_and_undo_the_present(web1: Web1) -> None:
    for target in ("vda", "vdb"):
        web1.write(1, "0", target)
    web1.run("create", "web1", "one")
    for target in ("vda", "vdb"):
        web1.write(2, "0", target)
    answer = web1.run("revert", "web1", "one", "-y", "--json").json
    assert (answer["snapshot"], answer["kept_as"], answer["state"]) == ("one", "before-revert-1", "stopped")
    assert {"config_changes", "seconds", "schema", "vm"} <= set(answer)
    assert web1.reads(1, "0") and web1.reads(1, "0", "vdb")
    web1.run("undo", "web1", "-y")
    assert web1.reads(2, "0") and web1.reads(2, "0", "vdb")


def test_revert_says_what_goes_back_and_what_is_gone(web1: Web1) -> None:
    web1.run("create", "web1", "one")
    plan = web1.run("revert", "web1", "one", "-n").out
    assert "  stopped, and stays so\n" in plan and "No way back: when the definition names the new overlays\n" in plan
    assert "  stopped -> running from its disks\n" in web1.run("revert", "web1", "one", "--start", "-n").out
    only = web1.run("revert", "web1", "one", "--only", "vda", "-y").out
    assert only.startswith("vda of web1 is back at 'one', vdb as before; stopped\n")
    assert "gone (--discard)" in web1.run("revert", "web1", "one", "--discard", "-y").out
    error = web1.run("revert", "web1", "one", "--keep-memory", "-y", "--json", code=6).json["error"]
    assert error["kind"] == "MemoryNotSaved"


def test_revert_discard_keeps_nothing(web1: Web1) -> None:
    web1.run("create", "web1", "one")
    web1.write(2, "0")
    assert web1.run("rollback", "web1", "one", "--discard", "-y", "--json").json["kept_as"] is None
    assert web1.names() == ["one"]
    assert web1.reads(0, "0")
    web1.run("undo", "web1", "-y", code=4)


@pytest.mark.parametrize("words", [["--discard", "--keep-as", "x"], ["--start", "--stopped"]])
def test_revert_with_contradicting_options_exits_2(web1: Web1, words: list[str]) -> None:
    web1.run("create", "web1", "one")
    web1.run("revert", "web1", "one", "-y", *words, code=2)


def test_delete_merges_and_every_state_reads_the_same(web1: Web1) -> None:
    for byte, name in enumerate(("one", "two", "three"), 1):
        web1.write(byte, f"{byte}M")
        web1.run("create", "web1", name)
    web1.write(4, "4M")
    answer = web1.run("delete", "web1", "two", "one", "-y", "--json").json
    assert (answer["deferred"], {m["method"] for m in answer["merged"]}) == (False, {"commit"})
    assert set(answer["merged"][0]) == {"disk", "top", "into", "bytes", "seconds", "method"}
    assert web1.names() == ["three"]
    assert all(web1.reads(byte, f"{byte}M") for byte in (1, 2, 3, 4))
    web1.run("revert", "web1", "three", "-y")
    assert all(web1.reads(byte, f"{byte}M") for byte in (1, 2, 3)) and web1.reads(0, "4M")


def test_delete_keeps_to_its_rate_also_when_recover_goes_on_with_it(
    web1: Web1, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate is in the journal until the merge is done."""
    web1.run("create", "web1", "one")
    io("-f", "qcow2", "-c", "write -P 7 0 8M", web1.active())
    monkeypatch.setenv("DISKCHAIN_FAULT", "full:merge.committed")
    web1.run("delete", "web1", "one", "-y", "--rate", "64M", code=3)
    monkeypatch.setenv("DISKCHAIN_FAULT", "")
    (entry,) = web1.directory.glob(".diskchain/*/journal/*.json")
    assert json.loads(entry.read_text())["body"]["data"]["rate"] == 64 << 20
    web1.run("recover", "web1")
    assert web1.reads(7, "7M") and web1.names() == []
    web1.run("delete", "web1", "two", "-y", "--rate", "fast", code=2)


@pytest.mark.parametrize("words", [("delete", "web1", "one"), ("accept", "web1"), ("delete", "web1", "one", "--copy")])
def test_dry_run_ends_as_the_run_does_when_something_stands_in_the_way(web1: Web1, words: tuple[str, ...]) -> None:
    """The plan, then the same error; in JSON one object has both."""
    subprocess.run(["qemu-img", "bitmap", "--add", web1.active(), "b"], check=True)
    web1.run("create", "web1", "one")
    said = web1.run(*words, "-y", code=6)
    tried = web1.run(*words, "-n", code=6)
    assert tried.err == said.err and "dirty bitmaps" in tried.err and "fold" in tried.out
    both = web1.run(*words, "-n", "--json", code=6).json
    assert both["plan"]["steps"] and both["error"] == web1.run(*words, "-y", "--json", code=6).json["error"]
    (several,) = web1.run(*words[:1], "web*", *words[2:], "-n", "--json", code=6).json["results"]
    assert several["plan"] == both["plan"] and several["error"] == both["error"]


def test_delete_of_a_leaf_frees_what_list_said(web1: Web1) -> None:
    web1.run("create", "web1", "one")
    web1.write(2, "0")
    web1.run("revert", "web1", "one", "--keep-as", "leaf", "-y")
    leaf = web1.run("list", "web1", "--json").json["snapshots"][1]
    before = used(web1)
    web1.run("rm", "web1", "leaf", "-y")
    assert leaf["frees"] == before - used(web1) > 0


def used(web1: Web1) -> int:
    return sum(path.stat().st_blocks * 512 for path in web1.directory.glob("*.qcow2"))


def test_delete_at_a_fork_lets_the_layer_wait_and_its_name_is_free_again(web1: Web1) -> None:
    web1.run("create", "web1", "one")
    web1.run("revert", "web1", "one", "-y")
    plan = web1.run("delete", "web1", "one", "-n").out
    assert "its layer" in plan and "stays until one is left" in plan
    body = web1.run("delete", "web1", "one", "-y", "--json").json
    assert body["deferred"] and body["deleted"] == body["pending"] == ["one"] and body["merged"] == []
    assert web1.run("list", "web1", "--json").json["pending"][0]["op"] == "wait"
    assert "stays until one layer is left on it" in web1.run("list", "web1").out
    assert web1.run("undelete", "web1", "one", "--json", code=6).json["error"]["kind"] == "Refused"
    web1.run("create", "web1", "one")
    merged = web1.run("delete", "web1", "before-revert-1", "-y", "--json").json
    assert [m["method"] for m in merged["merged"]] == ["commit"] * 2 + ["unlink"] * 2 and merged["pending"] == []


def test_delete_when_stopped_is_taken_back_until_it_is_merged(web1: Web1) -> None:
    web1.run("create", "web1", "one")
    body = web1.run("delete", "web1", "one", "--when-stopped", "-y", "--json").json
    assert body["deferred"] and body["pending"] == ["one"]
    assert web1.run("undelete", "web1", "one", "--json").json["snapshot"]["name"] == "one"
    web1.run("undelete", "web1", "one", code=4)
    web1.run("delete", "web1", "one", "--when-stopped", "-y")
    assert "fold" in web1.run("merge", "web1", "-n").out
    assert web1.run("merge", "web1", "--json").json["pending"] == []
    web1.run("undelete", "web1", "one", code=4)


def test_delete_what_is_not_said_clearly_exits_2(web1: Web1) -> None:
    web1.run("create", "web1", "one")
    for wrong in ((), ("one", "--older-than", "1d"), ("one", "--when-stopped", "--restart")):
        web1.run("delete", "web1", *wrong, "-y", code=2)
    web1.run("delete", "we*,nope", "--older-than", "1d", code=4)
    web1.run("accept", "web1", "--when-stopped", "--restart", "-y", code=2)


def test_delete_older_than_leaves_protected_and_young_ones(web1: Web1) -> None:
    for name in ("one", "two", "three"):
        web1.run("create", "web1", name)
    web1.run("protect", "web1", "one")
    time.sleep(1.1)
    body = web1.run("delete", "web1", "--older-than", "1s", "-y", "--json").json
    assert body["deleted"] == ["two", "three"] and len(body["merged"]) == 2, "both in one pass"
    assert [s["name"] for s in web1.run("list", "web1", "--json").json["snapshots"]] == ["one"]
    web1.run("accept", "web1", "-y", code=6)


def test_nothing_to_delete_is_done_and_asks_nobody(web1: Web1) -> None:
    """What cron does every night must not fail in the nights in which nothing is old enough."""
    assert web1.run("accept", "web1", "--json").json["deleted"] == []
    web1.run("create", "web1", "one")
    for words in (["web1"], ["web*"]):
        assert "nothing is to be deleted" in web1.run("delete", *words, "--older-than", "1d").out
    assert web1.run("delete", "web1", "--older-than", "1d", "--json").json["deleted"] == []
    assert "nothing" in web1.run("delete", "web1", "--older-than", "1d", "-n").out
    assert web1.names() == ["one"]


def test_recorded_delete_says_how_to_merge_it_and_how_to_take_it_back(
    web1: Web1, monkeypatch: pytest.MonkeyPatch
) -> None:
    web1.run("create", "web1", "one")
    web1.run("create", "web1", "it's two")
    assert "merged by: diskchain merge web1\n" in web1.run("delete", "web1", "one", "--when-stopped", "-n").out
    assert "merged by: diskchain merge web1\n" in web1.run("delete", "web1", "one", "--when-stopped", "-y").out
    assert "(deleted; merge it: diskchain merge web1: " in web1.run("list", "web1").out
    for words in (["show"], ["delete", "-y"], ["revert", "-y"], ["protect"]):
        error = web1.run(words[0], "web1", "one", *words[1:], "--json", code=4).json["error"]
        assert error["hint"] == "diskchain undelete web1 one" and "is deleted" in error["message"]
    assert complete("undelete web1 ", monkeypatch) == ["one"]
    plan = web1.run("delete", "web1", "it's two", "-n", "--json").json["plan"]
    assert plan["title"] == "web1: delete \"it's two\"; also merges 'one' (deleted before)"
    answer = web1.run("delete", "web1", "it's two", "-y").out
    assert "also merged: 'one' (deleted before)" in answer and answer.startswith('deleted "it\'s two" of web1\n')


def test_a_name_wins_over_an_id(web1: Web1) -> None:
    snapshot = web1.run("create", "web1", "one", "--json").json["snapshot"]
    assert web1.run("show", "web1", snapshot["id"], "--json").json["snapshot"]["name"] == "one"
    web1.run("create", "web1", snapshot["id"])
    web1.run("delete", "web1", snapshot["id"], "-y")
    assert web1.names() == ["one"]


def test_delete_that_was_killed_and_is_typed_again_is_done(web1: Web1) -> None:
    for name in ("one", "two"):
        web1.run("create", "web1", name)
    killed("delete", "web1", "one", "-y", at="delete.committed-one")
    answer = web1.run("delete", "web1", "one", "-y")
    assert answer.out == "deleted 'one' of web1\n" and "was finished first" in answer.err
    web1.run("create", "web1", "three")
    killed("delete", "web1", "three", "-y", at="delete.committed-one")
    assert web1.run("delete", "web1", "three", "two", "-y", "--json").json["deleted"] == ["two"]
    web1.run("delete", "web1", "one", "-y", code=4)
    assert web1.names() == []


def test_accept_of_branches(web1: Web1) -> None:
    web1.run("create", "web1", "one")
    web1.run("revert", "web1", "one", "-y")
    assert web1.run("accept", "web1", "-y", "--json", code=6).json["error"]["kind"] == "HasChildren"
    assert "accept the present" in web1.run("accept", "web1", "--drop-branches", "-n").out
    body = web1.run("accept", "web1", "--drop-branches", "-y", "--json").json
    assert sorted(body["deleted"]) == ["before-revert-1", "one"] and body["pending"] == []


def test_list_and_tree_as_json(web1: Web1) -> None:
    web1.run("create", "web1", "one")
    web1.run("revert", "web1", "one", "-y")
    web1.run("create", "web1", "two")
    listing = web1.run("list", "web1", "--json").json
    assert (listing["current"], listing["pending"]) == ("two", [])
    assert listing["now"]["keeps"] > 0
    assert set(listing["snapshots"][0]) >= {"keeps", "frees", "age_seconds", "warnings", "current", "pause_ms"}
    tree = web1.run("tree", "--json", "web1").json
    (one,) = tree["snapshots"]
    assert [child["name"] for child in one["children"]] == ["before-revert-1", "two"]
    everything = web1.run("list", "--json").json
    assert [vm["vm"] for vm in everything["vms"]] == ["web1"]
    assert web1.run("list").out.startswith("web1 (stopped)\nNAME")
    assert web1.run("list", "web1", "-H", "-o", "name").out == "one\nbefore-revert-1\ntwo\n"


def test_show_tells_layers_and_configuration(web1: Web1) -> None:
    web1.run("create", "web1", "one", "-d", "why\x1b[31m")
    shown = web1.run("show", "web1", "one", "--json").json["snapshot"]
    assert [layer["target"] for layer in shown["layers"]] == ["vda", "vdb"]
    assert shown["configuration"]["memory"] == 64 << 20
    text = web1.run("show", "web1", "one").out
    assert "\x1b" not in text
    assert "why\\x1b[31m" in text
    web1.run("show", "web1", "nope", code=4)


def test_rename_describe_protect(web1: Web1) -> None:
    web1.run("create", "web1", "one")
    web1.run("rename", "web1", "one", "two", "-n")
    assert web1.names() == ["one"]
    web1.run("rename", "web1", "one", "two")
    assert web1.run("describe", "web1", "two", "why", "--json").json["snapshot"]["description"] == "why"
    web1.run("protect", "web1", "two")
    assert web1.run("delete", "web1", "two", "-y", "--json", code=6).json["error"]["kind"] == "Protected"
    web1.run("unprotect", "web1", "two")
    web1.run("delete", "web1", "two", "-y")


def test_power_of_a_machine_that_is_off(web1: Web1) -> None:
    assert web1.run("stop", "web1", "--json").json == {
        "schema": 1, "vm": "web1", "state": "stopped", "changed": False, "merged": []
    }  # fmt: skip
    assert web1.run("stop", "web1", "--force").out == "web1 is stopped already\n"
    web1.run("pause", "web1", code=6)
    web1.run("resume", "web1", code=6)
    web1.run("start", "web1", "-n")


def test_undefine_keeps_everything(web1: Web1) -> None:
    web1.run("create", "web1", "one")
    web1.run("machine", "undefine", "web1", "-y")
    web1.run("list", "web1", code=4)
    web1.run("machine", "define", str(web1.directory / "web1.toml"))
    assert web1.names() == ["one"]


# -- asked on a terminal -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "code", "left"),
    [(b"n\n", 1, ["one"]), (b"\n", 1, ["one"]), (b"\x04", 1, ["one"]), (b"\x03", 130, ["one"]), (b"y\n", 0, [])],
)
def test_delete_on_a_terminal_asks_first(web1: Web1, typed: bytes, code: int, left: list[str]) -> None:
    web1.run("create", "web1", "one")
    said, got = on_terminal([sys.executable, "-m", "diskchain", "delete", "web1", "one"], b"[y/N] ", typed)
    assert (got, web1.names()) == (code, left), said
    assert ("nothing was changed" in said) == (code == 1)


def on_terminal(argv: list[str], question: bytes, typed: bytes) -> tuple[str, int]:
    """Run a program on a terminal of its own, answer its question; return what it said and its exit code."""
    pid, fd = pty.fork()
    if pid == 0:
        heed_signals()
        os.execv(argv[0], argv)
    said = b""
    with contextlib.suppress(OSError):  # EIO is the end of a terminal
        while piece := os.read(fd, 4096):
            said += piece
            if question in said and typed:
                os.write(fd, typed)
                typed = b""
    os.close(fd)
    return said.decode(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_signal_ends_the_wait_for_an_answer_even_when_its_handler_raises_nothing() -> None:
    """What a signal between the question and read(2) amounts to: its handler is not what ends the wait."""
    came: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _frame: came.append(number))
    reading, writing = os.pipe()
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with os.fdopen(reading) as nothing:
            wait_for(nothing)
        assert came == [signal.SIGUSR1] and signal.set_wakeup_fd(-1) == -1
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
        os.close(writing)


# -- interrupted -------------------------------------------------------------------------------------------------------


def killed(*words: str, at: str) -> None:
    """Run a command line in a process of its own that is killed at a fault point."""
    env = {**os.environ, "DISKCHAIN_FAULT": f"kill:{at}"}
    done = subprocess.run([sys.executable, "-m", "diskchain", *words], env=env, capture_output=True, check=False)
    assert done.returncode == -9, done


def test_recover_finishes_a_killed_delete(web1: Web1) -> None:
    web1.write(1, "1M")
    web1.run("create", "web1", "one")
    web1.write(2, "2M")
    killed("delete", "web1", "one", "-y", at="delete.committed-one")
    (result,) = web1.run("recover", "--json").json["results"]
    assert (result["op"], result["snapshot"], result["outcome"]) == ("delete", "one", "finished")
    assert web1.names() == []
    assert web1.reads(1, "1M") and web1.reads(2, "2M")
    assert web1.run("recover", "web1").out == "web1: nothing was interrupted\n"
    assert web1.run("recover").out == "nothing was interrupted\n"


def test_next_change_recovers_first_and_says_so(web1: Web1) -> None:
    web1.run("create", "web1", "one")
    killed("create", "web1", "two", at="create.intent.after")
    answer = web1.run("create", "web1", "three")
    assert "note: an interrupted create of 'two' was undone first" in answer.err
    assert web1.names() == ["one", "three"]


def test_dry_run_of_an_interrupted_vm_recovers_nothing(web1: Web1) -> None:
    web1.run("create", "web1", "one")
    killed("revert", "web1", "one", "-y", at="revert.switched.after")
    before = sorted(web1.directory.rglob("journal/*.json"))
    assert before
    web1.run("revert", "web1", "one", "-n", code=None)
    web1.run("recover", "-n")
    web1.run("recover", "web1", "-n")
    assert sorted(web1.directory.rglob("journal/*.json")) == before
    assert "finished" in web1.run("recover", "web1").out


def test_recover_undo_takes_a_killed_revert_back(web1: Web1) -> None:
    web1.write(1, "0")
    web1.run("create", "web1", "one")
    web1.write(2, "0")
    killed("revert", "web1", "one", "-y", at="revert.switched.after")
    web1.run("recover", "web1", "--undo", "--finish", "-y", code=2)
    web1.run("recover", "web1", "--undo", "-y")
    assert web1.reads(2, "0")


def test_busy_names_the_holder(web1: Web1) -> None:
    env = {**os.environ, "DISKCHAIN_FAULT": "stop:create.intent.after"}
    holder = subprocess.Popen([sys.executable, "-m", "diskchain", "create", "web1", "one"], env=env)
    try:
        os.waitid(os.P_PID, holder.pid, os.WSTOPPED | os.WNOWAIT)
        error = web1.run("create", "web1", "two", "--wait", "0s", "--json", code=5).json["error"]
        assert "create web1" in error["message"]
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("words", [
    ["create", "web1", "two"], ["delete", "web1", "one"], ["accept", "web1"], ["revert", "web1", "one"],
    ["move", "web1", "--to", "DIR"], ["delete", "web1", "one", "--to", "DIR"], ["detach", "web1", "--to", "DIR"],
], ids=" ".join)  # fmt: skip
def test_plan_says_where_room_is_needed_and_how_much_is_free(web1: Web1, words: list[str]) -> None:
    web1.run("create", "web1", "one")
    web1.write(2, "0")
    there = web1.directory / "there"
    there.mkdir()
    words = [str(there) if word == "DIR" else word for word in words]
    if words[0] == "detach":
        web1.run("base", "seal", str(web1.directory / "web1.qcow2"))
    plan = web1.run(*words, "-n", "--json").json["plan"]
    (need,) = plan["needs"]
    assert need["directory"] == str(there if "--to" in words else web1.directory)
    assert need["bytes"] == plan["space_needed"] > 0 and need["free"] > 0
    line = rf"^Needed on {re.escape(need['directory'])}: [\d.]+[KM] \([\d.]+[MGT] free\)$"
    assert re.search(line, web1.run(*words, "-n").out, re.MULTILINE)


# -- a dry run refuses what the command refuses ------------------------------------------------------------------------


def no_right(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Take the right to write to a path from us, also where root runs the tests."""
    real = os.access

    def access(asked: Path, mode: int, **more: bool) -> bool:
        return real(asked, mode, **more) and not (Path(asked) == path and mode & os.W_OK)

    monkeypatch.setattr(os, "access", access)


@pytest.mark.parametrize("dry", [["-n"], []])
def test_pause_and_resume_of_a_machine_that_is_off_are_refused(web1: Web1, dry: list[str]) -> None:
    for word in ("pause", "resume"):
        assert web1.run(word, "web1", *dry, "--json", code=6).json["error"]["message"] == "web1 is off"


@pytest.mark.parametrize("dry", [["-n"], []])
def test_no_right_to_write_is_refused(web1: Web1, monkeypatch: pytest.MonkeyPatch, dry: list[str]) -> None:
    web1.run("create", "web1", "one")
    no_right(monkeypatch, Path(web1.active("vdb")))
    assert "Permission denied" in web1.run("start", "web1", *dry, code=6).err


@pytest.mark.parametrize("words", [["create", "web1", "two"], ["revert", "web1", "one", "-y"]], ids=" ".join)
@pytest.mark.parametrize("dry", [["-n"], []])
def test_no_right_to_make_layers_is_refused(
    web1: Web1, monkeypatch: pytest.MonkeyPatch, words: list[str], dry: list[str]
) -> None:
    web1.run("create", "web1", "one")
    no_right(monkeypatch, web1.directory)
    assert "Permission denied" in web1.run(*words, *dry, code=6).err


def test_missing_kernel_is_warned_of_and_refused(web1: Web1) -> None:
    file = web1.directory / "web1.toml"
    file.write_text(file.read_text().replace("memory =", 'kernel = "vmlinuz"\nmemory ='))
    missing = f"kernel {web1.directory / 'vmlinuz'} does not exist"
    assert f"warning: {missing}; web1 can't start without it\n" == web1.run("machine", "define", str(file)).err
    for dry in (["-n"], []):
        assert missing in web1.run("start", "web1", *dry, code=6).err
