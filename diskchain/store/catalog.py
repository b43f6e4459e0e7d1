"""The catalog on disk: `.diskchain/<uuid>/` beside the VM's first disk. It travels with the disks."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diskchain.chain.model import Catalog, Image, Memory, Snapshot
from diskchain.chain.rules import dangling
from diskchain.chain.text import name_with
from diskchain.errors import DiskchainError, RecordDamaged
from diskchain.host import files
from diskchain.host.fault import point
from diskchain.store import record
from diskchain.store.reserve import Reserve

HOME = ".diskchain"


class Home:
    """The directory of one VM's records, and the names in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.catalog = path / "catalog.json"
        self.journal = path / "journal"
        self.lock = path / "lock"
        self.start_waits = path / "start-waits"  # locked by a `start` that finds a merge at work
        self.reserve = Reserve(path / "reserve")
        self.recover_txt = path / "RECOVER.txt"

    @classmethod
    def beside(cls, disk: Path, uuid: str) -> Home:
        """Return the home of the VM whose first disk is the given file."""
        return cls(disk.parent / HOME / uuid)

    @property
    def disks_dir(self) -> Path:
        """The directory that paths in the catalog are relative to."""
        return self.path.parent.parent

    def snapshot_dir(self, snapshot_id: str) -> Path:
        """Return the directory of a snapshot's configuration and memory."""
        return self.path / "snapshots" / snapshot_id

    def memory(self, snapshot_id: str) -> Path:
        """Return the path of a snapshot's saved memory."""
        return self.snapshot_dir(snapshot_id) / "memory"

    def configuration(self, snapshot_id: str) -> Path:
        """Return the path of a snapshot's configuration."""
        return self.snapshot_dir(snapshot_id) / "machine.json"

    def make(self) -> None:
        """Create the directories (mode 0700: guest memory is secrets) and the reserve."""
        for directory in (self.path, self.journal, self.path / "snapshots"):
            files.make_dirs_durably(directory)
        self.fill_reserve()
        files.fsync_dir(self.path)

    def remove_unused(self) -> None:
        """Take back a `make` of records that nothing was put into; what is not empty stays."""
        self.reserve.release()
        for path in (self.recover_txt, self.catalog, self.lock):
            path.unlink(missing_ok=True)
        for directory in (self.journal, self.path / "snapshots", self.path, self.path.parent):
            with contextlib.suppress(OSError):
                directory.rmdir()

    def fill_reserve(self) -> None:
        """Make sure of the room that records can fall back on when the volume is full; quietly nothing when it is."""
        largest = 0
        with contextlib.suppress(OSError):
            largest = self.catalog.stat().st_size
        self.reserve.fill(largest)


def homes_near(disk: Path) -> Iterator[Home]:
    """Yield the homes that stand beside a disk."""
    parent = disk.parent / HOME
    if parent.is_dir():
        for entry in sorted(parent.iterdir()):
            if (entry / "catalog.json").exists():
                yield Home(entry)


def load(home: Home) -> Catalog:
    """Return the VM's catalog. Raise NotFound, RecordDamaged."""
    body = record.read(home.catalog, "catalog")
    try:
        return _from_json(body, home.disks_dir)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordDamaged(f"{home.catalog} holds something else than a catalog ({error!r:.80})") from None


def save(home: Home, catalog: Catalog) -> None:
    """Write the catalog and RECOVER.txt durably. At 0 bytes free the reserve is used. Raise NoSpace, Refused; as `verify`
    before anything is written.
    """
    point("catalog.save.before")
    verify(catalog)
    data, text = record.dump("catalog", _to_json(catalog, home.disks_dir)), recover_text(home, catalog)
    home.reserve.write(home.catalog, data)
    home.reserve.write(home.recover_txt, text)
    point("catalog.save.after")


def verify(catalog: Catalog) -> None:
    """Raise RecordDamaged for a catalog with a name that leads nowhere: nobody could read it again."""
    for finding in dangling(catalog):
        raise RecordDamaged(f"the records of {catalog.name} would contradict themselves ({finding.evidence}); they stay as "
                            "they are", hint="this is a bug, please report it; keep every file")  # fmt: skip


def remove(records: Path, *, last: str = "") -> None:
    """Remove the directory of records that do not count any more, durably; the catalog first, so that they are none from
    then on. With the last of them goes the directory that they stand in. `last`: the file in it that says whose it is.
    """
    files.unlink_durably(records / "catalog.json")
    if last:
        for path in [path for path in records.iterdir() if path.name != last]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        files.fsync_dir(records)
    shutil.rmtree(records)
    files.fsync_dir(records.parent)
    if not any(records.parent.iterdir()):
        records.parent.rmdir()
        files.fsync_dir(records.parent.parent)


def may_be(home: Home, catalog: Catalog) -> bool:
    """Whether the catalog on disk is this one; also when that can't be told."""
    try:
        return bool(record.read(home.catalog, "catalog") == json.loads(json.dumps(_to_json(catalog, home.disks_dir))))
    except DiskchainError:
        return True


def _short(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _to_json(catalog: Catalog, root: Path) -> dict[str, Any]:
    body = asdict(catalog)
    for key, image in catalog.images.items():
        body["images"][key]["path"] = _short(image.path, root)
    return body


def _from_json(body: dict[str, Any], root: Path) -> Catalog:
    images = {k: Image(**{**v, "path": root / v["path"]}) for k, v in body["images"].items()}
    snapshots = {
        k: Snapshot(**{**v, "memory": Memory(**v["memory"]), "partial": tuple(v["partial"])})
        for k, v in body["snapshots"].items()
    }
    lists = {key: tuple(body.get(key, ())) for key in ("targets", "detached", "state_files")}
    return Catalog(**{**body, "images": images, "snapshots": snapshots, **lists})


def restore_overlay(frozen: Path, target: str, snapshot_id: str) -> Path:
    """Return the overlay that RECOVER.txt tells to make on a frozen image: not there before, so nothing of ours is hit."""
    return frozen.with_name(name_with("", frozen.stem, f".{target}.{snapshot_id}.restore.qcow2"))


def _quoted(path: Path) -> str:
    """As one word of a shell, always in quotes: `it's` too."""
    return "'" + str(path).replace("'", "'\\''") + "'"


def _rebase(image: Image, below: Image) -> str:
    return f"  qemu-img rebase -u -f qcow2 -F {below.fmt} -b {_quoted(below.path)} {_quoted(image.path)}"


def recover_text(home: Home, catalog: Catalog) -> bytes:
    """Return RECOVER.txt: how to open every state of the VM with plain qemu-img, should diskchain be gone."""
    lines = [
        f"The disks of {catalog.name} ({catalog.uuid}), as diskchain left them.",
        "Every file is plain qcow2 (or raw). Nothing here needs diskchain.",
        "",
        "The present: let the VM's disks point to",
        *(f"  {t}: {catalog.images[i].path}" for t, i in catalog.active.items()),
        *(
            f"  (detached: {catalog.images[i].target}, its last layer {catalog.images[i].path})"
            for i in catalog.detached
        ),
        "",
        "Should a reference to a backing file be lost, these commands restore it (with the VM off):",
        *(_rebase(image, catalog.images[image.backing]) for image in catalog.images.values() if image.backing),
        "",
        "Snapshots (frozen images: never write to them, make an overlay on them first):",
    ]
    for s in catalog.visible():
        lines.append(f"  {s.name} ({s.created})")
        for target, image_id in s.disks.items():
            image = catalog.images[image_id]
            fresh = restore_overlay(image.path, target, s.id)
            lines.append(
                f"    qemu-img create -f qcow2 -F {image.fmt} -b {_quoted(image.path)} {_quoted(fresh)}   # {target}"
            )
        if s.memory.saved:
            lines.append(f"    memory: {home.memory(s.id)}")
        lines += [f"    {name}: {home.snapshot_dir(s.id) / name}" for name in s.captured]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")
