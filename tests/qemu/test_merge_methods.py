"""Every way to merge, on every layout, on a filesystem that shares blocks and on one that does not: byte for byte the same.

Killed in the middle and done again, too. The reference is the chain as plain qemu-img flattened it before.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from diskchain.chain.deletion import Deletion, Fold, Pull
from diskchain.chain.model import Image, Snapshot
from diskchain.errors import DiskchainError
from diskchain.host import locks, probe
from diskchain.host.qemu_img import AS_FAST_AS_IT_CAN, Caching, Pace
from diskchain.ops import caching, merge, methods
from diskchain.ops.merge import Merged
from diskchain.ops.progress import QUIET
from tests.support.page_cache import forgotten
from tests.support.rig import MiB, Rig
from tests.support.sample import FULL

# name: format and options of the lower layer, options of the upper one
LAYOUTS = {
    "plain": ("qcow2", "", ""),
    "small-below": ("qcow2", "cluster_size=4k", ""),
    "large-below": ("qcow2", "cluster_size=2M", "cluster_size=4k"),
    "extended-above": ("qcow2", "", "extended_l2=on,cluster_size=128k"),
    "extended-below": ("qcow2", "extended_l2=on,cluster_size=32k", "cluster_size=512"),
    "old-below": ("qcow2", "compat=0.10", "compression_type=zstd"),
    "raw-below": ("raw", "", "cluster_size=2M"),
    "full-below": ("qcow2", "preallocation=full", ""),
}
METHODS = ("commit", "convert", "clone", "stream")
SIZE = 16 * MiB


@pytest.fixture(scope="module", params=["plain", "shares"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory on the filesystem of the tests, and one on XFS, which shares blocks."""
    directory = tmp_path_factory.mktemp("methods")
    if request.param == "plain":
        yield directory
        return
    mounted, file = directory / "mnt", directory / "xfs.img"
    mounted.mkdir()
    with file.open("wb") as opened:
        opened.truncate(1024 * MiB)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", str(file)], check=True)
    subprocess.run(["mount", "-o", "loop", str(file), str(mounted)], check=True)
    try:
        assert probe.directory(mounted).clone
        yield mounted
    finally:
        subprocess.run(["umount", str(mounted)], check=True)
        file.unlink()


@dataclass
class Chain:
    """ground <- lower <- (middle <-) upper (a raw lower one stands on nothing), and what the upper one shows."""

    lower: Image
    upper: Image
    ground: Image | None
    shown: bytes
    middle: Image | None = None

    def merged_by(self, method: str) -> Fold | Pull:
        """The merge of the two."""
        if method == "stream":
            return Pull("vda", (self.lower,), (self.upper,), self.ground)
        below = (self.ground,) if self.ground else ()
        return Fold("vda", self.upper, self.lower, (), (self.middle,) if self.middle else (), below, method)


def build(place: Path, layout: str, seed: int, *, size: int = SIZE, writes: int = 14, longest: int = 300,
          middle: bool = False) -> Chain:  # fmt: skip
    """Make a chain with writes, zeroes, discards and compressed clusters at odd places in every layer."""
    for old in place.glob("*.qcow2"):
        old.unlink()
    fmt, lower, upper = LAYOUTS[layout]
    ground = None if fmt == "raw" or "full" in lower else _image(place, "ground", "qcow2", "", None, size)
    if ground:
        scribble(ground.path, "qcow2", seed, size, writes, longest, compressed=True)
    low = _image(place, "lower", fmt, lower, ground, size)
    scribble(low.path, fmt, seed + 1, size, writes, longest, compressed=ground is not None)
    between = _image(place, "middle", "qcow2", "", low, size) if middle else None
    if between:
        scribble(between.path, "qcow2", seed + 3, size, writes, longest, compressed=True)
    top = _image(place, "upper", "qcow2", upper, between or low, size)
    scribble(top.path, "qcow2", seed + 2, size, writes, longest, compressed=True)
    return Chain(low, top, ground, flat(top), between)


def _image(place: Path, name: str, fmt: str, options: str, on: Image | None, size: int) -> Image:
    path = place / f"{name}.qcow2"
    backed = ["-b", on.path.name, "-F", on.fmt] if on else []
    Rig.qemu_img("create", "-q", "-f", fmt, *(["-o", options] if options else []), *backed, str(path), str(size))
    return Image(name, path, fmt, "vda", size, on.id if on else None, ours=True)


def scribble(path: Path, fmt: str, seed: int, size: int, count: int, longest: int, *, compressed: bool) -> None:
    """What a guest, and an import, would leave."""
    rng, words = random.Random(seed), []
    if compressed:  # first: a compressed write never goes where something is
        words += ["-c", f"write -c -P 77 {rng.randrange(0, size // (2 * MiB)) * 2 * MiB} 2M"]
    for _ in range(count):
        offset, length = rng.randrange(0, size // 512 - longest) * 512, rng.randrange(1, longest) * 512
        verb = rng.choice([f"write -P {rng.randrange(1, 255)}"] * 2 + ["write -z", "discard", "write -P 0"])
        words += ["-c", f"{verb} {offset} {length}"]
    done = subprocess.run(["qemu-io", "-f", fmt, "-d", "unmap", *words, str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr


def flat(image: Image) -> bytes:
    """What a guest reads."""
    out = image.path.with_suffix(".flat")
    Rig.qemu_img("convert", "-f", image.fmt, "-O", "raw", str(image.path), str(out))
    data = out.read_bytes()
    out.unlink()
    return data


async def carry_out(work: Fold | Pull, *, unclean: bool = False, pace: Pace = AS_FAST_AS_IT_CAN) -> Merged:
    """Under the guard, as `delete` does."""
    written = [i.path for i in (work.into, *work.gone)] if isinstance(work, Fold) else [work.overlays[0].path]
    readers = [] if isinstance(work, Fold) else [work.gone[0].path]
    with locks.guard_images(written, wait=5, users=locks.open_by, readers=readers) as guard:
        if isinstance(work, Fold):
            return await merge.fold(work, guard, unclean=unclean, progress=QUIET, pace=pace)
        merged = await merge.pull(work, work.overlays[0], guard, unclean=unclean, progress=QUIET, pace=pace)
        await merge.settle(work, work.overlays[0], guard)
        return merged


def left(chain: Chain, work: Fold | Pull) -> bytes:
    """What is shown when the layer that goes is gone."""
    gone, stays = (work.gone, work.into) if isinstance(work, Fold) else ((chain.lower,), chain.upper)
    for image in gone:
        image.path.unlink()
    if stays.fmt == "qcow2":
        code = subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(stays.path)], check=False).returncode
        assert code in (0, 3), "3: clusters are leaked, nothing else"
    return flat(stays)


def taken(image: Image) -> int:
    """Bytes on the disk; XFS takes more beyond the end for a while, and gives it back when it is needed."""
    status = image.path.stat()
    return min(status.st_blocks * 512, status.st_size)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_method_on_every_layout_keeps_every_byte(place: Path, layout: str) -> None:
    """One layer that goes, or two: by turns, so that each way meets each on half of the layouts."""
    for number, method in enumerate(METHODS):
        two = method != "stream" and (number + list(LAYOUTS).index(layout)) % 2 == 1
        chain = build(place, layout, 100 * number + len(layout), middle=two)
        work = chain.merged_by(method)
        room = merge.growth(work) if isinstance(work, Fold) else merge.pulled(work, chain.upper)
        grows = work.into if isinstance(work, Fold) else chain.upper
        before = taken(grows)
        merged = asyncio.run(carry_out(work))
        assert merged.method == method
        assert taken(grows) - before <= room, f"{method}: grew by more than was said"
        assert left(chain, work) == chain.shown, method


@pytest.mark.parametrize("method", METHODS)
def test_killed_in_the_middle_and_done_again(place: Path, method: str) -> None:
    """SIGKILL of qemu-img; the view through the upper layer is whole; the redo ends in the same content."""
    rng, hit = random.Random(11), 0
    for seed in range(12):
        if seed >= (3 if FULL else 2) and (hit or method == "clone"):
            break
        two = method != "stream" and seed == 1
        chain = build(place, "plain", 500 + seed, size=96 * MiB, writes=40, longest=8000, middle=two)
        work = chain.merged_by(method)
        hit += asyncio.run(_killed(work, rng.uniform(0.01, 0.06)))
        assert flat(chain.upper) == chain.shown, "the view through the upper layer"
        asyncio.run(carry_out(work, unclean=True))
        assert left(chain, work) == chain.shown
    assert hit or method == "clone", "nothing was hit: it is too quick for this test"


async def _killed(work: Fold | Pull, after: float) -> bool:
    task = asyncio.create_task(carry_out(work))
    end = time.monotonic() + 20
    while not task.done() and time.monotonic() < end:
        engine = _engine()
        if engine:
            await asyncio.sleep(after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(engine, signal.SIGKILL)
            break
        await asyncio.sleep(0.001)
    with contextlib.suppress(DiskchainError):
        await task
        return False
    return True


def _engine() -> int | None:
    """Our qemu-img that moves data."""
    for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            if words[0].endswith(b"qemu-io") or {b"commit", b"convert"} & set(words):
                return int(child)
    return None


def deletion(chain: Chain, **more: bool) -> Deletion:
    """The deletion of the lower layer's snapshot, as the planner makes it."""
    snapshot = Snapshot("s", "s", "", None, {"vda": "lower"}, **more)  # type: ignore[arg-type]
    fold = chain.merged_by("commit")
    assert isinstance(fold, Fold)
    return Deletion((snapshot,), (fold,))


def test_the_method_is_chosen_by_size_of_pieces_filesystem_and_direction(place: Path) -> None:
    """Large pieces are cloned where blocks can be shared; what moves much less upwards goes up."""
    shares = bool(probe.directory(place).clone)
    small = build(place, "plain", 1, writes=1, longest=2)
    for number in range(12):
        write(small.upper, f"write -P 5 {number}M 20k")
    chosen = methods.choose(deletion(small))
    assert [f.method for f in chosen.folds] == ["commit"]
    begun = methods.choose(deletion(small, merge_begun=True))
    assert [f.method for f in begun.folds] == ["commit"]
    large = build(place, "plain", 1, size=256 * MiB, writes=1, longest=2)
    write(large.upper, "write -P 3 0 160M")
    chosen = methods.choose(deletion(large))
    assert not chosen.folds and [p.method for p in chosen.pulls] == ["stream"], "the lower layer holds nearly nothing"
    write(large.lower, "write -P 4 96M 160M")
    chosen = methods.choose(deletion(large))
    assert [f.method for f in chosen.folds] == ["clone" if shares else "commit"]


def write(image: Image, command: str) -> None:
    """Write into a layer."""
    subprocess.run(["qemu-io", "-f", image.fmt, "-c", command, str(image.path)], check=True, capture_output=True)


@pytest.mark.parametrize("layout", ["plain", "extended-above"])
def test_several_layers_of_subclusters_are_converted_unless_that_writes_much_more(place: Path, layout: str) -> None:
    """Large pieces are cloned; what overlaps is written once, by commit, as is what has no subclusters."""
    shares = bool(probe.directory(place).clone)
    chain = build(place, layout, 3, size=256 * MiB, writes=1, longest=2, middle=True)
    assert chain.middle
    write(chain.lower, "write -P 4 130M 100M")
    write(chain.middle, "write -P 5 0 48M")
    write(chain.upper, "write -P 6 80M 48M")
    moved = "commit" if layout == "plain" else "convert"
    assert [f.method for f in methods.choose(deletion(chain)).folds] == ["clone" if shares else moved]
    write(chain.upper, "write -P 6 0 48M")
    assert [f.method for f in methods.choose(deletion(chain)).folds] == ["clone" if shares else "commit"]


LARGE = {
    Caching.AROUND_NATIVE: {"AROUND_FROM": 0, "IN_PIECES_OF": 0, "CACHED_AT_MOST": 1.0, "CACHED_FROM": 2.0},
    Caching.WRITES_AROUND: {"WRITES_FROM": 0, "WRITES_IN_PIECES_OF": 0, "CACHED_FROM": 0.0},
}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Caching]:
    """How each fold was done."""
    seen: list[Caching] = []
    real = caching.of_fold

    def noted(*args: Any, **more: Any) -> Caching:
        seen.append(real(*args, **more))
        return seen[-1]

    monkeypatch.setattr(caching, "of_fold", noted)
    return seen


@pytest.fixture
def ways(place: Path, request: pytest.FixtureRequest) -> list[Caching]:
    """How large layers are committed: by turns, so that each way meets half of the layouts on each filesystem; or all."""
    number = list(LAYOUTS).index(request.getfixturevalue("layout")) if "layout" in request.fixturenames else 0
    by_turns = list(LARGE)[(number + bool(probe.directory(place).clone)) % 2]
    return list(LARGE) if FULL else [by_turns]


@contextlib.contextmanager
def all_are_large(way: Caching) -> Iterator[None]:
    """Every commit of a first try is done that way, whatever its size."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LARGE[way].items():
            patch.setattr(caching, name, value)
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
def test_around_the_page_cache_every_layout_keeps_every_byte(
    place: Path, layout: str, ways: list[Caching], seen: list[Caching]
) -> None:
    """What is read afterwards through the page cache is what was written around it."""
    for way in ways:
        chain = build(place, layout, 900 + len(layout), middle=len(layout) % 2 == 1)
        work = chain.merged_by("commit")
        with all_are_large(way):
            asyncio.run(carry_out(work))
        assert left(chain, work) == chain.shown
        assert seen.pop() == way


def test_around_the_page_cache_killed_and_done_again(place: Path, ways: list[Caching], seen: list[Caching]) -> None:
    """The redo is the careful one: around it, too, by QEMU's threads."""
    for way in ways:
        with all_are_large(way):
            _kill_until_hit(place, 2 if FULL else 1)
        assert seen[:2] == [way, Caching.AROUND]
        seen.clear()


def _kill_until_hit(place: Path, times: int) -> None:
    hit = 0
    for seed in range(12):
        chain = build(place, "plain", 700 + seed, size=96 * MiB, writes=40, longest=8000, middle=seed % 2 == 1)
        work = chain.merged_by("commit")
        hit += asyncio.run(_killed(work, 0.01 + 0.01 * (seed % 4)))
        assert flat(chain.upper) == chain.shown, "the view through the upper layer"
        asyncio.run(carry_out(work, unclean=True))
        assert left(chain, work) == chain.shown
        if hit >= times:
            break
    assert hit, "nothing was hit: it is too quick for this test"


def test_without_linux_aio_it_goes_on_by_threads(place: Path, seen: list[Caching]) -> None:
    """A host on which fs.aio-max-nr is used up: qemu-img can't open the image so, and is told to open it as always."""
    limit = Path("/proc/sys/fs/aio-max-nr")
    before = limit.read_text()
    chain = build(place, "plain", 31)
    work = chain.merged_by("commit")
    limit.write_text("0")
    try:
        with all_are_large(Caching.AROUND_NATIVE):
            asyncio.run(carry_out(work))
    finally:
        limit.write_text(before)
    assert left(chain, work) == chain.shown
    assert seen == [Caching.AROUND_NATIVE]


def test_what_is_large_is_written_around_the_page_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And read where it is; not what is in small pieces, not what is small."""
    monkeypatch.setattr(caching, "AROUND_FROM", 32 * MiB)
    monkeypatch.setattr(caching, "WRITES_FROM", 32 * MiB)
    chain = build(place, "plain", 5, size=256 * MiB, writes=1, longest=2)
    write(chain.upper, "write -P 6 16M 64M")
    write(chain.lower, "write -P 4 0 100M")
    work = chain.merged_by("commit")
    assert isinstance(work, Fold)

    def chosen(*, cached: bool) -> Caching:
        for image in (chain.lower, chain.upper):
            forgotten(image.path)
            if cached:
                image.path.read_bytes()
        return caching.of_fold(work, "commit", unclean=False, pace=AS_FAST_AS_IT_CAN)

    assert chosen(cached=False) is Caching.AROUND_NATIVE
    assert chosen(cached=True) is Caching.WRITES_AROUND
    for name in ("AROUND_FROM", "WRITES_FROM"):
        monkeypatch.setattr(caching, name, 128 * MiB)
    assert chosen(cached=False) is chosen(cached=True) is Caching.THROUGH
    for name in ("AROUND_FROM", "WRITES_FROM"):
        monkeypatch.setattr(caching, name, 32 * MiB)
    for at in range(100, 200):
        write(chain.upper, f"write -P 7 {at}M 64k")
    assert chosen(cached=False) is Caching.THROUGH
    monkeypatch.setattr(caching, "WRITES_IN_PIECES_OF", 2 * MiB)
    assert chosen(cached=True) is Caching.THROUGH


@pytest.mark.parametrize("method", METHODS)
def test_a_rate_is_kept_and_an_idle_engine_writes_the_same(place: Path, method: str) -> None:
    """24 MiB at 16 MiB a second take a second at least, by whatever they are moved; -C has no rate (nor use for one)."""
    chain = build(place, "plain", 9, size=64 * MiB, writes=2, longest=20)
    write(chain.lower if method == "stream" else chain.upper, "write -P 9 8M 24M")
    shown, work = flat(chain.upper), chain.merged_by(method)
    began = time.monotonic()
    asyncio.run(carry_out(work, pace=Pace(16 * MiB, idle=True)))
    took = time.monotonic() - began
    assert took >= 1.0 or method == "clone"
    assert left(chain, work) == shown
