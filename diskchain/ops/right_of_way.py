"""`start` wins over a merge that another command is carrying out: it asks, the merge stops as for Ctrl-C, and is pending.

What asks is a lock on a file beside the VM's own (locks.announced): it goes with whoever asks, and only a merge looks for it,
only while stopping costs nothing (journal: intent, commit). Whatever else holds the VM's lock is never disturbed, nor is a
merge that has begun to relink: that ends in a moment, and `start` waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

from diskchain.chain.text import size
from diskchain.errors import Busy, DiskchainError, Unfinished
from diskchain.host import locks
from diskchain.host.locks import Far
from diskchain.ops.progress import Progress
from diskchain.ops.vm import VM, Host
from diskchain.store import journal
from diskchain.store.catalog import Home
from diskchain.store.journal import Entry

LOOK_EVERY = 0.2  # seconds between two looks whether a start waits
NOTE_EVERY = 1.0  # seconds between two notes of how far the merge is
LETS_GO_WITHIN = 10.0  # seconds that a command may need to end after its merge, however short the start would wait
STOPS_WITHIN = 60.0  # seconds that a merge may take to stop, or to end when it relinks already


# -- the merge ---------------------------------------------------------------------------------------------------------


class _Told:
    """A merge's progress, passed on; how far it is, is noted for those who wait, too."""

    def __init__(self, progress: Progress, home: Home, limit: asyncio.Timeout) -> None:
        self._progress, self._home, self._limit = progress, home, limit
        self._far: Far | None = None
        self._noted = 0.0

    def begin(self, what: str, total: int, *, note: str = "") -> None:
        """Passed on. Where we were cancelled already nothing long begins: Python 3.11's wait_for can lose that."""
        if self._limit.expired():
            raise asyncio.CancelledError
        self._far = Far(what, 0, total)
        self._progress.begin(what, total, note=note)

    def update(self, done: int) -> None:
        """Passed on."""
        if self._far is not None:
            self._far = Far(self._far.what, done, self._far.total)
        self._progress.update(done)

    def end(self) -> None:
        """Passed on."""
        self._progress.end()

    def warn(self, text: str) -> None:
        """Passed on."""
        self._progress.warn(text)

    def note(self) -> None:
        """Write down how far it is, if it is time."""
        if self._far is not None and time.monotonic() - self._noted >= NOTE_EVERY:
            self._noted = time.monotonic()
            locks.note_far(self._home.lock, self._far)


@contextlib.asynccontextmanager
async def yielded(vm: VM, entry: Entry, progress: Progress) -> AsyncIterator[Progress]:
    """Move data, in the block, until a `start` of the VM asks for it to stop. Yield the progress to be told.

    Raise Unfinished when it was stopped; the block was cancelled then, as by Ctrl-C.
    """
    pid = locks.announcer(vm.home.start_waits)
    if pid is not None:
        raise _stopped(vm, entry, pid)

    async def look(told: _Told, limit: asyncio.Timeout) -> None:
        nonlocal pid
        while (pid := locks.announcer(vm.home.start_waits)) is None:
            told.note()
            await asyncio.sleep(LOOK_EVERY)
        limit.reschedule(asyncio.get_running_loop().time())

    try:
        async with asyncio.timeout(None) as limit:
            told = _Told(progress, vm.home, limit)
            looking = asyncio.create_task(look(told, limit))
            try:
                yield told
            finally:
                looking.cancel()
    except TimeoutError:
        if pid is None:
            raise
        raise _stopped(vm, entry, pid) from None


def _stopped(vm: VM, entry: Entry, pid: int) -> Unfinished:
    by = f"pid {pid}" if pid else "another diskchain"
    if not (entry.data["snapshots"] or entry.data.get("waits")):  # nothing remembers a detach
        return Unfinished(f"detach interrupted: {vm.name} was started by {by}; it stands on what it stood on",
                          hint=f"diskchain stop {vm.name}, then again")  # fmt: skip
    return Unfinished(f"merge interrupted: {vm.name} was started by {by}; it is pending",
                      hint=f"it is carried out by: diskchain stop {vm.name}")  # fmt: skip


# -- the start ---------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def taken(host: Host, name: str, progress: Progress, tell: Callable[[str], None]) -> AsyncIterator[VM]:
    """Hold the VM's lock for a start; a merge that holds it is dealt with as `merge.on_start` says. `tell`: what is said.

    Raise as `Host.change`; Busy where the merge is not to be disturbed.
    """
    async with contextlib.AsyncExitStack() as stack:
        yield await _enter(stack, host, name, progress, tell)


async def _enter(stack: contextlib.AsyncExitStack, host: Host, name: str, progress: Progress,
                 tell: Callable[[str], None]) -> VM:  # fmt: skip
    try:
        return await stack.enter_async_context(host.change(name, "start", wait=0))
    except Busy:
        home = host.places.find(name).home
    while True:
        with contextlib.ExitStack() as asking:
            if home and host.config.merge.on_start == "interrupt":
                asking.enter_context(locks.announced(home.start_waits, f"start {name}"))
            wait = host.config.wait
            if home and await _merge_over(host, name, home, progress, tell):
                wait = max(wait, LETS_GO_WITHIN)
            try:
                return await stack.enter_async_context(host.change(name, "start", wait=wait))
            except Busy:
                if home is None or host.config.merge.on_start != "wait" or not is_merging(home):
                    raise  # else the next of several merges has begun meanwhile


async def _merge_over(host: Host, name: str, home: Home, progress: Progress, tell: Callable[[str], None]) -> bool:
    """Return when nobody merges any more: whether somebody did. Raise Busy where a start is refused meanwhile."""
    if not is_merging(home):
        return False
    what, how = locks.holder(home.lock), host.config.merge.on_start
    if how == "refuse":
        raise Busy(f"{name} is being merged: {what}{_far_in_words(home)}",
                   hint='wait for its end; or merge.on_start = "interrupt"')  # fmt: skip
    if how == "interrupt":
        tell(f"a merge gives way to the start: {what}")
        await _until_nobody_merges(home, progress, STOPS_WITHIN)
    else:
        tell(f"waiting for the end of a merge: {what}")
        await _until_nobody_merges(home, progress, None)
    return True


async def _until_nobody_merges(home: Home, progress: Progress, limit: float | None) -> None:
    end = None if limit is None else time.monotonic() + limit
    shown = ""
    try:
        while is_merging(home) and (end is None or time.monotonic() < end):
            far = locks.holder_far(home.lock) if end is None else None
            if far and far.what != shown:
                shown = far.what
                progress.begin(f"waiting: {far.what}", far.total)
            if far:
                progress.update(far.done)
            await asyncio.sleep(0.1)
    finally:
        progress.end()


def is_merging(home: Home) -> bool:
    """Whether another process that lives carries out a merge of this VM."""
    if locks.holder_operation(home.lock) is None:
        return False
    try:
        entry = journal.open_entry(home)
    except DiskchainError:  # it was closed a moment ago
        return False
    return entry is not None and entry.op == "delete"


def _far_in_words(home: Home) -> str:
    far = locks.holder_far(home.lock)
    if far is None:
        return ""
    percent = min(100, 100 * far.done // far.total) if far.total else 0
    return f", {far.what} {size(far.done)}/{size(far.total)}, {percent} %"
