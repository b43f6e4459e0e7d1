"""A client of qemu-guest-agent on the VM's own channel. Nothing that comes out of the channel is trusted.

The channel is a stream of JSON lines with no beginning: it may hold answers to questions that somebody asked before
us, half a line, or whatever the guest likes to write. So every question is preceded by 0xFF (which resets the agent's
parser) and `guest-sync-delimited` with a number of ours; what comes before 0xFF and that number is thrown away.
QEMU serves one client at a time; a second one waits until the first has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from diskchain.errors import AgentFailed, AgentMissing

log = logging.getLogger(__name__)

_LONGEST = 256 * 1024  # bytes of one answer; guest-info takes about 6 KiB
_MOST = 1024 * 1024  # bytes that are thrown away until an agent counts as babbling
_MANY = 100_000  # file systems
ATTEMPT = 5.0  # seconds for one question that is answered at once by an agent that is alive


class Agent:
    """An open channel."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._kept = bytearray()
        self._thrown = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, path: Path) -> AsyncIterator[Agent]:
        """Open the channel. Raise AgentMissing when nobody listens there (no QEMU, no channel)."""
        try:
            reader, writer = await asyncio.open_unix_connection(path, limit=64 * 1024)
        except OSError as error:
            raise AgentMissing(f"the channel of the guest agent can't be opened: {error.strerror}") from error
        try:
            yield cls(reader, writer)
        finally:
            writer.transport.abort()  # what a full channel did not take is not waited for

    # -- what can be asked -----------------------------------------------------------------------------------------

    async def commands(self, limit: float = ATTEMPT) -> set[str]:
        """Return the names of the commands that the agent carries out."""
        (answer,) = await self.ask("guest-info", limit=limit)
        try:
            return {str(c["name"]) for c in answer["supported_commands"] if c["enabled"] is True}
        except (TypeError, KeyError) as error:
            raise _nonsense("guest-info", answer) from error

    async def is_frozen(self, limit: float = ATTEMPT) -> bool:
        """Whether the agent says that it froze the file systems."""
        (answer,) = await self.ask("guest-fsfreeze-status", limit=limit)
        return _status(answer)

    async def freeze(self, limit: float) -> int:
        """Freeze the file systems; return how many. After a failure nobody knows: thaw."""
        (answer,) = await self.ask("guest-fsfreeze-freeze", limit=limit)
        return _count("guest-fsfreeze-freeze", answer)

    async def thaw(self, limit: float = ATTEMPT) -> tuple[bool, int]:
        """Thaw the file systems; return whether the agent took them for frozen until now, and how many really were.

        The command is sent at once, without waiting for an agent that hangs in something else.
        """
        before, count = await self.ask("guest-fsfreeze-status", "guest-fsfreeze-thaw", limit=limit)
        return _status(before), _count("guest-fsfreeze-thaw", count)

    async def set_clock(self, limit: float = ATTEMPT) -> None:
        """Set the guest's clock to ours. An agent that can't set the hardware clock as well has done enough."""
        try:
            await self.ask("guest-set-time", limit=limit, arguments={"time": time.time_ns()})
        except AgentFailed as error:
            with contextlib.suppress(AgentFailed):
                (answer,) = await self.ask("guest-get-time", limit=limit)
                if isinstance(answer, int) and abs(answer - time.time_ns()) < 5e9:
                    return
            raise error

    # -- how -------------------------------------------------------------------------------------------------------

    async def ask(self, *commands: str, limit: float, arguments: dict[str, Any] | None = None) -> list[Any]:
        """Send commands (the last one with `arguments`), return their answers. Raise AgentFailed, at the limit too."""
        log.debug("agent %s %s", " ".join(commands), arguments or "")
        number = secrets.randbelow(1 << 31)
        words = [_line("guest-sync-delimited", {"id": number}), *map(_line, commands[:-1])]
        self._writer.write(b"\xff" + b"".join(words) + _line(commands[-1], arguments))
        try:
            async with asyncio.timeout(limit):
                await self._skip_to(number)
                return [_value(command, await self._read_line()) for command in commands]
        except TimeoutError:
            raise AgentFailed(f"the guest agent did not answer {commands[-1]} within {limit:.0f} s") from None
        except OSError as error:
            raise AgentFailed(f"the channel of the guest agent broke: {error.strerror}") from error

    async def _skip_to(self, number: int) -> None:
        """Throw everything away up to the answer to our own synchronisation."""
        while True:
            await self._skip_delimiter()
            with contextlib.suppress(ValueError, RecursionError):
                line = await self._read_line()
                if _parsed(line.rpartition(b"\xff")[2]) == {"return": number}:
                    return

    async def _skip_delimiter(self) -> None:
        while (at := self._kept.find(b"\xff")) < 0:
            self._throw(len(self._kept))
            await self._read_more()
        self._throw(at + 1)

    async def _read_line(self) -> bytes:
        """Return the next line that is not empty; what is longer than any answer is an error."""
        while True:
            while (end := self._kept.find(b"\n")) < 0:
                if len(self._kept) > _LONGEST:
                    raise AgentFailed("the guest agent sends an answer without end")
                await self._read_more()
            line = bytes(self._kept[:end]).strip()
            self._throw(end + 1)
            if line:
                return line

    def _throw(self, count: int) -> None:
        del self._kept[:count]
        self._thrown += count
        if self._thrown > _MOST:
            raise AgentFailed("the guest floods the channel of its agent")

    async def _read_more(self) -> None:
        data = await self._reader.read(64 * 1024)
        if not data:
            raise AgentFailed("the channel of the guest agent was closed")
        self._kept += data


def _line(command: str, arguments: dict[str, Any] | None = None) -> bytes:
    return json.dumps({"execute": command, **({"arguments": arguments} if arguments else {})}).encode() + b"\n"


def _parsed(line: bytes) -> Any:
    return json.loads(line.decode("utf-8", "strict"))


def _value(command: str, line: bytes) -> Any:
    try:
        answer = _parsed(line)
    except (ValueError, RecursionError):
        raise _nonsense(command, line) from None
    if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
        said = str(answer["error"].get("desc", ""))[:200]
        raise AgentFailed(f"the guest agent refused {command}: {said or 'it gave no reason'}")
    if not isinstance(answer, dict) or "return" not in answer:
        raise _nonsense(command, line)
    return answer["return"]


def _status(answer: Any) -> bool:
    if answer not in ("frozen", "thawed"):
        raise _nonsense("guest-fsfreeze-status", answer)
    return bool(answer == "frozen")


def _count(command: str, answer: Any) -> int:
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < _MANY:
        raise _nonsense(command, answer)
    return answer


def _nonsense(command: str, answer: Any) -> AgentFailed:
    return AgentFailed(f"the guest agent answers {command} with nonsense: {str(answer)[:60]!r}")


async def thaw_patiently(path: Path, limit: float) -> tuple[bool, int]:
    """Thaw as `Agent.thaw`, again and again until the agent answers.

    Raise AgentMissing when there is no QEMU (any more), AgentFailed after `limit` seconds.
    """
    end = time.monotonic() + limit
    while True:
        try:
            async with Agent.connect(path) as agent:
                return await agent.thaw(min(ATTEMPT, max(0.5, end - time.monotonic())))
        except AgentFailed:
            if time.monotonic() + 0.5 > end:
                raise
            await asyncio.sleep(0.5)
