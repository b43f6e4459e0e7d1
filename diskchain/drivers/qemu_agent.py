"""The part of the embedded driver that talks to the guest agent."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from diskchain.chain.machine import Machine
from diskchain.drivers.agent import ATTEMPT, Agent, thaw_patiently
from diskchain.errors import AgentFailed, AgentMissing, Refused

_NEEDED = ("guest-fsfreeze-freeze", "guest-fsfreeze-status", "guest-fsfreeze-thaw")


class QemuAgent:
    """To be mixed into QemuDriver."""

    name: str
    run_dir: Path

    def _machine_running(self) -> Machine:
        raise NotImplementedError

    async def _execute(self, command: str, **arguments: Any) -> Any:
        raise NotImplementedError

    @property
    def _channel(self) -> Path:
        return self.run_dir / "agent.sock"

    def has_agent(self) -> bool:
        """Whether the running machine was started with `agent = true`."""
        return self._machine_running().agent

    async def _is_listening(self) -> bool:
        """Whether something in the guest has opened the channel, as QEMU says."""
        chardevs = await self._execute("query-chardev")
        return any(c.get("label") == "agent" and c.get("frontend-open") is True for c in chardevs)

    async def _wait_for_listener(self, limit: float) -> None:
        """After its memory was loaded a guest has the channel open a moment after it runs."""
        if not self.has_agent():
            raise AgentMissing(f"{self.name} has no channel for a guest agent",
                               hint="agent = true in its machine file, machine define, then stop and start it")  # fmt: skip
        end = time.monotonic() + limit
        while not await self._is_listening():
            if time.monotonic() > end:
                raise AgentMissing(f"no guest agent runs in {self.name}")
            await asyncio.sleep(0.05)

    async def check_agent(self) -> None:
        """Ask it whether anything is frozen already (it admits to fewer commands then), and which commands it has."""
        await self._wait_for_listener(0)
        missing: list[str] = []
        try:
            async with Agent.connect(self._channel) as agent:
                frozen = await agent.is_frozen()
                if not frozen:
                    known = await agent.commands()
                    missing = [c for c in _NEEDED if c not in known]
        except AgentFailed as error:
            hint = "look at qemu-guest-agent in the guest: systemctl status qemu-guest-agent"
            raise AgentMissing(f"{self.name}: {error.message}", hint=hint) from error
        if frozen:
            raise Refused(f"the file systems of {self.name} are frozen already", hint=f"diskchain recover {self.name}")
        if missing:
            raise AgentMissing(f"the guest agent of {self.name} does not carry out {', '.join(missing)}",
                               hint="allow it in the agent's configuration in the guest")  # fmt: skip

    async def is_frozen(self) -> bool:
        """guest-fsfreeze-status."""
        await self._wait_for_listener(0)
        async with Agent.connect(self._channel) as agent:
            return await agent.is_frozen()

    async def thaw(self, limit: float) -> bool:
        """guest-fsfreeze-thaw, tried until it is answered."""
        end = time.monotonic() + limit
        await self._wait_for_listener(min(limit, ATTEMPT))
        was, count = await thaw_patiently(self._channel, max(1.0, end - time.monotonic()))
        return was or count > 0

    async def set_clock(self, limit: float) -> None:
        """guest-set-time with the host's time."""
        await self._wait_for_listener(min(limit, 2.0))
        async with Agent.connect(self._channel) as agent:
            await agent.set_clock(limit)
