"""The qcow2 header as values: parse bytes, distrust every number. Never opens a file.

Format: docs/interop/qcow2.txt of QEMU; the limits are those of QEMU's block/qcow2.h. Where QEMU is lenient and no
tool writes such an image (duplicate extensions, tables inside the header cluster, NUL in a name), this is strict.

    HostileImage     numbers or names that no honest tool writes; QEMU must not be shown the image
    ChainDamaged     a file that was cut short, or that QEMU itself marked as corrupt
    UnsupportedDisk  honest, but not for us: encryption, other backing formats (reject_unsafe only)
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any, NamedTuple

from diskchain.chain.approved import ApprovedImage as ApprovedImage
from diskchain.chain.approved import Autoclear as Autoclear
from diskchain.chain.approved import Compatible as Compatible
from diskchain.chain.approved import Compression as Compression
from diskchain.chain.approved import Header as Header
from diskchain.chain.approved import Incompatible as Incompatible
from diskchain.chain.text import printable
from diskchain.errors import ChainDamaged, HostileImage, UnsupportedDisk

KiB = 1024
MiB = 1024 * KiB

MAGIC = b"QFI\xfb"
FORMATS = ("qcow2", "raw")
SECTOR = 512

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MIN_CLUSTER_BITS_EXTENDED_L2 = 14
MAX_L1_BYTES = 32 * MiB
MAX_REFCOUNT_TABLE_BYTES = 8 * MiB
MAX_SNAPSHOTS = 65536
SNAPSHOT_ENTRY_MIN = 40
REFCOUNT_TABLE_MIN = 8
MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY_BYTES = 1024 * MAX_BITMAPS
MAX_BACKING_NAME = 1023
MAX_FORMAT_NAME = 15
MAX_REFCOUNT_ORDER = 6
MAX_EXTENSIONS = 64  # ours; QEMU knows six kinds. Bounds the time that a 2 MiB header cluster can cost

V2_LENGTH = 72
V3_LENGTH = 104
FIRST_READ = 4 * KiB  # bytes; enough for every overlay that QEMU writes (its names end near byte 600)

_ANY_FILE = 1 << 65  # bytes; every 64-bit offset lies inside
L1_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00

# Header extensions that matter here; all others are stepped over
EXT_END = 0
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_BITMAPS = 0x23852875
EXT_ENCRYPTION = 0x0537BE77
EXT_DATA_FILE = 0x44415441

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_NAME_PLACE = struct.Struct(">8xQI")
_SPAN = struct.Struct(">8xQII")
_EXTENSION = struct.Struct(">II")
_BITMAPS = struct.Struct(">IIQQ")

_SOURCE_HINT = "don't open it with QEMU; get the image from its source again"
_RESTORE_HINT = "restore the file from a backup, or look at a copy of it with: qemu-img check -f qcow2 COPY"
_CONVERT_HINT = "convert a trusted image first: qemu-img convert -f qcow2 -O qcow2 OLD NEW"


# Every combination, made once: an IntFlag is slow to make (0.5 us), and it remembers each value it ever saw.
_INCOMPATIBLE = tuple(Incompatible(bits) for bits in range(32))
_COMPATIBLE = tuple(Compatible(bits) for bits in range(2))
_AUTOCLEAR = tuple(Autoclear(bits) for bits in range(4))
_ALL_INCOMPATIBLE = len(_INCOMPATIBLE) - 1
_ALL_COMPATIBLE = len(_COMPATIBLE) - 1
_ALL_AUTOCLEAR = len(_AUTOCLEAR) - 1
_COMPRESSION_BIT = int(Incompatible.COMPRESSION)
_EXTENDED_L2_BIT = int(Incompatible.EXTENDED_L2)
_BITMAPS_BIT = int(Autoclear.BITMAPS)


_COMPRESSION = tuple(Compression)


class _Numbers(NamedTuple):
    """The fixed header in file order, before any check; version 2 is filled up as the format says."""

    magic: bytes
    version: int
    backing_offset: int
    backing_length: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_entries: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    snapshots: int
    snapshots_offset: int
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_length: int = V2_LENGTH


def header_span(first: bytes) -> int:
    """Given the first 104 bytes (or more), return how many bytes from offset 0 `parse_header` wants: at most 2 MiB.

    Nothing is checked here: nonsense gives a small number and is refused by `parse_header`.
    """
    if len(first) < V2_LENGTH:
        return V3_LENGTH
    offset: int
    length: int
    cluster_bits: int
    offset, length, cluster_bits = _SPAN.unpack_from(first)
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        return V3_LENGTH
    cluster_size: int = 1 << cluster_bits
    if offset == 0:
        return cluster_size
    return min(cluster_size, max(offset + length, V3_LENGTH))


def parse_header(data: bytes, file_size: int) -> Header:
    """Given the first bytes of an image (`header_span`) and its size in bytes, return its header.

    Raise HostileImage or ChainDamaged, never anything else, whatever the bytes are.
    """
    return _parse_known(data, file_size) or _parse_fully(data, file_size)


class _Known(NamedTuple):
    """Headers that were parsed fully, all but the backing file name: for every file of at least `needs` bytes."""

    needs: int
    rest: tuple[Any, ...]


def _parse_known(data: bytes, file_size: int) -> Header | None:
    """The short way: all bytes in front of the backing file name are those of a header that was parsed before.

    That is the rule within a chain, and four times as quick. None: no backing file, unusual or wrong, parse it fully.
    """
    if len(data) < V2_LENGTH:
        return None
    offset, length = _NAME_PLACE.unpack_from(data)
    if not V2_LENGTH <= offset <= FIRST_READ or offset + length > len(data):
        return None
    known = _known(data[:offset])
    if known is None or file_size < known.needs:
        return None
    return Header._make((data[offset : offset + length].decode("utf-8", "surrogateescape"), *known.rest))


@lru_cache(maxsize=64)  # of at most FIRST_READ bytes; a chain has one kind of header for each length of a name
def _known(prefix: bytes) -> _Known | None:
    """Given the bytes in front of a backing file name, return what follows from them alone; None if they are wrong."""
    _, length = _NAME_PLACE.unpack_from(prefix)
    if length > MAX_BACKING_NAME:
        return None
    try:
        header = _parse_fully(prefix + bytes(length), _ANY_FILE)
    except (HostileImage, ChainDamaged):
        return None  # which error it is can depend on the rest of the file
    return _Known(_needs(header), header[1:])


def _needs(header: Header) -> int:
    """The size of the smallest file with this header: its tables end there (see `_check_tables`)."""
    if header.has_bitmaps:
        return _ANY_FILE  # the place of their directory isn't kept: always look at it
    return max(
        header.l1_offset + header.l1_bytes if header.l1_entries else 0,
        header.refcount_table_offset + REFCOUNT_TABLE_MIN,
        header.snapshots_offset + header.snapshots * SNAPSHOT_ENTRY_MIN if header.snapshots else 0,
    )


def _parse_fully(data: bytes, file_size: int) -> Header:
    raw = _numbers(data)
    _check_geometry(raw)
    _check_tables(raw, file_size)
    name = _backing_name(raw, data)
    extensions = _extensions(data, raw.header_length, raw.backing_offset or 1 << raw.cluster_bits)
    return Header(
        backing_name=name,
        version=raw.version,
        backing_format=_backing_format(extensions),
        virtual_size=raw.size,
        cluster_bits=raw.cluster_bits,
        l1_offset=raw.l1_offset,
        l1_entries=raw.l1_entries,
        refcount_table_offset=raw.refcount_offset,
        refcount_table_clusters=raw.refcount_clusters,
        refcount_order=raw.refcount_order,
        snapshots=raw.snapshots,
        snapshots_offset=raw.snapshots_offset,
        crypt_method=raw.crypt_method,
        header_length=raw.header_length,
        incompatible=_INCOMPATIBLE[raw.incompatible & _ALL_INCOMPATIBLE],
        compatible=_COMPATIBLE[raw.compatible & _ALL_COMPATIBLE],
        autoclear=_AUTOCLEAR[raw.autoclear & _ALL_AUTOCLEAR],
        unknown_incompatible=raw.incompatible & ~_ALL_INCOMPATIBLE,
        unknown_compatible=raw.compatible & ~_ALL_COMPATIBLE,
        unknown_autoclear=raw.autoclear & ~_ALL_AUTOCLEAR,
        compression_type=_compression(raw, data),
        data_file=_data_file(extensions),
        has_bitmaps=_has_bitmaps(raw, extensions, file_size),
    )


def reject_unsafe(header: Header) -> None:
    """Raise if QEMU must not be shown this image, or can't keep our promises with it; else return.

    HostileImage: external data, unknown features, bad backing name. UnsupportedDisk: encryption, other backing
    formats. ChainDamaged: marked corrupt. The dirty bit, internal snapshots and bitmaps are allowed.
    """
    features = header.incompatible
    if features and header.corrupt:
        raise ChainDamaged("the image is marked as corrupt", hint=_RESTORE_HINT)
    if header.unknown_incompatible:
        what = f"the image uses unknown incompatible features (bits {header.unknown_incompatible:#x})"
        raise HostileImage(what, hint=_SOURCE_HINT)
    if header.data_file is not None or (features and features & Incompatible.DATA_FILE):
        where = printable(header.data_file or "(not named)")
        raise HostileImage(f"the image keeps its data in another file: {where}", hint=_CONVERT_HINT)
    if header.crypt_method:
        method = {1: "AES", 2: "LUKS"}.get(header.crypt_method, f"method {header.crypt_method}")
        raise UnsupportedDisk(f"the image is encrypted ({method})", hint=_CONVERT_HINT)
    if header.backing_name is not None:
        _reject_unsafe_backing(header.backing_name, header.backing_format)


def has_protocol(name: str) -> bool:
    """Would QEMU take this file name for `protocol:...`? True if a colon comes before the first slash."""
    return ":" in name.partition("/")[0]


def l2_offsets(l1: bytes) -> list[int]:
    """Given an L1 table, return the offsets of its L2 tables in table order, reserved bits masked, holes left out."""
    entries = struct.unpack(f">{len(l1) // 8}Q", l1[: len(l1) // 8 * 8])
    return [entry & L1_OFFSET_MASK for entry in entries if entry & L1_OFFSET_MASK]


def l1_entries(l1: bytes) -> list[tuple[int, int, bool]]:
    """Given an L1 table, return (number, offset, written in place) of each L2 table; holes left out."""
    entries = struct.unpack(f">{len(l1) // 8}Q", l1[: len(l1) // 8 * 8])
    return [
        (number, entry & L1_OFFSET_MASK, bool(entry >> 63))
        for number, entry in enumerate(entries)
        if entry & L1_OFFSET_MASK
    ]


def _hostile(message: str) -> HostileImage:
    return HostileImage(message, hint=_SOURCE_HINT)


def _cut_short(what: str) -> ChainDamaged:
    return ChainDamaged(f"the file is cut short: {what}", hint=_RESTORE_HINT)


def _numbers(data: bytes) -> _Numbers:
    if data[:4] != MAGIC:
        hint = "if it is a raw image, say so; the format is never guessed"
        raise ChainDamaged("not a qcow2 image (no magic number)", hint=hint)
    if len(data) < V2_LENGTH:
        raise _cut_short(f"{len(data)} bytes of header")
    numbers = _V2.unpack_from(data)
    version = numbers[1]
    if version == 2:
        return _Numbers(*numbers)
    if version != 3:
        raise _hostile(f"unknown qcow2 version {version}")
    if len(data) < V3_LENGTH:
        raise _cut_short(f"{len(data)} bytes of header")
    return _Numbers(*numbers, *_V3.unpack_from(data, V2_LENGTH))


def _check_geometry(raw: _Numbers) -> None:
    smallest = MIN_CLUSTER_BITS
    if raw.incompatible & _EXTENDED_L2_BIT:
        smallest = MIN_CLUSTER_BITS_EXTENDED_L2
    if not smallest <= raw.cluster_bits <= MAX_CLUSTER_BITS:
        raise _hostile(f"cluster size 2^{raw.cluster_bits} (2^{smallest} to 2^{MAX_CLUSTER_BITS} exist)")
    if raw.refcount_order > MAX_REFCOUNT_ORDER:
        raise _hostile(f"reference counts of 2^{raw.refcount_order} bits")
    if raw.version >= 3 and (raw.header_length < V3_LENGTH or raw.header_length % 8):
        raise _hostile(f"header length {raw.header_length}")
    if raw.header_length > 1 << raw.cluster_bits:
        raise _hostile(f"header length {raw.header_length} exceeds the cluster")


def _check_tables(raw: _Numbers, file_size: int) -> None:
    cluster_size = 1 << raw.cluster_bits
    entry_bits = 4 if raw.incompatible & _EXTENDED_L2_BIT else 3
    covered = 1 << (2 * raw.cluster_bits - entry_bits)  # bytes of guest disk per L1 entry
    if raw.l1_entries * 8 > MAX_L1_BYTES:
        raise _hostile(f"L1 table of {raw.l1_entries} entries")
    if raw.l1_entries < -(-raw.size // covered):
        raise _hostile(f"L1 table of {raw.l1_entries} entries is too small for {raw.size} bytes")
    if raw.refcount_clusters << raw.cluster_bits > MAX_REFCOUNT_TABLE_BYTES:
        raise _hostile(f"refcount table of {raw.refcount_clusters} clusters")
    if raw.refcount_clusters == 0:
        raise ChainDamaged("the image has no refcount table", hint=_RESTORE_HINT)
    if raw.snapshots > MAX_SNAPSHOTS:
        raise _hostile(f"{raw.snapshots} internal snapshots")
    _check_place("L1 table", raw.l1_offset, raw.l1_entries * 8, cluster_size, file_size)
    # The first entry is enough: a refcount table may end in a hole at the end of the file.
    _check_place("refcount table", raw.refcount_offset, REFCOUNT_TABLE_MIN, cluster_size, file_size)
    _check_place("snapshot table", raw.snapshots_offset, raw.snapshots * SNAPSHOT_ENTRY_MIN, cluster_size, file_size)


def _check_place(what: str, offset: int, length: int, cluster_size: int, file_size: int) -> None:
    """A table of that many bytes lies on a cluster, behind the header, inside the file; nothing may be anywhere."""
    if length == 0:
        return
    if offset % cluster_size or offset < cluster_size:
        raise _hostile(f"{what} at offset {offset}, which isn't a cluster of its own")
    if offset + length > file_size:
        raise _cut_short(f"{what} at {offset}+{length}, file size {file_size}")


def _backing_name(raw: _Numbers, data: bytes) -> str | None:
    offset, length = raw.backing_offset, raw.backing_length
    if offset == 0:
        return None
    if length > MAX_BACKING_NAME:
        raise _hostile(f"backing file name of {length} bytes (limit {MAX_BACKING_NAME})")
    if offset < raw.header_length or offset + length > 1 << raw.cluster_bits:
        raise _hostile(f"backing file name at {offset}+{length}, outside the header cluster")
    if offset + length > len(data):
        raise _cut_short(f"backing file name at {offset}+{length}")
    return data[offset : offset + length].decode("utf-8", "surrogateescape")


def _extensions(data: bytes, start: int, end: int) -> dict[int, bytes]:
    """The header extensions between two offsets, by type. Bounds as in QEMU; no type twice."""
    found: dict[int, bytes] = {}
    while start < end:
        if start + _EXTENSION.size > min(end, len(data)):
            raise _extension_error(start, end)
        kind, length = _EXTENSION.unpack_from(data, start)
        start += _EXTENSION.size
        if length > end - start:
            raise _hostile(f"header extension {kind:#x} of {length} bytes exceeds the header")
        if kind == EXT_END:
            break
        if start + length > len(data):
            raise _cut_short(f"header extension {kind:#x}")
        if kind in found or len(found) == MAX_EXTENSIONS:
            raise _hostile(f"header extension {kind:#x} repeated, or too many of them")
        found[kind] = data[start : start + length]
        start += (length + 7) & ~7
    return found


def _extension_error(start: int, end: int) -> HostileImage | ChainDamaged:
    if start + _EXTENSION.size > end:
        return _hostile("the last header extension exceeds the header")
    return _cut_short("header extensions")


def _backing_format(extensions: dict[int, bytes]) -> str | None:
    name = extensions.get(EXT_BACKING_FORMAT)
    if not name:
        return None
    if len(name) > MAX_FORMAT_NAME:
        raise _hostile(f"backing format name of {len(name)} bytes")
    return name.decode("utf-8", "surrogateescape")


def _compression(raw: _Numbers, data: bytes) -> Compression:
    present = raw.header_length > V3_LENGTH and len(data) > V3_LENGTH
    kind = data[V3_LENGTH] if present else 0
    announced = bool(raw.incompatible & _COMPRESSION_BIT)
    if announced != bool(kind) or kind >= len(_COMPRESSION):
        raise _hostile(f"compression type {kind} doesn't agree with the feature bits")
    return _COMPRESSION[kind]


def _data_file(extensions: dict[int, bytes]) -> str | None:
    name = extensions.get(EXT_DATA_FILE)
    return None if name is None else name.decode("utf-8", "surrogateescape")


def _has_bitmaps(raw: _Numbers, extensions: dict[int, bytes], file_size: int) -> bool:
    if EXT_ENCRYPTION in extensions and raw.crypt_method != 2:
        raise _hostile("an encryption header in an image that isn't LUKS")
    content = extensions.get(EXT_BITMAPS)
    if content is None:
        return False
    if len(content) != _BITMAPS.size:
        raise _hostile(f"bitmaps extension of {len(content)} bytes")
    count, _reserved, size, offset = _BITMAPS.unpack(content)
    if raw.autoclear & _BITMAPS_BIT:  # else QEMU ignores the extension: it may be stale
        if not 1 <= count <= MAX_BITMAPS or size > MAX_BITMAP_DIRECTORY_BYTES:
            raise _hostile(f"{count} bitmaps in a directory of {size} bytes")
        _check_place("bitmap directory", offset, size, 1 << raw.cluster_bits, file_size)
    return True


def _reject_unsafe_backing(name: str, fmt: str | None) -> None:
    shown = printable(name)
    if not name:
        raise _hostile("the backing file name is empty")
    if _has_control_characters(name):
        raise _hostile(f"the backing file name has control or undecodable characters: {shown}")
    if has_protocol(name):
        raise _hostile(f"the backing file name is not a plain path: {shown}")
    if fmt is None:
        hint = f"if you trust it, name its format: qemu-img rebase -u -b {shown} -F qcow2|raw IMAGE"
        raise HostileImage("the image doesn't name the format of its backing file", hint=hint)
    if fmt not in FORMATS:
        raise UnsupportedDisk(f"the backing file has format {printable(fmt)}; only qcow2 and raw", hint=_CONVERT_HINT)


def _has_control_characters(name: str) -> bool:
    """C0, DEL, C1 controls, or bytes that are no UTF-8."""
    if name.isprintable():
        return False
    return any(code < 0x20 or 0x7F <= code < 0xA0 or 0xD800 <= code <= 0xDFFF for code in map(ord, name))
