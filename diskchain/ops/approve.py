"""Approve a chain before any QEMU sees it: headers only, every file opened once, nothing executed."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from diskchain.chain import allocation, qcow2
from diskchain.chain.qcow2 import ApprovedImage, Header
from diskchain.errors import ChainDamaged, DiskchainError, HostileImage, NotFound, UnsupportedDisk
from diskchain.host import files

GiB = 1 << 30
MAX_DEPTH = 200
L1_PIECE = 64 << 10  # bytes
MAX_L2_BYTES = 16 * GiB  # a full disk of 128 TiB with 64 KiB clusters; more comes only from sparse, hostile files


def approve_chain(
    top: Path, fmt: str, *, roots: Sequence[Path] | None = None, max_depth: int = MAX_DEPTH
) -> list[ApprovedImage]:
    """Given the top image and its format (`qcow2` or `raw`, never probed), return the chain, top first, base last.

    Raise HostileImage (cycle, more than `max_depth` images, outside `roots`, unsafe header or name), ChainDamaged
    (cut short, corrupt, or a backing file is missing), UnsupportedDisk, NotFound (no top), Refused (no permission).
    """
    layers: list[_Layer] = []
    seen: set[tuple[int, int]] = set()
    for layer in _walk(top, fmt, roots):
        identity = layer.status.st_dev, layer.status.st_ino
        if identity in seen:
            raise HostileImage(f"the chain of {str(top)!r} has a cycle: it comes back to {layer.path!r}")
        seen.add(identity)
        layers.append(layer)
        if len(layers) == max_depth and layer.backing is not None:
            hint = "merge snapshots (diskchain delete), or flatten it: qemu-img convert"
            raise HostileImage(f"the chain of {str(top)!r} is deeper than {max_depth} images", hint=hint)
    return _linked(layers)


def virtual_size(path: Path, fmt: str) -> int:
    """Given a single image, return how many bytes a guest sees; what it stands on is not looked at. Raise as above."""
    with files.UntrustedFiles() as opener:
        layer = _look(opener, path, fmt)
    return layer.header.virtual_size if layer.header else _raw_size(layer.status.st_size)


def header(path: Path, fmt: str) -> Header | None:
    """Given a single image, return its header, None of a raw one; as `virtual_size`."""
    with files.UntrustedFiles() as opener:
        return _look(opener, path, fmt).header


def fingerprint(path: Path, fmt: str) -> dict[str, object]:
    """Return what tells a frozen image from a changed one: size and virtual_size in bytes, and
    qcow2: sha256 (hex) over header cluster, L1 table and all L2 tables, which changes when a write allocates or moves
    a cluster; raw: mtime_ns. Data written in place into an allocated cluster does not show.
    qcow2: written_ns, too, the time of its last write. A copy has another one: no change, but no proof either (moved.py).
    qcow2 with bitmaps or internal snapshots of its own: map, too, which stays when these are removed from it.

    Raise as `approve_chain` does for a single image.
    """
    _require_known(fmt, path)
    with files.UntrustedFiles() as opener:
        opened = opener.open(path)
    try:
        size = opened.status.st_size
        if fmt == "raw":
            return {"size": size, "virtual_size": _raw_size(size), "mtime_ns": opened.status.st_mtime_ns}
        header = checked_header(opened, reject=False)
        digest = _metadata_digest(opened.fd, header, size, opened.path)
        found: dict[str, object] = {"size": size, "virtual_size": header.virtual_size, "sha256": digest,
                                    "written_ns": opened.status.st_mtime_ns}  # fmt: skip
        if header.has_bitmaps or header.snapshots:
            found["map"] = _map_digest(opened.fd, header, size, opened.path)
        return found
    finally:
        os.close(opened.fd)


def differing(recorded: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Return what tells that a frozen image was changed, given its fingerprints of then and of now."""
    return sorted(key for key in recorded if key not in ("map", "written_ns") and now.get(key) != recorded[key])


def map_of(path: Path) -> str:
    """Return the `map` of a qcow2 image: sha256 (hex) of where the data of each guest cluster lies. Raise as `fingerprint`."""
    with files.UntrustedFiles() as opener:
        opened = opener.open(path)
    try:
        return _map_digest(opened.fd, checked_header(opened), opened.status.st_size, opened.path)
    finally:
        os.close(opened.fd)


class _Layer(NamedTuple):
    """One opened, looked at and closed file; `backing` is the path to open next."""

    path: str
    fmt: str
    header: Header | None
    status: os.stat_result
    backing: str | None


def _walk(top: Path, fmt: str, roots: Sequence[Path] | None) -> Iterator[_Layer]:
    """Yield the layers one by one; endless for a cycle, the caller stops it."""
    with files.UntrustedFiles(roots) as opener:
        layer = _look(opener, top, fmt)
        yield layer
        while layer.backing is not None and layer.header is not None and layer.header.backing_format is not None:
            try:
                below = _look(opener, layer.backing, layer.header.backing_format)
            except NotFound as error:
                raise _missing(layer, error) from error
            yield below
            layer = below


def _missing(layer: _Layer, error: NotFound) -> ChainDamaged:
    hint = "bring the file back, or let diskchain look for it: diskchain check --repair VM"
    return ChainDamaged(f"{layer.path!r}: its backing file is missing: {error.message}", hint=hint)


def _look(opener: files.UntrustedFiles, path: Path | str, fmt: str) -> _Layer:
    """Open, read the header (qcow2 only), close."""
    _require_known(fmt, path)
    opened = opener.open(path)
    try:
        if fmt == "raw":
            return _Layer(opened.path, fmt, None, opened.status, None)
        header = checked_header(opened)
    finally:
        os.close(opened.fd)
    return _Layer(opened.path, fmt, header, opened.status, _backing_path(opened.directory, header))


def _require_known(fmt: str, path: Path | str) -> None:
    if fmt not in qcow2.FORMATS:
        raise UnsupportedDisk(f"{str(path)!r}: format {fmt!r} isn't supported; only qcow2 and raw")


def checked_header(opened: files.Opened, *, reject: bool = True) -> Header:
    """Given an open qcow2 image, return its header; with `reject` only if QEMU may be shown it. Errors name the file."""
    header = None
    try:
        header = _read_header(opened.fd, opened.status.st_size)
        if reject:
            qcow2.reject_unsafe(header)
    except DiskchainError as error:
        hint = _name_the_format(opened, header) if header and "name the format" in error.message else error.hint
        raise type(error)(f"{opened.path!r}: {error.message}", hint=hint) from error
    return header


def _name_the_format(opened: files.Opened, header: Header) -> str:
    """The command with which an admin writes down what an old qemu-img left out. We only say it: probing is guessing."""
    name = header.backing_name or ""
    fmt = {".qcow2": "qcow2", ".raw": "raw"}.get(Path(name).suffix) or _looks_like(
        _backing_path(opened.directory, header)
    )
    return (f"if you trust it, write it down: qemu-img rebase -u -f qcow2 -b {shlex.quote(name)} -F {fmt} "
            f"{shlex.quote(opened.path)}")  # fmt: skip


def _looks_like(path: str | None) -> str:
    try:
        fd = files.open_untrusted(Path(path or ""))
    except DiskchainError:
        return "raw"
    with open(fd, "rb") as opened:
        return "qcow2" if opened.read(len(qcow2.MAGIC)) == qcow2.MAGIC else "raw"


def _read_header(fd: int, size: int) -> Header:
    data = files.read_span(fd, 0, qcow2.FIRST_READ)
    span = qcow2.header_span(data)
    if span > len(data):
        data += files.read_span(fd, len(data), span - len(data))
    return qcow2.parse_header(data, size)


def _backing_path(directory: str, header: Header) -> str | None:
    """As QEMU resolves it: relative to the directory (ending in a slash) of the image that names it."""
    name = header.backing_name
    if name is None or name.startswith("/"):
        return name
    return directory + name


def _linked(layers: Sequence[_Layer]) -> list[ApprovedImage]:
    """Each layer with the real path of the one below it."""
    return [_approved(layer, below) for layer, below in zip(layers, [*layers[1:], None], strict=True)]


def _approved(layer: _Layer, below: _Layer | None) -> ApprovedImage:
    status = layer.status
    return ApprovedImage(
        layer.path,
        layer.fmt,
        layer.header,
        _raw_size(status.st_size) if layer.header is None else layer.header.virtual_size,
        status.st_size,
        status.st_blocks * 512,
        status.st_dev,
        status.st_ino,
        None if below is None else below.path,
        None if below is None else below.fmt,
    )


def _raw_size(size: int) -> int:
    """QEMU shows whole sectors of a raw file."""
    return -(-size // qcow2.SECTOR) * qcow2.SECTOR


def _metadata_digest(fd: int, header: Header, size: int, path: str) -> str:
    """Hash one table after the other: a full 1 TB disk has 128 MiB of L2 tables, one cluster is held at a time."""
    digest = hashlib.sha256(files.read_span(fd, 0, header.cluster_size))
    offsets = l2_tables(fd, header, size, path, digest.update)
    for offset in offsets:
        digest.update(files.read_span(fd, offset, header.cluster_size))
    return digest.hexdigest()


def _map_digest(fd: int, header: Header, size: int, path: str) -> str:
    """Hash the L2 tables, without the marks that change when an internal snapshot goes."""
    l2_tables(fd, header, size, path)
    entries = qcow2.l1_entries(files.read_span(fd, header.l1_offset, header.l1_bytes))
    check_l2([offset for _, offset, _ in entries], header.cluster_size, size, path)
    digest = hashlib.sha256(header.virtual_size.to_bytes(8, "big"))
    for number, offset, _ in entries:
        table = files.read_span(fd, offset, header.cluster_size)
        digest.update(number.to_bytes(8, "big") + allocation.without_copied(table, header))
    return digest.hexdigest()


def l2_tables(
    fd: int, header: Header, size: int, path: str, on_piece: Callable[[bytes], object] = lambda _: None
) -> list[int]:
    """Return the offsets of an image's L2 tables, sorted; `on_piece` gets its L1 table, piece by piece. Raise as `check_l2`.

    An L1 table of 32 MiB, full of nonsense or of more tables than any disk has, is given up where that shows.
    """
    found: set[int] = set()
    for at in range(0, header.l1_bytes, L1_PIECE):
        piece = files.read_span(fd, header.l1_offset + at, min(L1_PIECE, header.l1_bytes - at))
        on_piece(piece)
        more = set(qcow2.l2_offsets(piece)) - found
        check_l2(more, header.cluster_size, size, path, known=len(found))
        found |= more
    return sorted(found)


def check_l2(offsets: Collection[int], cluster_size: int, size: int, path: str, known: int = 0) -> None:
    """Raise HostileImage for more L2 tables than any disk needs, `known` others counted; ChainDamaged for one in a wrong place."""
    count = known + len(offsets)
    if count * cluster_size > MAX_L2_BYTES:
        raise HostileImage(f"{path!r}: {count} L2 tables")
    for offset in offsets:
        if offset % cluster_size or offset >= size:
            raise ChainDamaged(f"{path!r}: L2 table at {offset}, file size {size}")
