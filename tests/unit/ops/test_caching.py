"""ops/caching on real files: what is read ahead of an engine. How large merges are done: tests/qemu/test_merge_methods.py."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from diskchain.chain.model import Image
from diskchain.host import readahead
from diskchain.host.qemu_img import AS_FAST_AS_IT_CAN, Caching, Pace
from diskchain.ops import caching
from tests.support.page_cache import forgotten, on_the_disk_alone
from tests.support.rig import MiB, Rig

KiB, SIZE = 1024, 8 * MiB


@pytest.fixture
def images(tmp_path: Path) -> list[Image]:
    """Layers on the disk alone, in small pieces and in one; and one in small pieces that is cached, too."""
    few = [f"write -P 7 {at * 128}k 64k" for at in range(SIZE // (128 * KiB))]
    found = [layer(tmp_path / name, words) for name, words in (("a", few), ("b", [f"write 0 {SIZE}"]), ("c", few))]
    for image in found[:2]:
        forgotten(image.path)
    found[2].path.read_bytes()
    return found


def layer(path: Path, words: Sequence[str]) -> Image:
    """Make an image and write into it."""
    Rig.qemu_img("create", "-q", "-f", "qcow2", str(path), str(SIZE))
    subprocess.run(["qemu-io", "-f", "qcow2", str(path)], input="\n".join(words), text=True, check=True,
                   capture_output=True)  # fmt: skip
    return Image(path.name, path, "qcow2", "vda", SIZE, None)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is read ahead."""
    seen: list[str] = []
    real = readahead._read

    def noted(paths: Iterable[Path], *more: object) -> None:
        chosen = list(paths)
        seen.extend(path.name for path in chosen)
        real(chosen, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(readahead, "_read", noted)
    return seen


def ahead_of(images: list[Image], how: Caching = Caching.THROUGH, pace: Pace = AS_FAST_AS_IT_CAN) -> None:
    """What an engine would be told."""

    async def work() -> None:
        async with caching.reading_ahead(images, how, pace):
            await asyncio.sleep(0)

    asyncio.run(work())


def test_what_is_in_small_pieces_and_not_cached_is_read_ahead(images: list[Image], read: list[str]) -> None:
    """Only for an engine that takes it from the page cache, and not where others are to have the disk, too."""
    for how in Caching:
        if how is not Caching.THROUGH:
            ahead_of(images, how)
    for pace in (Pace(rate=MiB), Pace(idle=True)):
        ahead_of(images, pace=pace)
    assert read == []
    ahead_of(images)
    assert read == ["a"]


def test_what_would_take_much_of_the_memory_is_not(
    images: list[Image], read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of what is to spare."""
    takes = images[0].path.stat().st_blocks * 512
    monkeypatch.setattr(caching, "memory_to_spare", lambda: 4 * takes - 4)
    ahead_of(images)
    assert read == []
    monkeypatch.setattr(caching, "memory_to_spare", lambda: 4 * takes)
    ahead_of(images)
    assert read == ["a"]


def test_what_is_not_there_or_no_image_is_left_for_the_engine_to_tell(tmp_path: Path, read: list[str]) -> None:
    """Nothing is raised."""
    on_the_disk_alone(tmp_path / "odd")
    for name in ("none", "odd"):
        ahead_of([Image(name, tmp_path / name, "qcow2", "vda", SIZE, None)])
    assert read == []
