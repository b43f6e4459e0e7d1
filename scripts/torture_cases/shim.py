"""shim.c: build it (also by `python -m scripts.torture_cases.shim`), tell it what to do, read what it logged."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")
COUNT, KILL, KILL_ALL, FAIL, LOG = range(5)
WRITE, TRUNCATE, SYNC, DATASYNC, CREATE, RENAME, LINK, UNLINK, MKDIR, RMDIR, SYMLINK, ZERO, NAMELESS = range(1, 14)


class _Control(ctypes.Structure):
    _fields_ = (
        ("counter", ctypes.c_uint64), ("at", ctypes.c_uint64), ("action", ctypes.c_int32), ("error", ctypes.c_int32),
        ("sticky", ctypes.c_int32), ("leader", ctypes.c_int32), ("hits", ctypes.c_int32), ("armed", ctypes.c_int32),
        ("syncs_only", ctypes.c_int32), ("prefix", ctypes.c_char * 256), ("log", ctypes.c_char * 256),
        ("what", ctypes.c_char * 64), ("mutex", ctypes.c_char * 64),
    )  # fmt: skip


@functools.cache
def library() -> Path:
    """Return the shim, built if it is not there yet."""
    directory = Path(__file__).resolve().parents[2] / ".cache/torture"
    path = directory / f"shim-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        made = path.with_suffix(f".{os.getpid()}")
        argv = ["gcc", "-O1", "-shared", "-fPIC", "-o", str(made), str(SOURCE), "-ldl", "-pthread"]
        subprocess.run(argv, check=True)
        made.rename(path)
    return path


class Shim:
    """What one worker's processes are told through their mapped file; only files below `directory` count."""

    def __init__(self, place: Path, directory: Path) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.library, self.control, self.log = library(), place / "control", place / "log"
        self.control.write_bytes(bytes(ctypes.sizeof(_Control)))
        with self.control.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._shared = _Control.from_buffer(self._map)
        self._shared.prefix, self._shared.log = bytes(directory), bytes(self.log)
        ctypes.CDLL(str(self.library)).torture_prepare(bytes(self.control))

    @property
    def env(self) -> dict[str, str]:
        """What the processes must find in their environment."""
        return {"LD_PRELOAD": str(self.library), "TORTURE_SHIM": str(self.control)}

    def arm(self, action: int, *, at: int = 0, error: int = 0, sticky: bool = False, syncs_only: bool = False) -> None:
        """From now on count, and hit the call number `at`."""
        self.log.unlink(missing_ok=True)
        shared = self._shared
        shared.counter = shared.leader = shared.hits = 0
        shared.what = b""
        shared.action, shared.at, shared.error = action, at, error
        shared.sticky, shared.syncs_only = int(sticky), int(syncs_only)
        shared.armed = 1

    def disarm(self) -> tuple[int, int, str]:
        """Let everything through again; return how many calls there were, how many were hit, which was the first."""
        self._shared.armed = 0
        return int(self._shared.counter), int(self._shared.hits), bytes(self._shared.what).decode()

    def logged(self) -> list[Record]:
        """Return what was logged since `arm`."""
        return list(_records(self.log.read_bytes())) if self.log.exists() else []


@dataclass(frozen=True)
class Record:
    """One call, as it happened. `path`, `other`: what it was made with; `mtime`: of the file, after it."""

    kind: int
    inode: int
    offset: int
    length: int
    mtime: int
    path: str
    other: str
    data: bytes


_HEAD = struct.Struct("=IIQqqqII")


def _records(data: bytes) -> Iterator[Record]:
    at = 0
    while at < len(data):
        size, kind, inode, offset, length, mtime, path, other = _HEAD.unpack_from(data, at)
        names = at + _HEAD.size
        yield Record(
            kind, inode, offset, length, mtime, data[names : names + path].decode(),
            data[names + path : names + path + other].decode(), data[names + path + other : at + size],
        )  # fmt: skip
        at += size


if __name__ == "__main__":
    library()
