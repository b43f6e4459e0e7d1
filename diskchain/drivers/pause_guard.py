"""Our end of the watchdog process (drivers/watchdog.py): the guard of a pause and of frozen file systems."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from diskchain.drivers.agent import ATTEMPT
from diskchain.drivers.protocol import PauseGuard
from diskchain.drivers.watched import Watched
from diskchain.errors import AgentFailed, DiskchainError, DriverFailed
from diskchain.host.process import Piped, our_module, spawn_piped, uninterrupted

_READY = 30.0  # seconds that the process gets to start and to reach the VM
_PATIENCE = 15.0  # seconds that we try to thaw ourselves when the watchdog was killed


class WatchdogGuard:
    """A PauseGuard. Should the watchdog be killed, what was frozen through it is thawed by us."""

    def __init__(self, child: Piped, vm: Watched) -> None:
        self._child, self._vm = child, vm
        self._answers: asyncio.Queue[str] = asyncio.Queue()
        self._fired = self._frozen = self._saves = False
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls, vm: Watched, words: Sequence[str], log: Path, limit: float | None) -> WatchdogGuard:
        """Start the process and wait until it is connected. Raise DriverFailed.

        `words` name the VM to it (see drivers/watchdog.py); `vm` is for us, should it be killed.
        """
        argv, env = our_module("diskchain.drivers.watchdog")
        argv += [*words, *([] if limit is None else [str(limit)])]
        child = await spawn_piped(argv, log, env=env)
        try:
            said = await asyncio.wait_for(child.stdout.readline(), _READY)
            why = "did not start"
        except TimeoutError:
            said, why = b"", f"was not ready within {_READY:.0f} s"
        except BaseException:
            child.kill()
            raise
        if said != b"ready\n":
            child.kill()
            raise DriverFailed(f"the watchdog that guards the pause {why}", hint=f"see {log}; try again")
        return cls(child, vm)

    @classmethod
    @contextlib.asynccontextmanager
    async def guarding(
        cls, vm: Watched, words: Sequence[str], log: Path, limit: float | None
    ) -> AsyncIterator[PauseGuard]:
        """Be there as long as the block runs. See `start` and `stop`."""
        guard = await cls.start(vm, words, log, limit)
        try:
            yield guard
        finally:
            await guard.stop()

    async def _listen(self) -> None:
        while line := await self._child.stdout.readline():
            if line == b"fired\n":
                self._fired = True
            else:
                self._answers.put_nowait(line.decode("utf-8", "replace").strip())
        self._answers.put_nowait("")  # it is gone

    def _tell(self, words: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._child.write(words.encode() + b"\n")

    async def _ask(self, words: str, limit: float) -> list[str]:
        """Return the words of the answer. Raise AgentFailed when it says so, does not answer, or was killed."""
        self._tell(words)
        try:
            answer = await asyncio.wait_for(self._answers.get(), limit)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._child.kill()  # stopped by somebody: it holds the channel, and would not thaw
            raise AgentFailed("the watchdog that guards the pause does not answer") from None
        if not answer:
            self._answers.put_nowait("")
            raise AgentFailed("the watchdog that guards the pause was killed")
        word, _, rest = answer.partition(" ")
        if word == "failed":
            raise AgentFailed(rest)
        return rest.split()

    # -- the pause -------------------------------------------------------------------------------------------------

    def watch_save(self) -> None:
        """See PauseGuard."""
        self._saves = True
        self._tell("save")

    def arm(self) -> None:
        """See PauseGuard."""
        self._tell("arm")

    def disarm(self) -> None:
        """See PauseGuard."""
        self._tell("done")

    def fired(self) -> bool:
        """See PauseGuard."""
        return self._fired

    # -- file systems ----------------------------------------------------------------------------------------------

    async def freeze(self, limit: float) -> int:
        """See PauseGuard."""
        self._frozen = True
        (count,) = await self._ask(f"freeze {limit}", limit + ATTEMPT)
        return int(count)

    async def still_frozen(self) -> bool:
        """See PauseGuard."""
        return await self._ask("status", 2 * ATTEMPT) == ["frozen"]

    async def thaw(self) -> int:
        """See PauseGuard."""
        try:
            was, count = await self._ask("thaw", 2 * ATTEMPT)
        except AgentFailed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._listening), 0.5)  # killed: it has ended, or is about to
            if not self._listening.done():
                raise  # it goes on trying
            was, count = await self._thaw_ourselves()
        self._frozen = False
        return int(count) if was == "frozen" and not self._fired else 0

    async def _thaw_ourselves(self) -> tuple[str, str]:
        was, count = await self._vm.thaw_patiently(_PATIENCE)
        return "frozen" if was else "thawed", str(count)

    async def stop(self) -> None:
        """Close its stdin: what is still paused or frozen goes on now, by the watchdog, or by us if it was killed."""
        self._child.close_stdin()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._let_go(), 5)
        self._listening.cancel()
        if self._frozen and self._child.returncode not in (None, 0):
            await uninterrupted(self._thaw_at_last())

    async def _let_go(self) -> None:
        """Wait until it has done what it must; it may stay for the save."""
        await asyncio.shield(self._listening)
        if self._frozen or not self._saves:
            await self._child.wait()

    async def _thaw_at_last(self) -> None:
        with contextlib.suppress(DiskchainError):
            await self._thaw_ourselves()
