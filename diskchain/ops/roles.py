"""What a disk is for: `os` or `data`. What replaces an operating system replaces only disks that are `os`.

A machine of ours has it in its machine file; libvirt has no such mark, so that of a domain's disk is in the catalog.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from diskchain.chain.model import Catalog
from diskchain.drivers.machines import Registered
from diskchain.errors import NotFound, Refused
from diskchain.ops.vm import VM

ROLES = ("os", "data")


def of(catalog: Catalog, registered: Registered | None) -> dict[str, str]:
    """Return the role of each disk. Where nothing was said, a domain's first disk has the operating system."""
    if registered is not None:
        return {disk.target: disk.role for disk in registered.machine.disks}
    return {target: role(catalog.roles, catalog.active, target) for target in catalog.active}


def role(said: Mapping[str, str], targets: Mapping[str, str], target: str) -> str:
    """Return what was said of a domain's disk, or what is taken as given."""
    return said.get(target, "os" if target == next(iter(targets), None) else "data")


def refuse_other(vm: VM, target: str, wanted: str) -> None:
    """Raise Refused for a machine of ours (its machine file says it), NotFound for a disk that the domain has not."""
    if vm.driver.kind == "qemu":
        raise Refused(f"{vm.name} is a machine of diskchain's: its machine file says what its disks are for",
                      hint=f'role = "{wanted}" below that [[disk]], then: diskchain machine define FILE')  # fmt: skip
    if target not in vm.catalog.active:
        raise NotFound(f"{vm.name} has no disk {target}", hint=f"its disks: {', '.join(vm.catalog.active)}")


def set_role(vm: VM, target: str, wanted: str) -> bool:
    """Note a disk's role; return whether that changed anything. The VM's lock is held. Raise as `refuse_other`."""
    refuse_other(vm, target, wanted)
    before = of(vm.catalog, None)[target]
    vm.save(replace(vm.catalog, roles={**vm.catalog.roles, target: wanted}))
    return before != wanted
