"""What a directory may look like after the power went, given what was there before and a log of what was done to it.

Nothing is relied on but what POSIX says: data is there once its file was synced, a name once its directory was. All
else may be there, or not, or (data) in part; a rename is whole or not there. No order between two files is kept.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scripts.torture_cases import shim
from scripts.torture_cases.shim import Record

DATA = ("none", "all", "4096", "512")
NAMES = ("none", "all", "some")
SECTOR = 65536


@dataclass(eq=False)
class Node:
    """A file, directory or symlink. `origin`: where its first content lies, relative to the copy of before."""

    origin: str | None
    is_dir: bool = False
    link: str = ""
    mode: int = 0o600
    settled: list[Record] = field(default_factory=list)
    pending: list[Record] = field(default_factory=list)
    mtime: int | None = None  # as synced
    later_mtime: int | None = None
    names: dict[str, Node] = field(default_factory=dict)  # as the running system sees them
    durable: dict[str, Node] = field(default_factory=dict)

    @property
    def touched(self) -> bool:
        return bool(self.settled or self.pending) or self.origin is None


@dataclass(frozen=True)
class NameOp:
    """A change of names: `node` leaves `source` (if any) and enters `target` (if any)."""

    node: Node
    source: tuple[Node, str] | None
    target: tuple[Node, str] | None

    def concerns(self, directory: Node) -> bool:
        """Whether a sync of this directory makes it last."""
        return directory in [place[0] for place in (self.source, self.target) if place]

    def apply(self, durable: bool) -> None:
        """Do it to the names that last, or to those of the running system."""
        if self.source:
            names = self.source[0].durable if durable else self.source[0].names
            if names.get(self.source[1]) is self.node:
                del names[self.source[1]]
        if self.target:
            (self.target[0].durable if durable else self.target[0].names)[self.target[1]] = self.node


class Disk:
    """A directory tree as the running system sees it, and as it would be found after a power cut."""

    def __init__(self, root: Path) -> None:
        """Look at the tree before anything was done to it."""
        self._root = root
        self._inodes: dict[int, Node] = {}
        self._pending: list[NameOp] = []
        self.top = self._scan(root, "")

    def _scan(self, path: Path, relative: str) -> Node:
        status = path.lstat()
        node = Node(relative, path.is_dir() and not path.is_symlink(), mode=status.st_mode & 0o7777)
        self._inodes[status.st_ino] = node
        if node.is_dir:
            for entry in sorted(os.listdir(path)):
                node.names[entry] = self._scan(path / entry, f"{relative}/{entry}".lstrip("/"))
            node.durable = dict(node.names)
        return node

    def replay(self, log: Sequence[Record]) -> None:
        """Do to it what was logged."""
        for record in log:
            if record.kind in (shim.SYNC, shim.DATASYNC):
                self._sync(self._inodes[record.inode], record)
            elif record.kind in (shim.WRITE, shim.TRUNCATE, shim.ZERO):
                node = self._inodes[record.inode]
                node.pending.append(record)
                node.later_mtime = record.mtime
            elif record.kind == shim.NAMELESS:  # O_TMPFILE: gone with whoever has it open
                self._inodes[record.inode] = Node(None)
            else:
                self._name(record)

    def _sync(self, node: Node, record: Record) -> None:
        node.settled += node.pending
        node.pending = []
        if record.kind == shim.SYNC:
            node.mtime = node.later_mtime
        if node.is_dir:
            for op in [op for op in self._pending if op.concerns(node)]:
                op.apply(durable=True)
                self._pending.remove(op)

    def _name(self, record: Record) -> None:
        if record.kind in (shim.CREATE, shim.MKDIR, shim.SYMLINK):
            node = Node(None, record.kind == shim.MKDIR, record.other if record.kind == shim.SYMLINK else "")
            node.mode = 0o700 if node.is_dir else record.length & 0o755
            self._inodes[record.inode] = node
            op = NameOp(node, None, self._place(record.path))
        else:
            node = self._inodes[record.inode]
            source = None if record.kind == shim.LINK else self._place(record.path)
            target = self._place(record.other) if record.kind in (shim.LINK, shim.RENAME) else None
            op = NameOp(node, source, target)
        op.apply(durable=False)
        self._pending.append(op)

    def _place(self, path: str) -> tuple[Node, str]:
        node, parts = self.top, Path(path).relative_to(self._root).parts
        for part in parts[:-1]:
            node = node.names[part]
        return node, parts[-1]

    def cut(self, rng: random.Random, data: str, names: str, before: Path) -> dict[str, Found]:
        """Return what is found after the power cut, by relative path; `before`: a copy of the tree as it was."""
        for op in self._pending:
            if names == "all" or (names == "some" and rng.random() < 0.5):
                op.apply(durable=True)
        found: dict[str, Found] = {}
        _walk(self.top, "", found, lambda node: _contents(node, before, data, rng))
        return found


Look = Callable[[Node], tuple[bytes, int | None]]


@dataclass(frozen=True)
class Found:
    """One name after the cut. `content` None: what `origin` holds, unchanged."""

    node: Node
    content: bytes | None
    mtime: int | None


def _walk(node: Node, path: str, found: dict[str, Found], look: Look) -> None:
    for name, child in node.durable.items():
        where = f"{path}/{name}".lstrip("/")
        has_content = not child.is_dir and not child.link and child.touched
        found[where] = Found(child, *look(child)) if has_content else Found(child, None, None)
        if child.is_dir:
            _walk(child, where, found, look)


def _contents(node: Node, before: Path, data: str, rng: random.Random) -> tuple[bytes, int | None]:
    content = bytearray((before / node.origin).read_bytes() if node.origin is not None else b"")
    for record in node.settled:
        _do(content, record, None, rng)
    for record in node.pending:
        if data != "none":
            _do(content, record, None if data == "all" else int(data), rng)
    mtime = node.mtime
    if node.later_mtime is not None and data != "none" and (data == "all" or rng.random() < 0.5):
        mtime = node.later_mtime
    return bytes(content), mtime


def _do(content: bytearray, record: Record, unit: int | None, rng: random.Random) -> None:
    """Do one thing to a file; with `unit` each piece of so many bytes may have got there or not."""
    if record.kind == shim.TRUNCATE:
        if unit is None or rng.random() < 0.5:
            _resize(content, record.length)
        return
    data, end = record.data, record.offset + record.length
    if record.kind == shim.ZERO:
        end = min(end, len(content))
        data = bytes(max(end - record.offset, 0))
    at = record.offset
    whole = unit is None or rng.random() < 0.3
    while at < end:
        stop = end if whole or unit is None else min((at // unit + 1) * unit, end)
        if whole or rng.random() < 0.5:
            _resize(content, max(len(content), stop))
            content[at:stop] = data[at - record.offset : stop - record.offset]
        at = stop


def _resize(content: bytearray, size: int) -> None:
    if size < len(content):
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))


def put(found: Mapping[str, Found], directory: Path, before: Path) -> None:
    """Make a directory, which is a copy of what was before, into what was found after the cut."""
    for root, dirs, names in os.walk(directory, topdown=False):
        for name in (*names, *dirs):
            path = Path(root) / name
            if str(path.relative_to(directory)) not in found:
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    there: dict[Node, Path] = {}
    for where, one in found.items():
        path, origin = directory / where, one.node.origin
        if (known := there.setdefault(one.node, path)) != path:
            path.unlink(missing_ok=True)
            path.hardlink_to(known)
        elif one.content is None and origin not in (None, where) and not one.node.is_dir:
            path.unlink(missing_ok=True)
            subprocess.run(["cp", "--archive", "--sparse=always", str(before / str(origin)), str(path)], check=True)
        else:
            _put(path, one)


def _put(path: Path, one: Found) -> None:
    if one.node.link:
        path.symlink_to(one.node.link)
    elif one.node.is_dir:
        path.mkdir(mode=one.node.mode, exist_ok=True)
    elif one.content is not None:
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            for at in range(0, len(one.content), SECTOR):
                if any(piece := one.content[at : at + SECTOR]):
                    file.seek(at)
                    file.write(piece)
            file.truncate(len(one.content))
        path.chmod(one.node.mode)
        if one.mtime is not None:
            os.utime(path, ns=(one.mtime, one.mtime))
