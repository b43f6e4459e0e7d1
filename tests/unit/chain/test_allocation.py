"""L2 tables as values: all entries at once agrees with one entry at a time; grids agree with sets."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from diskchain.chain import allocation, qcow2
from diskchain.chain.allocation import (
    Allocation,
    RawExtents,
    Row,
    held_bytes,
    hidden_bytes,
    missing_runs,
    new_bytes,
    runs,
)
from fixtures.hostile import header

WORD = st.one_of(
    st.just(0),
    st.integers(0, 63).map(lambda bit: 1 << bit),
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([1 << 63 | 0x50000, 0x50000, 1 << 62 | 0x1234, 1 << 63 | 0x50001, 3 << 62 | 0x50000]),
)


def parsed(version: int = 3, incompatible: int = 0) -> qcow2.Header:
    return qcow2.parse_header(header(version=version, incompatible=incompatible), 4 << 16)


@settings(max_examples=300, deadline=None)
@given(words=st.lists(WORD, min_size=64, max_size=64), version=st.sampled_from([2, 3]), extended=st.booleans())
def test_row_agrees_with_one_entry_at_a_time(words: list[int], version: int, extended: bool) -> None:
    found = parsed(incompatible=16) if extended else parsed(version=version)
    row = allocation.row(struct.pack(">64Q", *words), found)
    entries = list(zip(words[::2], words[1::2], strict=True)) if extended else [(word, 0) for word in words]
    for (entry, subclusters), held, owned in zip(entries, row.held, row.owned, strict=True):
        compressed = bool(entry & allocation.COMPRESSED)
        zero = bool(entry & 1) and version == 3
        placed = bool(entry & allocation.OFFSET)
        assert bool(held) is (compressed or (subclusters != 0 if extended else placed or zero))
        assert bool(owned) is (placed and not compressed and bool(entry >> 63))
        assert {held, owned} <= {0, allocation.SET}


def layer(held: set[int], owned: set[int], cluster_size: int, row_length: int) -> Allocation:
    rows = {}
    for index in {cluster // row_length for cluster in held | owned}:
        places = range(index * row_length, (index + 1) * row_length)
        rows[index] = Row(bytes(128 * (n in held) for n in places), bytes(128 * (n in owned) for n in places))
    return Allocation(cluster_size, row_length, 1 << 20, 16, 10**6, 10**6, 0, 0, rows, frozenset(rows))


CLUSTERS = st.sets(st.integers(0, 63))
SIZES = st.sampled_from([(4096, 4), (8192, 8), (16384, 4), (4096, 16)])


def units(clusters: set[int], size: int) -> set[int]:
    return {unit for n in clusters for unit in range(n * size // 4096, (n + 1) * size // 4096)}


@settings(max_examples=300, deadline=None)
@given(upper=CLUSTERS, lower=CLUSTERS, upper_grid=SIZES, lower_grid=SIZES)
def test_grids_agree_with_sets(
    upper: set[int], lower: set[int], upper_grid: tuple[int, int], lower_grid: tuple[int, int]
) -> None:
    top, into = layer(upper, set(), *upper_grid), layer(set(), lower, *lower_grid)
    size = lower_grid[0]
    over = units(upper, upper_grid[0])
    assert held_bytes(top) == len(over) * 4096
    assert {unit for start, end in runs(top) for unit in range(start // 4096, end // 4096)} == over
    hidden = {n for n in lower if units({n}, size) <= over}
    assert hidden_bytes(into, top) == len(hidden) * size
    new = {unit * 4096 // size for unit in over} - lower
    slack = 64 * 1024 + 20 * size + len({n // lower_grid[1] for n in new}) * size
    assert len(new) * size <= new_bytes(top, into) <= 1.01 * len(new) * size + slack


@settings(max_examples=200, deadline=None)
@given(upper=CLUSTERS, lower=CLUSTERS)
def test_raw_agrees_with_sets(upper: set[int], lower: set[int]) -> None:
    top = layer(upper, set(), 65536, 8)
    raw = RawExtents(tuple(runs(layer(lower, set(), 65536, 8))))
    assert hidden_bytes(raw, top) == len(upper & lower) * 65536
    disk = {n for n in upper if n * 65536 < top.virtual_size}
    assert len(disk - lower) * 65536 <= new_bytes(top, raw) <= len(disk - lower) * 65536 * 1.01 + 65536


@settings(max_examples=300, deadline=None)
@given(upper=CLUSTERS, lower=CLUSTERS, raw=CLUSTERS, upper_grid=SIZES, lower_grid=SIZES)
def test_missing_runs_agree_with_sets(
    upper: set[int], lower: set[int], raw: set[int], upper_grid: tuple[int, int], lower_grid: tuple[int, int]
) -> None:
    """All that is held below and not above, each once, in order; beyond the disk's end nothing."""
    top, low = layer(upper, set(), *upper_grid), layer(lower, set(), *lower_grid)
    below: list[Allocation | RawExtents] = [low, RawExtents(tuple(runs(layer(raw, set(), 4096, 4))))]
    found = list(missing_runs(below, top))
    wanted = (units(lower, lower_grid[0]) | raw) - units(upper, upper_grid[0])
    assert all(start < end for start, end in found) and found == sorted(found)
    listed = [unit for start, end in found for unit in range(start // 4096, end // 4096)]
    assert listed == sorted(unit for unit in wanted if unit * 4096 < top.virtual_size)


def test_missing_runs_leave_nothing_out_of_an_overlay_with_subclusters() -> None:
    top = layer({0, 1}, set(), 65536, 4096)
    assert allocation.has_subclusters(top)
    assert list(missing_runs([RawExtents(((0, 65536),))], top)) == [(0, 65536)]
    assert list(missing_runs([RawExtents(((70000, 71000),))], top)) == [(65536, 131072)]
