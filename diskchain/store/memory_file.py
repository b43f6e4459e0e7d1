"""The file that a snapshot's memory is saved in: libvirt's save header, XML, padding, then QEMU's migration stream.

One format for both drivers (facts.md). 92 bytes in the machine's byte order (libvirt src/qemu/qemu_saveimage.h,
struct _virQEMUSaveHeader): magic, version 2, data_len, was_running, compressed 0, cookie offset 0, unused. Then the
XML with its NUL and zero padding (data_len bytes together), then the stream at 92 + data_len, which we keep a multiple
of 4096 with at least 64 KiB to spare, so that `virsh save-image-edit` can grow the XML.
While it is being written its magic says "Part"; after the fsync it is flipped to "Save".
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from diskchain.errors import MemoryDamaged, MemoryNotSaved

_HEADER = struct.Struct("=16sIIIII56x")
_PART, _SAVE = b"LibvirtQemudPart", b"LibvirtQemudSave"
_SPARE = 64 << 10
_PIECE = 4 << 20
_RUN_STATE = b"\x0bglobalstate" + struct.pack(">II", 0, 1)  # name, instance, version; then the length and the text
_RUNNING = struct.pack(">I", 8) + b"running\0"


@dataclass(frozen=True)
class MemoryHeader:
    """The header's values. `stream` = offset of QEMU's stream in bytes."""

    complete: bool
    was_running: bool
    stream: int
    xml: str


def write_header(fd: int, xml: str, *, was_running: bool) -> int:
    """Write the header in its unfinished form at the start of `fd`, leave the offset at the stream; return that."""
    text = xml.encode() + b"\0"
    stream = -(-(_HEADER.size + len(text) + _SPARE) // 4096) * 4096
    data_len = stream - _HEADER.size
    os.pwrite(fd, _HEADER.pack(_PART, 2, data_len, int(was_running), 0, 0) + text.ljust(data_len, b"\0"), 0)
    return os.lseek(fd, stream, os.SEEK_SET)


def seal(fd: int) -> None:
    """fsync the stream, then flip the magic to the finished form, and fsync that too.

    Raise MemoryNotSaved when the disk lost some of it: the kernel tells that once, and another fsync may say all is well.
    """
    sync(fd)
    os.pwrite(fd, _SAVE, 0)
    sync(fd)


def sync(fd: int) -> None:
    """fsync the file. Raise MemoryNotSaved, once: the kernel does not tell again what it lost."""
    try:
        os.fsync(fd)
    except OSError as error:
        raise MemoryNotSaved(f"the disk lost some of it: {error.strerror}", hint="look at dmesg") from error


def read_header(fd: int) -> MemoryHeader:
    """Given an open memory file, return its header. Raise MemoryDamaged when it is none."""
    raw = os.pread(fd, _HEADER.size, 0)
    size = os.fstat(fd).st_size
    if len(raw) < _HEADER.size:
        raise MemoryDamaged("the memory file is cut off", hint=HINT)
    magic, version, data_len, was_running, compressed, _cookie = _HEADER.unpack(raw)
    stream = _HEADER.size + data_len
    if magic not in (_PART, _SAVE) or version != 2 or compressed or stream > min(size, 64 << 20):
        raise MemoryDamaged("the memory file's header is not one that we wrote", hint=HINT)
    xml = os.pread(fd, data_len, _HEADER.size).split(b"\0", 1)[0].decode("utf-8", "replace")
    return MemoryHeader(magic == _SAVE, bool(was_running), stream, xml)


def relabel(fd: int, xml: str) -> None:
    """Put another XML in front of a stream, durably. Raise MemoryDamaged when there is no room for it.

    Only the XML is written: cut off in the middle, it is no XML any more, and the stream is what it was.
    """
    room = read_header(fd).stream - _HEADER.size
    text = xml.encode() + b"\0"
    if len(text) > room:
        raise MemoryDamaged("the memory file has no room for the definition under its new name", hint=HINT)
    os.pwrite(fd, text.ljust(room, b"\0"), _HEADER.size)
    os.fsync(fd)


def stream_digest(fd: int, stream: int) -> str:
    """Return the sha256 of everything from the stream's first byte to the end of the file."""
    digest, offset = hashlib.sha256(), stream
    while piece := os.pread(fd, _PIECE, offset):
        digest.update(piece)
        offset += len(piece)
    return digest.hexdigest()


def ran(fd: int) -> bool:
    """Given a finished stream, say whether the VM's CPUs ran at its instant: then it is not that of the frozen disks.

    QEMU notes its run state in the section `globalstate` (migration/global_state.c), which comes after all memory. Without
    such a section: False.
    """
    end = os.fstat(fd).st_size
    while end > 0:
        begin = max(0, end - _PIECE)
        piece = os.pread(fd, end - begin + len(_RUN_STATE) + 112, begin)
        found = piece.rfind(_RUN_STATE)
        if found >= 0:
            return piece[found + len(_RUN_STATE) :].startswith(_RUNNING)
        end = begin
    return False


def verify_outside(path: Path, size: int) -> None:
    """Look at a memory file without reading its stream: regular, finished, as long as recorded. Raise MemoryDamaged."""
    os.close(_opened(path, size)[0])


def open_verified(path: Path, size: int, sha256: str) -> int:
    """Given a memory file and what was recorded of it, return a descriptor placed at the stream.

    QEMU accepts flipped bits and cut-off files without a word (14 of 14, facts.md), so length and digest are verified
    before it sees one byte. Raise MemoryDamaged.
    """
    fd, header = _opened(path, size)
    try:
        if stream_digest(fd, header.stream) != sha256:
            raise MemoryDamaged(f"the memory file is not what was saved: its checksum differs ({path})", hint=HINT)
        os.lseek(fd, header.stream, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _opened(path: Path, size: int) -> tuple[int, MemoryHeader]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)  # a FIFO must not hang us
    except OSError as error:
        raise MemoryDamaged(f"the memory file can't be opened: {error.strerror} ({path})", hint=HINT) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise MemoryDamaged(f"the memory file is not a regular file ({path})", hint=HINT)
        header = read_header(fd)
        if not header.complete:
            raise MemoryDamaged(f"the memory file was never finished ({path})", hint=HINT)
        if os.fstat(fd).st_size != size:
            raise MemoryDamaged(
                f"the memory file has {os.fstat(fd).st_size} bytes, {size} were saved ({path})", hint=HINT
            )
    except BaseException:
        os.close(fd)
        raise
    return fd, header


HINT = "the disks of the snapshot are not affected: revert with --cold"
