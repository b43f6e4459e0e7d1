"""The small process that lets a paused VM go on, and thaws its file systems, when diskchain can't.

    python -m diskchain.drivers.watchdog qemu RUN_DIR [LIMIT]
    python -m diskchain.drivers.watchdog libvirt URI UUID [LIMIT]

It is connected to the VM before the pause begins, and it is the one that talks to the guest agent: what was frozen
through it, it thaws. On stdin, one word a line:

    freeze SECONDS   freeze the guest's file systems, in at most that time     -> frozen N      | failed WHY
    status           are they still frozen?                                    -> status WORD   | failed WHY
    arm, done        the pause begins, is over
    save             memory is about to be saved while the guest runs
    thaw             thaw them                                                 -> thawed WORD N | failed WHY

(WORD: what the agent held them for until then, `frozen` or `thawed`; N: how many there were.) End of file = diskchain is
done or dead: what is paused then goes on, what is frozen is thawed. The same happens `LIMIT` seconds after `arm` (never
without LIMIT), and HOLD seconds after a freeze; `fired` is said then. A thaw that nobody answers is tried for an hour.
After `save` we stay until the save is over, our stdout closed: a guest that hangs because it failed is freed.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from diskchain.drivers.agent import ATTEMPT
from diskchain.drivers.watched import Watched, WatchedQemu
from diskchain.errors import AgentFailed, DiskchainError

THAW_GIVE_UP = 3600.0
HOLD = 8.0  # seconds that a running guest may be frozen: it writes again within 10


class Watchdog:
    """What was begun and must be ended, by us if nobody else does."""

    def __init__(self, vm: Watched, limit: float | None) -> None:
        self._vm, self._limit = vm, limit
        self._armed = self._frozen = self._saves = False
        self._armed_until: float | None = None
        self._frozen_until = 0.0
        self._thawing: asyncio.Task[None] | None = None

    async def watch(self) -> None:
        """Obey the words on stdin until its end."""
        await self._vm.connect()
        words = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(words), sys.stdin)
        _say("ready")
        while True:
            try:
                line = await asyncio.wait_for(words.readline(), self._left())
            except TimeoutError:
                _say("fired")
                await self._let_go()
                continue
            if not line:
                break
            await self._obey(line.decode("ascii", "replace").split())
        await self._let_go()
        if self._saves:
            _hang_up()
            await self._vm.free_after_save()
        await self._vm.close()
        if self._thawing:
            await self._thawing

    def _left(self) -> float | None:
        """Seconds until we act by ourselves."""
        end = self._frozen_until if self._frozen else None
        if self._armed:
            end = self._armed_until  # while the guest stands still, nothing in it waits for its disks
        return None if end is None else max(0.0, end - time.monotonic())

    async def _obey(self, words: list[str]) -> None:
        match words:
            case ["arm"]:
                self._armed = True
                self._armed_until = None if self._limit is None else time.monotonic() + self._limit
            case ["done"]:
                self._armed = False
                self._frozen_until = time.monotonic() + HOLD
            case ["save"]:
                self._saves = True
            case ["freeze", seconds]:
                await _answer(self._freeze(float(seconds)))
            case ["status"]:
                await _answer(self._status())
            case ["thaw"]:
                await _answer(self._thaw())

    async def _freeze(self, limit: float) -> str:
        self._frozen = True  # from the first byte that we send
        try:
            count = await self._vm.freeze(limit)
        except DiskchainError:
            await self._begin_thaw()  # it may freeze a minute later all the same
            raise
        self._frozen_until = time.monotonic() + HOLD
        return f"frozen {count}"

    async def _status(self) -> str:
        if not self._frozen:
            return "status thawed"
        return f"status {_word(await self._vm.is_frozen())}"

    async def _thaw(self) -> str:
        if self._thawing:  # we have acted already: they were not frozen until now
            await asyncio.wait([self._thawing], timeout=ATTEMPT)
            if not self._thawing.done():
                raise AgentFailed("the guest agent does not answer")
        if not self._frozen:
            return "thawed thawed 0"
        try:
            was, count = await self._vm.thaw()
        except DiskchainError:
            await self._begin_thaw()
            raise
        self._frozen = False
        return f"thawed {_word(was)} {count}"

    async def _let_go(self) -> None:
        """Resume and thaw what we are responsible for."""
        if self._armed:
            await self._vm.let_go_on()
        self._armed = False
        await self._begin_thaw()

    async def _begin_thaw(self) -> None:
        """Thaw in the background: a pause that begins meanwhile must find us listening."""
        if not self._frozen:
            return
        self._frozen = False
        await self._vm.drop_agent()
        self._thawing = asyncio.create_task(self._thaw_patiently())

    async def _thaw_patiently(self) -> None:
        with contextlib.suppress(DiskchainError):
            await self._vm.thaw_patiently(THAW_GIVE_UP)


async def _answer(work: Coroutine[Any, Any, str]) -> None:
    try:
        _say(await work)
    except DiskchainError as error:
        _say(f"failed {error.message}")


def _word(frozen: bool) -> str:
    return "frozen" if frozen else "thawed"


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be there any more
        print(line.replace("\n", " "), flush=True)


def _hang_up() -> None:
    """Close our stdout: who waits for us need not wait any longer."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def watched(words: list[str]) -> tuple[Watched, float | None]:
    """Given our arguments, return the VM and the limit."""
    kind, *rest = words
    if kind == "libvirt":
        uri, uuid, *limit = rest
        domain: Watched = importlib.import_module("diskchain.drivers.libvirt").WatchedDomain(uri, uuid)
        return domain, float(limit[0]) if limit else None
    run_dir, *limit = rest
    return WatchedQemu(Path(run_dir)), float(limit[0]) if limit else None


def main() -> None:
    """Run from the command line, see above."""
    with contextlib.suppress(DiskchainError, BrokenPipeError):
        asyncio.run(Watchdog(*watched(sys.argv[1:])).watch())


if __name__ == "__main__":
    main()
