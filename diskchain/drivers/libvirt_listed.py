"""Our snapshots in libvirt's own list (`virsh snapshot-list`): metadata only, no file is touched.

Each carries our id and a digest of its XML in its description; what has no such mark is somebody else's and is left alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import libvirt

from diskchain.drivers import domain_xml
from diskchain.drivers.libvirt_api import called
from diskchain.drivers.protocol import Listed

_MARK = re.compile(r"\[diskchain ([0-9a-f]+) ([0-9a-f]{16})\]")


class DomainSnapshots:
    """To be mixed into LibvirtDriver."""

    _domain: Any

    async def listed_snapshots(self) -> dict[str, str]:
        """The names and our ids of those that carry our mark."""
        return {name: mark[0] for name, mark in (await self._marks()).items()}

    async def _marks(self) -> dict[str, tuple[str, str]]:
        found = {}
        for snapshot in await called("list its snapshots", self._domain.listAllSnapshots, 0):
            match = _MARK.search(str(await called("read a snapshot", snapshot.getXMLDesc, 0)))
            if match:
                found[str(snapshot.getName())] = (match[1], match[2])
        return found

    async def list_snapshots(self, wanted: Sequence[Listed]) -> None:
        """Written anew, parents first, unless all of it stands there already."""
        xmls = {one.name: _xml(one) for one in wanted}
        marks = {one.name: (one.id, _digest(xmls[one.name])) for one in wanted}
        there = await self._marks()
        current = next((one.name for one in wanted if one.current), None)
        if there == marks and await self._current() == current:
            return
        for name in there:
            snapshot = await called("find a snapshot", self._domain.snapshotLookupByName, name, 0)
            await called("take a snapshot out of its list", snapshot.delete,
                         libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)  # fmt: skip
        for one in wanted:
            flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
            flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT if one.current else 0
            xml = domain_xml.with_mark(xmls[one.name], f"[diskchain {one.id} {marks[one.name][1]}]")
            await called("put a snapshot into its list", self._domain.snapshotCreateXML, xml, flags)

    async def _current(self) -> str | None:
        if not await called("ask for its current snapshot", self._domain.hasCurrentSnapshot, 0):
            return None
        return str((await called("ask for its current snapshot", self._domain.snapshotCurrent, 0)).getName())


def _xml(one: Listed) -> str:
    state = "disk-snapshot" if one.memory is None and one.was != "stopped" else one.was.replace("stopped", "shutoff")
    domain = json.loads(one.definition.text)["persistent"]
    return domain_xml.listed(one.name, one.description, one.created, one.parent, state, one.memory, domain, one.layers)


def _digest(xml: str) -> str:
    return hashlib.sha256(xml.encode()).hexdigest()[:16]
