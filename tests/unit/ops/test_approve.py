"""Approving chains: hostile ones are refused quickly and without QEMU, good ones pass and agree with qemu-img."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diskchain.chain import qcow2
from diskchain.chain.qcow2 import ApprovedImage
from diskchain.errors import ChainDamaged, DiskchainError, HostileImage
from diskchain.ops import approve
from diskchain.ops.allocation import allocated
from diskchain.ops.approve import approve_chain, differing, fingerprint
from fixtures.hostile import CASES, GOOD, GoodCase, HostileCase, header, write_chain, write_image

CPU_LIMIT, MEMORY_LIMIT = 0.05, 64 << 20  # seconds of processor, bytes; of each answer
TRIES = 5  # the quickest counts: others work on the same processors


def run(*argv: str | Path) -> str:
    return subprocess.run([str(arg) for arg in argv], check=True, capture_output=True, text=True).stdout


def write(path: Path, command: str) -> None:
    run("qemu-io", "-f", "qcow2", "-c", command, path)


def create(path: Path, size: str = "64M", *options: str | Path) -> Path:
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, size)
    return path


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_keywords: object) -> None:
        pytest.fail("a program was started")

    for name in ("fork", "posix_spawn", "posix_spawnp", "execv", "execve", "system"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)


def cpu_seconds(work: Callable[[], object]) -> float:
    """The processor time of the quickest of some tries, each of which knows nothing of the others."""
    found = []
    for _ in range(TRIES):
        qcow2._known.cache_clear()
        before = time.process_time()
        work()
        found.append(time.process_time() - before)
    return min(found)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that is held at once."""
    qcow2._known.cache_clear()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("no_programs")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_approve_hostile_chain_is_refused_quickly(case: HostileCase, tmp_path: Path) -> None:
    top = case.build(tmp_path)

    def answer() -> DiskchainError:
        with pytest.raises(case.expected) as caught:
            approve_chain(top, case.fmt, roots=[tmp_path] if case.confined else None)
        assert type(caught.value) is case.expected
        assert caught.value.message.isprintable()
        return caught.value

    error = answer()
    took, taken = cpu_seconds(answer), peak_bytes(answer)
    print(f"{case.name}: {took * 1000:.2f} ms, {taken >> 10} KiB: {error.message[:100]}")
    assert took < CPU_LIMIT and taken < MEMORY_LIMIT


@pytest.mark.usefixtures("no_programs")
@pytest.mark.parametrize("case", [c for c in CASES if not c.name.startswith("depth")], ids=lambda case: case.name)
def test_fingerprint_of_hostile_image_raises_only_our_errors(case: HostileCase, tmp_path: Path) -> None:
    top = case.build(tmp_path)

    def answer() -> None:
        try:
            fingerprint(top, case.fmt)
        except DiskchainError as error:
            assert error.message.isprintable()

    assert cpu_seconds(answer) < CPU_LIMIT and peak_bytes(answer) < MEMORY_LIMIT


@pytest.mark.usefixtures("no_programs")
@pytest.mark.parametrize("case", GOOD, ids=lambda case: case.name)
def test_approve_good_chain_passes(case: GoodCase, tmp_path: Path) -> None:
    images = approve_chain(case.build(tmp_path), case.fmt, roots=[tmp_path])
    assert len(images) == case.length
    assert [image.backing for image in images] == [image.path for image in images[1:]] + [None]
    assert [image.backing_fmt for image in images] == [image.fmt for image in images[1:]] + [None]


def test_corpus_is_as_large_as_promised() -> None:
    assert len(CASES) >= 150
    assert len({case.name for case in CASES}) == len(CASES)
    assert len({case.name for case in GOOD}) == len(GOOD)


def build_real_chain(directory: Path) -> Path:
    (directory / "deep").mkdir()
    (directory / "base.raw").write_bytes(b"x" * 1000)
    create(directory / "deep" / "a.qcow2", "64M", "-b", "../base.raw", "-F", "raw")
    create(directory / "b.qcow2", "64M", "-b", "deep/a.qcow2", "-F", "qcow2")
    top = create(directory / "c.qcow2", "128M", "-o", "cluster_size=2M", "-b", directory / "b.qcow2", "-F", "qcow2")
    write(top, "write -P 7 0 4M")
    return top


def test_approve_real_chain_agrees_with_qemu_img(tmp_path: Path) -> None:
    top = build_real_chain(tmp_path)
    theirs: list[dict[str, Any]] = json.loads(run("qemu-img", "info", "--backing-chain", "--output=json", top))
    ours = approve_chain(top, "qcow2", roots=[tmp_path])
    assert [str(image.path) for image in ours] == [os.path.realpath(layer["filename"]) for layer in theirs]
    assert [image.virtual_size for image in ours] == [layer["virtual-size"] for layer in theirs]
    assert [image.fmt for image in ours] == [layer["format"] for layer in theirs]
    assert [image.allocated for image in ours] == [layer["actual-size"] for layer in theirs]
    assert [(image.dev, image.ino) for image in ours] == [
        (image.path.stat().st_dev, image.path.stat().st_ino) for image in ours
    ]


def test_approve_through_symlinked_directory_gives_real_paths(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "down").mkdir()
    (tmp_path / "link").symlink_to("real/down")
    write_image(tmp_path / "real" / "base.qcow2", header())
    write_image(tmp_path / "link" / "top.qcow2", header(backing=b"../base.qcow2"))
    found = approve_chain(tmp_path / "link" / "top.qcow2", "qcow2", roots=[tmp_path / "link" / ".."])
    assert [image.path for image in found] == [
        tmp_path / "real" / "down" / "top.qcow2",
        tmp_path / "real" / "base.qcow2",
    ]


def test_approve_with_raw_top_never_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = write_image(tmp_path / "top", header(backing=b"/etc/shadow", backing_format=b"raw"))
    monkeypatch.setattr(os, "pread", lambda *_args: pytest.fail("read"))
    (image,) = approve_chain(top, "raw")
    assert (image.fmt, image.header, image.backing, image.virtual_size) == ("raw", None, None, 4 * 65536)


def test_approve_with_no_roots_allowed_refuses_everything(tmp_path: Path) -> None:
    with pytest.raises(HostileImage, match="outside"):
        approve_chain(write_chain(tmp_path, 1), "qcow2", roots=[])


def test_approve_root_is_a_directory_not_a_prefix(tmp_path: Path) -> None:
    (tmp_path / "images-private").mkdir()
    (tmp_path / "images").mkdir()
    top = write_chain(tmp_path / "images-private", 1)
    with pytest.raises(HostileImage, match="outside"):
        approve_chain(top, "qcow2", roots=[tmp_path / "images"])
    assert approve_chain(top, "qcow2", roots=[Path("/")])


def test_approve_relative_top_is_found_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_chain(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    assert [image.path.name for image in approve_chain(Path("1.qcow2"), "qcow2")] == ["1.qcow2", "0.qcow2"]


def test_approve_max_depth_counts_images(tmp_path: Path) -> None:
    top = write_chain(tmp_path, 5)
    assert len(approve_chain(top, "qcow2", max_depth=5)) == 5
    with pytest.raises(HostileImage, match="deeper than 4"):
        approve_chain(top, "qcow2", max_depth=4)


def test_approve_leaves_no_descriptor_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for case in (case for case in CASES if not case.name.startswith("depth")):
        place = tmp_path / case.name
        place.mkdir()
        with pytest.raises(case.expected):
            approve_chain(case.build(place), case.fmt, roots=[place] if case.confined else None)
    assert len(os.listdir("/proc/self/fd")) == before


def count_calls(monkeypatch: pytest.MonkeyPatch, top: Path) -> tuple[Counter[str], list[ApprovedImage]]:
    calls: Counter[str] = Counter()

    def counting(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **keywords: Any) -> Any:
            calls[name] += 1
            return real(*args, **keywords)

        monkeypatch.setattr(os, name, call)

    with monkeypatch.context() as monkeypatch:
        for name in ("open", "pread", "fstat", "stat", "lstat", "readlink", "close"):
            counting(name)
        images = approve_chain(top, "qcow2")
    return calls, images


def test_approve_depth_200_is_linear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = write_chain(tmp_path, 200)
    for depth in (50, 200):
        calls, images = count_calls(monkeypatch, tmp_path / f"{depth - 1}.qcow2")
        assert len(images) == depth
        # the directory is opened and resolved once; the base's header cluster needs a second read
        expected = {"open": depth + 1, "close": depth + 1, "readlink": 1, "stat": depth, "fstat": depth}
        assert calls == {**expected, "pread": depth + 1}
    assert top.name == "199.qcow2"


# Fingerprints


def test_fingerprint_is_unchanged_by_reading_and_opening(tmp_path: Path) -> None:
    top = build_real_chain(tmp_path)
    before = fingerprint(top, "qcow2")
    write(top, "read 0 64M")
    run("qemu-img", "check", "-f", "qcow2", top)
    os.utime(top)
    assert differing(before, fingerprint(top, "qcow2")) == []
    assert set(before) == {"size", "virtual_size", "sha256", "written_ns"}
    assert before["virtual_size"] == 128 << 20


LAYOUTS = ("cluster_size=64k", "cluster_size=512", "extended_l2=on", "compat=0.10")
WRITES = ("write -P 1 0 64k", "write -P 1 60M 512", "write -z 8M 1M", "write -c 16M 64k")
NO_NEW_CLUSTER = (
    ("cluster_size=512", "write -c 16M 64k"),  # 64 KiB is no single compressed cluster
    ("compat=0.10", "write -z 8M 1M"),  # version 2 has no zero clusters: nothing is written where nothing was
)


@pytest.mark.parametrize(
    ("options", "command"), [(o, w) for o in LAYOUTS for w in WRITES if (o, w) not in NO_NEW_CLUSTER]
)
def test_fingerprint_shows_every_new_cluster(tmp_path: Path, options: str, command: str) -> None:
    path = create(tmp_path / "image.qcow2", "64M", "-o", options)
    write(path, "write -P 9 32M 128k")
    before = fingerprint(path, "qcow2")
    write(path, command)
    assert differing(before, fingerprint(path, "qcow2"))


def test_fingerprint_shows_a_moved_cluster(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2")
    write(path, "write -P 9 0 128k")
    run("qemu-img", "snapshot", "-c", "one", path)
    before = fingerprint(path, "qcow2")
    write(path, "write -P 8 0 64k")  # copy on write: the snapshot keeps the old cluster
    assert differing(before, fingerprint(path, "qcow2"))


def test_fingerprint_shows_resize_and_rebase(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2")
    prints = [fingerprint(path, "qcow2")]
    run("qemu-img", "resize", "-q", "-f", "qcow2", path, "65M")
    prints.append(fingerprint(path, "qcow2"))
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "other", "-F", "raw", path)
    prints.append(fingerprint(path, "qcow2"))
    assert all(differing(one, other) for one, other in itertools.combinations(prints, 2))


def test_fingerprint_of_raw_is_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1000))
    os.utime(path, ns=(0, 12345))
    assert fingerprint(path, "raw") == {"size": 1000, "virtual_size": 1024, "mtime_ns": 12345}


def test_fingerprint_holds_one_table_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = create(tmp_path / "image.qcow2", "20G", "-o", "preallocation=metadata")
    lengths: list[int] = []
    real = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        lengths.append(length)
        return real(fd, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    fingerprint(path, "qcow2")
    assert len(lengths) >= 40
    assert max(lengths) == 65536


@pytest.mark.parametrize("entry", [1 << 40, 0x40200])
def test_fingerprint_of_l2_table_in_a_wrong_place_is_damage(tmp_path: Path, entry: int) -> None:
    path = write_image(tmp_path / "image.qcow2", header(), clusters=8)
    with open(path, "r+b") as file:
        file.seek(3 * 65536)
        file.write(entry.to_bytes(8, "big"))
    with pytest.raises(ChainDamaged, match="L2 table"):
        fingerprint(path, "qcow2")


def test_fingerprint_of_endless_l2_tables_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approve, "MAX_L2_BYTES", 65536)
    path = write_image(tmp_path / "image.qcow2", header(l1_entries=2), clusters=8)
    with open(path, "r+b") as file:
        file.seek(3 * 65536)
        file.write((4 * 65536).to_bytes(8, "big") + (5 * 65536).to_bytes(8, "big"))
    with pytest.raises(HostileImage, match="2 L2 tables"):
        fingerprint(path, "qcow2")


@pytest.mark.parametrize("bits", [16, 21])
@pytest.mark.parametrize("kind", ["random", "many"])
def test_tables_of_32_mib_of_nonsense_are_given_up_at_once(tmp_path: Path, kind: str, bits: int) -> None:
    """A sparse file of 8 TiB whose header is good: 4 million L2 tables anywhere, or more than any disk has."""
    path = write_image(
        tmp_path / "top", header(cluster_bits=bits, l1_entries=4 << 20, snapshots=1, snapshots_offset=1 << 30)
    )
    tables = {
        "random": random.Random(bits).randbytes(32 << 20),
        "many": b"".join((number + (1 << 19) << bits).to_bytes(8, "big") for number in range(1 << 19)),
    }
    with open(path, "r+b") as file:
        file.seek(3 << bits)
        file.write(tables[kind])
        file.truncate(8 << 40)

    def look(read: Callable[[Path], object]) -> None:
        with pytest.raises((ChainDamaged, HostileImage), match="L2 table"):
            read(path)

    def fingerprinted() -> None:
        look(lambda path: fingerprint(path, "qcow2"))

    approve_chain(path, "qcow2", roots=[tmp_path])
    for work in (fingerprinted, lambda: look(approve.map_of), lambda: look(allocated)):
        assert peak_bytes(work) < MEMORY_LIMIT
        assert kind == "many" or cpu_seconds(work) < CPU_LIMIT  # a quarter of a million tables are looked at, all good
