"""Several VMs in one command: two real machines that are off, `web1` and `web2`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from diskchain.cli import many
from diskchain.cli.render import named
from diskchain.host.process import our_module

from .conftest import Run
from .test_stopped_machine import killed, on_terminal

MACHINE = """
name = "NAME"
memory = "64 MiB"
[[disk]]
target = "vda"
image = "NAME.qcow2"
"""


@pytest.fixture
def webs(run: Run, tmp_path: Path) -> Run:
    """Define two machines, and groups of them; return the command line."""
    for name in ("web1", "web2"):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / f"{name}.qcow2"), "16M"], check=True)
        (tmp_path / f"{name}.toml").write_text(MACHINE.replace("NAME", name))
        run("machine", "define", str(tmp_path / f"{name}.toml"))
    (tmp_path / "config/diskchain").mkdir(parents=True)
    groups = '[groups]\nall = ["web1", "web*"]\nstale = ["gone", "web2", "x*"]\nnone = ["x*"]\n'
    (tmp_path / "config/diskchain/diskchain.toml").write_text(groups)
    return run


def names(run: Run, vm: str) -> list[str]:
    return [snapshot["name"] for snapshot in run("list", vm, "--json").json["snapshots"]]


def killed_create(vm: str) -> None:
    killed("create", vm, "half", at="create.intent.after")


@pytest.mark.parametrize("vms", ["w*", "web1,web2", "@all", "qemu:web1,web2", "web1,web[12],@all"])
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_create_on_several_has_a_line_and_a_result_for_each(webs: Run, vms: str, jobs: str) -> None:
    answer = webs("create", vms, "one", "-d", "why, 'so'", "--jobs", jobs, "--json").json
    assert [(one["vm"], one["snapshot"]["name"]) for one in answer["results"]] == [("web1", "one"), ("web2", "one")]
    assert {one["snapshot"]["description"] for one in answer["results"]} == {"why, 'so'"}
    assert (names(webs, "web1"), names(webs, "web2")) == (["one"], ["one"])
    lines = webs("create", vms, "two", "--jobs", jobs).out.splitlines()
    assert sorted(lines) == ["created 'two' of web1: 1 disk", "created 'two' of web2: 1 disk"]


def test_a_plain_name_answers_as_ever_and_a_pattern_of_one_has_results(webs: Run) -> None:
    assert webs("create", "web1", "one", "--jobs", "4", "--json").json["vm"] == "web1"
    assert webs("create", "qemu:web1", "two", "--json").json["vm"] == "web1"
    (result,) = webs("create", "web1*", "three", "--json").json["results"]
    assert result["vm"] == "web1"


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_one_fails_and_the_other_is_done(webs: Run, jobs: str) -> None:
    webs("create", "web1", "one")
    answer = webs("create", "web*", "one", "--jobs", jobs, "--json", code=2)
    first, second = answer.json["results"]
    assert (first["vm"], first["error"]["kind"], first["error"]["code"]) == ("web1", "BadName", 2)
    assert (second["vm"], "error" in second, names(webs, "web2")) == ("web2", False, ["one"])
    assert [line for line in answer.err.splitlines() if line.startswith("diskchain:") and "web1" in line]


def test_exit_code_is_the_highest(webs: Run) -> None:
    webs("create", "web1", "one")
    webs("protect", "web1", "one")
    answer = webs("delete", "web2,web1", "one", "-y", "--json", code=6)
    assert [one["error"]["code"] for one in answer.json["results"]] == [4, 6]


@pytest.mark.parametrize("vms", ["db*", "web1,db1", "web1,db*", "@none", "@nope", ","])
def test_what_fits_nothing_is_not_found_and_nothing_is_done(webs: Run, vms: str) -> None:
    answer = webs("create", vms, "one", "--json", code=4).json
    assert answer["error"]["kind"] == "NotFound"
    assert vms.removeprefix("web1,") in answer["error"]["message"]
    assert names(webs, "web1") == []


def test_a_group_with_a_vm_that_is_gone_does_the_others(webs: Run) -> None:
    gone, web2 = webs("create", "@stale", "one", "--json", code=4).json["results"]
    assert (gone["vm"], gone["error"]["kind"], web2["snapshot"]["name"]) == ("gone", "NotFound", "one")


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize(("typed", "code", "left"), [(b"n\n", 1, ["one"]), (b"y\n", 0, [])])
def test_delete_shows_every_plan_and_asks_once(webs: Run, jobs: str, typed: bytes, code: int, left: list[str]) -> None:
    webs("create", "web*", "one")
    argv = [sys.executable, "-m", "diskchain", "delete", "web*", "one", "--jobs", jobs]
    said, got = on_terminal(argv, b"[y/N] ", typed)
    assert (got, names(webs, "web1"), names(webs, "web2")) == (code, left, left), said
    before, question, after = said.partition("Delete on 2 VMs? [y/N]")
    assert question and "[y/N]" not in after
    assert "web1: " in before and "web2: " in before


def test_delete_without_a_terminal_exits_2(webs: Run) -> None:
    webs("create", "web*", "one")
    for jobs in ("1", "2"):
        answer = webs("delete", "web*", "one", "--jobs", jobs, "--json", code=2)
        assert answer.json["error"]["kind"] == "UsageError"
    assert (names(webs, "web1"), names(webs, "web2")) == (["one"], ["one"])


def test_dry_run_has_a_plan_for_each(webs: Run) -> None:
    webs("create", "web*", "one")
    results = webs("revert", "web*", "one", "-n", "--json").json["results"]
    assert [(one["vm"], "steps" in one["plan"]) for one in results] == [("web1", True), ("web2", True)]


def test_list_without_headers_says_which_vm_and_takes_one_without_snapshots(webs: Run) -> None:
    webs("create", "web2", "one")
    webs("create", "web2", "two")
    for vms in ([], ["web*"]):
        rows = [line.split("\t") for line in webs("list", *vms, "-H").out.splitlines()]
        assert [row[:2] for row in rows] == [["web2", "one"], ["web2", "two"]]
    webs("create", "web1", "one")
    for vms in ([], ["web*"]):
        assert webs("list", *vms, "-H", "-o", "NAME").out == "one\none\ntwo\n"
        assert webs("list", *vms, "-H", "-o", "name,vm").out == "one\tweb1\none\tweb2\ntwo\tweb2\n"
    assert webs("list", "web2", "-H").out.startswith("one\t")


@pytest.mark.parametrize("words", [["list"], ["tree"], ["status"]])
def test_without_any_vm_people_are_told_and_scripts_get_no_row(run: Run, words: list[str]) -> None:
    assert run(*words).out.splitlines()[-1] == "no VMs are defined"
    assert words == ["tree"] or run(*words, "-H").out == ""


def test_list_of_columns_without_name_has_no_row_for_the_present(webs: Run) -> None:
    webs("create", "web1", "one")
    assert len(webs("list", "web1", "-o", "CREATED,TYPE").out.splitlines()) == 2


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_every_other_command_takes_several(webs: Run, jobs: str) -> None:
    def results(*words: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = webs(*words, "--jobs", jobs, "--json").json["results"]
        assert [one["vm"] for one in found] == ["web1", "web2"]
        return found

    webs("create", "web*", "one")
    assert {one["snapshot"]["protected"] for one in results("protect", "web*", "one")} == {True}
    results("unprotect", "web*", "one")
    assert {one["kept_as"] for one in results("revert", "web*", "one", "--keep-as", "kept", "-y", "--wait", "60s")} == {
        "kept"
    }
    assert {one["snapshot"] for one in results("undo", "web*", "-y")} == {"kept"}
    assert {one["state"] for one in results("stop", "web*", "--force", "--timeout", "1m")} == {"stopped"}
    results("start", "web*", "-n")
    assert {one["outcome"] for one in results("recover", "web*")} == {"nothing"}
    assert {one["deferred"] for one in results("merge", "web*")} == {False}
    assert {tuple(one["deleted"]) for one in results("delete", "web*", "kept", "-y")} == {("kept",)}
    for word in ("pause", "resume"):
        answer = webs(word, "web*", "--jobs", jobs, "--json", code=6)
        assert [one["error"]["kind"] for one in answer.json["results"]] == ["Refused", "Refused"]


def test_list_and_tree_of_several(webs: Run) -> None:
    webs("create", "web*", "one")
    assert [one["current"] for one in webs("list", "web*", "--json").json["results"]] == ["one", "one"]
    some, every = webs("list", "web1,web2").out, webs("list").out
    assert re.sub(r" \ds", "", some) == re.sub(r" \ds", "", every)
    assert webs("tree", "web2,web1").out.startswith("web2 (stopped, 1 disk)\n")
    assert webs("list", "web*", "-H", "-o", "name").out == "one\none\n"


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_what_was_interrupted_comes_first_and_is_named(webs: Run, jobs: str) -> None:
    killed_create("web2")
    answer = webs("create", "web*", "one", "--jobs", jobs)
    assert "note: web2: an interrupted create of 'half' was undone first" in answer.err
    assert names(webs, "web2") == ["one"]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_interrupted_puts_back_and_says_what_is_done(webs: Run, tmp_path: Path, jobs: str) -> None:
    began, real = tmp_path / "began", shutil.which("qemu-img")
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin/qemu-img"
    fake.write_text(f'#!/bin/sh\ncase "$*" in *web2*) touch {began}; exec sleep 60;; esac\nexec {real} "$@"\n')
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"}
    argv = [sys.executable, "-m", "diskchain", "--json", "create", "web*", "one", "--jobs", jobs]
    ours = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    while not began.exists() or names(webs, "web1") != ["one"]:
        assert ours.poll() is None
        time.sleep(0.1)
    ours.send_signal(signal.SIGTERM)
    out, err = ours.communicate(timeout=30)
    answer = json.loads(out)
    assert (ours.returncode, answer["error"]["code"], answer["results"][0]["vm"]) == (143, 143, "web1"), err
    assert "done: web1" in answer["error"]["message"]
    assert "web2: interrupted; nothing is left half-done" in err
    assert webs("recover", "web2").out == "web2: nothing was interrupted\n"


def test_a_process_that_is_killed_is_one_error_and_the_other_goes_on(
    webs: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deadly(name: str) -> tuple[list[str], dict[str, str]]:
        words, env = our_module(name)
        return words, {**env, "DISKCHAIN_FAULT": "kill:delete.committed-one"}

    webs("create", "web*", "one")
    webs("protect", "web2", "one")
    monkeypatch.setattr(many, "our_module", deadly)
    web1, web2 = webs("delete", "web*", "one", "-y", "--jobs", "2", "--json", code=6).json["results"]
    assert (web1["error"]["kind"], web1["error"]["hint"]) == ("Unfinished", "diskchain recover web1")
    assert web2["error"]["kind"] == "Protected"


def test_part_is_for_our_own_use(webs: Run) -> None:
    webs("--part", "x", "list", code=2)
    assert "--part" not in webs("--help").out


def test_groups_of_a_wrong_type_exit_2(webs: Run, tmp_path: Path) -> None:
    for text in ('groups = "web1"', '[groups]\nweb = "web1"', "[groups]\nweb = [1]"):
        (tmp_path / "wrong.toml").write_text(text)
        assert "groups" in webs("--config", str(tmp_path / "wrong.toml"), "list", code=2).err


def test_named_knows_names_from_paths() -> None:
    assert named("web1", "web1 is off") == "web1 is off"
    assert named("web1", "there is no VM 'web1'") == "there is no VM 'web1'"
    assert named("web1", "/srv/web1/web1.qcow2: no") == "web1: /srv/web1/web1.qcow2: no"
    assert named("web", "web1 is off") == "web: web1 is off"
