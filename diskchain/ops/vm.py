"""One VM at hand: its driver, its records, its lock."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from diskchain.chain.model import Catalog, vm_name
from diskchain.cluster.detect import refuse_managed
from diskchain.config import Config
from diskchain.drivers.domains import Domains
from diskchain.drivers.machines import Machines, Registered
from diskchain.drivers.protocol import Definition, Driver
from diskchain.errors import Busy, ChainDamaged, DiskchainError, HostileImage, NotFound, Unfinished, UnsupportedDisk
from diskchain.host import files, locks
from diskchain.host.locks import vm_lock
from diskchain.ops.adopt import catalog_of, refreshed
from diskchain.ops.definitions import definition_at as definition_at
from diskchain.ops.ids import new_id as new_id
from diskchain.ops.ids import now_utc as now_utc
from diskchain.ops.listed import uses, wanted
from diskchain.ops.places import LIBVIRT, Place, Places, find_home, new_home
from diskchain.store import catalog as catalog_store
from diskchain.store import journal
from diskchain.store.catalog import Home

log = logging.getLogger(__name__)
E = TypeVar("E", bound=Exception)


class VM:
    """A VM, its records and its driver. `catalog` is what was last read or written.

    A domain that we have no records of yet comes with the catalog that it would be adopted with (`known` is False).
    """

    def __init__(self, driver: Driver, home: Home, host: Host, catalog: Catalog | None = None,
                 registered: Registered | None = None) -> None:  # fmt: skip
        self.driver = driver
        self.registered = registered  # the definition of a machine of ours
        self.home = home
        self.host = host
        self.known = catalog is None
        self.catalog: Catalog = catalog or catalog_store.load(home)

    @property
    def name(self) -> str:
        """The name that admins use."""
        return self.driver.name

    @property
    def config(self) -> Config:
        """The settings."""
        return self.host.config

    @property
    def lists_snapshots(self) -> bool:
        """Whether the settings say that libvirt is to list its snapshots, too."""
        return self.config.libvirt.register and self.driver.kind == LIBVIRT

    def save(self, catalog: Catalog) -> None:
        """Write the catalog durably, and go on with it.

        Raise NoSpace, Refused, DiskchainError when nothing was changed, or the journal knows of it; Unfinished when
        the change was made, and the disk failed after it.
        """
        try:
            catalog_store.save(self.home, catalog)
        except (DiskchainError, OSError) as error:
            if journal.is_open(self.home) or not catalog_store.may_be(self.home, catalog):
                raise
            raise Unfinished(f"{error}; the change was made, and may be lost when the power goes",
                             hint=f"put right the disk, then look at it: diskchain list {self.name}") from error  # fmt: skip
        self.catalog = catalog

    def reload(self) -> None:
        """Read the catalog afresh."""
        if self.known:
            self.catalog = catalog_store.load(self.home)

    def refresh(self, *, moved: bool = False) -> None:
        """Take up disks that were attached to, or detached from, a libvirt domain since. Nothing is written.

        Raise ChainDamaged when a disk that we know lies elsewhere now; `moved`: it is passed over.
        """
        if self.known and self.driver.kind == LIBVIRT and not journal.is_open(self.home):
            domain = self.host.domains.get(self.driver.uuid)
            self.catalog = refreshed(self.catalog, domain, self.config.image_roots, moved=moved)

    async def verify_definition(self) -> None:
        """Raise ChainDamaged when the VM's manager would start it on other layers than the catalog says."""
        for target, path in (await self.driver.next_files() or {}).items():
            known = self.catalog.active.get(target)
            says = self.catalog.images[known].path if known else None
            if says is None and await self._only_at_the_next_start(target, path):
                continue
            if says is None or not files.is_same(says, path):
                raise ChainDamaged(f"{target} of {self.name} is defined with {path}, the catalog says {says or 'nothing'}",
                                   hint=f"changed by something else; take it up: diskchain adopt {self.name}")  # fmt: skip

    async def _only_at_the_next_start(self, target: str, path: Path) -> bool:
        """Whether a disk that we don't know was attached to the definition alone (virsh attach-disk --config): the VM that is
        on has not got it, and it is none of our layers but a detached one.
        """
        if (await self.driver.state()).is_off or target in await self.driver.active_files():
            return False
        image = next((i for i in self.catalog.images.values() if files.is_same(i.path, path)), None)
        return image is None or image.id in self.catalog.detached

    async def verify_running(self, *, same_disks: bool = True) -> None:
        """Compare what the hypervisor writes to with the catalog. Raise ChainDamaged when they differ.

        Without `same_disks` it may have others besides those of the catalog, and lack some.
        """
        found = await self.driver.written_files()
        missing = sorted(set(self.catalog.active) - set(found))
        if missing and same_disks:
            raise ChainDamaged(f"the running {self.name} has no disk {', '.join(missing)}, the catalog says it has",
                               hint="was a machine define cut off? repeat it, with the VM off")  # fmt: skip
        for target, path in found.items():
            known = self.catalog.active.get(target)
            if known is None and not same_disks:
                continue
            if known is None or not files.is_same(self.catalog.images[known].path, path):
                raise ChainDamaged(f"{target} of {self.name} writes to {path}, the catalog says "
                                   f"{self.catalog.images[known].path if known else 'nothing'}",
                                   hint="something else than diskchain switched its disks; stop the VM and look")  # fmt: skip

    async def require_off(self) -> None:
        """Raise Busy when a VM that was off when we looked at it has been started since."""
        if not (await self.driver.state()).is_off:
            raise Busy(f"{self.name} was started by something else a moment ago", hint="look at it, then try again")


@dataclass(frozen=True)
class Neighbour:
    """A VM of this host as its manager knows it. `disks`: what its definition names; `home`: its records, if it has any."""

    label: str
    uuid: str
    home: Path | None
    disks: tuple[Path, ...]


class Host:
    """All VMs that this host's diskchain can reach."""

    def __init__(self, config: Config, uri: str | None = None) -> None:
        self.config = config
        self.machines = Machines(config.state_dir)
        self.domains = Domains(uri)
        self.places = Places(config, self.machines, self.domains)

    def names(self) -> list[str]:
        """Return the names of all VMs, sorted. Raise Unreachable."""
        return self.places.names()

    def neighbours(self) -> Iterator[Neighbour]:
        """Yield every VM of this host whose definition can be read, to ask who uses an image.

        Raise Unreachable when libvirt does not answer: nobody may write to what it might use.
        """
        for other in self.machines.all():
            paths = tuple(Path(d.image) for d in other.machine.disks)
            yield Neighbour(f"the machine {other.machine.name}", other.machine.uuid, other.home, paths)
        for domain in self.domains.all():
            home = find_home(domain)
            yield Neighbour(f"the domain {domain.name}", domain.uuid, home.path if home else None, domain.images)

    @contextlib.asynccontextmanager
    async def look(self, name: str) -> AsyncIterator[VM]:
        """Open a VM for reading: no lock, nothing is repaired. Raise NotFound, RecordDamaged.

        What is missing or does not fit because another command is changing it is no damage: Busy.
        """
        vm = self._open(name, socket="info")
        seen = vm.catalog
        try:
            yield vm
        except (NotFound, ChainDamaged, HostileImage, UnsupportedDisk, FileNotFoundError) as error:
            if vm.known and _is_changing(vm.home, seen):
                raise Busy(
                    f"another command changed {vm.name} while this one looked at it", hint="try again"
                ) from error
            naming(error, vm.name)
            raise
        finally:
            await vm.driver.close()

    @contextlib.asynccontextmanager
    async def change(self, name: str, operation: str, *, wait: float | None = None,
                     adopt: bool = False) -> AsyncIterator[VM]:  # fmt: skip
        """Open a VM for a change: hold its lock. An interrupted operation is the caller's to resolve first.

        `adopt`: records are made for a domain that has none; without it such a domain can only be started, stopped, ...
        Raise NotFound, RecordDamaged, Busy.
        """
        wait = self.config.wait if wait is None else wait
        place = self.places.find(name)
        if place.domain:
            refuse_managed(place.name)
        with self._first_lock(place, operation, wait) as first:
            made = None
            if first:  # somebody may have made the records while we waited
                place = self.places.find(name)
                made = self._adopt(place) if adopt else None
            try:
                async with self._changing(name, place.home or made, operation, wait) as vm:
                    yield vm
            except BaseException:
                if made is not None and not catalog_store.load(made).snapshots and not journal.is_open(made):
                    made.remove_unused()
                raise

    @contextlib.asynccontextmanager
    async def _changing(self, name: str, home: Home | None, operation: str, wait: float) -> AsyncIterator[VM]:
        """Look the VM up once more, under the lock: what it was before may have changed while we waited."""
        with self._lock(name, home, operation, wait):
            vm = self._open(name, socket="qmp")
            before, listed = journal.contents(vm.home), uses(vm.catalog)
            try:
                yield vm
                if listed or uses(vm.catalog):
                    await _follow(vm)
            except (DiskchainError, OSError) as error:
                raise _honest(vm, error, before) from error
            finally:
                await vm.driver.close()

    @contextlib.contextmanager
    def _first_lock(self, place: Place, operation: str, wait: float) -> Iterator[bool]:
        """The lock of a domain without records: it keeps two commands from making them at once. Yield whether it is one."""
        if place.home is not None:
            yield False
            return
        directory = self.config.run_dir / "domains"
        with files.os_errors(directory, "create"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with vm_lock(directory / f"{place.uuid}.lock", f"{operation} {place.name}", wait=wait):
            yield True

    def _lock(
        self, name: str, home: Home | None, operation: str, wait: float
    ) -> contextlib.AbstractContextManager[None]:
        if home is None:
            return contextlib.nullcontext()  # the first lock is held
        _refuse_gone(name, home)
        return vm_lock(home.lock, f"{operation} {name}", wait=wait)

    def _adopt(self, place: Place) -> Home | None:
        """Make the records of a domain that has none, and return them. The first lock is held."""
        if place.home is None and place.domain:
            catalog, home = catalog_of(place.domain, self.config.image_roots), new_home(place.domain)
            with files.os_errors(home.path, "create"):
                home.make()
            catalog_store.save(home, catalog)
            return home
        return None

    def _home(self, place: Place) -> Home:
        home = place.home or (new_home(place.domain) if place.domain else None)
        assert home
        if place.home is not None:
            _refuse_gone(place.name, home)
        return home

    def _open(self, name: str, *, socket: str) -> VM:
        place = self.places.find(name)
        home = self._home(place)
        catalog = catalog_of(place.domain, self.config.image_roots) if place.home is None and place.domain else None
        driver = self.places.driver(place, socket=socket)
        try:
            vm = VM(driver, home, self, catalog, place.registered)
        except NotFound as error:
            raise ChainDamaged(f"the catalog of {name} is missing: {home.catalog}",
                               hint="bring it back from a backup; RECOVER.txt beside it lists the chain") from error  # fmt: skip
        if vm.catalog.uuid != driver.uuid:
            raise ChainDamaged(f"{home.catalog} is the catalog of another VM ({vm.catalog.name}, {vm.catalog.uuid})",
                               hint="bring the right one back; RECOVER.txt beside it lists the chain")  # fmt: skip
        return vm


def _is_changing(home: Home, seen: Catalog) -> bool:
    """Whether the records are not as they were seen, or somebody who lives is in the middle of an operation."""
    if journal.is_open(home) and locks.holder_operation(home.lock):
        return True
    return not catalog_store.may_be(home, seen)


def _refuse_gone(name: str, home: Home) -> None:
    if not home.path.is_dir():
        raise ChainDamaged(f"the records of {name} are gone: {home.path} does not exist",
                           hint="bring the directory back from a backup; the images themselves are plain qcow2")  # fmt: skip


async def _follow(vm: VM) -> None:
    """What the command was for is done; a list that can't be written is told of, and `check` finds it."""
    try:
        await vm.driver.list_snapshots(wanted(vm.catalog, vm.home))
    except DiskchainError as error:
        log.warning("virsh snapshot-list of %s could not be brought into line: %s", vm.name, error.message)


def _honest(vm: VM, error: DiskchainError | OSError, before: Mapping[str, bytes]) -> DiskchainError:
    """An exit code says whether anything changed: with a journal entry left open, `failed` becomes `unfinished`.

    An entry that is as it was `before` was not touched: then a refusal (6) or damage (8) is what it says.
    """
    known = error
    if not isinstance(known, DiskchainError):
        known = DiskchainError(f"the system said: {error}", hint="look at dmesg and the filesystem, then try again")
    naming(known, vm.name)
    now = journal.contents(vm.home)
    if not now or isinstance(known, Unfinished) or (now == before and known.exit_code not in (1, 7, 9)):
        return known
    return Unfinished(f"{known.message}; stopped half-way", hint=f"diskchain recover {vm.name}")


def naming(error: E, vm: str) -> E:
    """Given an error from where only images are known, let its hint name the VM; return it."""
    if isinstance(error, DiskchainError) and error.hint:
        error.hint = error.hint.replace("check --repair VM", f"check --repair {vm}")
    return error


def plain(name: str) -> str:
    """Given what an admin typed (`web1` or `qemu:web1`), return the machine's name. Raise NotFound for what can't be."""
    bare = name.removeprefix("qemu:")
    try:
        return vm_name(bare)
    except DiskchainError:
        raise NotFound(f"there is no machine {name!r}", hint="diskchain machine list") from None


def refuse_unfinished(vm: VM) -> None:
    """Raise Unfinished when an operation on the VM was interrupted."""
    if journal.is_open(vm.home):
        raise Unfinished(f"an earlier operation on {vm.name} was interrupted", hint=f"diskchain recover {vm.name}")


async def record_configuration(vm: VM, snapshot_id: str) -> Definition:
    """Make a snapshot's directory, and write into it the configuration that the VM runs with now, durably; return it."""
    directory = vm.home.snapshot_dir(snapshot_id)
    with files.os_errors(directory, "create"):
        directory.mkdir(mode=0o700)
    definition = await vm.driver.live_definition()
    files.write_durably(vm.home.configuration(snapshot_id), json.dumps(asdict(definition)).encode())
    files.fsync_dir(directory.parent)
    return definition


def remove_snapshot_dir(vm: VM, snapshot_id: str) -> None:
    """Remove a snapshot's directory and the files that we put there. Can be repeated."""
    directory = vm.home.snapshot_dir(snapshot_id)
    if directory.is_dir():
        with files.os_errors(directory, "remove"):
            for path in sorted(directory.rglob("*"), reverse=True):  # what is in a directory before the directory
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            directory.rmdir()
        files.fsync_dir(directory.parent)
