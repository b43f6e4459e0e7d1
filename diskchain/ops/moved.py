"""Where does a layer lie now that is gone from its place? What can be proven of that, and what was only found.

A fingerprint covers header and tables. It is the same for every layer without data on the same image, and stays the same
when data is written in place, in a copy; so it proves nothing without the time of the last write, which `mv` keeps, or the
digest of a seal. What somebody else uses is not taken in any case.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from diskchain.chain.allocation import held_bytes
from diskchain.chain.model import Catalog, Image
from diskchain.errors import DiskchainError
from diskchain.host import files
from diskchain.ops import base, directories, images_known
from diskchain.ops.allocation import allocated
from diskchain.ops.directories import Identity
from diskchain.ops.vm import Host
from diskchain.store import seal as seal_store


@dataclass(frozen=True)
class Found:
    """A file with the fingerprint of a lost layer. `proof`: what else fits; without one `doubt` and what to do by hand."""

    path: Path
    proof: str = ""
    doubt: str = ""
    remedy: str = ""


def find(host: Host, catalog: Catalog, image: Image) -> list[Found]:
    """Return the files of known directories that have a frozen layer's fingerprint. Raise Unreachable."""
    if image.fingerprint is None:
        return []
    beside = {i.path.parent for i in catalog.images.values()}
    taken = _taken(host, catalog)
    places = base.find(host, dict(image.fingerprint), image.fmt, *beside)
    return [_judged(image, path, taken.get(directories.identity(path) or (-1, -1))) for path in places]


def place(found: list[Found]) -> Found | None:
    """Return the only file that is proven to be the layer."""
    proven = [one for one in found if one.proof]
    return proven[0] if len(proven) == 1 else None


def _judged(image: Image, path: Path, user: str | None) -> Found:
    back = f"mv '{path}' '{image.path}'"
    if user is not None:
        return Found(
            path, doubt=f"{user} uses it", remedy=f"leave it there; bring {image.path.name} back from elsewhere"
        )
    if not _holds_data(image, path):
        return Found(path, doubt="holds no data, so that fits every empty layer on the same image",
                     remedy=f"if it is this one: {back}")  # fmt: skip
    proof = _proof(image, path)
    if proof:
        return Found(path, proof=proof)
    doubt = ("was written to at another time: a copy, perhaps with other data" if _written(image) is not None
             else "the time of its last write was not recorded: it may be a copy with other data")  # fmt: skip
    return Found(path, doubt=doubt,
                 remedy=f"bring the right file back; only if you know that nothing wrote to this one: {back}")  # fmt: skip


def _holds_data(image: Image, path: Path) -> bool:
    """Of a raw file the time is part of the fingerprint: that proves it without any data, too."""
    if image.fmt == "raw":
        return True
    with contextlib.suppress(DiskchainError):
        return held_bytes(allocated(path)) > 0
    return False


def _proof(image: Image, path: Path) -> str:
    """What proves that a file with the same tables has the same data."""
    with contextlib.suppress(DiskchainError, OSError):
        if path.stat().st_mtime_ns == _written(image):
            return "the time of its last write"
        seal = seal_store.load(image.path)
        if seal and seal.sha256 and files.sha256_file(path) == seal.sha256:
            return "the digest of its seal"
    return ""


def _written(image: Image) -> object:
    """When a frozen layer was last written (ns); None where nobody noted it.

    A seal was made later than the fingerprint, by somebody who looked: its time counts.
    """
    with contextlib.suppress(DiskchainError):
        seal = seal_store.load(image.path)
        if seal is not None:
            return seal.mtime_ns
    recorded = image.fingerprint or {}
    return recorded.get("written_ns", recorded.get("mtime_ns"))


def _taken(host: Host, catalog: Catalog) -> dict[Identity, str]:
    """Every file that is a disk or a layer of some VM. A base that others stand on, too, may be followed: it is no state
    of theirs.
    """
    found = {directories.identity(image.path): catalog.name for image in catalog.images.values()}
    for other in host.neighbours():
        if other.uuid != catalog.uuid:
            found.update({directories.identity(disk): other.label for disk in other.disks})
    for other, records in images_known.catalogs(host):
        if other.uuid != catalog.uuid:
            ids = {*records.active.values(), *records.detached}
            found.update({directories.identity(image.path): other.label for image in records.images.values()
                          if image.ours or image.id in ids or records.frozen_by(image.id)})  # fmt: skip
    return {identity: who for identity, who in found.items() if identity is not None}
