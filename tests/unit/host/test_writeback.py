"""host/writeback on a real ext4: the kernel writes meanwhile, and what fails is left for the sync to tell."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from diskchain.host.writeback import writing_back
from tests.support.refusals import SmallDisk
from tests.support.rig import MiB, wait_for


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A small ext4, which gives a file its blocks when it writes them (delayed allocation)."""
    found = SmallDisk(tmp_path, 64 * MiB)
    yield found
    found.close()


@pytest.fixture
def fd(disk: SmallDisk) -> Iterator[int]:
    """An open file there of which nothing is on the disk yet."""
    fd = os.open(disk.path / "file", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, os.urandom(8 * MiB), 0)
    yield fd
    os.close(fd)


def is_written(disk: SmallDisk) -> bool:
    """Whether all of the file has its place on the disk."""
    said = subprocess.run(["filefrag", "-v", disk.path / "file"], capture_output=True, text=True, check=True).stdout
    assert "extent" in said
    return "delalloc" not in said


def test_the_kernel_writes_while_the_block_runs_and_not_after_it(disk: SmallDisk, fd: int) -> None:
    """Not before either: that is the control."""
    assert not is_written(disk)

    async def work() -> None:
        async with writing_back(fd):
            await asyncio.to_thread(wait_for, lambda: is_written(disk), "it is written", 5)
        os.pwrite(fd, bytes(MiB), 16 * MiB)
        await asyncio.sleep(0.3)
        assert not is_written(disk)

    asyncio.run(work())


def test_what_could_not_be_written_is_told_by_the_sync(disk: SmallDisk, fd: int) -> None:
    """The block itself ends as if nothing had been."""

    async def work() -> None:
        async with writing_back(fd):
            disk.emergency()
            await asyncio.sleep(0.3)

    asyncio.run(work())
    with pytest.raises(OSError):
        os.fsync(fd)


def test_cancelled_it_has_ended_before_the_block_is_left(fd: int) -> None:
    """The descriptor may be closed then, and its locks given up."""

    async def work() -> None:
        async with writing_back(fd):
            asyncio.current_task().cancel()  # type: ignore[union-attr]
            await asyncio.sleep(30)

    async def cancelled() -> None:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(work())
        assert not any(map(at_work, threading.enumerate()))

    asyncio.run(cancelled())


def at_work(thread: threading.Thread) -> bool:
    """Whether a thread is in our loop."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame:
        if frame.f_code.co_name == "_write_back":
            return True
        frame = frame.f_back
    return False


def test_where_it_cannot_be_done_nothing_happens() -> None:
    """A pipe has no pages to write."""
    reader, writer = os.pipe()

    async def work() -> None:
        async with writing_back(writer):
            await asyncio.sleep(0.15)

    asyncio.run(work())
    os.close(reader)
    os.close(writer)
