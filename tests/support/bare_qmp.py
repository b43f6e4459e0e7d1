"""What diskchain is measured against: QEMU driven by hand over one socket, without records, checks or a watchdog.

The guest has the same command line as one of diskchain's; each sequence is the shortest that does the job.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diskchain.chain.machine import Machine
from diskchain.chain.model import Image
from diskchain.drivers.qemu_argv import blockdev, command_line, node_name

MiB = 1 << 20


class Qmp:
    """A blocking QMP connection; waits `timeout` seconds until QEMU listens, and `answers_within` seconds for a line of it."""

    def __init__(self, path: Path, timeout: float = 30, *, answers_within: float | None = None) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        end = time.monotonic() + timeout
        while self._socket.connect_ex(str(path)) != 0:
            if time.monotonic() > end:
                raise TimeoutError(f"no QEMU on {path}")
            time.sleep(0.001)
        self._socket.settimeout(answers_within)
        self._answers = self._socket.makefile("rb")
        self._answers.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, *, fd: int | None = None, **arguments: Any) -> Any:
        """Run a command (`_` in argument names stands for `-`). Raise RuntimeError with QEMU's words."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        message = json.dumps({"execute": command, "arguments": named}).encode() + b"\n"
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        self._socket.sendmsg([message], rights)
        while True:
            line = self._answers.readline()
            if not line:
                raise ConnectionError(f"QEMU closed the connection during {command}")
            answer = json.loads(line)
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        """Close the connection."""
        self._answers.close()
        self._socket.close()


class BareGuest:
    """A guest on base images in `directory`; `machine` is complete and names these images."""

    def __init__(self, machine: Machine, directory: Path, run_dir: Path) -> None:
        self.machine, self.dir, self.run_dir = machine, directory, run_dir
        self.console = directory / "console.log"
        self.qmp: Qmp
        self._process: subprocess.Popen[bytes]
        self._made = 0
        self.chains: dict[str, tuple[Image, ...]] = {
            d.target: (Image(f"{d.target}base", Path(d.image), "qcow2", d.target, 0),) for d in machine.disks
        }

    def start(self, *, incoming: bool = False) -> None:
        """Start QEMU on the current chains."""
        self.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        argv = command_line(self.machine, self.chains, run_dir=self.run_dir, console=self.console, sockets=("bare",),
                            stopped=incoming, incoming=incoming)  # fmt: skip
        (self.run_dir / "bare.sock").unlink(missing_ok=True)
        with (self.dir / "qemu.log").open("ab") as log:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.qmp = Qmp(self.run_dir / "bare.sock")

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self._process.pid

    def make_overlays(self) -> dict[str, Image]:
        """Make an empty overlay on every active layer."""
        overlays = {}
        self._made += 1
        for target, chain in self.chains.items():
            path = self.dir / f"{target}.{self._made}.qcow2"
            subprocess.run(
                ["qemu-img", "create", "-q", "-f", "qcow2", "-b", chain[0].path, "-F", "qcow2", path], check=True
            )
            overlays[target] = Image(f"{target}n{self._made}", path, "qcow2", target, 0, chain[0].id)
        return overlays

    def stack(self, overlays: Mapping[str, Image]) -> None:
        """The overlays are the active layers now."""
        self.chains = {t: (overlays[t], *chain) for t, chain in self.chains.items()}

    def create(self, memory: Path) -> float:
        """Snapshot disks and memory with everything prepared before the pause; return the pause in milliseconds.

        Comes back when the memory is on disk.
        """
        overlays = self.make_overlays()
        fd = self._memory_file(memory)
        try:
            for image in overlays.values():
                self.qmp("blockdev-add", **blockdev(image, None, read_only=False))
            self._prepare_save(fd, background=True)
            pause = self._timed(lambda: self._switch_and_capture(overlays))
            self.wait_for_migration()
            os.fsync(fd)
        finally:
            os.close(fd)
        self.stack(overlays)
        return pause

    def _switch_and_capture(self, overlays: Mapping[str, Image]) -> None:
        self.qmp("stop")
        self.qmp("transaction", actions=[
            {"type": "blockdev-snapshot", "data": {"node": node_name(self.chains[t][0]), "overlay": node_name(image)}}
            for t, image in overlays.items()
        ])  # fmt: skip
        self.qmp("migrate", uri="fd:memory")
        self._wait_for_first_page()
        if self.qmp("query-status")["status"] != "running":
            self.qmp("cont")

    def _wait_for_first_page(self) -> None:
        while True:
            answer = self.qmp("query-migrate")
            ram = answer.get("ram", {})
            if ram.get("normal", 0) + ram.get("duplicate", 0) > 0 or answer.get("status") == "completed":
                return
            if answer.get("status") == "failed":
                raise RuntimeError(f"migrate: {answer}")

    def stop_migrate_cont(self, memory: Path) -> float:
        """Save the memory of the stopped guest; return how long it stood still, in milliseconds."""
        fd = self._memory_file(memory)
        try:
            self._prepare_save(fd, background=False)
            return self._timed(self._save_while_stopped)
        finally:
            os.close(fd)

    def _save_while_stopped(self) -> None:
        self.qmp("stop")
        self.qmp("migrate", uri="fd:memory")
        self.wait_for_migration()
        self.qmp("cont")

    def savevm(self, name: str) -> float:
        """QEMU's own internal snapshot, deleted again; return how long it took, in milliseconds."""
        taken = self._timed(lambda: self._hmp(f"savevm {name}"))
        self._hmp(f"delvm {name}")
        return taken

    def _hmp(self, line: str) -> None:
        said = self.qmp("human-monitor-command", command_line=line)
        if said:
            raise RuntimeError(f"{line}: {said}")

    def restore(self, memory: Path) -> float:
        """Leave the present for a saved memory on new overlays; return the milliseconds until the guest runs."""
        return self._timed(lambda: self._restore(memory))

    def _restore(self, memory: Path) -> None:
        overlays = self.make_overlays()
        self.quit()
        self.stack(overlays)
        self.start(incoming=True)
        fd = os.open(memory, os.O_RDONLY)
        try:
            self._prepare_load(fd)
            self.qmp("migrate-incoming", uri="fd:memory")
            self.wait_for_migration()
        finally:
            os.close(fd)
        self.qmp("cont")

    def _memory_file(self, path: Path) -> int:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        size = self.machine.memory + self.machine.memory // 50 + 32 * MiB
        subprocess.run(["fallocate", "--keep-size", "--length", str(size), str(path)], check=True)
        return fd

    def _prepare_save(self, fd: int, *, background: bool) -> None:
        capability = {"capability": "background-snapshot", "state": background}
        self.qmp("migrate-set-capabilities", capabilities=[capability])
        self._prepare_load(fd)

    def _prepare_load(self, fd: int) -> None:
        self.qmp("migrate-set-parameters", max_bandwidth=1 << 40)
        self.qmp("getfd", fd=fd, fdname="memory")

    def wait_for_migration(self) -> None:
        """Wait until the save or load is over. Raise RuntimeError when it failed."""
        while (answer := self.qmp("query-migrate")).get("status") != "completed":
            if answer.get("status") in ("failed", "cancelled"):
                raise RuntimeError(f"migration: {answer}")
            time.sleep(0.002)

    @staticmethod
    def _timed(work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) * 1000

    def hold(self) -> None:
        """SIGSTOP: leave the processors to what is measured."""
        os.kill(self.pid, signal.SIGSTOP)

    def release(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def quit(self) -> None:
        """End QEMU."""
        self.qmp("stop")
        self.qmp("quit")
        self._process.wait()
        self.qmp.close()

    def destroy(self) -> None:
        """Kill QEMU."""
        self._process.kill()
        self._process.wait()
        self.qmp.close()
