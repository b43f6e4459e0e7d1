"""The embedded driver: a QEMU that diskchain starts itself and drives over its own QMP socket."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diskchain.chain.machine import DiskSpec, Machine
from diskchain.chain.model import Image
from diskchain.drivers import accel, migration, serial
from diskchain.drivers.machines import Machines, Registered, differences
from diskchain.drivers.memory_saver import MemorySaver
from diskchain.drivers.migration import Commander
from diskchain.drivers.monitor import Monitor
from diskchain.drivers.pause_guard import WatchdogGuard
from diskchain.drivers.protocol import Chains, Definition, Listed, PauseGuard, Serial, StateFile, VMState
from diskchain.drivers.qemu_agent import QemuAgent
from diskchain.drivers.qemu_argv import command_line
from diskchain.drivers.qemu_disks import QemuDisks
from diskchain.drivers.qemu_parts import Parts, missing
from diskchain.drivers.suitable import Unsuitable
from diskchain.drivers.watched import WatchedQemu
from diskchain.errors import DiskchainError, DriverFailed, Refused, Unreachable
from diskchain.host import files
from diskchain.host.process import (
    ProcessId,
    find_process,
    process_id,
    scope,
    spawn_detached,
)

# a QMP socket serves one client at a time: changes, looks, the watchdog, the command that switches the disks
SOCKETS = ("qmp", "info", "watch", "switch")

_STATES = {
    "running": VMState.RUNNING,
    "suspended": VMState.SUSPENDED,
    "io-error": VMState.CRITICAL,
    "guest-panicked": VMState.CRASHED,
    "internal-error": VMState.CRASHED,
}


class QemuDriver(QemuDisks, QemuAgent, MemorySaver):
    """One machine of ours. `socket` is `qmp` for the holder of the VM's lock, `info` for everybody who only looks."""

    kind = "qemu"

    def __init__(self, registered: Registered, machines: Machines, run_dir: Path, *, socket: str = "qmp") -> None:
        self._registered = registered
        self._machines = machines
        self._state_dir = machines.dir.parent
        self.run_dir = run_dir / registered.machine.uuid
        self._socket = socket
        self._monitor: Monitor | None = None
        self._parts = Parts(registered.machine.name, registered.home, self.run_dir)
        self.name = registered.machine.name
        self.uuid = registered.machine.uuid

    @property
    def home(self) -> Path:
        """Where the VM's records, console log and QEMU log are."""
        return self._registered.home

    @property
    def _machine(self) -> Machine:
        return self._registered.machine

    # -- the process and its monitor -------------------------------------------------------------------------------

    def process(self) -> ProcessId | None:
        """Return the machine's QEMU, or None. Its own pid file first, then a look through all processes."""
        try:
            found = process_id(int((self.run_dir / "pid").read_text()))
        except (OSError, ValueError):
            found = None
        if found and self._is_ours(found):
            return found
        return find_process("-uuid", self.uuid)

    def _is_ours(self, found: ProcessId) -> bool:
        try:
            return f"-uuid\0{self.uuid}\0".encode() in Path(f"/proc/{found.pid}/cmdline").read_bytes()
        except OSError:
            return False

    async def _connected(self) -> Monitor:
        if self._monitor is None:
            if self.process() is None:
                raise DriverFailed(f"{self.name} is not running", hint=f"diskchain start {self.name}")
            self._monitor = await Monitor.connect(self.run_dir / f"{self._socket}.sock")
        return self._monitor

    async def _commander(self) -> Commander:
        return await self._connected()

    async def _execute(self, command: str, **arguments: Any) -> Any:
        return await (await self._connected()).execute(command, **arguments)

    async def close(self) -> None:
        """Close the connection; the machine goes on."""
        await self._forget_switch()
        if self._monitor:
            await self._monitor.close()
            self._monitor = None

    # -- looking ---------------------------------------------------------------------------------------------------

    async def state(self) -> VMState:
        """Ask QEMU; no process = stopped."""
        process = self.process()
        if process is None:
            await self.close()
            return VMState.STOPPED
        try:
            status = (await self._execute("query-status"))["status"]
        except (Unreachable, DriverFailed):
            if await process.gone(1.0):
                await self.close()
                return VMState.STOPPED
            raise
        return _STATES.get(status, VMState.PAUSED)

    async def next_files(self) -> None:
        """The catalog decides."""

    async def unsuitable(self) -> list[Unsuitable]:
        """None: `define` takes image files only."""
        return []

    async def listed_snapshots(self) -> dict[str, str]:
        """There is no other list than the catalog."""
        return {}

    async def list_snapshots(self, wanted: Sequence[Listed]) -> None:
        """There is no other list than the catalog."""

    async def check_files(self, paths: Sequence[Path], *, written: bool) -> None:
        """QEMU is of our own user."""

    async def remarks(self) -> list[str]:
        """Nobody else manages it."""
        return []

    async def refuse(self, operation: str) -> None:
        """Nobody else manages our machines."""

    async def refuse_elsewhere(self) -> None:
        """Nobody migrates them."""

    def _machine_running(self) -> Machine:
        try:
            return Machine.from_dict(json.loads((self.run_dir / "machine.json").read_bytes())["machine"])
        except (OSError, ValueError, KeyError):
            return self._machine

    def memory_bytes(self) -> int:
        """The running machine's RAM."""
        return (self._machine_running() if self.process() else self._machine).memory

    def definition(self) -> Definition:
        """The definition in the state directory."""
        return Definition(self.kind, json.dumps({"machine": self._machine.to_dict()}))

    async def live_definition(self) -> Definition:
        """The definition the running QEMU was started with, with what was decided then (`ran_with`)."""
        if self.process() is None:
            return self.definition()
        try:
            return Definition(self.kind, (self.run_dir / "machine.json").read_text())
        except OSError as error:
            raise DriverFailed(f"the run-time record of {self.name} is gone ({error.strerror})",
                               hint="stop and start the machine; use --disk-only until then") from error  # fmt: skip

    def differences(self, old: Definition, new: Definition) -> list[str]:
        """Compare two machine definitions in words."""
        return differences(_machine_of(old), _machine_of(new))

    def renewed(self, definition: Definition) -> Definition:
        """A new generation id, where the machine has one: a saved memory loads only into the devices it was saved from."""
        record = json.loads(definition.text)
        if record["machine"].get("genid"):
            record["machine"]["genid"] = str(uuid.uuid4())
        return replace(definition, text=json.dumps(record))

    def disks(self, definition: Definition) -> dict[str, Path]:
        """The machine's disks."""
        return {disk.target: Path(disk.image) for disk in _machine_of(definition).disks}

    def without_memory(self, definition: Definition, attached: Collection[str]) -> Definition:
        """A machine gets and loses disks only while it is off."""
        return definition

    def missing_files(self, definition: Definition) -> list[str]:
        """Look for the kernel, initrd, UEFI firmware and swtpm of a definition."""
        machine = _machine_of(definition)
        named = (("kernel", machine.kernel), ("initrd", machine.initrd))
        found = [f"{what} {path} does not exist" for what, path in named if path and not Path(path).is_file()]
        return found + missing(machine)

    # -- besides disks and memory ----------------------------------------------------------------------------------

    def state_files(self, definition: Definition) -> list[StateFile]:
        """NVRAM and TPM directory, beside the records."""
        return self._parts.state_files(_machine_of(definition))

    async def make_state_file(self, state: StateFile) -> None:
        """NVRAM from the template; a TPM that swtpm initialised."""
        await self._parts.make(self._machine, state)

    def unusable(self, definition: Definition, name: str, sizes: Mapping[str, int]) -> str | None:
        """NVRAM must be as long as the template; a TPM needs its permanent state."""
        return self._parts.unusable(_machine_of(definition), name, sizes)

    def check_helpers(self) -> None:
        """Look for swtpm."""
        if self.process():
            self._parts.check_helpers(self._machine_running())

    def memory_loads_with(self, definition: Definition) -> list[str]:
        """Compare the firmware with the one that was recorded."""
        return self._parts.memory_loads_with(json.loads(definition.text))

    async def unsupported(self, definition: Definition) -> list[str]:
        """Ask QEMU whether it has the machine type."""
        kind = _machine_of(definition).machine
        if kind in await accel.machine_types():
            return []
        return [f"this QEMU ({await accel.qemu_version()}) has no machine type {kind}"]

    # -- power -----------------------------------------------------------------------------------------------------

    async def start(self, chains: Chains, *, paused: bool = False) -> None:
        """Start QEMU on the chains."""
        ran_with = {
            "accel": await accel.decide(self._machine.accel, self._state_dir),
            "qemu": await accel.qemu_version(),
            **self._parts.runs_with(self._machine),
        }
        await self._launch(self._machine, ran_with, chains, stopped=paused)

    async def start_from_memory(self, definition: Definition, chains: Chains, memory: int) -> None:
        """Start QEMU as it was when the memory was saved, load the memory, stay paused."""
        ran_with = json.loads(definition.text)["ran_with"]
        await self._launch(_machine_of(definition), ran_with, chains, stopped=True, incoming=True)
        try:
            await migration.load(await self._connected(), memory)
        except DiskchainError as error:
            await self.kill()
            raise DriverFailed(f"{error.message}; {self._log_tail()}", hint=error.hint) from error

    async def _launch(self, machine: Machine, ran_with: Mapping[str, Any], chains: Chains, *, stopped: bool,
                      incoming: bool = False) -> None:  # fmt: skip
        self._fresh_run_dir()
        complete = replace(machine, accel=ran_with["accel"])
        record = {"machine": machine.to_dict(), "ran_with": dict(ran_with)}
        files.write_durably(self.run_dir / "machine.json", json.dumps(record).encode())
        prefix = await scope(self.name)
        parts = await self._parts.launch(complete, ran_with, prefix)
        argv = command_line(complete, chains, run_dir=self.run_dir, console=self.home / "console.log",
                            sockets=SOCKETS, stopped=stopped, incoming=incoming, parts=parts)  # fmt: skip
        self._log_start = self._log_size()
        child = spawn_detached([*prefix, *argv], self._log)
        began = time.monotonic()
        while True:
            if child.poll() is not None:
                await self._parts.end()
                raise DriverFailed(f"QEMU did not start: {self._log_tail()}", hint=f"the whole log: {self._log}")
            try:
                self._monitor = await Monitor.connect(self.run_dir / f"{self._socket}.sock", timeout=0.2)
                return
            except Unreachable:
                if time.monotonic() - began > 60:
                    child.kill()
                    raise

    def _fresh_run_dir(self) -> None:
        self.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if len(os.fsencode(self.run_dir / "switch.sock")) > 107:
            raise DriverFailed(f"the path {self.run_dir} is too long for sockets",
                               hint="choose a shorter run_dir in the configuration")  # fmt: skip
        for name in (*(f"{s}.sock" for s in SOCKETS), "agent.sock", "pid"):
            (self.run_dir / name).unlink(missing_ok=True)

    @property
    def _log(self) -> Path:
        return self.home / "qemu.log"

    def _log_size(self) -> int:
        return self._log.stat().st_size if self._log.exists() else 0

    def _log_tail(self) -> str:
        try:
            with self._log.open("rb") as log:
                log.seek(getattr(self, "_log_start", 0))
                lines = [line for line in log.read().decode("utf-8", "replace").splitlines() if "warning:" not in line]
        except OSError:
            lines = []
        said = "; ".join(line.removeprefix("qemu-system-x86_64: ") for line in lines[-2:])
        return said or "QEMU said nothing"

    async def power_off(self, timeout: float) -> bool:
        """Press the ACPI power button (again every 10 seconds: a guest that still boots misses the first)."""
        process, end = self.process(), time.monotonic() + timeout
        while process and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(DriverFailed, Unreachable):
                await self._execute("system_powerdown")
            if await process.gone(min(10.0, left)):
                break
        if process is None or not process.alive():
            await self.close()
            await self._parts.end()
            return True
        return False

    async def quit(self) -> None:
        """Stop the CPUs, then let QEMU end by itself: it writes its caches into the images."""
        process = self.process()
        if process is None:
            return
        await self._execute("stop")
        with contextlib.suppress(Unreachable):  # the connection breaks, that is the answer
            await self._execute("quit")
        await self.close()
        if not await process.gone(120):
            raise Unreachable(f"QEMU of {self.name} does not end", hint=f"diskchain stop --force {self.name}")
        await self._parts.end()

    async def kill(self) -> None:
        """SIGKILL QEMU."""
        process = self.process()
        await self.close()
        if process:
            process.kill()
            if not await process.gone(60):
                raise Unreachable(f"QEMU (pid {process.pid}) does not die; it waits for its storage")
        await self._parts.end()

    async def pause(self) -> None:
        """QMP stop."""
        await self._execute("stop")

    async def resume(self) -> None:
        """QMP cont, unless it runs already."""
        if (await self._execute("query-status"))["status"] != "running":
            await self._execute("cont")

    async def wake_up(self) -> None:
        """QMP system_wakeup."""
        await self._execute("system_wakeup")

    # -- console ---------------------------------------------------------------------------------------------------

    async def open_serial(self) -> Serial:
        """Give QEMU a FIFO beside the log that it writes."""
        process = self.process()
        if process is None:
            raise DriverFailed(f"{self.name} is not running", hint=f"diskchain start {self.name}")
        if self._machine_running().console == "none":
            raise Refused(f"{self.name} has no serial console",
                          hint='console = "log" in its machine file, define it again, stop and start it')  # fmt: skip
        return await serial.attach(self._execute, self.run_dir, self.home / "console.log", process, self.name)

    # -- configuration ---------------------------------------------------------------------------------------------

    async def define(self, definition: Definition, chains: Chains) -> None:
        """Write the definition. Its images only identify the chains, which may have been moved since it was recorded."""
        machine = _machine_of(definition)
        disks = tuple(_in_chain(disk, chains.get(disk.target, ())) for disk in machine.disks)
        self._registered = replace(self._registered, machine=replace(machine, disks=disks))
        self._machines.put(self._registered)

    async def align(self, chains: Chains, was: Collection[Path] = ()) -> list[str]:
        """The catalog decides."""
        return []

    async def memory_label(self, disks: Mapping[str, Path]) -> str:
        """Enough for people and tools to identify it: libvirt shows it (virsh save-image-dumpxml), but can't run it."""
        return (f"<domain type='qemu'><name>{self.name}</name><uuid>{self.uuid}</uuid>"
                f"<memory unit='b'>{self.memory_bytes()}</memory><os><type arch='x86_64'>hvm</type></os>"
                "<description>saved by diskchain; use: diskchain revert</description></domain>")  # fmt: skip

    def label_now(self, definition: Definition, label: str) -> str:
        """Nobody reads it."""
        return label

    # -- snapshot --------------------------------------------------------------------------------------------------

    async def check_memory_save(self) -> None:
        """Our machines have no devices that QEMU can't save."""

    def pause_guard(self, *, limit: float | None) -> contextlib.AbstractAsyncContextManager[PauseGuard]:
        """A watchdog process connected to this QEMU."""
        words = ["qemu", str(self.run_dir)]
        return WatchdogGuard.guarding(WatchedQemu(self.run_dir), words, self.home / "watchdog.log", limit)


def _machine_of(definition: Definition) -> Machine:
    return Machine.from_dict(json.loads(definition.text)["machine"])


def _in_chain(disk: DiskSpec, chain: Sequence[Image]) -> DiskSpec:
    """The disk with an image of its chain: its own, if that is one, else the base."""
    if not chain or any(Path(disk.image) == image.path for image in chain):
        return disk
    return replace(disk, image=str(chain[-1].path), fmt=chain[-1].fmt)
