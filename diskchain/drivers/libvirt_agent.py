"""The guest agent of a libvirt domain: libvirtd holds its channel, so whoever comes can freeze and thaw."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from typing import Any

import libvirt
import libvirt_qemu

from diskchain.drivers import domain_xml, migration
from diskchain.drivers.agent import ATTEMPT
from diskchain.drivers.domains import ANSWERS_WITHIN
from diskchain.drivers.libvirt_api import asked, called, connect_now
from diskchain.drivers.libvirt_monitor import Passthrough
from diskchain.drivers.watched import free_after_save, until_it_stays
from diskchain.errors import AgentFailed, AgentMissing, DiskchainError, DriverFailed, NotFound, Refused, Unreachable

_NEEDED = ("guest-fsfreeze-freeze", "guest-fsfreeze-status", "guest-fsfreeze-thaw")


async def ask(domain: Any, command: str, limit: float = ATTEMPT, **arguments: Any) -> Any:
    """Ask the agent; return its answer. Raise AgentMissing when there is none, AgentFailed otherwise."""
    named = {key.replace("_", "-"): value for key, value in arguments.items()}
    text = json.dumps({"execute": command, **({"arguments": named} if named else {})})
    try:
        said = await called(command, libvirt_qemu.qemuAgentCommand, domain, text, max(1, math.ceil(limit)), 0)
        return json.loads(said)["return"]
    except DriverFailed as error:
        if isinstance(error.__cause__, libvirt.libvirtError) and error.__cause__.get_error_code() in (
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED, libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED,
        ):  # fmt: skip
            raise AgentMissing(error.message, hint="give the domain a channel org.qemu.guest_agent.0") from error
        raise AgentFailed(f"the guest agent: {error.message}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise AgentFailed(f"the guest agent answered nonsense to {command}") from error


async def thaw(domain: Any, limit: float) -> tuple[bool, int]:
    """Thaw; return whether file systems were frozen until now, and how many."""
    was = await ask(domain, "guest-fsfreeze-status", limit) == "frozen"
    count = await ask(domain, "guest-fsfreeze-thaw", limit)
    return was, count if isinstance(count, int) else 0


async def thaw_patiently(domain: Any, limit: float) -> tuple[bool, int]:
    """Thaw, again and again until the agent answers. Raise AgentFailed after `limit` seconds, AgentMissing."""
    end = time.monotonic() + limit
    while True:
        try:
            return await thaw(domain, min(ATTEMPT, max(1.0, end - time.monotonic())))
        except AgentFailed:
            if time.monotonic() + 0.5 > end:
                raise
            await asyncio.sleep(0.5)


class DomainAgent:
    """To be mixed into LibvirtDriver."""

    name: str
    _domain: Any

    def has_agent(self) -> bool:
        """Whether the domain has the agent's channel."""
        return self._channel_state() is not None

    def _channel_state(self) -> str | None:
        """None without a channel, and without an answer of libvirt's."""
        try:
            return domain_xml.agent_channel(str(asked("read the definition", self._domain.XMLDesc, 0)))
        except DiskchainError:
            return None

    def _refuse_without(self) -> None:
        state = self._channel_state()
        if state is None:
            raise AgentMissing(f"{self.name} has no channel for a guest agent",
                               hint="virsh edit: <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>")  # noqa: E501  # fmt: skip
        if state != "connected":
            raise AgentMissing(f"no guest agent runs in {self.name}")

    async def check_agent(self) -> None:
        """Whether anything is frozen already, and which commands it has."""
        self._refuse_without()
        try:
            frozen = await self.is_frozen()
            known = await ask(self._domain, "guest-info") if not frozen else {}
            names = {c["name"] for c in known.get("supported_commands", []) if c.get("enabled") is True}
        except (AgentFailed, AttributeError, KeyError, TypeError) as error:
            hint = "look at qemu-guest-agent in the guest: systemctl status qemu-guest-agent"
            raise AgentMissing(f"the guest agent of {self.name} does not answer: {error}", hint=hint) from error
        if frozen:
            raise Refused(f"the file systems of {self.name} are frozen already", hint=f"diskchain recover {self.name}")
        missing = [c for c in _NEEDED if c not in names]
        if missing:
            raise AgentMissing(f"the guest agent of {self.name} does not carry out {', '.join(missing)}",
                               hint="allow it in the agent's configuration in the guest")  # fmt: skip

    async def is_frozen(self) -> bool:
        """guest-fsfreeze-status."""
        self._refuse_without()
        return bool(await ask(self._domain, "guest-fsfreeze-status") == "frozen")

    async def thaw(self, limit: float) -> bool:
        """guest-fsfreeze-thaw, tried until it is answered."""
        await self._wait_for_agent(min(limit, ATTEMPT))
        was, count = await thaw_patiently(self._domain, limit)
        return was or count > 0

    async def _wait_for_agent(self, limit: float) -> None:
        """After its memory was loaded a guest has the channel open a moment after it runs."""
        end = time.monotonic() + limit
        while True:
            try:
                self._refuse_without()
                return
            except AgentMissing:
                if time.monotonic() > end or not self.has_agent():
                    raise
            await asyncio.sleep(0.05)

    async def set_clock(self, limit: float) -> None:
        """guest-set-time with the host's time."""
        await self._wait_for_agent(min(limit, 2.0))
        await ask(self._domain, "guest-set-time", limit, time=time.time_ns())


class WatchedDomain:
    """A domain as the watchdog needs it (drivers/watched.py): on a connection of its own."""

    def __init__(self, uri: str, uuid: str) -> None:
        self._uri, self._uuid = uri, uuid
        self._domain: Any = None

    async def connect(self) -> None:
        """Connect to libvirtd."""
        connection = await asyncio.to_thread(connect_now, self._uri, ANSWERS_WITHIN)
        self._domain = await called("look for the domain", connection.lookupByUUIDString, self._uuid)

    async def _reached(self) -> Any:
        if self._domain is None:
            await self.connect()
        return self._domain

    async def close(self) -> None:
        """Others have connections of their own."""

    async def let_go_on(self) -> None:
        """Resume, once libvirt lets us and no save is at work that would stop it again."""
        await until_it_stays(self._goes_on)

    async def _goes_on(self) -> bool:
        try:
            domain, asked = await self._reached(), True
            try:
                if await migration.give_up_plain(Passthrough(domain)):
                    return False
            except Refused:
                pass  # who may not ask has not begun one
            except DriverFailed:
                asked = False  # libvirt is busy with it, or it is off
            state, _ = await called("ask for the state", domain.state)
            if state == libvirt.VIR_DOMAIN_PAUSED:
                await called("resume the domain", domain.resume)
            return state != libvirt.VIR_DOMAIN_PAUSED and (asked or state != libvirt.VIR_DOMAIN_RUNNING)
        except NotFound:
            raise
        except DiskchainError:
            self._domain = None  # libvirtd may be restarting just now
            return False

    async def free_after_save(self) -> None:
        """Through the monitor; libvirtd may be restarting just now."""
        for _ in range(60):
            with contextlib.suppress(DiskchainError, OSError):
                try:
                    await free_after_save(Passthrough(await self._reached()), self._uuid)
                except Unreachable:
                    self._domain = None
                    await asyncio.sleep(1)
                    continue
            return

    async def freeze(self, limit: float) -> int:
        """guest-fsfreeze-freeze."""
        count = await ask(await self._reached(), "guest-fsfreeze-freeze", limit)
        return count if isinstance(count, int) else 0

    async def is_frozen(self) -> bool:
        """guest-fsfreeze-status."""
        return bool(await ask(await self._reached(), "guest-fsfreeze-status") == "frozen")

    async def thaw(self) -> tuple[bool, int]:
        """guest-fsfreeze-thaw."""
        return await thaw(await self._reached(), ATTEMPT)

    async def drop_agent(self) -> None:
        """The channel is libvirtd's."""

    async def thaw_patiently(self, limit: float) -> tuple[bool, int]:
        """Until the agent answers; libvirtd may be restarting just now."""
        end = time.monotonic() + limit
        while True:
            with contextlib.suppress(AgentFailed):
                return await thaw_patiently(await self._reached(), max(1.0, min(30.0, end - time.monotonic())))
            self._domain = None
            if time.monotonic() > end:
                raise AgentFailed("the guest agent does not answer")
            await asyncio.sleep(0.5)
