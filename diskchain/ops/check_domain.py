"""A part of check: a libvirt domain. What libvirt's definition says of its chains against their files, who made its layers,
and what would stand in the way of a snapshot. libvirt is asked and nothing is changed: no monitor command is passed through.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from diskchain.chain import qcow2
from diskchain.chain.model import Catalog, Image
from diskchain.chain.rules import Finding, error, info, warning
from diskchain.cluster.detect import refuse_managed
from diskchain.drivers import domain_xml
from diskchain.drivers.domains import Domain
from diskchain.errors import DiskchainError, Refused
from diskchain.host import files
from diskchain.ops import register
from diskchain.ops.looked import Look
from diskchain.ops.vm import Host

_DAY = 86400


async def find(host: Host, seen: Look, domain: Domain, catalog: Catalog) -> list[Finding]:
    """Return what is found about a domain whose chains are known."""
    found = await asyncio.to_thread(lambda: [*_layers(domain, catalog, time.time()), *_managed(domain.name)])
    return [*found, *(await _access(host, seen, catalog))]


def _layers(domain: Domain, catalog: Catalog, now: float) -> Iterator[Finding]:
    for target, chain in catalog.active_chains().items():
        yield from _raw_by_name_only(domain.name, target, chain[0])
        yield from of_others(domain.name, target, chain, _frozen_at(chain), now)
    for xml in domain.xmls:
        yield from backing_stores(domain.name, domain_xml.backing_stores(xml), catalog.active_chains())


def _raw_by_name_only(name: str, target: str, top: Image) -> Iterator[Finding]:
    """A qcow2 image that the definition calls raw: the guest sees its header, and writes over it."""
    if top.fmt != "raw":
        return
    try:
        fd = files.open_untrusted(top.path)
    except DiskchainError:
        return
    with open(fd, "rb") as image:
        if image.read(4) == qcow2.MAGIC:
            yield warning("format-differs", f"{name} {target}", f"the definition calls {top.path} raw, it begins like a qcow2 "
                          "image", "if it is one: virsh edit, <driver type='qcow2'/>, before the guest writes to it")  # fmt: skip


def _frozen_at(chain: list[Image]) -> list[float]:
    """When each lower layer was written last."""
    found = []
    for image in chain[1:]:
        try:
            found.append(image.path.stat().st_mtime)
        except OSError:
            continue
    return found


def of_others(name: str, target: str, chain: list[Image], frozen_at: list[float], now: float) -> Iterator[Finding]:
    """Overlays that something else made: an old snapshot of virsh or virt-manager, which nobody lists any more."""
    overlays = [image for image in chain[:-1] if not image.ours]
    if not overlays or not frozen_at:
        return
    days = int((now - min(frozen_at)) / _DAY)
    what = f"{len(overlays)} overlays that diskchain did not make, on {chain[-1].path.name}; the oldest layer is {days} days old"
    yield info(
        "layers-of-others", f"{name} {target}", what, f"diskchain adopt {name} takes them up; they stay as they are"
    )


def backing_stores(name: str, says: Mapping[str, list[Path]], chains: Mapping[str, list[Image]]) -> Iterator[Finding]:
    """The chain that libvirt noted in its XML against the one in the headers. No note is none: libvirt reads the headers.

    A disk that is on another file altogether was switched by something else; that is said elsewhere.
    """
    for target, noted in says.items():
        chain = [image.path for image in chains.get(target, [])]
        if noted and chain and files.same_file(noted[0], chain[0]) and not all(map(files.same_file, noted, chain)):
            one, other = (" <- ".join(path.name for path in reversed(paths)) for paths in (noted, chain))
            yield error("backing-store-differs", f"{name} {target}", f"its definition has the chain {one}, the files have {other}",
                        "with the VM off: virsh edit, and take <backingStore> out")  # fmt: skip


def _managed(name: str) -> Iterator[Finding]:
    try:
        refuse_managed(name)
    except Refused as problem:
        yield info("cluster-managed", name, problem.message, problem.hint)


async def _access(host: Host, seen: Look, catalog: Catalog) -> list[Finding]:
    """What a create would say before it changes anything."""
    try:
        driver = seen.driver(host)
    except DiskchainError:
        return []
    found = []
    try:
        tops = [catalog.images[i].path for i in catalog.active.values()]
        found += [info("manager", seen.name, remark) for remark in await driver.remarks()]
        await driver.check_files([path for path in tops if path.exists()], written=False)
        if seen.home is not None:
            found += register.differences(seen.name, catalog, seen.home, await driver.listed_snapshots())
    except Refused as problem:
        found.append(error("files-out-of-reach", seen.name, problem.message, problem.hint))
    except DiskchainError:
        pass  # a daemon that does not answer was named before
    finally:
        await driver.close()
    return found
