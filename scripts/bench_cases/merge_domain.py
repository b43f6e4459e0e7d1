"""`virsh blockcommit`: libvirt's own way to merge, which needs a running domain."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from scripts.bench_cases.bench import say
from scripts.bench_cases.domains import available
from tests.support.domain import DomainRig
from tests.support.libvirtd import Libvirtd

NAME = "blockcommit"
VM = "bench-merge"


@contextlib.contextmanager
def libvirt() -> Iterator[Libvirtd | None]:
    """A private libvirtd, or None where there can't be one."""
    if not available():
        say("virsh blockcommit: left out, there is no libvirtd here that root could run")
        yield None
        return
    daemon = Libvirtd()
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.destroy()


def argv(daemon: Libvirtd) -> list[str]:
    """What an admin types to fold the uppermost layer of `running` into the one below it, and go on there."""
    return ["virsh", "-q", "-c", daemon.uri, "blockcommit", VM, "vda", "--active", "--pivot", "--wait"]


@contextlib.contextmanager
def running(daemon: Libvirtd, top: Path) -> Iterator[None]:
    """A domain on that layer which does nothing (its guest is paused), so that all of the disk is the merge's."""
    rig = DomainRig(top.parent.parent / "domain", name=VM, daemon=daemon, memory="64 MiB")
    disk = (
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{top}'/>"
        "<target dev='vda' bus='virtio'/></disk>"
    )
    definition = rig.dir / "vm.xml"
    definition.write_text(rig.xml(guest=False, disks=disk))
    try:
        rig.virsh("define", str(definition))
        rig.virsh("start", "--paused", VM)
        yield
    finally:
        rig.destroy()
