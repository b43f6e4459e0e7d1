"""Every image file that this host's diskchain can know of: where images lie, and who stands on whom.

Files are told apart by device and inode, so every name of one counts. Looked through: the directories of all definitions
and catalogs, and the image roots of the configuration with what is below them (to a depth).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from diskchain.chain.model import Catalog
from diskchain.errors import DiskchainError
from diskchain.ops import sharers
from diskchain.ops.vm import Host, Neighbour
from diskchain.store import catalog as catalog_store
from diskchain.store.catalog import Home

Identity = tuple[int, int]
MOST = 100_000  # files: a root that is somebody's whole file server must not stop a delete


@dataclass
class Scan:
    """What was found. `names`: every name of a file, symlinks too; `stands_on`: an overlay's backing file."""

    names: dict[Identity, list[Path]] = field(default_factory=dict)
    stands_on: dict[Identity, Identity] = field(default_factory=dict)

    def overlays_of(self, image: Identity) -> Iterator[tuple[Identity, Path]]:
        """Yield what stands on an image, and what stands on that, ..."""
        todo, seen = [image], {image}
        while todo:
            below = todo.pop()
            for overlay, backing in self.stands_on.items():
                if backing == below and overlay not in seen:
                    seen.add(overlay)
                    todo.append(overlay)
                    yield overlay, self.names[overlay][0]


def catalogs(host: Host) -> Iterator[tuple[Neighbour, Catalog]]:
    """Yield every VM that has records that can be read. Raise Unreachable when libvirt does not answer."""
    for neighbour in host.neighbours():
        if neighbour.home is not None:
            with contextlib.suppress(DiskchainError):
                yield neighbour, catalog_store.load(Home(neighbour.home))


def directories(host: Host, *more: Path) -> list[Path]:
    """Return where images may lie: of all definitions, of all catalogs, the image roots with what is below them."""
    found = {path.resolve() for path in more}
    for neighbour in host.neighbours():
        found |= {disk.parent.resolve() for disk in neighbour.disks}
    for _, catalog in catalogs(host):
        found |= {image.path.parent.resolve() for image in catalog.images.values()}
    for root in host.config.image_roots:
        found |= set(sharers.directories_below(root.resolve(), sharers.DEPTH))
    return sorted(found)


def scan(places: Iterable[Path]) -> Scan:
    """Look through directories: every file with its names, every overlay with what it stands on."""
    found = Scan()
    for directory in places:
        for path in _files(directory):
            with contextlib.suppress(OSError, ValueError):
                status = path.stat()  # a symlink is another name
                identity = (status.st_dev, status.st_ino)
                known = found.names.setdefault(identity, [])
                known.append(path)
                backing = sharers.backing_identity(path) if len(known) == 1 and not path.is_symlink() else None
                if backing is not None:
                    found.stands_on[identity] = backing
        if len(found.names) > MOST:
            break
    return found


def _files(directory: Path) -> list[Path]:
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        usable = (e for e in entries if e.is_file(follow_symlinks=True) and not e.name.endswith((".trash", ".seal")))
        return sorted((Path(e.path) for e in usable), key=lambda path: (path.is_symlink(), path))
    return []
