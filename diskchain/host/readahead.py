"""Have the kernel read files from their beginnings to their ends while an engine asks for pieces of them.

An engine goes through a disk in the order of the guest; in the file the pieces lie in the order in which they were written
(docs/benchmarks.md, "Merging").
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from diskchain.host.process import uninterrupted

_AT_A_TIME = 1 << 20  # bytes; then it is looked whether the block has ended


@contextlib.asynccontextmanager
async def reading_ahead(paths: Sequence[Path]) -> AsyncIterator[None]:
    """While the block runs, let the kernel read whole files into its page cache, one after the other.

    Nothing is raised: what can't be read is left for the engine to tell.
    """
    ended = threading.Event()
    work = asyncio.create_task(asyncio.to_thread(_read, paths, ended))
    try:
        yield
    finally:
        ended.set()
        await uninterrupted(work)


def _read(paths: Sequence[Path], ended: threading.Event) -> None:
    for path in paths:
        with (
            contextlib.suppress(OSError),
            open(path, "rb", opener=_as_it_stands) as file,
            open(os.devnull, "wb") as nowhere,
        ):
            at = 0
            while not ended.is_set() and (count := os.sendfile(nowhere.fileno(), file.fileno(), at, _AT_A_TIME)):
                at += count  # by reference: nothing is copied to us


def _as_it_stands(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)
