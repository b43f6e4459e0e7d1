"""Work in a thread of its own beside a block of ours: it begins and ends with the block."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

from diskchain.host.process import uninterrupted


@contextlib.asynccontextmanager
async def beside(work: Callable[[threading.Event], None]) -> AsyncIterator[None]:
    """While the block runs, run `work` in a thread; it looks at the event, which is set when it is to end, and is waited for.

    Not a thread of the event loop's: of those there are few, and the block may need them. What `work` raises is raised at
    the end of the block.
    """
    ended = threading.Event()
    with ThreadPoolExecutor(1) as own:
        running = asyncio.get_running_loop().run_in_executor(own, work, ended)
        try:
            yield
        finally:
            ended.set()
            await uninterrupted(running)
