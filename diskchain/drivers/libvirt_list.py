"""Every domain of a connection, as values: what it is called, what it names, what libvirt holds of it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import libvirt

from diskchain.drivers import domain_xml
from diskchain.drivers.domain_xml import DomainDisk
from diskchain.drivers.domains import Domain
from diskchain.drivers.libvirt_api import asked, translated
from diskchain.errors import DiskchainError, Unreachable

SECURE = libvirt.VIR_DOMAIN_XML_SECURE
INACTIVE = SECURE | libvirt.VIR_DOMAIN_XML_INACTIVE
MIGRATABLE = SECURE | libvirt.VIR_DOMAIN_XML_MIGRATABLE


def list_domains(connection: Any) -> list[Domain]:
    """Return every domain of a connection. One that vanishes meanwhile is left out. Raise Unreachable, libvirtError."""
    listed = []
    for domain in connection.listAllDomains():
        try:
            listed.append(_listed(connection, domain))
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:  # a domain left out would be one that uses no image
                raise translated(error, "look at a domain") from error
    return listed


def find_domain(connection: Any, text: str) -> Domain | None:
    """Return the domain of that name or uuid, or None. Raise Unreachable."""
    for look in (connection.lookupByName, connection.lookupByUUIDString):
        try:
            return _listed(connection, look(text))
        except libvirt.libvirtError as error:
            if error.get_error_code() not in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_INVALID_ARG):
                raise translated(error, f"look for {text}") from error
    return None


def host_facts(connection: Any) -> tuple[int, int, str]:
    """Return the versions of libvirt's daemon and its QEMU, and its capabilities XML. Raise libvirtError."""
    return int(connection.getLibVersion()), int(connection.getVersion()), str(connection.getCapabilities())


def _listed(connection: Any, domain: Any) -> Domain:
    active, persistent = bool(domain.isActive()), bool(domain.isPersistent())
    saved = bool(domain.hasManagedSaveImage(0))
    xmls = [domain.XMLDesc(SECURE)]
    if active and persistent:
        xmls.append(domain.XMLDesc(INACTIVE))
    if saved:
        with _gone_meanwhile():
            xmls.append(domain.managedSaveGetXMLDesc(0))
    return Domain(str(domain.name()), str(domain.UUIDString()), persistent, active, saved,
                  _snapshots(domain), tuple(map(str, xmls)), resolved(connection, str(xmls[0])))  # fmt: skip


@contextlib.contextmanager
def _gone_meanwhile() -> Iterator[None]:
    """A saved image may be started from, and be gone, between two questions; a lost connection is something else."""
    try:
        yield
    except libvirt.libvirtError as error:
        if isinstance(translated(error, "look at a domain"), Unreachable):
            raise


def _snapshots(domain: Any) -> tuple[tuple[str, int], ...]:
    """The names and times of the snapshots that libvirt has metadata of, oldest first."""
    if not domain.snapshotNum(0):
        return ()
    found = [(str(s.getName()), _created(str(s.getXMLDesc(0)))) for s in domain.listAllSnapshots(0)]
    return tuple(sorted(found, key=lambda each: each[1]))


def _created(xml: str) -> int:
    found = re.search(r"<creationTime>(\d+)<", xml)
    return int(found[1]) if found else 0


def resolved(connection: Any, xml: str) -> tuple[DomainDisk, ...]:
    """The disks of a definition; a pool's volume with its path and kind, where the pool can tell."""
    return tuple(_with_volume_path(connection, disk) for disk in domain_xml.disks(xml))


def with_files(connection: Any, xml: str) -> str:
    """Return a definition that names the files that volumes are: it must be understood when the pool is gone."""
    volumes = {
        d.target: (d.path, d.fmt or "raw") for d in resolved(connection, xml) if d.pool and d.path and d.type == "file"
    }
    return domain_xml.with_sources(xml, volumes) if volumes else xml


def _with_volume_path(connection: Any, disk: DomainDisk) -> DomainDisk:
    if disk.type != "volume" or disk.path is not None:
        return disk
    kinds = {libvirt.VIR_STORAGE_VOL_FILE: "file", libvirt.VIR_STORAGE_VOL_BLOCK: "block"}

    def look() -> tuple[int, str]:
        volume = connection.storagePoolLookupByName(disk.pool).storageVolLookupByName(disk.volume)
        return volume.info()[0], volume.path()

    try:
        kind, path = asked("look for a volume", look)
    except DiskchainError:
        return disk
    return replace(disk, type=kinds.get(kind, "network"), path=Path(path))
