"""What every driver must do with a guest agent. A new driver joins DRIVERS (cases.py) and passes this unchanged.

One guest for each driver: the real agent, and a program that writes to a file system on vdb all the time.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from diskchain.drivers.protocol import Driver
from diskchain.errors import AgentFailed, AgentMissing, Refused
from tests.contract.cases import DRIVERS, Case, base_chains
from tests.contract.test_driver import play, started
from tests.support.console import Console


@pytest.fixture(scope="module", params=sorted(DRIVERS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """One driver and its machine, which runs."""
    found = DRIVERS[request.param](tmp_path_factory.mktemp("agent"), request)
    found.give_agent()

    async def story(driver: Driver, console: Console) -> None:
        await driver.start(base_chains(found))
        await asyncio.to_thread(console.wait, r"^F 5 ")

    play(found, story)
    yield found
    found.cleanup()


async def writes(console: Console) -> int:
    """Wait until the guest writes; return its clock."""
    return int((await asyncio.to_thread(console.wait, r"^F \d+ (\d+)", 30, console.mark()))[1])


async def stands(console: Console) -> bool:
    """Whether it does not write while its clock ticks."""
    await asyncio.sleep(0.1)
    mark = console.mark()
    first = int((await asyncio.to_thread(console.wait, r"^T (\d+)", 30, mark))[1])
    await asyncio.to_thread(console.wait, rf"^T {first + 40} ", 30, mark)
    return not any(line.startswith("F ") for _, line in console.lines(mark))


def test_guard_freezes_and_thaws_and_counts(case: Case) -> None:
    """Frozen = the guest's program waits; thawed = it goes on. The counts agree."""

    async def story(driver: Driver, console: Console) -> None:
        assert driver.has_agent()
        await driver.check_agent()
        async with driver.pause_guard(limit=9) as guard:
            count = await guard.freeze(30)
            assert count >= 1 and await guard.still_frozen() and await stands(console)
            assert await guard.thaw() == count and not guard.fired()
            await writes(console)
            assert not await guard.still_frozen()
        assert not await driver.is_frozen()

    play(case, story)


def test_guard_left_frozen_thaws_and_so_it_does_when_it_was_killed(case: Case) -> None:
    """The end of the guard is what our death looks like to it; a guard that is killed leaves the thaw to us."""

    async def story(driver: Driver, console: Console) -> None:
        async with driver.pause_guard(limit=9) as guard:
            await guard.freeze(30)
        await writes(console)
        async with driver.pause_guard(limit=9) as guard:
            count = await guard.freeze(30)
            kill_guards(case)
            assert await guard.thaw() == count
            await writes(console)
        async with driver.pause_guard(limit=9) as guard:
            await guard.freeze(30)
            kill_guards(case)
            with pytest.raises(AgentFailed):
                await guard.still_frozen()
        await writes(console)

    play(case, story)


def kill_guards(case: Case) -> None:
    """SIGKILL every process of the guard; whoever guards, names the VM (as QEMU does, whose -watchdog-action is another)."""
    killed = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if b"watchdog" in words and b"qemu-system" not in words and os.fsencode(case.guard_word) in words:
            os.kill(int(process.name), signal.SIGKILL)
            killed += 1
    assert killed


def test_guard_counts_nothing_when_the_guest_was_thawed_behind_its_back(case: Case) -> None:
    """A second driver thaws while a guard (killed) holds it: nothing was frozen until now."""

    async def story(driver: Driver, console: Console) -> None:
        async with driver.pause_guard(limit=9) as guard:
            await guard.freeze(30)
            kill_guards(case)
            with pytest.raises(AgentFailed):
                await guard.still_frozen()
            assert await driver.is_frozen() and await driver.thaw(30) and not await driver.thaw(30)
            assert await guard.thaw() == 0
        await writes(console)

    play(case, story)


def test_freeze_twice_is_refused_beforehand(case: Case) -> None:
    """What is frozen already belongs to somebody else."""

    async def story(driver: Driver, console: Console) -> None:
        async with driver.pause_guard(limit=9) as guard:
            await guard.freeze(30)
            kill_guards(case)
            with pytest.raises(Refused, match="frozen already"):
                await driver.check_agent()

    play(case, story)


def test_set_clock_puts_a_clock_right_that_stood_still(case: Case) -> None:
    """A paused guest's clock stands; set, it is ours again."""

    async def story(driver: Driver, console: Console) -> None:
        await driver.pause()
        await asyncio.sleep(4)
        await driver.resume()
        assert time.time() - await writes(console) > 2
        await driver.set_clock(30)
        assert abs(time.time() - await writes(console)) < 2

    play(case, story)


@pytest.mark.parametrize("name", sorted(DRIVERS))
def test_agent_that_is_not_there_is_missing(tmp_path: Path, request: pytest.FixtureRequest, name: str) -> None:
    """A VM without a channel: said at once."""
    case = DRIVERS[name](tmp_path, request)

    async def story(driver: Driver, console: Console) -> None:
        await started(driver, case, console)
        assert not driver.has_agent()
        for question in (driver.check_agent(), driver.is_frozen(), driver.thaw(30), driver.set_clock(30)):
            with pytest.raises(AgentMissing, match="no channel"):
                await question

    try:
        play(case, story)
    finally:
        case.cleanup()
