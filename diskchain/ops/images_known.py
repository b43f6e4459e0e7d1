"""Every image file that this host's diskchain can know of: where images lie, and who stands on whom.

Files are told apart by device and inode, so every name of one counts. Looked through: the directories of all definitions
and catalogs, and the image roots of the configuration with what is below them (to a depth).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from diskchain.chain.model import Catalog
from diskchain.errors import DiskchainError
from diskchain.ops.directories import DEPTH, Identity, Unread, below, look_through
from diskchain.ops.vm import Host, Neighbour
from diskchain.store import catalog as catalog_store
from diskchain.store.catalog import Home

MOST = 100_000  # files: a root that is somebody's whole file server must not stop a delete


@dataclass
class Scan:
    """What was found. `names`: every name of a file, symlinks too; `stands_on`: an overlay's backing file (more than one
    where its name may mean several).
    """

    names: dict[Identity, list[Path]] = field(default_factory=dict)
    stands_on: dict[Identity, set[Identity]] = field(default_factory=dict)
    unread: list[Unread] = field(default_factory=list)

    def overlays_of(self, image: Identity) -> Iterator[tuple[Identity, Path]]:
        """Yield what stands on an image, and what stands on that, ..."""
        todo, seen = [image], {image}
        while todo:
            below = todo.pop()
            for overlay, backing in self.stands_on.items():
                if below in backing and overlay not in seen:
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
        found |= set(below(root.resolve(), DEPTH))
    return sorted(found)


def scan(places: Iterable[Path]) -> Scan:
    """Look through directories: every file with its names, every overlay with what it stands on, what can't be read."""
    found = Scan()
    for directory in places:
        looked = look_through(directory)
        for path, identity in looked.names:
            if not path.name.endswith((".trash", ".seal")):
                found.names.setdefault(identity, []).append(path)
            if path in looked.overlays:
                found.stands_on.setdefault(identity, set()).update(looked.overlays[path])
        found.unread += looked.unread
        if len(found.names) > MOST:
            found.unread.append(Unread(directory, f"more than {MOST} files; the rest was not looked at", denied=False))
            break
    return found
