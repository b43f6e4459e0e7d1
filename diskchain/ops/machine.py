"""machine define, undefine, list: the machines that diskchain runs itself."""

from __future__ import annotations

import contextlib
import os
import secrets
import uuid as uuid_module
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diskchain.chain import qcow2
from diskchain.chain.machine import DiskSpec, Machine, NetSpec, parse_machine_file
from diskchain.chain.model import Catalog, Image
from diskchain.chain.qcow2 import ApprovedImage
from diskchain.drivers import accel
from diskchain.drivers.machines import Machines, Registered, with_absolute_paths
from diskchain.drivers.protocol import VMState
from diskchain.drivers.qemu import QemuDriver
from diskchain.drivers.qemu_parts import check_installed
from diskchain.errors import (
    BadMachineFile,
    ChainDamaged,
    DiskchainError,
    DriverFailed,
    HostileImage,
    NotFound,
    Refused,
    Unfinished,
    UsageError,
    VMRunning,
)
from diskchain.host import files
from diskchain.host.fault import point
from diskchain.host.locks import vm_lock
from diskchain.ops import sharers, state_files
from diskchain.ops.approve import approve_chain, fingerprint
from diskchain.ops.vm import Host, new_id, plain
from diskchain.ops.written import refuse_unwritable
from diskchain.store import catalog as catalog_store
from diskchain.store.catalog import Home, homes_near


@dataclass(frozen=True)
class Defined:
    """A machine that was defined. `again`: it was known before; its layers are the catalog's and did not change.

    `missing`: what it names and does not start without.
    """

    machine: Machine
    home: Path
    again: bool
    missing: Sequence[str] = ()


async def define(host: Host, file: Path) -> Defined:
    """Define a machine from its file, or define it again. Which layer is active, only the catalog says.

    Raise BadMachineFile naming key and line, BadName; NotFound, HostileImage for its images; Refused when an image belongs to
    another VM, or is a lower layer of a chain.
    """
    known, machine, home, chains = await examine(host, file, parse(file))
    await _refuse_other_disks_while_on(host, known, machine)
    with files.os_errors(home.path, "create"):
        home.make()
    with vm_lock(home.lock, f"define {machine.name}", wait=host.config.wait):
        registered = Registered(machine, home.path, str(file.absolute()))
        catalog = _next_catalog(host, machine, home, chains)
        driver = QemuDriver(registered, host.machines, host.config.run_dir)
        catalog = await state_files.provide(driver, catalog)
        with _told(host, machine.name, "defined"):
            catalog_store.save(home, _both(home, catalog))
            point("define.catalog")
            host.machines.put(registered)
            point("define.definition")
            catalog_store.save(home, catalog)
    return Defined(machine, home.path, known is not None, driver.missing_files(driver.definition()))


Chains = dict[str, list[ApprovedImage]]


async def examine(host: Host, file: Path, machine: Machine) -> tuple[Registered | None, Machine, Home, Chains]:
    """Return the machine as it was known and as it would be defined, its records and chains. Changes nothing.

    Raise as `define`. `machine` is what `file` says (or will say).
    """
    machine = with_absolute_paths(machine, file.parent.absolute())
    known = _known(host.machines, machine.name)
    disks = [_with_format(file, d) for d in machine.disks]
    for path in (file.absolute(), *(Path(d.image) for d in disks)):
        refuse_unwritable(path)
    roots = [*host.config.image_roots, file.parent.resolve(), *(Path(d.image).parent for d in disks)]
    chains = {d.target: _approved(Path(d.image), d.fmt, roots) for d in disks}
    machine = replace(machine, disks=tuple(replace(d, image=str(chains[d.target][0].path)) for d in disks))
    home = _home_of(host, machine, known, chains)
    machine = await _completed(machine, known, home)
    check_installed(machine)
    _next_catalog(host, machine, home, chains)
    return known, machine, home, chains


def _both(home: Home, new: Catalog) -> Catalog:
    """Return the catalog for the moment between: with the disks of before and of afterwards.

    Whichever definition a kill leaves, all its disks have an active layer, and a second define finishes the change.
    """
    try:
        old = catalog_store.load(home)
    except NotFound:
        return new
    gone = {t: i for t, i in old.active.items() if t not in new.active}
    if not gone:
        return new
    detached = tuple(i for i in new.detached if i not in gone.values())
    return replace(new, images={**old.images, **new.images}, active={**gone, **new.active}, detached=detached)


def parse(file: Path) -> Machine:
    """Return what a machine file says. Raise NotFound, BadMachineFile; a FIFO or a device is none and is not opened."""
    try:
        with open(files.open_untrusted(_real(file)), encoding="utf-8") as opened:
            text = opened.read()
    except NotFound:
        raise NotFound(f"{file} does not exist", hint="write one like those in docs/machine-file.md") from None
    except (DiskchainError, OSError, UnicodeDecodeError) as error:
        raise BadMachineFile(
            f"{file} can't be read: {error}", hint="write one like those in docs/machine-file.md"
        ) from None
    return parse_machine_file(text, str(file))


def _real(path: Path) -> Path:
    """Symlinks resolved as far as they can be (Path.resolve raises RuntimeError for a loop)."""
    return Path(os.path.realpath(path))


def _known(machines: Machines, name: str) -> Registered | None:
    try:
        return machines.get(name)
    except (NotFound, DriverFailed):
        return None  # a damaged definition is written anew; the records are found beside the disk


def _with_format(file: Path, disk: DiskSpec) -> DiskSpec:
    """Return the disk with its format: as written, else by the file's name; never by looking into a guest's data."""
    path = Path(disk.image)
    fmt = disk.fmt or {".qcow2": "qcow2", ".raw": "raw"}.get(path.suffix, "")
    if not fmt:
        raise BadMachineFile(f'{file}: {disk.target}: the format of {path.name} is not clear from its name',
                             hint=f'add format = "qcow2" or format = "raw" to [[disk]] {disk.target}')  # fmt: skip
    fd = files.open_untrusted(_real(path))
    with open(fd, "rb") as opened:
        is_qcow2 = opened.read(4) == qcow2.MAGIC
    if fmt == "raw" and is_qcow2 and not disk.fmt:
        raise HostileImage(f"{path} is named raw but begins like qcow2", hint='add format = "..." if you are sure')
    return replace(disk, image=str(_real(path)), fmt=fmt)


def _approved(path: Path, fmt: str, roots: list[Path]) -> list[ApprovedImage]:
    """Approve a chain whose files lie where images may lie."""
    try:
        return approve_chain(path, fmt, roots=roots)
    except HostileImage as error:
        if "outside the allowed" not in error.message:
            raise
        raise HostileImage(error.message, hint="if that backing file is yours, add its directory to image_roots in "
                           "/etc/diskchain/diskchain.toml") from error  # fmt: skip


def _home_of(host: Host, machine: Machine, known: Registered | None, chains: dict[str, list[ApprovedImage]]) -> Home:
    """Return where the machine's records are, or will be: known, found by its first disk's image, or new."""
    if known:
        return Home(known.home)
    first = chains[machine.disks[0].target][0].path
    taken = {other.uuid for other in host.neighbours()}
    for home in homes_near(first):
        catalog = catalog_store.load(home)
        if catalog.uuid not in taken and catalog.image_at(first) and machine.uuid in ("", catalog.uuid):
            return home
    return Home.beside(first, machine.uuid or str(uuid_module.uuid4()))


async def _completed(machine: Machine, known: Registered | None, home: Home) -> Machine:
    """Return the machine with uuid, MACs and machine type, kept from before where there is a before."""
    uuid = home.path.name
    if machine.uuid not in ("", uuid):
        raise Refused(
            f"{machine.name} has the uuid {uuid}, the file says {machine.uuid}", hint="leave uuid out of the file"
        )
    old_nets = known.machine.nets if known else ()
    nets = tuple(_with_mac(net, old_nets[i] if i < len(old_nets) else None) for i, net in enumerate(machine.nets))
    kind = machine.machine
    if known and kind in ("q35", "pc") and known.machine.machine.startswith(_PREFIX[kind]):
        kind = known.machine.machine
    return replace(
        machine, uuid=uuid, genid=_genid(machine, known), nets=nets, machine=await accel.versioned_machine(kind)
    )


def _genid(machine: Machine, known: Registered | None) -> str:
    """The generation id, kept from before; none where the machine file brings a device of its own."""
    if any("vmgenid" in word for word in machine.extra):
        return ""
    return (known.machine.genid if known else "") or str(uuid_module.uuid4())


_PREFIX = {"q35": "pc-q35-", "pc": "pc-i440fx-"}


def _with_mac(net: NetSpec, old: NetSpec | None) -> NetSpec:
    if net.mac:
        return net
    made = "52:54:00:" + ":".join(f"{b:02x}" for b in secrets.token_bytes(3))
    return replace(net, mac=old.mac if old else made)


def _next_catalog(host: Host, machine: Machine, home: Home, chains: dict[str, list[ApprovedImage]]) -> Catalog:
    """Return the catalog with which the machine is defined. Changes nothing. Raise Refused, ChainDamaged."""
    catalog = _catalog_of(host, machine, home)
    for disk in machine.disks:
        _refuse_foreign(host, machine, chains[disk.target])
    targets = tuple(d.target for d in machine.disks)
    known = {t for t in targets if t in catalog.active}
    for target in known:
        _refuse_other_chain(catalog, target, chains[target][0])
    catalog = catalog.without_disks(set(catalog.active) - known)
    for target in (t for t in targets if t not in known):
        if catalog.image_at(chains[target][0].path):
            catalog = _attached_again(catalog, target, chains[target][0])
        else:
            catalog = _with_chain(catalog, target, chains[target])
    active = {t: catalog.active[t] for t in targets}
    return replace(catalog, name=machine.name, targets=targets, active=active)


async def _refuse_other_disks_while_on(host: Host, known: Registered | None, machine: Machine) -> None:
    """Raise VMRunning when disks are added or removed under a running VM: its QEMU would write to others than we say."""
    if known is None or [d.target for d in known.machine.disks] == [d.target for d in machine.disks]:
        return
    driver = QemuDriver(known, host.machines, host.config.run_dir, socket="info")
    try:
        if not (await driver.state()).is_off:
            raise VMRunning(f"{machine.name} is on; disks are added and removed while it is off",
                            hint=f"diskchain stop {machine.name}")  # fmt: skip
    finally:
        await driver.close()


def _attached_again(catalog: Catalog, target: str, top: ApprovedImage) -> Catalog:
    """A disk comes back that the VM had before: it goes on with its last layer. Raise Refused, UsageError."""
    image = catalog.image_at(top.path)
    assert image
    if any(i.id == image.id for chain in catalog.active_chains().values() for i in chain):
        raise UsageError(f"{top.path} is used by two disks of {catalog.name}")
    last = catalog.detached_on(image.id)
    if last is None or image.target != target:
        where = f"the last layer of its {image.target}" if last else "frozen by a snapshot"
        raise Refused(f"{top.path} belongs to the chains of {catalog.name} already, {where}",
                      hint=f'target = "{image.target}", or revert to the snapshot that has it; or use a copy')  # fmt: skip
    detached = tuple(i for i in catalog.detached if i != last)
    return replace(catalog, active={**catalog.active, target: last}, detached=detached)


def _catalog_of(host: Host, machine: Machine, home: Home) -> Catalog:
    """Return the machine's catalog, an empty one for a new machine.

    Never an empty one where there has been another: its base would be started under its own overlays.
    """
    try:
        return catalog_store.load(home)
    except NotFound:
        if machine.name in host.machines.names() or home.recover_txt.exists():
            raise ChainDamaged(f"the catalog of {machine.name} is missing: {home.catalog}",
                               hint="bring it back from a backup; RECOVER.txt beside it lists the chain") from None  # fmt: skip
        return Catalog(home.path.name, machine.name)


def _refuse_other_chain(catalog: Catalog, target: str, top: ApprovedImage) -> None:
    image = catalog.image_at(top.path)
    if image is None or image.target != target:
        raise Refused(f"{target} of {catalog.name} is the chain of {catalog.chain(catalog.active[target])[-1].path}, "
                      f"{top.path} is not part of it", hint="undefine the machine first, or choose another name")  # fmt: skip


def _refuse_foreign(host: Host, machine: Machine, chain: list[ApprovedImage]) -> None:
    """Refuse what another VM would be hurt by: writing to any image of its chains, standing on its active layer."""
    for name, path, active in _images_of_others(host, machine):
        if files.same_file(path, chain[0].path):
            raise Refused(f"{chain[0].path} is part of the chain of {name}",
                          hint="make an overlay of it, or copy it, and use that")  # fmt: skip
        if active and any(files.same_file(path, below.path) for below in chain[1:]):
            raise Refused(f"{path} is what {name} writes to; nothing can stand on it",
                          hint=f"take a snapshot of {name} first, and stand on what that freezes; or copy it")  # fmt: skip


def _images_of_others(host: Host, machine: Machine) -> Iterator[tuple[str, Path, bool]]:
    """Yield the images of all other machines and domains: whose, where, and whether it is an active layer."""
    for other in host.neighbours():
        if other.label == f"the machine {machine.name}":
            continue
        catalog = Catalog(other.uuid, other.label)
        with contextlib.suppress(DiskchainError):
            catalog = catalog_store.load(Home(other.home)) if other.home else catalog
        active = set(catalog.active.values())
        yield from ((other.label, image.path, image.id in active) for image in catalog.images.values())
        yield from ((other.label, path, True) for path in other.disks if not catalog.image_at(path))


def _with_chain(catalog: Catalog, target: str, chain: list[ApprovedImage]) -> Catalog:
    overlays = sharers.overlays_beside(chain[0].path)
    if overlays:
        raise Refused(f"{chain[0].path} is the backing file of {overlays[0]}; a VM that writes to it destroys that",
                      hint="name the topmost image of the chain instead, or move its overlays away")  # fmt: skip
    below: str | None = None
    for found in reversed(chain):
        if catalog.image_at(found.path):
            raise UsageError(f"{found.path} is used by two disks of {catalog.name}")
        mark = fingerprint(found.path, found.fmt) if found is not chain[0] else None
        image = Image(new_id(), found.path, found.fmt, target, found.virtual_size, below, fingerprint=mark)
        catalog = catalog.with_images([image])
        below = image.id
    return replace(catalog, active={**catalog.active, target: below or ""})


async def undefine(host: Host, name: str) -> Path:
    """Forget a machine's definition; images, snapshots and records stay where they are. Return the records' place.

    Raise NotFound, VMRunning.
    """
    registered = host.machines.get(plain(name))
    driver = QemuDriver(registered, host.machines, host.config.run_dir)
    try:
        if await driver.state() is not VMState.STOPPED:
            raise VMRunning(f"{name} is on", hint=f"diskchain stop {name}")
    finally:
        await driver.close()
    with _told(host, registered.machine.name, "undefined"):
        host.machines.remove(registered.machine.name)
        point("undefine.removed")
    return registered.home


@contextlib.contextmanager
def _told(host: Host, name: str, done: str) -> Iterator[None]:
    """An exit code says whether anything changed: what fails after the definition did becomes Unfinished."""
    before = _known(host.machines, name)
    try:
        yield
    except (DiskchainError, OSError) as error:
        if _known(host.machines, name) == before:
            raise
        raise Unfinished(f"{error}; {name} was {done}, and that may be lost when the power goes",
                         hint="put right the disk, then look at it: diskchain machine list") from error  # fmt: skip
