"""A VM that we have no records of yet: its chain as it is becomes the catalog. Nothing is written here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diskchain.chain.model import Catalog, Image
from diskchain.drivers.domains import Domain
from diskchain.drivers.suitable import suitable
from diskchain.errors import ChainDamaged, HostileImage, UnsupportedDisk, UsageError
from diskchain.host import files
from diskchain.ops.approve import approve_chain, fingerprint
from diskchain.ops.ids import new_id


def catalog_of(domain: Domain, roots: Sequence[Path]) -> Catalog:
    """Return the catalog of a domain as it is now: the chain of each suitable disk; none of it is ours.

    Raise UnsupportedDisk when no disk is suitable; HostileImage, ChainDamaged, NotFound for what the files say.
    """
    taken, refused = suitable(domain.disks)
    if not taken:
        text = "; ".join(f"{u.target} is {u.why}" for u in refused) or "it has no disk"
        raise UnsupportedDisk(f"{domain.name} has no disk that a snapshot can cover: {text}",
                              hint=refused[0].instead if refused else "give it a disk in a qcow2 or raw file")  # fmt: skip
    catalog = Catalog(domain.uuid, domain.name, targets=tuple(taken))
    allowed = [*roots, *(disk.path.parent for disk in taken.values() if disk.path)]
    for target, disk in taken.items():
        assert disk.path
        catalog = with_chain(catalog, target, disk.path, disk.fmt or "raw", allowed)
    return catalog


def refreshed(catalog: Catalog, domain: Domain, roots: Sequence[Path], *, moved: bool = False) -> Catalog:
    """Return the catalog with the disks that the domain has now: those attached since are added, the others detached.

    Raise ChainDamaged when a disk that is known lies elsewhere now: something else than diskchain switched it. With `moved`
    that is not looked at. Raise UnsupportedDisk when libvirt can't tell where it lies.
    """
    taken, refused = suitable(domain.disks)
    lost = {disk.target for disk in domain.disks if disk.type == "volume" and disk.target in catalog.active}
    for one in refused:
        if one.target in lost:
            raise UnsupportedDisk(f"{one.target} of {domain.name} is {one.why}", hint=one.instead)
    for target, disk in taken.items():
        known = catalog.active.get(target)
        if not moved and known is not None and disk.path and not files.is_same(catalog.images[known].path, disk.path):
            raise ChainDamaged(f"{target} of {domain.name} is defined with {disk.path}, the catalog says "
                               f"{catalog.images[known].path}",
                               hint=f"switched by something else; take it up: diskchain adopt {domain.name}")  # fmt: skip
    catalog = catalog.without_disks(set(catalog.active) - set(taken))
    allowed = [*roots, *(disk.path.parent for disk in taken.values() if disk.path)]
    for target, disk in taken.items():
        if target not in catalog.active and disk.path:
            catalog = _attached(catalog, target, disk.path, disk.fmt or "raw", allowed)
    return replace(catalog, name=domain.name, targets=tuple(taken), active={t: catalog.active[t] for t in taken})


def _attached(catalog: Catalog, target: str, path: Path, fmt: str, roots: Sequence[Path]) -> Catalog:
    image = next((image for image in catalog.images.values() if files.is_same(image.path, path)), None)
    if image is None:
        return with_chain(catalog, target, path, fmt, roots)
    if image.id not in catalog.detached:
        raise ChainDamaged(f"{path} is a frozen layer of {catalog.name}; it must not be written",
                           hint=f"detach it ({target}), and go back to a snapshot that has it")  # fmt: skip
    detached = tuple(i for i in catalog.detached if i != image.id)
    return replace(catalog, active={**catalog.active, target: image.id}, detached=detached)


def with_chain(catalog: Catalog, target: str, top: Path, fmt: str, roots: Sequence[Path]) -> Catalog:
    """Return the catalog with the chain of a disk, as its files say, as the chain of `target`."""
    try:
        chain = approve_chain(top, fmt, roots=roots)
    except HostileImage as error:
        if "outside the allowed" not in error.message:
            raise
        raise HostileImage(error.message, hint="if that backing file is yours, add its directory to image_roots in "
                           "/etc/diskchain/diskchain.toml") from error  # fmt: skip
    below: str | None = None
    for found in reversed(chain):
        known = catalog.image_at(found.path)
        if known is not None and found is chain[0]:
            raise UsageError(f"{found.path} is used by two disks of {catalog.name}")
        if known is None:
            mark = fingerprint(found.path, found.fmt) if found is not chain[0] else None
            known = Image(new_id(), found.path, found.fmt, target, found.virtual_size, below, fingerprint=mark)
            catalog = catalog.with_images([known])
        below = known.id
    return replace(catalog, active={**catalog.active, target: below or ""})
