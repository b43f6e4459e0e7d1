"""Drift between definition and catalog, orphans of the state and run directories, and what filesystems can really do."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diskchain.host import probe

from .conftest import Run, Web1
from .test_health import change_catalog, everything, findings, home


def change_definition(web1: Web1, change: Callable[[Any], object], name: str = "web1") -> Path:
    """Rewrite a definition with a right checksum, perhaps under another name. Return its file."""
    data = json.loads((web1.directory / "state/machines/web1.json").read_bytes())
    change(data)
    data["sha256"] = hashlib.sha256(json.dumps(data["machine"], sort_keys=True).encode()).hexdigest()
    path = web1.directory / f"state/machines/{name}.json"
    path.write_text(json.dumps(data))
    return path


def told(run: Run, code: str) -> dict[str, str] | None:
    """The finding of doctor with this code."""
    found = run("doctor", "--json", code=None).json["findings"]
    return next((f for f in found if f["code"] == code), None)


def test_check_names_a_disk_that_only_one_of_both_knows(web1: Web1) -> None:
    """A disk that is missing in the definition; one that is missing in the catalog; another image."""
    disks = json.loads((web1.directory / "state/machines/web1.json").read_bytes())["machine"]["disks"]
    change_definition(web1, lambda d: d["machine"].update(disks=disks[:1]))
    (found,) = findings(web1, code=11)
    assert found["code"] == "definition-differs" and "vdb" in found["subject"] and "web1.toml" in found["remedy"]
    more = {**disks[1], "target": "vdc"}
    change_definition(web1, lambda d: d["machine"].update(disks=[*disks, more]))
    (found,) = findings(web1, code=11)
    assert "vdc" in found["subject"] and "can't start" in found["evidence"]
    other = {**disks[1], "image": str(web1.directory / "other.qcow2")}
    change_definition(web1, lambda d: d["machine"].update(disks=[disks[0], other]))
    (found,) = findings(web1, code=10)
    assert "other.qcow2" in found["evidence"] and "data.qcow2" in found["evidence"]


def test_check_says_another_name_in_the_catalog(web1: Web1) -> None:
    change_catalog(web1, lambda body: body.update(name="older"))
    codes = {f["code"] for f in web1.run("check", "--json").json["findings"]}
    assert codes >= {"name-differs"}


def test_status_of_a_vm_that_is_off_says_that_its_memory_would_not_fit(web1: Web1) -> None:
    change_definition(web1, lambda d: d["machine"].update(memory=1 << 50))
    codes = {f["code"] for f in web1.run("status", "--json", code=10).json["vms"][0]["findings"]}
    assert codes == {"memory-would-not-fit"}


def test_doctor_names_what_was_left_in_the_state_directory(web1: Web1) -> None:
    """Records that are gone; two definitions of one machine; half a definition. Nothing is touched."""
    change_definition(web1, lambda d: d["machine"].update(name="twin"), "twin")
    (web1.directory / "state/machines/.diskchain-tmp-12").touch()
    before = everything(web1.directory)
    twice = told(web1.run, "definition-twice")
    assert twice and "web1" in twice["subject"] and "twin" in twice["subject"]
    left = told(web1.run, "leftover-temporary")
    assert left and left["remedy"].endswith(".diskchain-tmp-12'")
    assert everything(web1.directory) == before
    shutil.rmtree(home(web1))
    missing = told(web1.run, "records-missing")
    assert missing and "machine undefine" in missing["remedy"]


def test_doctor_names_what_was_left_in_the_run_directory(web1: Web1, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead sockets of a machine that is off; a directory of an unknown one, without a QEMU and with one."""
    known = json.loads((web1.directory / "state/machines/web1.json").read_bytes())["machine"]["uuid"]
    mine, unknown = web1.directory / "run" / known, web1.directory / "run" / ("0" * 8 + known[8:])
    assert told(web1.run, "leftover-sockets") is None
    mine.mkdir(parents=True)
    unknown.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        monkeypatch.chdir(mine)  # the whole path is too long for a socket
        dead.bind("qmp.sock")
    sockets = told(web1.run, "leftover-sockets")
    assert sockets and "qmp.sock" in sockets["evidence"] and sockets["subject"] == "web1"
    left = told(web1.run, "leftover-run-dir")
    assert left and left["remedy"] == f"rm -r '{unknown}'"
    with subprocess.Popen([sys.executable, "-c", "input()", "-uuid", unknown.name], stdin=subprocess.PIPE) as process:
        running = told(web1.run, "machine-unknown")
        process.communicate(b"\n")
    assert running and f"pid {process.pid}" in running["evidence"]
    assert told(web1.run, "leftover-run-dir")


def test_probe_tries_for_real_and_leaves_nothing(tmp_path: Path) -> None:
    """What cp and fallocate can do here is what is found; entries and times stay as they are."""
    before = everything(tmp_path), tmp_path.stat().st_mtime_ns
    tried = probe.directory(tmp_path)
    assert (everything(tmp_path), tmp_path.stat().st_mtime_ns) == before
    (tmp_path / "a").write_bytes(b"1" * 65536)
    for found, argv in (
        (tried.clone, ["cp", "--reflink=always", "a", "b"]),
        (tried.direct, ["dd", "if=/dev/zero", "of=c", "bs=64k", "count=1", "oflag=direct"]),
        (tried.reserve, ["fallocate", "--keep-size", "-l", "64K", "a"]),
    ):
        done = subprocess.run(argv, cwd=tmp_path, check=False, capture_output=True)
        assert found is (done.returncode == 0), argv


def test_probe_where_it_can_not_be_tried_says_why() -> None:
    """No right, no regular files: not an answer, and no exception."""
    assert probe.directory(Path("/proc")).clone is None
    assert probe.directory(Path("/nowhere")).why


@pytest.mark.parametrize(
    ("tried", "codes"),
    [
        (probe.Tried(clone=False, direct=False, reserve=True), {"volume-no-direct"}),
        (probe.Tried(clone=True, direct=True, reserve=False), {"volume-no-reserve"}),
        (probe.Tried(why="no right to write there"), set()),
    ],
)
def test_doctor_says_what_a_filesystem_lacks(
    web1: Web1, monkeypatch: pytest.MonkeyPatch, tried: probe.Tried, codes: set[str]
) -> None:
    monkeypatch.setattr(probe, "directory", lambda path: tried)
    found = web1.run("doctor", "--json", code=None).json["findings"]
    assert {f["code"] for f in found} & {"volume-no-direct", "volume-no-reserve"} == codes
    (volume,) = [f for f in found if f["code"] == "volume"]
    assert ("not tried: no right" in volume["evidence"]) == (tried.clone is None)
