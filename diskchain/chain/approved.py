"""What approving finds out: feature bits, the header of an image, an approved image. Values, nothing is checked here.

Named tuples, not frozen dataclasses: those take 2 us to make with 23 fields, a sixth of the time for a whole layer.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import NamedTuple


class Incompatible(enum.IntFlag):
    """Features without which the image can't be read."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    DATA_FILE = 1 << 2
    COMPRESSION = 1 << 3
    EXTENDED_L2 = 1 << 4


class Compatible(enum.IntFlag):
    """Features that may be ignored."""

    LAZY_REFCOUNTS = 1 << 0


class Autoclear(enum.IntFlag):
    """Features that a writer who doesn't know them clears."""

    BITMAPS = 1 << 0
    RAW_DATA_FILE = 1 << 1


class Compression(enum.IntEnum):
    """How compressed clusters are compressed."""

    ZLIB = 0
    ZSTD = 1


class Header(NamedTuple):
    """A qcow2 header whose numbers were all checked; sizes and offsets in bytes.

    Names are decoded with surrogateescape and are NOT safe to print or open: see `printable` and `reject_unsafe`.
    A tuple, and the name first: the headers of a chain differ in nothing else, so they share the rest (qcow2._Known).
    """

    backing_name: str | None
    version: int
    backing_format: str | None
    virtual_size: int
    cluster_bits: int
    l1_offset: int
    l1_entries: int
    refcount_table_offset: int
    refcount_table_clusters: int
    refcount_order: int
    snapshots: int
    snapshots_offset: int
    crypt_method: int
    header_length: int
    incompatible: Incompatible
    compatible: Compatible
    autoclear: Autoclear
    unknown_incompatible: int
    unknown_compatible: int
    unknown_autoclear: int
    compression_type: Compression
    data_file: str | None
    has_bitmaps: bool

    @property
    def cluster_size(self) -> int:
        """Bytes in a cluster; also the size of one L2 table."""
        return 1 << self.cluster_bits

    @property
    def l1_bytes(self) -> int:
        """Size of the L1 table."""
        return self.l1_entries * 8

    @property
    def dirty(self) -> bool:
        """A writer with lazy refcounts did not close it; QEMU repairs refcounts when it opens it for writing."""
        return bool(self.incompatible & Incompatible.DIRTY)

    @property
    def corrupt(self) -> bool:
        """QEMU saw damaged metadata and marked the image."""
        return bool(self.incompatible & Incompatible.CORRUPT)

    @property
    def extended_l2(self) -> bool:
        """L2 entries are 16 bytes, with a bitmap of subclusters."""
        return bool(self.incompatible & Incompatible.EXTENDED_L2)


class ApprovedImage(NamedTuple):
    """One image of a chain that QEMU may be shown. Sizes in bytes; dev and ino hold within one boot only."""

    filename: str
    """Absolute; the directory has no symlinks left and the last component is none."""
    fmt: str
    """`qcow2` or `raw`."""
    header: Header | None
    """None for raw: a raw file is never probed."""
    virtual_size: int
    file_size: int
    allocated: int
    dev: int
    ino: int
    backing_filename: str | None
    backing_fmt: str | None

    @property
    def path(self) -> Path:
        """`filename` as a Path, made on demand: it costs as much as opening the file (1.7 us)."""
        return Path(self.filename)

    @property
    def backing(self) -> Path | None:
        """`backing_filename` as a Path."""
        return None if self.backing_filename is None else Path(self.backing_filename)
