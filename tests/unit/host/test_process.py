"""What programs of ours may take, and that none outlives its caller."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from diskchain.errors import ToolFailed
from diskchain.host.process import Limits, run

MiB = 1 << 20


def python(text: str) -> list[str]:
    return ["python3", "-c", text]


def test_a_program_that_takes_too_much_processor_time_is_ended() -> None:
    """After its second, by the kernel."""
    with pytest.raises(ToolFailed) as raised:
        asyncio.run(run(python("while True: pass"), limits=Limits(cpu=1), timeout=50))
    assert raised.value.returncode < 0


def test_a_program_that_takes_too_much_memory_gets_none() -> None:
    """It ends in its own words; the same without the limit, and less memory with it, is fine."""
    taking = "x = bytes({} << 20); print(len(x))"
    with pytest.raises(ToolFailed) as raised:
        asyncio.run(run(python(taking.format(512)), limits=Limits(memory=256 * MiB)))
    assert "MemoryError" in raised.value.stderr
    assert asyncio.run(run(python(taking.format(512)))).stdout == f"{512 * MiB}\n"
    assert asyncio.run(run(python(taking.format(32)), limits=Limits(memory=256 * MiB))).stdout == f"{32 * MiB}\n"


def test_a_program_that_does_not_end_in_time_is_killed() -> None:
    """The error says after how long."""
    with pytest.raises(ToolFailed, match=r"no end after 0\.2 seconds"):
        asyncio.run(run(["sleep", "60"], timeout=0.2))


def test_a_program_is_killed_when_nobody_waits_for_it_any_more() -> None:
    """A cancelled caller returns when the program is gone."""
    argv = ["sleep", f"{3600 + os.getpid() / 1e9:.9f}"]

    async def cancelled() -> None:
        task = asyncio.create_task(run(argv, timeout=None))
        while not running(argv):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert not running(argv)


def running(argv: list[str]) -> list[str]:
    """The processes with these words."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_bytes().decode().split("\0")[1:-1] == argv[1:]:
                found.append(process.name)
    return found
