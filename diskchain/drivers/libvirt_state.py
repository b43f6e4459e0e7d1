"""What a domain keeps besides disks and memory: its UEFI variables, and the state of its emulated TPM.

libvirt makes both at the first start. The TPM's lies where libvirt always puts it, `<its state>/swtpm/<uuid>/tpm2`, owned by
the user that swtpm runs as; that directory only root can read. (libvirt src/qemu/qemu_tpm.c, qemuTPMEmulatorStorageBuildPath.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from diskchain.drivers import domain_xml, tpm
from diskchain.drivers.protocol import Definition, StateFile
from diskchain.errors import Refused
from diskchain.host import libvirt_daemon

_SYSTEM = "var/lib/libvirt/swtpm"


class DomainState:
    """To be mixed into LibvirtDriver."""

    name: str
    uuid: str
    uri: str

    def _tpm_dir(self) -> Path:
        if "/session" in self.uri:
            home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
            return home / "libvirt/qemu/swtpm" / self.uuid / "tpm2"
        return libvirt_daemon.root(self.uri) / _SYSTEM / self.uuid / "tpm2"

    def state_files(self, definition: Definition) -> list[StateFile]:
        """A command may still be at work in swtpm when the CPUs stand: `settles` is False. Saved memory has its state too."""
        xml = str(json.loads(definition.text)["persistent"])
        nvram = domain_xml.nvram(xml)
        found = [StateFile("nvram", nvram, saved_late=True, made_by_manager=True)] if nvram else []
        if domain_xml.tpm(xml) == "2.0":
            found.append(StateFile("tpm", self._tpm_dir(), directory=True, pattern=tpm.PATTERN, settles=False,
                                   made_by_manager=True))  # fmt: skip
        return found

    def refuse_tpm(self, xml: str) -> None:
        """Raise Refused when the domain has an emulated TPM whose state can't be in a snapshot."""
        version = domain_xml.tpm(xml)
        if version is None:
            return
        if version != "2.0":
            raise Refused(f"{self.name} has a TPM whose state diskchain can't put into a snapshot (version {version})",
                          hint="take it out, or give it an emulated one of version 2.0, its state in the usual place")  # fmt: skip
        directory = self._tpm_dir()
        if os.access(directory, os.R_OK | os.X_OK):
            return
        if os.geteuid() == 0 and not directory.exists():
            raise Refused(f"the TPM of {self.name} has no state yet: libvirt makes it at the first start",
                          hint=f"virsh start {self.name}, once")  # fmt: skip
        raise Refused(f"the state of {self.name}'s TPM can't be read: {directory}", hint="run diskchain as root")

    async def make_state_file(self, state: StateFile) -> None:
        """libvirt makes it at the first start."""

    def unusable(self, definition: Definition, name: str, sizes: Mapping[str, int]) -> str | None:
        """libvirt and QEMU say it at the start; an empty file is none, a TPM has its permanent state."""
        if name == "tpm" and not sizes.get(tpm.PERMANENT):
            return f"{tpm.PERMANENT} is not in it"
        return None if all(sizes.values()) else "it is empty"
