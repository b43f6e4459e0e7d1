"""A QMP command that QEMU has read but for its last byte: what is left of it in the pause is that byte.

QEMU takes what a monitor is sent byte by byte, one turn of its main loop for each (monitor_can_read in
monitor/monitor.c, QEMU 7.2 to 10; measured: 4-12 us a byte). A transaction over 16 disks has 1.9 kB; read while the
guest stands still that is as long as carrying it out. A command that was not ended is forgotten when the connection
closes (json_message_parser_destroy in monitor/qmp.c), so nothing is switched when we die before the last byte.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from diskchain.errors import DriverFailed, Unreachable

_PATIENCE = 120.0  # seconds, as for every other command
_GREETING = 10.0  # seconds
_LONGEST_ANSWER = 1 << 20  # bytes


class ReadyCommand:
    """One command, on a connection of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str) -> None:
        self._reader, self._writer, self._name = reader, writer, name

    @classmethod
    async def open(cls, path: Path, name: str, **arguments: Any) -> ReadyCommand:
        """Connect, and send all but the end. Raise Unreachable when there is no such socket, or another client has it."""
        try:
            reader, writer = await asyncio.open_unix_connection(str(path), limit=_LONGEST_ANSWER)
        except OSError as error:
            raise Unreachable(f"no answer from QEMU on {path}", hint="diskchain machine list") from error
        ready = cls(reader, writer, name)
        try:
            await asyncio.wait_for(ready._send(arguments), _GREETING)
        except (TimeoutError, OSError, ValueError, EOFError) as error:
            await ready.close()
            raise Unreachable(f"no answer from QEMU on {path}", hint="diskchain machine list") from error
        return ready

    async def _send(self, arguments: dict[str, Any]) -> None:
        await self._reader.readline()  # the greeting
        self._writer.write(b'{"execute":"qmp_capabilities"}\n')
        await self._answer()
        text = json.dumps({"execute": self._name, "arguments": arguments}, separators=(",", ":")).encode()
        self._writer.write(text[:-1])
        await self._writer.drain()

    async def run(self) -> Any:
        """Send the end; return the answer. Raise DriverFailed with QEMU's words; Unreachable: the outcome is unknown."""
        try:
            self._writer.write(b"}")
            answer = await asyncio.wait_for(self._answer(), _PATIENCE)
        except TimeoutError as error:
            raise Unreachable(f"QEMU did not answer {self._name} within {_PATIENCE:.0f} seconds",
                              hint="look at its storage; diskchain stop --force ends it") from error  # fmt: skip
        except (OSError, ValueError, EOFError) as error:
            raise Unreachable(f"the connection to QEMU broke during {self._name}", hint="diskchain recover") from error
        if "error" in answer:
            raise DriverFailed(f"QEMU refused {self._name}: {answer['error'].get('desc')}")
        return answer["return"]

    async def _answer(self) -> dict[str, Any]:
        """The next line that is no event."""
        while True:
            line = await self._reader.readuntil(b"\n")
            answer: dict[str, Any] = json.loads(line)
            if "return" in answer or "error" in answer:
                return answer

    async def close(self) -> None:
        """Close the connection: what was not ended is forgotten."""
        self._writer.transport.abort()
