"""Which guest clusters a layer holds, and what follows for merging: how much one grows, how much the other gives back.

Values only: `ops.allocation` reads the tables. A cluster is one byte (SET or 0) in the row of its L2 table; rows of
the layers of one chain lie side by side, so they are compared as long integers: 100 GB in 30 ms without numpy.
"""

from __future__ import annotations

import itertools
import re
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from diskchain.chain.qcow2 import Header

KiB = 1024
SET = 0x80

# L2 entries (docs/interop/qcow2.txt)
OFFSET = 0x00FF_FFFF_FFFF_FE00
ZERO = 1 << 0  # version 3, not with extended L2
COMPRESSED = 1 << 62
COPIED = 1 << 63  # refcount exactly one: written in place

# QEMU's mirror job (which `qemu-img commit` uses) copies at least this much at once, allocated or not
MIN_GRANULE = 4 * KiB
RAW_GRANULE = 64 * KiB

BLOCK_SLACK = 64 * KiB  # filesystem: blocks of its own for the extents, rounding at the ends
BLOCK_SHARE = 256  # ... and one byte in so many: 12 bytes for each extent, should every 4 KiB be one

_RUN = re.compile(rb"\x80+")


class Row(NamedTuple):
    """What one L2 table says, one byte for each of its clusters: SET or 0."""

    held: bytes
    """The layer answers for it (data or zeros); what is below is hidden."""
    owned: bytes
    """It has a place in the file that can be written again: neither compressed nor shared with an internal snapshot."""


@dataclass(frozen=True)
class Allocation:
    """What a qcow2 layer holds. Sizes in bytes; rows by the number of their L2 table, empty ones left out."""

    cluster_size: int
    row_length: int
    """Clusters per L2 table."""
    virtual_size: int
    refcount_bits: int
    l1_entries: int
    refcount_table_entries: int
    file_size: int
    file_holes: int
    """Bytes of the file that are not on the disk, so that writing into a cluster it already has can take space."""
    rows: Mapping[int, Row]
    own_tables: frozenset[int]
    """L2 tables that exist and are written in place."""


@dataclass(frozen=True)
class RawExtents:
    """Where a raw file has data: (start, end) in bytes, ascending, apart; everything else is hole."""

    extents: tuple[tuple[int, int], ...]


def entry_size(header: Header) -> int:
    """Bytes of an L2 entry."""
    return 16 if header.extended_l2 else 8


def without_copied(table: bytes, header: Header) -> bytes:
    """Given one L2 table, return it without the marks that a cluster has one reference only (COPIED): where the data lie."""
    width = 8 * entry_size(header)
    count = 8 * len(table) // width
    return (int.from_bytes(table, "big") & ~_every(1 << (width - 1), width, count)).to_bytes(len(table), "big")


def row(table: bytes, header: Header) -> Row:
    """Given one L2 table as it is in the file, return what it says.

    Extended L2: a cluster is held if any subcluster is (allocated or zero).
    """
    width = 8 * entry_size(header)
    count = 8 * len(table) // width
    entries = int.from_bytes(table, "big")
    return Row(
        _marks(_non_zero(entries & _every(_held_mask(header), width, count), width, count), width, count),
        _marks(_owned(entries, width, count), width, count),
    )


def _held_mask(header: Header) -> int:
    if header.extended_l2:
        return COMPRESSED << 64 | (1 << 64) - 1  # a place without subclusters is only preallocated
    return OFFSET | COMPRESSED | (ZERO if header.version >= 3 else 0)


def _owned(entries: int, width: int, count: int) -> int:
    up = width - 64
    placed = _non_zero(entries & _every(OFFSET << up, width, count), width, count)
    return placed & entries & ~(entries << 1)  # bit 63: COPIED; shifted to it: COMPRESSED


_PATTERNS: dict[tuple[int, int, int], int] = {}


def _every(entry: int, width: int, count: int) -> int:
    """The same entry `count` times. Remembered: an image needs four of them, over and over."""
    key = entry, width, count
    if key not in _PATTERNS:
        if len(_PATTERNS) >= 64:
            _PATTERNS.clear()
        _PATTERNS[key] = int.from_bytes(entry.to_bytes(width // 8, "big") * count, "big")
    return _PATTERNS[key]


def _non_zero(entries: int, width: int, count: int) -> int:
    """Set the top bit of every entry that isn't zero; other bits are noise. All at once: no entry carries over."""
    low = _every((1 << width - 1) - 1, width, count)
    return ((entries & low) + low) | entries


def _marks(entries: int, width: int, count: int) -> bytes:
    """The top bits, one byte each, in table order."""
    tops = entries & _every(1 << width - 1, width, count)
    return tops.to_bytes(count * width // 8, "big")[:: width // 8]


# Questions


def held_bytes(a: Allocation) -> int:
    """Guest bytes that the layer answers for, in whole clusters."""
    return a.cluster_size * sum(row.held.count(SET) for row in a.rows.values())


def new_bytes(top: Allocation, into: Allocation | RawExtents) -> int:
    """Given two layers, return an upper bound of the bytes by which the file of `into` grows when `top` is committed.

    With equal clusters exact but for metadata: refcounts, L2 and L1 tables, filesystem blocks (below 2 MiB + 5 %).
    Zero clusters count in full. Says nothing about blocks shared with another file (reflink): to write takes new ones.
    """
    if isinstance(into, RawExtents):
        grown = _uncovered(_rounded(_clipped(runs(top), top.virtual_size), RAW_GRANULE), into.extents)
    else:
        grown = _new_in_qcow2(top, into)
    return grown + grown // BLOCK_SHARE + BLOCK_SLACK if grown else 0


def missing_bytes(below: Sequence[Allocation | RawExtents], overlay: Allocation) -> int:
    """Return an upper bound of the bytes by which an overlay's file grows when what is below it is copied into it.

    What the overlay holds itself is not copied.
    """
    parts = [a if isinstance(a, Allocation) else _of_extents(a, overlay) for a in below]
    grown = _new_in_qcow2(union(parts), overlay, only_missing=True)
    return grown + grown // BLOCK_SHARE + BLOCK_SLACK if grown else 0


def union(parts: Sequence[Allocation]) -> Allocation:
    """Return what some layers of one chain hold together, on the grid of the first, in whole clusters of it."""
    first = parts[0]
    rows: dict[int, bytes] = {}
    for part in parts:
        for index, held in _on_grid(part, first, outward=True).items():
            both = _number(held) | _number(rows.get(index, b""))
            rows[index] = both.to_bytes(first.row_length, "big")
    return replace(first, rows={index: Row(held, b"") for index, held in rows.items()}, own_tables=frozenset())


def missing_runs(below: Sequence[Allocation | RawExtents], overlay: Allocation) -> Iterator[tuple[int, int]]:
    """Yield the parts, (start, end) in guest bytes, that layers below an overlay hold and it does not hold itself.

    Ascending, apart, generous: rounded outwards; of an overlay with subclusters nothing is left out, and its clusters stay
    whole (QEMU 7.2 dies of a read that begins within one of which it holds a part).
    """
    held = sorted(part for a in below for part in (runs(a) if isinstance(a, Allocation) else a.extents))
    whole = has_subclusters(overlay)
    parts = _clipped(_rounded(held, max(MIN_GRANULE, overlay.cluster_size * whole)), overlay.virtual_size)
    return _without(parts, () if whole else runs(overlay))


def has_subclusters(a: Allocation) -> bool:
    """Whether a cluster of it can be held in part (extended L2: entries of 16 bytes)."""
    return a.cluster_size == 16 * a.row_length


def mean_run(a: Allocation) -> int:
    """Return the mean length of the parts that a layer holds, 0 when it holds nothing."""
    lengths = [end - start for start, end in runs(a)]
    return sum(lengths) // len(lengths) if lengths else 0


def _of_extents(a: RawExtents, grid: Allocation) -> Allocation:
    rows: dict[int, bytearray] = {}
    for start, end in _rounded(_clipped(a.extents, grid.virtual_size), max(grid.cluster_size, MIN_GRANULE)):
        _mark(rows, start // grid.cluster_size, end // grid.cluster_size, grid.row_length)
    return replace(grid, rows={index: Row(bytes(held), b"") for index, held in rows.items()}, own_tables=frozenset())


def hidden_bytes(lower: Allocation | RawExtents, upper: Allocation) -> int:
    """Bytes in the file of `lower` that can't be seen through `upper`: what merging the two gives back.

    Compressed clusters, and those that an internal snapshot keeps, don't count.
    """
    if isinstance(lower, RawExtents):
        over = list(runs(upper))
        return sum(end - start for start, end in lower.extents) - _uncovered(lower.extents, over)
    return lower.cluster_size * sum(marks.count(SET) for marks in covered(lower, upper).values())


def covered(lower: Allocation, upper: Allocation) -> dict[int, bytes]:
    """Return the clusters of `lower`, one byte each in its rows, that `upper` hides as a whole and that are written in place."""
    both = {
        index: _number(lower.rows[index].owned) & _number(held)
        for index, held in _on_grid(upper, lower, outward=False).items()
        if index in lower.rows
    }
    return {index: number.to_bytes(lower.row_length, "big") for index, number in both.items() if number}


def places(table: bytes, header: Header, marks: bytes) -> Iterator[tuple[int, int]]:
    """Given one L2 table, yield where in the file the marked clusters lie, (start, end) in bytes, ascending, apart."""
    entries = array("Q", table)
    if sys.byteorder == "little":
        entries.byteswap()
    step = entry_size(header) // 8
    marked = (n for run in _RUN.finditer(marks) for n in range(run.start(), run.end()))
    starts = sorted(entries[n * step] & OFFSET for n in marked)
    return _joined((start, start + header.cluster_size) for start in starts)


def _new_in_qcow2(top: Allocation, into: Allocation, *, only_missing: bool = False) -> int:
    clusters = tables = in_place = 0
    for index, written in _on_grid(top, into, outward=True).items():
        there = into.rows.get(index)
        marks, owned = _number(written), 0 if there is None else _number(there.owned)
        if only_missing and there is not None:
            marks &= ~_number(there.held)
            if not marks:
                continue
        clusters += (marks & ~owned).bit_count()
        in_place += (marks & owned).bit_count()
        tables += index not in into.own_tables
    if not clusters and not in_place:
        return 0
    filled = min(into.file_holes, in_place * into.cluster_size)
    if into.cluster_size < MIN_GRANULE:  # one new cluster fills a whole block of the filesystem
        filled = into.file_holes
    return (clusters + tables) * into.cluster_size + filled + _metadata(top, into, clusters + tables)


def _metadata(top: Allocation, into: Allocation, clusters: int) -> int:
    """L1 table (when the disk grows), refcount blocks and refcount table for so many new clusters, generously.

    QEMU makes tables half as large again when they must grow, and writes the new one before it frees the old one.
    """
    size = into.cluster_size
    l1 = _grown_table(-(-top.virtual_size // (size * into.row_length)), into.l1_entries, size)
    clusters += l1 // size
    per_block = 8 * size // into.refcount_bits
    needed = -(-(into.file_size // size + clusters) // per_block) + 1
    if needed <= 2:  # one and one to spare: the first block is always there
        return l1 + size
    blocks = -(-clusters // per_block) + 1
    return l1 + blocks * size + _grown_table(needed, into.refcount_table_entries, size) + size


def _grown_table(needed: int, present: int, cluster_size: int) -> int:
    """Bytes of a new table of 8-byte entries, if the present one is too small."""
    return _rounded_up(12 * needed, cluster_size) + cluster_size if needed > present else 0


def _rounded_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _number(marks: bytes | bytearray) -> int:
    return int.from_bytes(marks, "big")


# The same guest bytes on another grid


def runs(a: Allocation) -> Iterator[tuple[int, int]]:
    """Yield the held parts as (start, end) in guest bytes, ascending, apart."""
    return _joined(_row_runs(a))


def _row_runs(a: Allocation) -> Iterator[tuple[int, int]]:
    for index in sorted(a.rows):
        base = index * a.row_length
        for found in _RUN.finditer(a.rows[index].held):
            yield (base + found.start()) * a.cluster_size, (base + found.end()) * a.cluster_size


def _joined(parts: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Given ascending parts, which may touch or overlap, yield them apart."""
    last: tuple[int, int] | None = None
    for start, end in parts:
        if last is None:
            last = start, end
        elif start <= last[1]:
            last = last[0], max(last[1], end)
        else:
            yield last
            last = start, end
    if last is not None:
        yield last


def _rounded(parts: Iterable[tuple[int, int]], unit: int) -> Iterator[tuple[int, int]]:
    return _joined((start // unit * unit, _rounded_up(end, unit)) for start, end in parts)


def _clipped(parts: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(end, size)) for start, end in parts if start < size)


def _uncovered(parts: Iterable[tuple[int, int]], cover: Iterable[tuple[int, int]]) -> int:
    """Bytes of `parts` that are in no part of `cover`; both ascending and apart."""
    edges = itertools.chain(cover, [(1 << 80, 1 << 80)])
    cover_start, cover_end = next(edges)
    total = 0
    for start, end in parts:
        total += end - start
        while cover_start < end:
            total -= max(0, min(end, cover_end) - max(start, cover_start))
            if cover_end > end:
                break
            cover_start, cover_end = next(edges)
    return total


def _without(parts: Iterable[tuple[int, int]], cover: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What of `parts` is in no part of `cover`; both ascending and apart."""
    edges = itertools.chain(cover, [(1 << 80, 1 << 80)])
    cover_start, cover_end = next(edges)
    for start, end in parts:
        while start < end:
            while cover_end <= start:
                cover_start, cover_end = next(edges)
            stop = min(end, max(start, cover_start))
            if stop > start:
                yield start, stop
            start = max(stop, min(end, cover_end)) if stop < end else end


def _on_grid(a: Allocation, grid: Allocation, *, outward: bool) -> Mapping[int, bytes | bytearray]:
    """What `a` holds as rows of `grid`: its clusters that `a` touches (`outward`), or covers as a whole."""
    same = (a.cluster_size, a.row_length) == (grid.cluster_size, grid.row_length)
    if same and a.cluster_size >= MIN_GRANULE:
        return {index: row.held for index, row in a.rows.items() if SET in row.held}
    size = grid.cluster_size
    rows: dict[int, bytearray] = {}
    for start, end in _rounded(runs(a), max(size, MIN_GRANULE)) if outward else runs(a):
        _mark(rows, -(-start // size), end // size, grid.row_length)
    return rows


def _mark(rows: dict[int, bytearray], first: int, end: int, length: int) -> None:
    """Set the clusters from `first` up to `end` in rows of that length."""
    while first < end:
        index, place = divmod(first, length)
        count = min(end - first, length - place)
        marks = rows.setdefault(index, bytearray(length))
        marks[place : place + count] = bytes([SET]) * count
        first += count
