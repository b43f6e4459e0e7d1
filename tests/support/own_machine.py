"""A machine of diskchain's, driven by its operations inside this process: each call is one command of the real thing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from diskchain.chain.machine import Machine
from diskchain.chain.model import Snapshot
from diskchain.config import Config
from diskchain.ops import create, machine, power, revert
from diskchain.ops.vm import VM, Host
from diskchain.store.catalog import Home
from tests.support.guest import boot_words, guest_files

MiB = 1 << 20
T = TypeVar("T")


@dataclass(frozen=True)
class Guest:
    """What kind of guest is wanted."""

    memory: int = 256 * MiB
    cpus: int = 1
    disks: int = 2
    modes: str = "cnt,tick"
    scsi: bool = False

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of its disks."""
        return tuple(f"{'sd' if self.scsi else 'vd'}{letter}" for letter in "abcdefghijklmnop"[: self.disks])


class OwnMachine:
    """A defined machine in `directory`, which is made here."""

    def __init__(self, guest: Guest, directory: Path, *, huge_pages: bool = True) -> None:
        directory.mkdir(parents=True)
        self.dir = directory
        # sockets have short names: the run directory stands outside the (long) test directory
        self.run_dir = Path(tempfile.mkdtemp(prefix="dc-", dir="/tmp"))
        settings = replace(Config().create, huge_pages=huge_pages)
        self.host = Host(replace(Config(), state_dir=directory / "state", run_dir=self.run_dir, create=settings))
        file = directory / "vm.toml"
        file.write_text(_machine_file(guest))
        make_bases(directory, guest.targets)
        defined = asyncio.run(machine.define(self.host, file))
        self.machine: Machine = defined.machine
        self.home = Home(defined.home)
        self.console = defined.home / "console.log"

    def _run(self, operation: str, work: Callable[[VM], Awaitable[T]]) -> T:
        async def command() -> T:
            async with self.host.change(self.machine.name, operation) as vm:
                return await work(vm)

        return asyncio.run(command())

    def start(self) -> None:
        """Start it."""
        self._run("start", lambda vm: power.start(vm))

    def pause(self) -> None:
        """Stop its processors."""
        self._run("pause", power.pause)

    def create(self, name: str) -> Snapshot:
        """Snapshot it with its memory, saved while it runs."""
        return self._run("create", lambda vm: create.create(vm, create.Request(name, memory="background")))

    def revert(self, name: str, *, discard: bool = True) -> revert.Reverted:
        """Go back to a snapshot."""
        return self._run("revert", lambda vm: revert.revert(vm, revert.Request(name, discard=discard)))

    def forget_memory(self, snapshot: Snapshot) -> None:
        """Remove the memory file of a snapshot that nobody reverts to any more."""
        self.home.memory(snapshot.id).unlink()

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return int((self.run_dir / self.machine.uuid / "pid").read_text())

    def hold(self) -> None:
        """SIGSTOP: leave the processors to what is measured."""
        os.kill(self.pid, signal.SIGSTOP)

    def release(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def destroy(self) -> None:
        """Kill it and remove everything."""
        with contextlib.suppress(OSError, ValueError):
            os.kill(self.pid, signal.SIGKILL)
        shutil.rmtree(self.run_dir, ignore_errors=True)
        shutil.rmtree(self.dir, ignore_errors=True)


def make_bases(directory: Path, targets: Sequence[str]) -> list[Path]:
    """Make the base images of these disks."""
    paths = [directory / f"{target}.qcow2" for target in targets]
    for path in paths:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "64M"], check=True)
    return paths


def _machine_file(guest: Guest) -> str:
    kernel, initrd = guest_files()
    lines = [
        f'name = "vm"\nmemory = "{guest.memory // MiB} MiB"\ncpus = {guest.cpus}\naccel = "tcg"',
        f'kernel = "{kernel}"\ninitrd = "{initrd}"\nappend = "{boot_words(guest.modes)}"',
        *(f'[[disk]]\ntarget = "{target}"\nimage = "{target}.qcow2"' for target in guest.targets),
    ]
    return "\n".join(lines) + "\n"
