"""Which VM is meant, who manages it, and where its records are: machines of ours first, then libvirt's domains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diskchain.chain.model import vm_name
from diskchain.config import Config
from diskchain.drivers.domains import Domain, Domains
from diskchain.drivers.machines import Machines, Registered
from diskchain.drivers.protocol import Driver
from diskchain.drivers.qemu import QemuDriver
from diskchain.errors import DiskchainError, NotFound, UnsupportedDisk, UsageError
from diskchain.ops.approve import approve_chain
from diskchain.store.catalog import Home

QEMU, LIBVIRT = "qemu", "libvirt"
_ASKED_FOR = 3.0  # seconds that libvirt may hold us up when a machine of ours is meant


@dataclass(frozen=True)
class Place:
    """One VM: who manages it, and its records. `home` is None for a domain that we have no records of yet."""

    name: str
    uuid: str
    home: Home | None
    registered: Registered | None = None
    domain: Domain | None = None

    @property
    def kind(self) -> str:
        """qemu or libvirt."""
        return QEMU if self.registered else LIBVIRT


class Places:
    """All VMs of this host."""

    def __init__(self, config: Config, machines: Machines, domains: Domains) -> None:
        self._config, self._machines, self._domains = config, machines, domains

    def names(self) -> list[str]:
        """Return the names of all VMs, sorted; one that both managers have stands with its manager, twice.

        Raise Unreachable when a libvirt that was asked for does not answer.
        """
        ours, theirs = self._machines.names(), self._domains.names()
        both = set(ours) & set(theirs)
        found = [f"{QEMU}:{n}" if n in both else n for n in ours]
        return sorted(found + [f"{LIBVIRT}:{n}" if n in both else n for n in theirs])

    def find(self, text: str) -> Place:
        """Given what an admin typed (`web1`, `qemu:web1`, `libvirt:web1`), return the VM.

        Raise NotFound, UsageError naming both when two managers have it, Unreachable.
        """
        kind, _, rest = text.partition(":")
        if kind == QEMU and rest:
            return self._machine(rest)
        if kind == LIBVIRT and rest:
            return self._of_domain(self._domains.get(rest))
        ours = text in self._machines.names()
        theirs = self._also_a_domain(text) if ours else self._domains.find(text)
        if ours and theirs:
            raise UsageError(f"{text!r} is a machine of diskchain's and a libvirt domain",
                             hint=f"{QEMU}:{text} or {LIBVIRT}:{text}")  # fmt: skip
        if theirs:
            return self._of_domain(theirs)
        return self._machine(text)

    def _also_a_domain(self, name: str) -> Domain | None:
        """Whether a machine's name is a domain's too; a libvirt that can't be asked does not keep us from our machines."""
        try:
            return self._domains.find(name, _ASKED_FOR)
        except DiskchainError:
            return None

    def _machine(self, name: str) -> Place:
        try:
            registered = self._machines.get(vm_name(name))
        except DiskchainError as error:
            if error.exit_code not in (2, 4):
                raise
            hint = "diskchain machine list" + ("; virsh list --all" if self._domains.uri else "")
            raise NotFound(f"there is no VM {name!r}", hint=hint) from None
        return Place(registered.machine.name, registered.machine.uuid, Home(registered.home), registered)

    def _of_domain(self, domain: Domain) -> Place:
        return Place(domain.name, domain.uuid, find_home(domain), domain=domain)

    def driver(self, place: Place, *, socket: str) -> Driver:
        """Open a VM's driver. `socket`: qmp for who changes it, info for who looks (a machine of ours)."""
        if place.registered:
            return QemuDriver(place.registered, self._machines, self._config.run_dir, socket=socket)
        assert place.domain
        log = self._config.run_dir / "domains" / f"{place.uuid}.log"
        driver: Driver = self._domains.driver(place.domain, log)
        return driver


def find_home(domain: Domain) -> Home | None:
    """Return the records of a domain: beside any of its disks, or of the images below them; None when there are none."""
    for directory in _directories(domain):
        home = Home(directory / ".diskchain" / domain.uuid)
        if home.catalog.exists() or home.recover_txt.exists():
            return home
    return None


def _directories(domain: Domain) -> Iterator[Path]:
    seen: set[Path] = set()
    for image in domain.images:
        directory = image.parent.resolve()  # an image is named by where it really is, too
        if directory not in seen:
            seen.add(directory)
            yield directory
    for image in domain.images:
        try:
            below = approve_chain(image, "qcow2")[1:]
        except DiskchainError:
            continue
        for layer in below:
            if layer.path.parent not in seen:
                seen.add(layer.path.parent)
                yield layer.path.parent


def new_home(domain: Domain) -> Home:
    """Return where the records of a domain will be: beside its first disk in a file. Raise UnsupportedDisk."""
    for disk in domain.disks:
        if disk.path is not None and disk.type == "file" and disk.device == "disk" and not disk.read_only:
            return Home.beside(disk.path.parent.resolve() / disk.path.name, domain.uuid)
    raise UnsupportedDisk(f"{domain.name} has no disk in an image file", hint="diskchain handles qcow2 and raw files")
