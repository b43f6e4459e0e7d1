"""host/readahead on real files: what is read while the block runs, that it ends with it, and that nothing is raised."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from diskchain.host import readahead
from diskchain.host.cached import cached_share
from diskchain.host.readahead import reading_ahead
from tests.support.page_cache import on_the_disk_alone
from tests.support.rig import wait_for


def test_whole_files_are_read_one_after_the_other(tmp_path: Path) -> None:
    """A file that is not there, and a link, are passed over."""
    first, second, linked = (on_the_disk_alone(tmp_path / name) for name in ("first", "second", "linked"))
    (tmp_path / "link").symlink_to(linked)
    paths = [tmp_path / "none", first, tmp_path / "link", second]

    async def work() -> None:
        async with reading_ahead(paths):
            await asyncio.to_thread(wait_for, lambda: cached_share(second) == 1, "they are read", 20)

    asyncio.run(work())
    assert cached_share(first) == 1
    assert cached_share(linked) <= 0.05


@pytest.mark.parametrize("cancelled", [False, True])
def test_it_has_ended_when_the_block_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cancelled: bool) -> None:
    """Nobody opens a file later that may be another one then."""
    ended = threading.Event()
    real = readahead._read

    def slow(*given: object) -> None:
        real(*given)  # type: ignore[arg-type]
        ended.set()

    monkeypatch.setattr(readahead, "_read", slow)
    monkeypatch.setattr(readahead, "_AT_A_TIME", 1)  # a byte a call: minutes for the file
    file = on_the_disk_alone(tmp_path / "file")

    async def work() -> None:
        async with reading_ahead([file] * 1000):
            await asyncio.sleep(0.05)
            assert not ended.is_set()
            if cancelled:
                asyncio.current_task().cancel()  # type: ignore[union-attr]

    async def main() -> None:
        await asyncio.wait([asyncio.create_task(work())], timeout=20)
        assert ended.is_set()

    asyncio.run(main())
