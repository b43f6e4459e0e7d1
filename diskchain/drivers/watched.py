"""What the watchdog needs of the VM that it watches, and a QEMU of ours as such. A libvirt domain: libvirt_agent.py."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from diskchain.drivers import migration
from diskchain.drivers.agent import Agent, thaw_patiently
from diskchain.drivers.migration import Commander
from diskchain.drivers.monitor import Monitor
from diskchain.errors import DiskchainError, NotFound, Unreachable
from diskchain.host import rescue
from diskchain.host.process import find_process

GIVE_UP = 600.0  # seconds after which a VM that can't be resumed is left to `recover`
SETTLED = 0.5


class Watched(Protocol):
    """One VM, reached by ways of our own: they are open before the pause begins."""

    async def connect(self) -> None:
        """Open them. Raise Unreachable."""

    async def close(self) -> None:
        """Close what the next operation's watchdog needs; the agent can still be reached."""

    async def let_go_on(self) -> None:
        """Resume the VM; return when it surely runs, is gone, or can't be resumed for `GIVE_UP` seconds. Raises nothing.

        Memory that is being saved while it stands is given up.
        """

    async def free_after_save(self) -> None:
        """Wait until no save is at work; if it failed, free a guest that hangs on it. Raises nothing."""

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


async def until_it_stays(goes_on: Callable[[], Awaitable[bool]]) -> None:
    """Call `goes_on` (look, let the VM go on if it stands; return whether it runs or is no business of ours) until it says
    yes twice, `SETTLED` seconds apart: what diskchain sent before it was killed may reach the hypervisor after our first look.
    """
    end, calm = time.monotonic() + GIVE_UP, 0
    while time.monotonic() < end:
        try:
            calm = calm + 1 if await goes_on() else 0
        except (NotFound, Unreachable):
            return
        except DiskchainError:
            calm = 0  # refused just now
        if calm == 2:
            return
        await asyncio.sleep(SETTLED if calm else 0.1)


async def free_after_save(monitor: Commander, uuid: str) -> None:
    """See `Watched`. Raise DiskchainError when QEMU does not answer any more."""
    while (now := await migration.progress(monitor)).status == "running":
        await asyncio.sleep(0.2)
    process = find_process("-uuid", uuid)
    if now.status == "failed" and process:
        await asyncio.to_thread(rescue.release, process.pid)


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
        """cont, once no save is at work that would stop it again."""
        if self._monitor:
            await until_it_stays(functools.partial(self._goes_on, self._monitor))

    async def _goes_on(self, monitor: Monitor) -> bool:
        if await migration.give_up_plain(monitor):
            return False
        state = await migration.run_state(monitor)
        if state in ("paused", "postmigrate"):
            await monitor.execute("cont")
        return state not in ("paused", "postmigrate", "finish-migrate")

    async def free_after_save(self) -> None:
        """The run directory has the name of the machine's uuid."""
        if self._monitor:
            with contextlib.suppress(DiskchainError, OSError):
                await free_after_save(self._monitor, self._run_dir.name)

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
