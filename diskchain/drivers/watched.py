"""What the watchdog needs of the VM that it watches, and a QEMU of ours as such. A libvirt domain: libvirt_agent.py."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Protocol

from diskchain.drivers.agent import Agent, thaw_patiently
from diskchain.drivers.monitor import Monitor
from diskchain.errors import DiskchainError

GIVE_UP = 600.0  # seconds after which a VM that can't be resumed is left to `recover`


class Watched(Protocol):
    """One VM, reached by ways of our own: they are open before the pause begins."""

    async def connect(self) -> None:
        """Open them. Raise Unreachable."""

    async def close(self) -> None:
        """Close what the next operation's watchdog needs; the agent can still be reached."""

    async def let_go_on(self) -> None:
        """Resume the VM as soon as it can be resumed. Raises nothing."""

    async def freeze(self, limit: float) -> int:
        """Freeze; return how many file systems. Raise AgentFailed, AgentMissing."""

    async def is_frozen(self) -> bool:
        """Whether they are frozen. Raise AgentFailed, AgentMissing."""

    async def thaw(self) -> tuple[bool, int]:
        """Thaw; return whether they were frozen until now, and how many. Raise AgentFailed, AgentMissing."""

    async def drop_agent(self) -> None:
        """Let go of a channel on which something failed."""

    async def thaw_patiently(self, limit: float) -> tuple[bool, int]:
        """Thaw, again and again until the agent answers. Raise AgentFailed after `limit` seconds."""


class WatchedQemu:
    """A machine of ours, by the sockets in its run directory."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._monitor: Monitor | None = None
        self._agent: Agent | None = None
        self._channel = contextlib.AsyncExitStack()

    async def connect(self) -> None:
        """The monitor that is kept for watchdogs."""
        self._monitor = await Monitor.connect(self._run_dir / "watch.sock")

    async def close(self) -> None:
        """The monitor; the next watchdog needs it, however long a thaw takes."""
        if self._monitor:
            await self._monitor.close()

    async def let_go_on(self) -> None:
        """cont, once the save (if one has begun) has come so far."""
        end = time.monotonic() + GIVE_UP
        while self._monitor and time.monotonic() < end:
            try:
                status = (await self._monitor.execute("query-status"))["status"]
                if status not in ("paused", "postmigrate", "finish-migrate"):
                    return
                if status != "finish-migrate":
                    await self._monitor.execute("cont")
                    return
            except DiskchainError:
                return
            await asyncio.sleep(0.1)

    @property
    def _agent_socket(self) -> Path:
        return self._run_dir / "agent.sock"

    async def freeze(self, limit: float) -> int:
        """Through a channel that stays open until we thaw."""
        self._agent = await self._channel.enter_async_context(Agent.connect(self._agent_socket))
        return await self._agent.freeze(limit)

    async def is_frozen(self) -> bool:
        """Asked on the open channel."""
        return self._agent is not None and await self._agent.is_frozen()

    async def thaw(self) -> tuple[bool, int]:
        """On the open channel."""
        return (False, 0) if self._agent is None else await self._agent.thaw()

    async def drop_agent(self) -> None:
        """The next attempt opens its own."""
        self._agent = None
        await self._channel.aclose()

    async def thaw_patiently(self, limit: float) -> tuple[bool, int]:
        """On channels of its own."""
        return await thaw_patiently(self._agent_socket, limit)
