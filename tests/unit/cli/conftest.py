"""A machine that is off, with two real disks, and the command line on it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from diskchain.cli.app import main
from diskchain.drivers import accel

MACHINE = """
name = "web1"
memory = "64 MiB"
[[disk]]
target = "vda"
image = "web1.qcow2"
role = "os"
[[disk]]
target = "vdb"
image = "data.qcow2"
"""


@dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Answer]
_BOOTS, _BOOTED = accel.boots, dict[str, float | None]()


@pytest.fixture(autouse=True)
def probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where KVM hangs a probe guest takes 4 seconds of processor: one is booted for all tests of a process."""

    async def boots(name: str) -> float | None:
        if name not in _BOOTED:
            _BOOTED[name] = await _BOOTS(name)
        return _BOOTED[name]

    monkeypatch.setattr(accel, "boots", boots)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process; stdin is no terminal."""
    monkeypatch.setenv("DISKCHAIN_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("DISKCHAIN_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "none")  # no libvirt of the host's is ever asked

    def run(*argv: str, code: int | None = 0) -> Answer:
        capfd.readouterr()
        got = main(argv)
        out, err = capfd.readouterr()
        assert code is None or got == code, (argv, got, out, err)
        return Answer(got, out, err)

    return run


class Web1:
    """The machine `web1`: its command line, and its disks as qemu-io sees them."""

    def __init__(self, run: Run, directory: Path) -> None:
        self.run, self.directory = run, directory

    def active(self, target: str = "vda") -> str:
        disks = self.run("machine", "list", "--json").json["machines"][0]["disks"]
        return str(next(disk["active"] for disk in disks if disk["target"] == target))

    def write(self, byte: int, at: str, target: str = "vda") -> None:
        io("-f", "qcow2", "-c", f"write -P {byte} {at} 64k", self.active(target))

    def reads(self, byte: int, at: str, target: str = "vda") -> bool:
        said = io("-r", "-f", "qcow2", "-c", f"read -P {byte} {at} 64k", self.active(target))
        return "Pattern verification failed" not in said

    def names(self) -> list[str]:
        return [s["name"] for s in self.run("list", "web1", "--json").json["snapshots"]]


def io(*argv: str) -> str:
    return subprocess.run(["qemu-io", *argv], check=False, capture_output=True, text=True).stdout


@pytest.fixture
def web1(run: Run, tmp_path: Path) -> Web1:
    for name in ("web1.qcow2", "data.qcow2"):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / name), "16M"], check=True)
    (tmp_path / "web1.toml").write_text(MACHINE)
    run("machine", "define", str(tmp_path / "web1.toml"))
    return Web1(run, tmp_path)
