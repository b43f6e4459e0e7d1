"""host/beside: a thread that begins and ends with a block."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from diskchain.host.beside import beside


class Work:
    """Waits until it is told to end, then for a moment more."""

    def __init__(self) -> None:
        self.began, self.ended = threading.Event(), threading.Event()

    def __call__(self, end: threading.Event) -> None:
        self.began.set()
        assert end.wait(20)
        threading.Event().wait(0.1)
        self.ended.set()


def test_it_has_ended_when_the_block_is_left_cancelled_or_not() -> None:
    """What it uses may be closed then."""

    async def block(work: Work, *, cancelled: bool) -> None:
        async with beside(work):
            assert await asyncio.to_thread(work.began.wait, 20) and not work.ended.is_set()
            if cancelled:
                asyncio.current_task().cancel()  # type: ignore[union-attr]
                await asyncio.sleep(20)

    async def main(*, cancelled: bool) -> None:
        work = Work()
        task = asyncio.create_task(block(work, cancelled=cancelled))
        await asyncio.wait([task])
        assert task.cancelled() == cancelled and work.ended.is_set()

    asyncio.run(main(cancelled=False))
    asyncio.run(main(cancelled=True))


def test_the_threads_of_the_event_loop_are_left_to_the_block() -> None:
    """Where there is one only, two things at work beside a block would wait for it for ever, and the block for them."""

    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        async with beside(Work()), beside(Work()):
            await asyncio.wait_for(asyncio.to_thread(int), 20)

    asyncio.run(main())


def test_what_it_raises_is_raised_at_the_end_of_the_block() -> None:
    """Not in the middle of it."""

    def work(_: threading.Event) -> None:
        raise OSError("gone")

    async def main() -> None:
        reached = False
        with pytest.raises(OSError, match="gone"):
            async with beside(work):
                await asyncio.sleep(0.05)
                reached = True
        assert reached

    asyncio.run(main())
