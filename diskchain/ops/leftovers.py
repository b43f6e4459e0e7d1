"""Files that nobody names, and users of a VM's layers that the VM does not know."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from diskchain.chain.model import Catalog
from diskchain.chain.rules import Finding, error, info, warning
from diskchain.chain.text import size
from diskchain.errors import DiskchainError
from diskchain.host import files
from diskchain.ops.approve import approve_chain
from diskchain.ops.directories import look_through
from diskchain.ops.vm import Host, Neighbour
from diskchain.store import catalog as catalog_store
from diskchain.store.catalog import Home, homes_near

_OVERLAY = re.compile(r".+\.[^.]+\.[0-9a-f]{12}\.qcow2")
_Identity = tuple[int, int]


def find(host: Host, catalog: Catalog, home: Home, in_flight: frozenset[str]) -> Iterator[Finding]:
    """Look through the directories of the VM's images and its records."""
    active = catalog.active.values()  # of several layers that a file stands on, the one that is written to is named
    mine = _identities(i.path for i in sorted(catalog.images.values(), key=lambda i: i.id not in active))
    others = _others(host, catalog)
    for directory in sorted({i.path.parent for i in catalog.images.values()}):
        looked = look_through(directory)
        for path, identity in looked.names:
            if path.name not in in_flight and identity not in mine and identity not in others:
                stands_on = looked.overlays.get(path, frozenset())
                below = next((layer for i, layer in mine.items() if i in stands_on), None)
                yield from _file(catalog, path, below)
        for one in looked.unread:
            yield warning("unreadable", str(one.path), f"it can't be read ({one.why}): whether it stands on a layer of "
                          f"{catalog.name} is not known, and merges are refused",
                          "run diskchain as root, or let it read that")  # fmt: skip
    yield from _shared(catalog, mine, others)
    yield from _in_records(home, catalog, in_flight)


def _identities(paths: Iterator[Path]) -> dict[_Identity, Path]:
    found = {}
    for path in paths:
        try:
            found[files.identity(path)] = path
        except DiskchainError:
            continue
    return found


def _others(host: Host, catalog: Catalog) -> dict[_Identity, tuple[str, bool]]:
    """The images of all other VMs: whose, and whether that one writes to it. Forgotten ones beside the disks count."""
    neighbours = [other for other in host.neighbours() if other.uuid != catalog.uuid]
    homes = {other.home: other.label for other in neighbours if other.home is not None}
    for image in catalog.images.values():
        homes.update({near.path: f"(undefined) {near.path.name}" for near in homes_near(image.path)
                      if near.path not in homes})  # fmt: skip
    found: dict[_Identity, tuple[str, bool]] = {}
    for other in neighbours:
        if other.home is None:
            found.update(_of_stranger(other))
    for path, name in homes.items():
        try:
            records = catalog_store.load(Home(path))
        except DiskchainError:
            continue
        if records.uuid != catalog.uuid:
            active = {records.images[i].path for i in records.active.values() if i in records.images}
            for identity, place in _identities(i.path for i in records.images.values()).items():
                found[identity] = (name, place in active)
    return found


def _of_stranger(other: Neighbour) -> dict[_Identity, tuple[str, bool]]:
    """The layers of a VM that we have no records of, as its definition and its files say."""
    found: dict[_Identity, tuple[str, bool]] = {}
    for disk in other.disks:
        try:
            chain = approve_chain(disk, "qcow2")
        except DiskchainError:
            chain = []  # raw, or nothing that may be looked into
        below = _identities(layer.path for layer in chain[1:])
        found.update({identity: (other.label, False) for identity in below if identity not in found})
        found.update(dict.fromkeys(_identities(iter([disk])), (other.label, True)))
    return found


def _regular(directory: Path) -> list[Path]:
    try:
        return sorted(p for p in directory.iterdir() if p.is_file() and not p.is_symlink())
    except OSError:
        return []


def _file(catalog: Catalog, path: Path, below: Path | None) -> Iterator[Finding]:
    """A file that no VM has. `below`: the layer of this VM that it stands on."""
    try:
        taken = size(files.allocated_bytes(path))
    except DiskchainError:
        return
    if path.is_symlink():
        if below is not None:
            yield from _foreign(catalog, path, below)
        return
    if path.name.endswith(".trash"):
        yield warning("leftover-trash", str(path), f"put away by a delete and not removed, {taken}", _remove(path))
        return
    if path.name.startswith(files.TEMPORARY) or path.name.endswith(".part"):
        yield warning("leftover-temporary", str(path), f"left by something that was killed, {taken}", _remove(path))
        return
    if _OVERLAY.fullmatch(path.name):
        stands = f", stands on {below.name}" if below else ""
        yield warning("orphan-overlay", str(path), f"looks like an overlay of diskchain, no catalog names it, {taken}{stands}",
                      "keep it until you know what it holds; then remove it")  # fmt: skip
    elif below is not None:
        yield from _foreign(catalog, path, below)


def _foreign(catalog: Catalog, path: Path, below: Path) -> Iterator[Finding]:
    active = {catalog.images[i].path for i in catalog.active.values()}
    if below in active:
        yield error("foreign-overlay", str(path), f"it stands on {below}, which {catalog.name} writes to: it is damaged "
                    "by every write", f"copy what you need out of it; make clones of a snapshot of {catalog.name}")  # fmt: skip
    else:
        yield warning("foreign-overlay", str(path), f"it stands on {below} of {catalog.name}; merges into that are refused",
                      "flatten it: qemu-img convert; or remove it when nobody needs it")  # fmt: skip


def _remove(path: Path) -> str:
    return f"rm '{path}'"


def _shared(catalog: Catalog, mine: dict[_Identity, Path],
            others: dict[_Identity, tuple[str, bool]]) -> Iterator[Finding]:  # fmt: skip
    active = {catalog.images[i].path for i in catalog.active.values()}
    for identity, path in mine.items():
        if identity not in others:
            continue
        who, writes = others[identity]
        if writes or path in active:
            yield error("shared-layer", str(path), f"{who} and {catalog.name} both use it, and one of them writes to it",
                        "never start both; give one of them a copy")  # fmt: skip
        else:
            yield info("shared-layer", str(path), f"{who} stands on it too; merges into it are refused")


def _in_records(home: Home, catalog: Catalog, in_flight: frozenset[str]) -> Iterator[Finding]:
    for directory in (home.path, home.journal, home.path / "snapshots"):
        for path in _regular(directory):
            if path.name.startswith(files.TEMPORARY):
                yield info("leftover-temporary", str(path), "left by something that was killed",
                           f"diskchain recover {catalog.name}")  # fmt: skip
    snapshots = home.path / "snapshots"
    for entry in sorted(snapshots.iterdir()) if snapshots.is_dir() else ():
        if not entry.is_dir() or entry.name in in_flight:
            continue
        if entry.name not in catalog.snapshots:
            taken = sum(p.stat().st_blocks * 512 for p in _regular(entry))
            yield warning("orphan-snapshot", str(entry), f"no snapshot of {catalog.name} has this directory, {size(taken)}",
                          "keep it until you know what it holds; then remove it")  # fmt: skip
            continue
        for path in _regular(entry):
            if path.name.endswith(".part") or path.name.startswith(files.TEMPORARY):
                yield warning("leftover-temporary", str(path),
                              f"an unfinished save, {size(path.stat().st_blocks * 512)}", _remove(path))  # fmt: skip
