"""What a domain keeps besides disks and memory: its UEFI variables, and the state of its emulated TPM.

libvirt makes both at the first start. The variables lie where the definition says, else (and libvirt 9.0 says it in the live
definition only) at `<its state>/qemu/nvram/<name>_VARS.fd`. The TPM's lies where libvirt always puts it,
`<its state>/swtpm/<uuid>/tpm2`, owned by the user that swtpm runs as; that directory only root can read.
(libvirt src/qemu/qemu_domain.c, qemuDomainNVRAMPathFormat; src/qemu/qemu_tpm.c, qemuTPMEmulatorStorageBuildPath.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from diskchain.drivers import domain_xml, tpm
from diskchain.drivers.protocol import Definition, StateFile
from diskchain.errors import DriverFailed, Refused
from diskchain.host import libvirt_daemon

_SYSTEM = Path("/var/lib/libvirt")


class DomainState:
    """To be mixed into LibvirtDriver."""

    name: str
    uuid: str
    uri: str

    def _of_session(self) -> Path | None:
        """Where a user's own daemon keeps its state; None for that of the system."""
        if "/session" not in self.uri:
            return None
        return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "libvirt/qemu"

    def _seen_by_us(self, path: Path) -> Path:
        """The daemon may have mounts of its own."""
        return path if self._of_session() else libvirt_daemon.root(self.uri) / path.relative_to("/")

    def _tpm_dir(self) -> Path:
        return self._seen_by_us((self._of_session() or _SYSTEM) / "swtpm" / self.uuid / "tpm2")

    def usual_nvram(self) -> Path:
        """Where libvirt puts the UEFI variables of a domain of this name that does not say where."""
        return (self._of_session() or _SYSTEM / "qemu") / "nvram" / f"{self.name}_VARS.fd"

    def _nvram(self, persistent: str, live: str | None) -> Path | None:
        """A live definition of then has the usual place of then: the domain may have been renamed since."""
        text = live or persistent
        named = domain_xml.nvram(text)
        if named and domain_xml.nvram(persistent) is None and domain_xml.name(text) != self.name:
            return self.usual_nvram()
        return self.usual_nvram() if domain_xml.leaves_nvram_to_libvirt(text) else named

    def state_files(self, definition: Definition) -> list[StateFile]:
        """A command may still be at work in swtpm when the CPUs stand: `settles` is False. Saved memory has its state too."""
        text = json.loads(definition.text)
        xml, on = str(text["persistent"]), text["live"] is not None
        nvram = self._nvram(xml, text["live"])
        found = []
        if nvram and nvram.is_absolute():
            found.append(StateFile("nvram", self._seen_by_us(nvram), saved_late=True, made_by_manager=True, in_use=on))
        if domain_xml.tpm(text["live"] or xml) == "2.0":
            found.append(StateFile("tpm", self._tpm_dir(), directory=True, pattern=tpm.PATTERN, settles=False,
                                   made_by_manager=True, in_use=on))  # fmt: skip
        return found

    def label_now(self, definition: Definition, label: str) -> str:
        """libvirt loads no memory whose label has another name than the domain, or than the XML that it is given."""
        try:
            domain_xml.parse(label)
        except DriverFailed:  # it was cut off as it was written anew
            text = json.loads(definition.text)
            label = str(text["live"] or text["persistent"])
        return self.as_named_now(definition, label)

    def as_named_now(self, definition: Definition, xml: str) -> str:
        """A renamed domain has its UEFI variables elsewhere, too, where libvirt chose their place."""
        if domain_xml.name(xml) == self.name:
            return xml
        if domain_xml.nvram(str(json.loads(definition.text)["persistent"])) is None:
            xml = domain_xml.with_nvram(xml, self.usual_nvram())
        return domain_xml.with_name(xml, self.name)

    def refuse_state(self, xml: str) -> None:
        """Raise Refused when the domain has UEFI variables or a TPM whose state can't be in a snapshot."""
        problem = domain_xml.nvram_problem(xml)
        if problem:
            raise Refused(f"{self.name} has its UEFI variables (<nvram>) {problem}: diskchain can't put them into a snapshot",
                          hint="give it NVRAM in a raw file")  # fmt: skip
        version = domain_xml.tpm(xml)
        if version is None:
            return
        if version != "2.0":
            raise Refused(f"{self.name} has a TPM whose state diskchain can't put into a snapshot ({version})",
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
