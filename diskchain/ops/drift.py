"""Drift: the definition against the catalog, and against what the running QEMU was started with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from diskchain.chain.model import Catalog
from diskchain.chain.rules import Finding, error, info, warning
from diskchain.drivers.machines import Registered


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
