"""Standard input, output and error that are closed, full, or read by nobody: what was done is done, the code says so."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from .conftest import Web1

PROGRAM = f"{sys.executable} -m diskchain"


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in a shell; the exit code is diskchain's, also in a pipe."""
    line = f"set -o pipefail; {PROGRAM} {command}"
    return subprocess.run(["bash", "-c", line], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def piped(command: str) -> subprocess.CompletedProcess[str]:
    """Run a command line whose standard output is a pipe that nobody reads."""
    program = (
        "import os, subprocess, sys; reading, writing = os.pipe(); os.close(reading);"
        "sys.exit(subprocess.run([sys.executable, '-m', 'diskchain', *sys.argv[1:]], stdout=writing).returncode)"
    )
    argv = [sys.executable, "-c", program, *command.split()]
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("json_too", ["", " --json"])
def test_change_whose_answer_cannot_be_written_is_done(web1: Web1, json_too: str) -> None:
    gone = piped("create web1 one" + json_too)
    full = shell(f"create web1 two{json_too} >/dev/full")
    closed = shell(f"create web1 three{json_too} >&-")
    assert (gone.returncode, gone.stderr) == (141, "")
    assert full.returncode == 12
    assert full.stderr == "diskchain: done; the answer could not be written: No space left on device\n"
    assert (closed.returncode, closed.stderr) == (0, "")
    assert web1.names() == ["one", "two", "three"]


@pytest.mark.parametrize("command", ["list web1", "tree", "list web1 --json", "doctor", "machine list", "--help"])
def test_look_whose_answer_cannot_be_written(web1: Web1, command: str) -> None:
    gone, full = piped(command), shell(f"{command} >/dev/full")
    assert (gone.returncode, gone.stderr) == (141, "")
    assert full.returncode == 1
    assert full.stderr == "diskchain: the answer could not be written: No space left on device\n"


def test_several_are_all_done_when_nobody_reads(web1: Web1) -> None:
    text = (web1.directory / "web1.toml").read_text().replace("web1", "web2").replace("data", "data2")
    (web1.directory / "web2.toml").write_text(text)
    for name in ("web2", "data2"):
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", str(web1.directory / f"{name}.qcow2"), "1M"], check=True
        )
    web1.run("machine", "define", str(web1.directory / "web2.toml"))
    for number, jobs in enumerate(("", " --jobs 2")):
        assert piped(f"create web* n{number}{jobs}").returncode == 141
    assert [s["name"] for s in web1.run("list", "web2", "--json").json["snapshots"]] == ["n0", "n1"]


def test_no_standard_input_is_no_terminal(web1: Web1) -> None:
    web1.run("create", "web1", "one")
    done = shell("delete web1 one <&-")
    assert done.returncode == 2 and "--yes" in done.stderr
    assert web1.names() == ["one"]


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
def test_standard_error_never_decides(web1: Web1, stderr: str) -> None:
    assert shell(f"status nope {stderr}").returncode == 4
    missing = shell(f"list nope --json {stderr}")
    assert missing.returncode == 4 and json.loads(missing.stdout)["error"]["code"] == 4
    assert shell(f"-vv create web1 one --rate {stderr}").returncode == 2
    assert shell(f"-vv create web1 one {stderr}").returncode == 0
    assert shell(f"delete web1 one --when-stopped -y {stderr}").returncode == 0
    assert web1.names() == []


def test_closed_descriptors_never_become_records(web1: Web1) -> None:
    """What a file gets that is opened while 0, 1 or 2 is closed; a child's words would be written into it."""
    assert shell("create web1 one <&- >&- 2>&-").returncode == 0
    assert web1.names() == ["one"]
    web1.run("check", "web1", "--deep")


def test_text_that_cannot_be_encoded_is_escaped(web1: Web1) -> None:
    web1.run("create", "web1", "日本")
    line = f"PYTHONIOENCODING=latin-1 {PROGRAM} tree web1"
    latin = subprocess.run(["bash", "-c", line], capture_output=True, check=False)
    assert latin.returncode == 0 and b"\\u65e5\\u672c" in latin.stdout
