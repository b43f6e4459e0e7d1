"""Headers: real ones agree with qemu-img, wrong ones are refused, random ones never raise anything unexpected."""

from __future__ import annotations

import itertools
import json
import struct
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diskchain.chain import qcow2
from diskchain.chain.text import printable
from diskchain.errors import ChainDamaged, DiskchainError, HostileImage, UnsupportedDisk
from fixtures.hostile import header

FILE_SIZE = 4 * 65536


def qemu_img(*args: str | Path) -> str:
    argv = ["qemu-img", *map(str, args)]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def info(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(qemu_img("info", "--output=json", "-f", "qcow2", path))
    return found


def parse(path: Path) -> qcow2.Header:
    data = path.read_bytes()
    return qcow2.parse_header(data[: qcow2.header_span(data[:104])], len(data))


OPTIONS = [
    "compat=0.10",
    "compat=1.1",
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=2M",
    "cluster_size=2M,extended_l2=on",
    "extended_l2=on",
    "compression_type=zstd",
    "lazy_refcounts=on",
    "refcount_bits=1",
    "refcount_bits=64",
    "preallocation=metadata",
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", ["0", "512", "1G"])
def test_parse_of_a_real_image_agrees_with_qemu_img(tmp_path: Path, options: str, size: str) -> None:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, size)
    ours, theirs = parse(path), info(path)
    special = theirs["format-specific"]["data"]
    qcow2.reject_unsafe(ours)
    assert ours.virtual_size == theirs["virtual-size"]
    assert ours.cluster_size == theirs["cluster-size"]
    assert ours.version == {"0.10": 2, "1.1": 3}[special["compat"]]
    assert 1 << ours.refcount_order == special["refcount-bits"]
    assert ours.compression_type.name.lower() == special["compression-type"]
    assert ours.extended_l2 is special.get("extended-l2", False)
    assert bool(ours.compatible & qcow2.Compatible.LAZY_REFCOUNTS) is special.get("lazy-refcounts", False)
    assert ours.corrupt is special.get("corrupt", False)
    assert (ours.dirty, ours.snapshots, ours.has_bitmaps, ours.backing_name) == (False, 0, False, None)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("name", ["base.qcow2", "sub/../base.qcow2", "ä ö $(x) ' \".qcow2", "x" * 200])
def test_parse_of_a_real_overlay_names_its_backing_file(tmp_path: Path, name: str, compat: str) -> None:
    path = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-o", f"compat={compat}", "-b", name, "-F", "qcow2", path, "1G")
    ours, theirs = parse(path), info(path)
    qcow2.reject_unsafe(ours)
    assert ours.backing_name == theirs["backing-filename"] == name
    assert ours.backing_format == theirs["backing-filename-format"] == "qcow2"


def test_parse_after_rebase_to_nothing_has_no_backing_file(tmp_path: Path) -> None:
    path = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "gone", "-F", "raw", path, "1G")
    qemu_img("rebase", "-q", "-u", "-f", "qcow2", "-b", "", path)
    assert parse(path).backing_name is None


def test_parse_sees_snapshots_and_bitmaps_and_allows_them(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    qemu_img("snapshot", "-c", "one", path)
    qemu_img("bitmap", "--add", "-f", "qcow2", path, "dirty")
    found = parse(path)
    qcow2.reject_unsafe(found)
    assert found.snapshots == 1
    assert found.has_bitmaps
    assert found.autoclear == qcow2.Autoclear.BITMAPS


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("data_file=DIR/data", HostileImage),
        ("data_file=DIR/data,data_file_raw=on", HostileImage),
        ("encrypt.format=aes,encrypt.key-secret=s", UnsupportedDisk),  # luks measures the CPU: fails under load
    ],
)
def test_reject_of_real_images_with_unsafe_features(tmp_path: Path, options: str, expected: type[Exception]) -> None:
    path = tmp_path / "image.qcow2"
    secret = ["--object", "secret,id=s,data=x"] if "secret" in options else []
    qemu_img("create", "-q", *secret, "-f", "qcow2", "-o", options.replace("DIR", str(tmp_path)), path, "1M")
    with pytest.raises(expected):
        qcow2.reject_unsafe(parse(path))


def test_parse_keeps_unknown_bits_apart() -> None:
    found = qcow2.parse_header(header(compatible=0x11, autoclear=1 << 63, incompatible=0x21), FILE_SIZE)
    assert (found.unknown_compatible, found.unknown_autoclear, found.unknown_incompatible) == (0x10, 1 << 63, 0x20)
    assert found.dirty
    with pytest.raises(HostileImage, match="0x20"):
        qcow2.reject_unsafe(found)


@pytest.mark.parametrize("cut", range(0, 140))
def test_parse_of_fewer_bytes_than_wanted_is_damage(cut: int) -> None:
    whole = header(backing=b"base.qcow2")
    assert qcow2.header_span(whole[:104]) == len(whole)
    with pytest.raises(ChainDamaged):
        qcow2.parse_header(whole[:cut], FILE_SIZE)


def test_every_refusal_has_one_line_and_a_hint() -> None:
    with pytest.raises(HostileImage) as caught:
        qcow2.reject_unsafe(qcow2.parse_header(header(backing=b"a\n\x1b[2J\xe2\x80\xaeb"), FILE_SIZE))
    assert caught.value.message.isprintable()
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a:b", True), (":", True), ("json:{}", True), ("./a:b", False), ("/a:b", False), ("a/b:c", False), ("a", False)],
)
def test_has_protocol_is_a_colon_before_the_first_slash(name: str, expected: bool) -> None:
    assert qcow2.has_protocol(name) is expected


def test_l2_offsets_masks_reserved_bits_and_skips_holes() -> None:
    table = struct.pack(">5Q", 0, 1 << 63 | 0x50000, 0x40000 | 0x1FF, 1 << 63, 0xFF << 56 | 0x60000)
    assert qcow2.l2_offsets(table) == [0x50000, 0x40000, 0x60000]
    assert qcow2.l2_offsets(table[:-1]) == [0x50000, 0x40000]
    assert qcow2.l2_offsets(b"") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain ä", "plain ä"),
        ("a\nb", "a\\nb"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\x9b", "\\x9b"),
        ("a\u202eb\u2066", "a\\u202eb\\u2066"),
        ("\udcff", "\\xff"),
        ("\ud800", "\\ud800"),
        ("\u2028", "\\u2028"),
    ],
)
def test_printable_escapes_what_a_terminal_would_obey(text: str, expected: str) -> None:
    assert printable(text) == expected


SEEDS = [
    header(),
    header(version=2),
    header(backing=b"base.qcow2"),
    header(version=2, backing=b"base.qcow2"),
    header(backing=b"/x/base.raw", backing_format=b"raw", incompatible=9, compression=1),
    header(autoclear=1, extensions=[(0x23852875, struct.pack(">IIQQ", 1, 0, 32, 65536)), (7, b"abc")]),
]


def only_our_errors(data: bytes, file_size: int) -> None:
    assert 0 < qcow2.header_span(data[:104]) <= 2 << 20
    try:
        found = qcow2.parse_header(data, file_size)
    except (HostileImage, ChainDamaged) as error:
        assert error.message.isprintable()
        return
    assert found.l1_offset + found.l1_bytes <= max(file_size, found.l1_offset if found.l1_bytes == 0 else 0)
    try:
        qcow2.reject_unsafe(found)
    except DiskchainError as error:
        assert error.message.isprintable()
        assert error.hint


@settings(max_examples=500, deadline=None)
@given(data=st.binary(max_size=4096), file_size=st.integers(0, 1 << 63))
@example(data=b"", file_size=0)
def test_parse_of_random_bytes_raises_only_our_errors(data: bytes, file_size: int) -> None:
    only_our_errors(data, file_size)
    only_our_errors(b"QFI\xfb\0\0\0\x03" + data, file_size)
    only_our_errors(b"QFI\xfb\0\0\0\x02" + data, file_size)


POKES = st.lists(st.tuples(st.integers(4, 200), st.binary(min_size=1, max_size=8)), max_size=6)


@settings(max_examples=2000, deadline=None)
@given(seed=st.sampled_from(SEEDS), pokes=POKES, cut=st.integers(0, 4096), size=st.sampled_from([FILE_SIZE, 1 << 62]))
def test_parse_of_mutated_headers_raises_only_our_errors(
    seed: bytes, pokes: list[tuple[int, bytes]], cut: int, size: int
) -> None:
    data = bytearray(seed.ljust(4096, b"\0"))
    for offset, content in pokes:
        data[offset : offset + len(content)] = content
    only_our_errors(bytes(data[: max(cut, 60)]), size)


# The short way (headers known but for the name) and the full one


OVERLAYS = ["compat=1.1", "compat=0.10", "compression_type=zstd", "cluster_size=512", "extended_l2=on"]


@lru_cache
def real_overlays() -> list[bytes]:
    """The first 4 KiB of overlays as qemu-img makes them, with names of several lengths."""
    found = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "top.qcow2")
        for option, name in itertools.product(OVERLAYS, ["b", "base.qcow2", "x" * 130]):
            qemu_img("create", "-q", "-u", "-f", "qcow2", "-o", option, "-b", name, "-F", "qcow2", path, "16M")
            found.append(path.read_bytes()[:4096])
    return found


def outcome(parse: Callable[[bytes, int], qcow2.Header], data: bytes, size: int) -> tuple[object, ...]:
    """What it gives: the header, or class, message and hint of the error."""
    try:
        return (parse(data, size),)
    except DiskchainError as error:
        return type(error), error.message, error.hint


CHANGES = st.lists(st.tuples(st.integers(0, 800), st.binary(min_size=1, max_size=8)), max_size=4)


@settings(max_examples=3000, deadline=None)
@given(
    number=st.integers(0, 14),
    changes=CHANGES,
    cut=st.one_of(st.just(4096), st.integers(0, 1000)),
    size=st.one_of(st.sampled_from([0, 197 << 10, 256 << 10, 1 << 40]), st.integers(0, 300 << 10)),
)
def test_parse_of_a_known_header_agrees_with_the_full_way(
    number: int, changes: list[tuple[int, bytes]], cut: int, size: int
) -> None:
    data = bytearray(real_overlays()[number])
    for offset, content in changes:
        data[offset : offset + len(content)] = content
    changed = bytes(data[:cut])
    expected = outcome(qcow2._parse_fully, changed, size)
    assert outcome(qcow2.parse_header, changed, size) == expected
    assert outcome(qcow2.parse_header, changed, size) == expected  # now surely known


@pytest.mark.parametrize("number", range(15))
def test_parse_of_a_known_header_minds_every_file_size(number: int) -> None:
    data = real_overlays()[number]
    sizes = [*range(0, 320 << 10, 512), *range(3 << 16, (3 << 16) + 32)]
    assert [outcome(qcow2.parse_header, data, size) for size in sizes] == [
        outcome(qcow2._parse_fully, data, size) for size in sizes
    ]


@pytest.mark.parametrize("number", range(15))
def test_parse_of_a_real_overlay_goes_the_short_way(number: int) -> None:
    assert qcow2._parse_known(real_overlays()[number], 1 << 20) is not None


LAST = 4 << 16  # behind everything else that `header` writes


@pytest.mark.parametrize(
    ("data", "end"),
    [
        (header(backing=b"b", autoclear=1, extensions=[(0x23852875, struct.pack(">IIQQ", 1, 0, 32, LAST))]), LAST + 32),
        (header(backing=b"b", snapshots=9, snapshots_offset=LAST), LAST + 360),
        (header(backing=b"b", refcount_offset=LAST), LAST + 8),
        (header(backing=b"b", l1_offset=LAST, l1_entries=5), LAST + 40),
    ],
    ids=["bitmaps", "snapshots", "refcounts", "l1"],
)
def test_parse_of_a_known_header_minds_the_end_of_its_last_table(data: bytes, end: int) -> None:
    assert outcome(qcow2.parse_header, data, end)[0] == qcow2._parse_fully(data, end)
    for size in (0, LAST, end - 1, end, end + 1, 1 << 70):
        assert outcome(qcow2.parse_header, data, size) == outcome(qcow2._parse_fully, data, size)
    assert outcome(qcow2.parse_header, data, end - 1)[0] is ChainDamaged
