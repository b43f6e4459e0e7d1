"""One VM at hand: its driver, its records, its lock."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from diskchain.chain.model import Catalog, Snapshot, vm_name
from diskchain.config import Config
from diskchain.drivers.machines import Machines
from diskchain.drivers.protocol import Definition, Driver
from diskchain.drivers.qemu import QemuDriver
from diskchain.errors import ChainDamaged, DiskchainError, NotFound, Unfinished
from diskchain.host import files
from diskchain.host.locks import vm_lock
from diskchain.store import catalog as catalog_store
from diskchain.store import journal
from diskchain.store.catalog import Home


def new_id() -> str:
    """Return a fresh id for an image, a snapshot or an operation: 12 hex digits."""
    return secrets.token_hex(6)


def now_utc() -> str:
    """Return the time as ISO 8601 UTC, for display only; nothing is decided by a clock."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class VM:
    """A VM, its records and its driver. `catalog` is what was last read or written."""

    def __init__(self, driver: Driver, home: Home, host: Host) -> None:
        self.driver = driver
        self.home = home
        self.host = host
        self.catalog: Catalog = catalog_store.load(home)

    @property
    def name(self) -> str:
        """The name that admins use."""
        return self.driver.name

    @property
    def config(self) -> Config:
        """The settings."""
        return self.host.config

    def save(self, catalog: Catalog) -> None:
        """Write the catalog durably, and go on with it."""
        catalog_store.save(self.home, catalog)
        self.catalog = catalog

    def reload(self) -> None:
        """Read the catalog afresh."""
        self.catalog = catalog_store.load(self.home)


@dataclass(frozen=True)
class Neighbour:
    """A VM of this host as its manager knows it. `disks`: what its definition names; `home`: its records, if it has any."""

    label: str
    uuid: str
    home: Path | None
    disks: tuple[Path, ...]


class Host:
    """All VMs that this host's diskchain can reach."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.machines = Machines(config.state_dir)

    def names(self) -> list[str]:
        """Return the names of all VMs, sorted."""
        return self.machines.names()

    def neighbours(self) -> Iterator[Neighbour]:
        """Yield every VM of this host whose definition can be read, to ask who uses an image."""
        for other in self.machines.all():
            paths = tuple(Path(d.image) for d in other.machine.disks)
            yield Neighbour(f"the machine {other.machine.name}", other.machine.uuid, other.home, paths)

    @contextlib.asynccontextmanager
    async def look(self, name: str) -> AsyncIterator[VM]:
        """Open a VM for reading: no lock, nothing is repaired. Raise NotFound, RecordDamaged."""
        vm = self._open(name, socket="info")
        try:
            yield vm
        finally:
            await vm.driver.close()

    @contextlib.asynccontextmanager
    async def change(self, name: str, operation: str, *, wait: float | None = None) -> AsyncIterator[VM]:
        """Open a VM for a change: hold its lock. An interrupted operation is the caller's to resolve first.

        Raise NotFound, RecordDamaged, Busy.
        """
        home = self._home(name)
        with vm_lock(home.lock, f"{operation} {name}", wait=self.config.wait if wait is None else wait):
            vm = self._open(name, socket="qmp")
            before = journal.contents(vm.home)
            try:
                yield vm
            except (DiskchainError, OSError) as error:
                raise _honest(vm, error, before) from error
            finally:
                await vm.driver.close()

    def _home(self, name: str) -> Home:
        home = Home(self.machines.get(plain(name)).home)
        if not home.path.is_dir():
            raise ChainDamaged(f"the records of {name} are gone: {home.path} does not exist",
                               hint="bring the directory back from a backup; the images themselves are plain qcow2")  # fmt: skip
        return home

    def _open(self, name: str, *, socket: str) -> VM:
        registered = self.machines.get(plain(name))
        driver = QemuDriver(registered, self.machines, self.config.run_dir, socket=socket)
        home = self._home(name)
        try:
            vm = VM(driver, home, self)
        except NotFound as error:
            raise ChainDamaged(f"the catalog of {name} is missing: {home.catalog}",
                               hint="bring it back from a backup; RECOVER.txt beside it lists the chain") from error  # fmt: skip
        if vm.catalog.uuid != driver.uuid:
            raise ChainDamaged(f"{home.catalog} is the catalog of another VM ({vm.catalog.name}, {vm.catalog.uuid})",
                               hint="bring the right one back; RECOVER.txt beside it lists the chain")  # fmt: skip
        return vm


def _honest(vm: VM, error: DiskchainError | OSError, before: Mapping[str, bytes]) -> DiskchainError:
    """An exit code says whether anything changed: with a journal entry left open, `failed` becomes `unfinished`.

    An entry that is as it was `before` was not touched: then a refusal (6) or damage (8) is what it says.
    """
    known = error
    if not isinstance(known, DiskchainError):
        known = DiskchainError(f"the system said: {error}", hint="look at dmesg and the filesystem, then try again")
    now = journal.contents(vm.home)
    if not now or isinstance(known, Unfinished) or (now == before and known.exit_code not in (1, 7, 9)):
        return known
    return Unfinished(f"{known.message}; stopped half-way", hint=f"diskchain recover {vm.name}")


def plain(name: str) -> str:
    """Given what an admin typed (`web1` or `qemu:web1`), return the machine's name. Raise NotFound for what can't be."""
    bare = name.removeprefix("qemu:")
    try:
        return vm_name(bare)
    except DiskchainError:
        raise NotFound(f"there is no VM {name!r}", hint="diskchain machine list") from None


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
    files.write_durably(directory / "machine.json", json.dumps(asdict(definition)).encode())
    files.fsync_dir(directory.parent)
    return definition


def definition_at(home: Home, snapshot: Snapshot) -> Definition:
    """Return the configuration that a snapshot in these records has. Raise ChainDamaged when it is gone."""
    path = home.snapshot_dir(snapshot.id) / "machine.json"
    try:
        return Definition(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ChainDamaged(f"the configuration of snapshot {snapshot.name!r} can't be read: {path}",
                           hint="bring it back from a backup; its disks are listed in RECOVER.txt") from error  # fmt: skip


def remove_snapshot_dir(vm: VM, snapshot_id: str) -> None:
    """Remove a snapshot's directory and the files that we put there. Can be repeated."""
    directory = vm.home.snapshot_dir(snapshot_id)
    if directory.is_dir():
        with files.os_errors(directory, "remove"):
            for path in sorted(directory.rglob("*"), reverse=True):  # what is in a directory before the directory
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            directory.rmdir()
        files.fsync_dir(directory.parent)
