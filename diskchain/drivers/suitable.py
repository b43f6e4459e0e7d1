"""Which disks of a domain a snapshot can cover: image files in qcow2 or raw that one VM alone writes to. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diskchain.drivers.domain_xml import DomainDisk

_FORMATS = ("qcow2", "raw")
_NATIVE = {"rbd": "rbd snap create POOL/IMAGE@NAME", "iscsi": "a snapshot on the iSCSI server",
           "nbd": "a snapshot on the NBD server", "gluster": "gluster snapshot create"}  # fmt: skip


@dataclass(frozen=True)
class Unsuitable:
    """A disk that the guest writes to and a snapshot of ours can't cover: why, and what to use instead."""

    target: str
    why: str
    instead: str


def suitable(disks: Sequence[DomainDisk]) -> tuple[dict[str, DomainDisk], list[Unsuitable]]:
    """Given a domain's disks, return those that snapshots cover, and those that the guest writes to and they can't.

    What the guest can't write to (CD-ROM, read-only) is neither: it needs no snapshot.
    """
    taken: dict[str, DomainDisk] = {}
    refused: list[Unsuitable] = []
    for disk in disks:
        if disk.device == "cdrom" or disk.read_only or disk.is_empty:
            continue
        why = _why_not(disk)
        if why is None:
            taken[disk.target] = disk
        else:
            refused.append(Unsuitable(disk.target, *why))
    return taken, refused


def _why_not(disk: DomainDisk) -> tuple[str, str] | None:
    if disk.device == "floppy":
        return "a floppy that can be written", "eject it, or define it with <readonly/>"
    if disk.type == "network":
        how = _NATIVE.get(disk.protocol, "the server's own snapshots")
        return f"a network disk ({disk.protocol or 'unknown protocol'})", how
    if disk.type == "volume":
        why = f"a volume that libvirt does not find ({disk.volume} in the pool {disk.pool})"
        return why, f"virsh pool-start {disk.pool}, virsh pool-refresh {disk.pool}"
    if disk.type == "block" or disk.device == "lun":
        return f"a block device ({disk.path})", f"lvcreate -s -n NAME {disk.path}, or the storage's own snapshots"
    if disk.type != "file" or disk.path is None:
        return f"a disk of type {disk.type}", "the storage's own snapshots"
    if disk.shareable:
        return "shared with other VMs (<shareable/>)", "a snapshot inside the guests' cluster file system"
    if disk.encrypted:
        return "encrypted by QEMU (<encryption>)", "encrypt inside the guest, or the host's volume"
    if disk.sliced:
        return "a part of its file (<slices>)", "give it a file of its own"
    if disk.transient:
        return "transient: its writes are thrown away at every stop", "nothing: there is nothing to keep"
    if (disk.fmt or "raw") not in _FORMATS:
        return f"an image in the format {disk.fmt}", f"qemu-img convert -O qcow2 {disk.path} NEW.qcow2"
    return None
