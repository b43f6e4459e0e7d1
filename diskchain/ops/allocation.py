"""Read which guest clusters a layer holds: its L1 table and the L2 tables that exist, nothing else."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from diskchain.chain import allocation, qcow2
from diskchain.chain.allocation import Allocation, RawExtents, Row
from diskchain.chain.qcow2 import Header
from diskchain.host import files
from diskchain.ops import approve


def allocated(path: Path, *, roots: Sequence[Path] | None = None) -> Allocation:
    """Given a qcow2 image, return what it holds. Raise as `approve_chain` does for a single image."""
    with _opened(path, roots) as opened:
        return _allocation(opened, approve.checked_header(opened))


def replaced(path: Path, upper: Allocation, *, roots: Sequence[Path] | None = None) -> list[tuple[int, int]]:
    """Return where in a qcow2 file lies what writing all of `upper` over it replaces in place: (start, end) in bytes.

    Raise as `allocated`.
    """
    with _opened(path, roots) as opened:
        header = approve.checked_header(opened)
        marked = allocation.covered(_allocation(opened, header), upper)
        l1 = qcow2.l1_entries(files.read_span(opened.fd, header.l1_offset, header.l1_bytes))
        tables = {index: offset for index, offset, _ in l1}
        return [
            place
            for index, marks in marked.items()
            for place in allocation.places(_table(opened.fd, tables[index], header), header, marks)
        ]


def raw_extents(path: Path, *, roots: Sequence[Path] | None = None) -> RawExtents:
    """Given a raw image, return where it has data: everywhere, on a filesystem without holes."""
    with _opened(path, roots) as opened, files.os_errors(path, "look for holes in"):
        return RawExtents(tuple(files.data_extents(opened.fd, opened.status.st_size)))


@contextlib.contextmanager
def _opened(path: Path, roots: Sequence[Path] | None) -> Iterator[files.Opened]:
    with files.UntrustedFiles(roots) as opener:
        opened = opener.open(path)
    try:
        yield opened
    finally:
        os.close(opened.fd)


def _allocation(opened: files.Opened, header: Header) -> Allocation:
    status = opened.status
    approve.l2_tables(opened.fd, header, status.st_size, opened.path)
    l1 = files.read_span(opened.fd, header.l1_offset, header.l1_bytes)
    entries = qcow2.l1_entries(l1)
    approve.check_l2([offset for _, offset, _ in entries], header.cluster_size, status.st_size, opened.path)
    return Allocation(
        cluster_size=header.cluster_size,
        row_length=header.cluster_size // allocation.entry_size(header),
        virtual_size=header.virtual_size,
        refcount_bits=1 << header.refcount_order,
        l1_entries=header.l1_entries,
        refcount_table_entries=header.refcount_table_clusters * header.cluster_size // 8,
        file_size=status.st_size,
        file_holes=max(0, status.st_size - status.st_blocks * 512),
        rows={index: _row(opened.fd, offset, header) for index, offset, _ in entries},
        own_tables=frozenset(index for index, _, copied in entries if copied),
    )


def _row(fd: int, offset: int, header: Header) -> Row:
    return allocation.row(_table(fd, offset, header), header)


def _table(fd: int, offset: int, header: Header) -> bytes:
    """One L2 table; one that ends behind the end of the file is read as zeros, as QEMU does."""
    return files.read_span(fd, offset, header.cluster_size).ljust(header.cluster_size, b"\0")
