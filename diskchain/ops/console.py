"""console: attach to the serial console of a running VM. Looks, sends, and never holds the guest up."""

from __future__ import annotations

import os
from typing import BinaryIO

from diskchain.drivers.protocol import Serial
from diskchain.errors import Refused
from diskchain.ops.vm import VM

_LAST_LINE = 4096


async def attach(vm: VM) -> Serial:
    """Attach. Raise Refused when the VM is off or has no console, Busy when somebody is attached."""
    if (await vm.driver.state()).is_off:
        raise Refused(f"{vm.name} is off", hint=f"diskchain start {vm.name}")
    return await vm.driver.open_serial()


class Output:
    """What the guest says from now on; first the line that it is on, which is where a prompt stands."""

    def __init__(self, serial: Serial) -> None:
        self._file: BinaryIO = serial.output.open("rb", buffering=0)
        end = self._file.seek(0, os.SEEK_END)
        start = max(0, end - _LAST_LINE)
        self._file.seek(start)
        tail = self._file.read(end - start)
        self._file.seek(start + tail.rfind(b"\n") + 1 if b"\n" in tail or start == 0 else end)

    def read(self) -> bytes:
        """Return what is new, at most 32 KiB; nothing when there is nothing."""
        if os.fstat(self._file.fileno()).st_size < self._file.tell():  # somebody emptied the log
            self._file.seek(0)
        return self._file.read(1 << 15)

    def close(self) -> None:
        """Let go of the log."""
        self._file.close()
