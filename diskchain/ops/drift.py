"""Drift: the definition against the catalog, and against what the running QEMU was started with."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from diskchain.chain.model import Catalog
from diskchain.chain.rules import Finding, error, info, warning
from diskchain.drivers import domain_xml
from diskchain.drivers.domains import Domain
from diskchain.drivers.machines import Registered
from diskchain.drivers.suitable import suitable
from diskchain.host import files, locks
from diskchain.ops.listed import of_others


def definition(registered: Registered, catalog: Catalog) -> Iterator[Finding]:
    """The disks of the definition against the chains of the catalog. A start takes the layers from the catalog alone."""
    name, machine = registered.machine.name, registered.machine
    again = f"diskchain machine define {registered.source}"
    here, there = {d.target for d in machine.disks}, set(catalog.active)
    for target in sorted(here - there):
        yield error("definition-differs", f"{name} {target}", "the definition has this disk, the catalog has not: it can't start",
                    f"take it out of the machine file, then: {again}")  # fmt: skip
    for target in sorted(there - here):
        yield error("definition-differs", f"{name} {target}", "the catalog has this disk, the definition has not: the guest "
                    "would not see it", f"put it back into the machine file, then: {again}")  # fmt: skip
    for disk in machine.disks:
        if disk.target in there and not _belongs(catalog, disk.target, Path(disk.image)):
            yield warning("definition-differs", f"{name} {disk.target}", f"the definition names {disk.image}, which is no image of "
                          f"its chain in the catalog ({catalog.chain(catalog.active[disk.target])[-1].path})",
                          f"correct the machine file, then: {again}")  # fmt: skip
    if catalog.name != name:
        yield info("name-differs", name, f"the catalog says {catalog.name}; only the definition's name counts")


def of_domain(domain: Domain, catalog: Catalog, *, known: bool) -> Iterator[Finding]:
    """A libvirt domain against the catalog, and what libvirt holds that would get into the way."""
    name = domain.name
    for (target, path), kinds in _sources(domain).items():
        if target in catalog.active:
            yield from _source(name, target, path, kinds, catalog)
    if domain.managed_save:
        yield warning("managed-save", name, "its memory is in a managed save, which fits its disks only as they are now",
                      f"virsh start {name}, or drop it: virsh managedsave-remove {name}")  # fmt: skip
    theirs = of_others(domain, catalog)
    if theirs:
        days = int((time.time() - theirs[0][1]) / 86400)
        yield warning("libvirt-snapshots", name, f"libvirt itself has {len(theirs)} of it, the oldest ({theirs[0][0]}) of {days} "
                      "days ago; virsh snapshot-delete and snapshot-revert change the chain", f"virsh snapshot-list {name} "
                      "--tree; leave them, or let them go with virsh snapshot-delete --metadata")  # fmt: skip
    for disk in suitable(domain.disks)[1]:
        yield info("not-covered", f"{name} {disk.target}", f"it is {disk.why}: no snapshot covers it", disk.instead)
    if not domain.persistent:
        yield info(
            "transient", name, "its definition is gone when it stops; it can't be reverted", f"virsh dumpxml {name}"
        )
    if not known:
        yield info("not-adopted", name, "diskchain has no records of it", f"diskchain create {name} makes them")


def _sources(domain: Domain) -> dict[tuple[str, Path], list[str]]:
    """Which of its definitions, live and persistent, name a file as a disk."""
    named: dict[tuple[str, Path], list[str]] = {}
    for xml, kind in zip(domain.xmls, ("live" if domain.active else "persistent", "persistent"), strict=False):
        for disk in domain_xml.disks(xml):
            if disk.path is not None:
                named.setdefault((disk.target, disk.path), []).append(kind)
    return named


def _source(name: str, target: str, path: Path, kinds: list[str], catalog: Catalog) -> Iterator[Finding]:
    says = catalog.images[catalog.active[target]].path
    if "live" in kinds and is_stale(catalog, target, path):
        yield warning("libvirt-stale", f"{name} {target}", f"QEMU writes to {says}, as the catalog says; libvirt "
                      f"believes {path}", f"diskchain stop {name}; diskchain start {name}")  # fmt: skip
        kinds = [kind for kind in kinds if kind != "live"]
    if kinds and says != path and not files.same_file(says, path):
        which = f"{' and '.join(kinds)} {'definitions name' if len(kinds) > 1 else 'definition names'}"
        yield error("active-differs", f"{name} {target}", f"its {which} {path}, the catalog says {says}: something else "
                    "than diskchain changed it", f"diskchain adopt {name}; do not start it before")  # fmt: skip


def is_stale(catalog: Catalog, target: str, believed: Path) -> bool:
    """Whether libvirt believes a disk on a layer below the active one, though that is open: QEMU knows better.

    Not by QEMU's byte locks: on QEMU 10 a paused domain showed none.
    """
    active, *below = catalog.chain(catalog.active[target])
    return any(files.same_file(believed, image.path) for image in below) and locks.is_open(active.path)


def _belongs(catalog: Catalog, target: str, path: Path) -> bool:
    image = catalog.image_at(path)
    return image is not None and image.target == target


def run_record(name: str, differences: Sequence[str], problem: str | None) -> Iterator[Finding]:
    """Given what differs between a running machine and its definition in words, or why that can't be told."""
    if problem:
        yield warning("run-record-missing", name, problem,
                      f"a snapshot with memory needs it: diskchain stop {name}, then start")  # fmt: skip
    elif differences:
        yield info("restart-needed", name, f"defined anew since it was started: {'; '.join(differences)}",
                   "it takes effect at the next start")  # fmt: skip
