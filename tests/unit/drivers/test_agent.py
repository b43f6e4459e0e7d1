"""The client of the guest agent against agents that lie, babble and keep silent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from diskchain.drivers.agent import Agent, thaw_patiently
from diskchain.errors import AgentFailed, AgentMissing
from tests.support.fake_agent import FakeAgent

T = TypeVar("T")


def talk(path: Path, work: Callable[[Agent], Awaitable[T]]) -> T:
    """Connect and do one thing."""

    async def run() -> T:
        async with Agent.connect(path) as agent:
            return await work(agent)

    return asyncio.run(run())


def test_freeze_and_thaw_an_honest_agent_counts(tmp_path: Path) -> None:
    """Frozen, counted, thawed, counted."""
    path = tmp_path / "s"

    async def story(agent: Agent) -> list[Any]:
        return [await agent.freeze(5), await agent.is_frozen(), await agent.thaw(), await agent.is_frozen()]

    with FakeAgent(path):
        assert talk(path, story) == [2, True, (True, 2), False]


def test_ask_old_answers_lie_in_the_channel_ours_is_found(tmp_path: Path) -> None:
    """Half a line, an old answer, an old synchronisation, then ours."""
    path = tmp_path / "s"
    stale = b'{"return": "thawed"}\n{"ret' + b'\xff{"return": 1}\n\xff[[[\n\xff\xff'
    seen: list[bytes] = []

    async def agent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(stale)
        sync = await reader.readline()
        seen.append(sync)
        number = sync.split(b'"id": ')[1].split(b"}")[0]
        writer.write(b'{"return": ' + number + b'}\n\n{"return": "frozen"}\n')
        await writer.drain()

    async def story() -> bool:
        async with await asyncio.start_unix_server(agent, path), Agent.connect(path) as client:
            return await client.is_frozen()

    assert asyncio.run(story()) is True
    assert seen[0].startswith(b"\xff{")


NONSENSE: list[Any] = [b"\x00\x01\x02\n", b"[" * 200_000 + b"\n", b"[]\n", b"{}\n", b'{"return": "melted"}\n', 17,
                       b'{"return": ["frozen"]}\n', b"\xff\xfe\n", b'{"error": 5}\n',
                       b'{"error": {"desc": "\\u001b[2J no"}}\n']  # fmt: skip


@pytest.mark.parametrize("answer", NONSENSE, ids=range(len(NONSENSE)))
def test_is_frozen_nonsense_is_an_error(tmp_path: Path, answer: Any) -> None:
    """Never a wrong answer, never another exception."""
    path = tmp_path / "s"
    with FakeAgent(path, {"guest-fsfreeze-status": answer}), pytest.raises(AgentFailed) as error:
        talk(path, lambda agent: agent.is_frozen())
    assert len(error.value.message) < 400


@pytest.mark.parametrize("count", [-1, True, 10**30, "2", 2.0, [2]])
def test_freeze_counts_that_are_none_are_errors(tmp_path: Path, count: Any) -> None:
    """A number of file systems is a small whole number."""
    path = tmp_path / "s"
    with FakeAgent(path, {"guest-fsfreeze-freeze": count}), pytest.raises(AgentFailed, match="nonsense"):
        talk(path, lambda agent: agent.freeze(5))


@pytest.mark.parametrize("flood", [b"x" * 65536, b"\xff" * 65536, b"\n" * 65536, b'\xff{"return": 5}\n' * 4096])
def test_ask_a_flood_is_an_error_soon_and_takes_no_memory(tmp_path: Path, flood: bytes) -> None:
    """A MiB of nonsense are enough; an answer without end is one too."""
    path = tmp_path / "s"
    with FakeAgent(path, flood=flood), pytest.raises(AgentFailed, match=r"flood|without end"):
        talk(path, lambda agent: agent.is_frozen(limit=20))


def test_ask_an_answer_without_end_is_an_error(tmp_path: Path) -> None:
    """More than 256 KiB is no answer."""
    path = tmp_path / "s"
    answer = b'{"return": "' + b"a" * 1_000_000
    with FakeAgent(path, {"guest-fsfreeze-status": answer}), pytest.raises(AgentFailed, match="without end"):
        talk(path, lambda agent: agent.is_frozen(limit=20))


def test_ask_silence_ends_at_the_limit(tmp_path: Path) -> None:
    """Nothing waits longer than it was told."""
    path, began = tmp_path / "s", time.monotonic()
    with FakeAgent(path, {"guest-sync-delimited": None}), pytest.raises(AgentFailed, match="did not answer"):
        talk(path, lambda agent: agent.is_frozen(limit=0.5))
    assert time.monotonic() - began < 10


def test_thaw_patiently_an_agent_that_hangs_gets_the_word_again_and_again(tmp_path: Path) -> None:
    """It hangs once, then it answers."""
    path, silent = tmp_path / "s", [None]

    def thaw() -> int | None:
        return silent.pop() if silent else 3

    with FakeAgent(path, {"guest-fsfreeze-thaw": thaw, "guest-fsfreeze-status": "frozen"}) as agent:
        began = time.monotonic()
        # each attempt is given up after 5 s
        assert asyncio.run(thaw_patiently(path, 60)) == (True, 3)
        assert agent.asked.count("guest-fsfreeze-thaw") == 2 and time.monotonic() - began > 4


def test_thaw_patiently_nobody_there_ends_at_once(tmp_path: Path) -> None:
    """Without a QEMU there is nothing to wait for."""
    with pytest.raises(AgentMissing):
        asyncio.run(thaw_patiently(tmp_path / "s", 3600))


def test_set_clock_a_clock_that_is_right_all_the_same_is_enough(tmp_path: Path) -> None:
    """The agent sets the system's clock, then fails on the hardware's: done."""
    path = tmp_path / "s"
    refused = b'{"error": {"desc": "hwclock failed"}}\n'
    with FakeAgent(path, {"guest-set-time": refused, "guest-get-time": time.time_ns}):
        talk(path, lambda agent: agent.set_clock())
    path.unlink()
    with (
        FakeAgent(path, {"guest-set-time": refused, "guest-get-time": lambda: time.time_ns() - 10**11}),
        pytest.raises(AgentFailed, match="hwclock failed"),
    ):
        talk(path, lambda agent: agent.set_clock())
