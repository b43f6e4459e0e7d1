"""The parts of a machine of ours besides disks and memory: UEFI firmware with its variables, and the TPM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diskchain.chain.machine import Machine, is_q35
from diskchain.drivers import firmware, tpm
from diskchain.drivers.protocol import StateFile
from diskchain.errors import DriverFailed, NotFound, Refused
from diskchain.host.process import find_program


def check_installed(machine: Machine) -> None:
    """Raise NotFound, saying what to install, when firmware or swtpm are needed and not there."""
    if machine.firmware == "uefi":
        firmware.find(machine.machine)
    if machine.tpm:
        find_program("swtpm")


def missing(machine: Machine) -> list[str]:
    """Return the same in words."""
    try:
        check_installed(machine)
    except NotFound as error:
        return [f"{error.message} ({error.hint})"]
    return []


class Parts:
    """Those of one machine; its `home` is where they are kept."""

    def __init__(self, name: str, home: Path, run_dir: Path) -> None:
        self._name, self._home = name, home
        self._nvram, self._tpm = home / "nvram.fd", home / "tpm"
        self._socket = run_dir / "tpm.sock"
        self._log = home / "swtpm.log"

    def state_files(self, machine: Machine) -> list[StateFile]:
        """Return what the machine keeps.

        QEMU does not write-protect flash during a background save (it is no RAM), so the stream holds a later state. A
        command may still be at work in swtpm when the CPUs stand.
        """
        found = []
        if machine.firmware == "uefi":
            found.append(StateFile("nvram", self._nvram, saved_late=True))
        if machine.tpm:
            found.append(StateFile("tpm", self._tpm, directory=True, pattern=tpm.PATTERN, settles=False))
        return found

    async def make(self, machine: Machine, state: StateFile) -> None:
        """Make one of them anew. Raise NotFound saying what to install."""
        if state.name == "nvram":
            firmware.make_nvram(state.path, firmware.find(machine.machine).template)
        else:
            find_program("swtpm")
            self._socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            await tpm.manufacture(state.path, self._socket, self._log)

    def unusable(self, machine: Machine, name: str, sizes: Mapping[str, int]) -> str | None:
        """Say why the machine could not start with a copy of these files; None: it could."""
        if name == "tpm":
            return None if sizes.get(tpm.PERMANENT) else f"{tpm.PERMANENT} is not in it"
        template = firmware.find(machine.machine).template
        size, wanted = sum(sizes.values()), template.stat().st_size
        return None if size == wanted else f"it has {size} bytes, the firmware here needs {wanted} ({template})"

    def check_helpers(self, machine: Machine) -> None:
        """Raise Refused when the machine runs without the swtpm that it began with."""
        if machine.tpm and tpm.process(self._tpm, self._socket) is None:
            raise Refused(f"the TPM of {self._name} has died (swtpm is gone); its state can't be saved",
                          hint=f"see {self._log}; shut the guest down and start it again: diskchain stop {self._name}")  # fmt: skip

    def runs_with(self, machine: Machine) -> dict[str, Any]:
        """Return what must be remembered of a start. Raise NotFound when firmware or swtpm are not installed."""
        check_installed(machine)
        if machine.firmware != "uefi":
            return {}
        return {"firmware": firmware.find(machine.machine).recorded()}

    def memory_loads_with(self, recorded: Mapping[str, Any]) -> list[str]:
        """Given what a machine ran with, return what differs. Raise Refused when its memory can't be loaded here."""
        code = recorded.get("ran_with", {}).get("firmware")
        try:
            if recorded["machine"].get("tpm"):
                find_program("swtpm")
            other = firmware.other_code(code) if code else None
        except (DriverFailed, NotFound) as error:
            raise Refused(error.message, hint=error.hint) from error
        return [other] if other else []

    async def launch(self, machine: Machine, ran_with: Mapping[str, Any], prefix: Sequence[str]) -> list[str]:
        """Start what must run before QEMU does; return QEMU's words for all parts."""
        words: list[str] = []
        if machine.firmware == "uefi":
            words += firmware.words(firmware.recorded_code(ran_with["firmware"]), self._nvram)
        if machine.tpm:
            await tpm.launch(self._tpm, self._socket, self._log, prefix=prefix)
            words += tpm.words(self._socket, tis=not is_q35(machine.machine))
        return words

    async def end(self) -> None:
        """QEMU is gone: so must be its TPM, before anybody touches its state."""
        if self._tpm.is_dir():
            await tpm.end(self._tpm, self._socket)
