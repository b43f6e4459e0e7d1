"""Files of a VM lie elsewhere now: let its definition name them there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from diskchain.chain.machine import DiskSpec, Machine
from diskchain.chain.model import Image
from diskchain.ops.vm import VM


async def follow(vm: VM, moved: Mapping[Path, Image], home: Path | None = None) -> None:
    """Given where each file was, and what is in its place (as the catalog has it), change the definition. Can be repeated.

    `home`: the records are there now, too: the definition is written in one step with that (a machine of ours).
    """
    if vm.registered is None:
        await vm.driver.align(vm.catalog.active_chains(), list(moved))
        return
    registered = replace(
        vm.registered, machine=with_images(vm.registered.machine, moved), home=home or vm.registered.home
    )
    if registered != vm.registered:
        vm.host.machines.put(registered)
        vm.registered = registered


def machine_of(vm: VM) -> Machine | None:
    """Return the definition of a machine of ours."""
    return vm.registered.machine if vm.registered else None


def warning(vm: VM, before: Machine | None) -> str | None:
    """Given the definition of before, say what an admin has to write into the machine file; None where nothing changed."""
    if vm.registered is None or before is None or vm.registered.machine == before:
        return None
    places = ", ".join(f"{d.target}: {d.image}" for d in vm.registered.machine.disks if d not in before.disks)
    return f"before {vm.name} is defined again, write the new place into {vm.registered.source} ({places})"


def with_images(machine: Machine, moved: Mapping[Path, Image]) -> Machine:
    """Return the machine with its disks where they are now."""
    return replace(machine, disks=tuple(_disk(disk, moved) for disk in machine.disks))


def _disk(disk: DiskSpec, moved: Mapping[Path, Image]) -> DiskSpec:
    image = moved.get(Path(disk.image))
    return disk if image is None else replace(disk, image=str(image.path), fmt=image.fmt)
