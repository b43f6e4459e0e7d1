"""A domain's QEMU monitor, as libvirt passes it through."""

from __future__ import annotations

import json
from typing import Any

import libvirt_qemu

from diskchain.drivers.libvirt_api import called
from diskchain.errors import DriverFailed


class Passthrough:
    """A domain's QEMU monitor as libvirt passes it through: what drivers/migration.py needs of a monitor."""

    def __init__(self, domain: Any) -> None:
        self._domain = domain
        self._fds: list[int] = []

    def send_fd(self, fd: int) -> None:
        """Pass a descriptor with the next command."""
        self._fds.append(fd)

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command. QEMU's errors come back as ordinary text."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        text = json.dumps({"execute": command, **({"arguments": named} if named else {})})
        fds, self._fds = self._fds, []
        if fds:
            said = await called(command, libvirt_qemu.qemuMonitorCommandWithFiles, self._domain, text, fds, 0)
            said = said[0] if isinstance(said, tuple) else said
        else:
            said = await called(command, libvirt_qemu.qemuMonitorCommand, self._domain, text, 0)
        answer = json.loads(said)
        if "error" in answer:
            raise DriverFailed(f"QEMU refused {command}: {answer['error'].get('desc', answer['error'])}")
        return answer.get("return")
