"""Have the kernel read files from their beginnings to their ends while an engine asks for pieces of them.

An engine goes through a disk in the order of the guest; in the file the pieces lie in the order in which they were written
(docs/benchmarks.md, "Merging").
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from diskchain.host.beside import beside

_AT_A_TIME = 1 << 20  # bytes; then it is looked whether the block has ended


def reading_ahead(paths: Iterable[Path]) -> AbstractAsyncContextManager[None]:
    """While the block runs, let the kernel read whole files into its page cache, one after the other.

    `paths` is gone through beside the block, too: choosing them costs it no time. Nothing is raised: what can't be read is
    left for the engine to tell. No file is opened after the block.
    """
    return beside(functools.partial(_read, paths))


def _read(paths: Iterable[Path], ended: threading.Event) -> None:
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
