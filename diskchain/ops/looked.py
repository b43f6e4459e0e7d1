"""What is known of one VM, as far as it can be read: records, journal, hypervisor. For check and status.

Made for damaged machines: what a look can't read becomes a finding, not an end. Nothing is written, no lock is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diskchain.chain.model import Catalog
from diskchain.chain.rules import Finding, dangling, error, info, left_by_save, stopped_itself, warning
from diskchain.drivers.domains import Domain
from diskchain.drivers.machines import Registered
from diskchain.drivers.protocol import Driver, VMState
from diskchain.errors import DiskchainError, DriverFailed, NotFound, Refused, Unreachable, UnsupportedDisk, UsageError
from diskchain.host import files, locks
from diskchain.ops.adopt import catalog_of
from diskchain.ops.places import Place
from diskchain.ops.vm import Host
from diskchain.store import catalog as catalog_store
from diskchain.store import journal
from diskchain.store.catalog import Home

BACKUP = "bring it back from a backup; RECOVER.txt beside it lists the chain"


@dataclass
class Look:
    """What is known of one VM, as far as it could be read."""

    name: str
    place: Place | None = None  # None: its definition can't be read
    catalog: Catalog | None = None
    state: VMState | None = None  # None: it could not be asked
    active: dict[str, Path] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    memory_bytes: int = 0
    changed: list[str] = field(default_factory=list)  # a running machine against its definition, in words
    no_record: str | None = None  # why that can't be told
    busy: str | None = None  # an operation is at work now
    in_flight: frozenset[str] = frozenset()  # what the open journal entry names: nothing of it is judged
    findings: list[Finding] = field(default_factory=list)

    @property
    def registered(self) -> Registered | None:
        """The definition of a machine of ours."""
        return self.place.registered if self.place else None

    @property
    def domain(self) -> Domain | None:
        """The libvirt domain."""
        return self.place.domain if self.place else None

    @property
    def home(self) -> Home | None:
        """The VM's records; None when there are none (yet)."""
        return self.place.home if self.place else None

    def driver(self, host: Host) -> Driver:
        """Open the driver for a look; the caller closes it."""
        assert self.place
        return host.places.driver(self.place, socket="info")


async def look(host: Host, name: str) -> Look:
    """Read all that can be read of a VM; what can't be is a finding. Raise NotFound when there is no such VM."""
    seen = Look(name.removeprefix("qemu:").removeprefix("libvirt:"))
    try:
        seen.place = host.places.find(name)
    except (NotFound, UsageError, Unreachable):
        raise
    except Refused as problem:
        seen.findings.append(error("definition-unreadable", name, problem.message, problem.hint))
        return seen
    except DiskchainError as problem:
        seen.findings.append(error("definition-damaged", name, problem.message, problem.hint))
        return seen
    home = seen.home
    if home is None:
        _as_adopted(host, seen)
        await _ask(host, seen)
        return seen
    if not home.path.is_dir():
        seen.findings.append(error("records-missing", name, f"{home.path} does not exist",
                                   "bring the directory back from a backup; the images are plain qcow2"))  # fmt: skip
        await _ask(host, seen)
        return seen
    _read_catalog(seen, home)
    _read_journal(seen, home)
    await _ask(host, seen)
    return seen


def stands_still(seen: Look) -> Iterator[Finding]:
    """Why a guest stands still that nobody paused: it crashed, or a disk of it failed."""
    if seen.state is VMState.CRASHED:
        yield error("crashed", seen.name, "the guest has crashed; QEMU stands still",
                    f"diskchain stop {seen.name} --force, then start")  # fmt: skip
    if seen.state is VMState.CRITICAL:
        images = seen.catalog.images if seen.catalog else {}
        active = seen.catalog.active if seen.catalog else {}
        places = {target: images[i].path.parent for target, i in active.items()}
        yield stopped_itself(
            seen.name, seen.failed, {target: (path, room(path) or 0) for target, path in places.items()}
        )


def room(place: Path) -> int | None:
    """Bytes that are free there; None where that can't be told."""
    try:
        return files.free_bytes(place)
    except DiskchainError:
        return None


def _as_adopted(host: Host, seen: Look) -> None:
    """A domain without records: its chains as they are."""
    assert seen.domain
    try:
        seen.catalog = catalog_of(seen.domain, host.config.image_roots)
    except UnsupportedDisk as problem:
        seen.findings.append(info("not-covered", seen.name, problem.message, problem.hint))
    except DiskchainError as problem:
        seen.findings.append(error("chain-unusable", seen.name, problem.message, problem.hint))


def _read_catalog(seen: Look, home: Home) -> None:
    assert seen.place
    try:
        catalog = catalog_store.load(home)
    except NotFound as problem:
        seen.findings.append(error("catalog-missing", seen.name, problem.message, BACKUP))
        return
    except DiskchainError as problem:
        seen.findings.append(error("catalog-damaged", seen.name, problem.message, problem.hint or BACKUP))
        return
    if catalog.uuid != seen.place.uuid:
        what = f"{home.catalog} is the catalog of another VM ({catalog.name}, {catalog.uuid})"
        seen.findings.append(error("catalog-foreign", seen.name, what, BACKUP))
        return
    wrong = list(dangling(catalog))
    seen.findings += wrong
    seen.catalog = None if wrong else catalog


def _read_journal(seen: Look, home: Home) -> None:
    if not journal.is_open(home):
        return
    seen.busy = locks.holder_operation(home.lock)
    remedy = f"diskchain recover {seen.name}"
    try:
        entry = journal.open_entry(home)
    except DiskchainError as problem:
        seen.findings.append(error("journal-damaged", seen.name, problem.message,
                                   "keep every file; bring the entry back from a backup"))  # fmt: skip
        return
    if entry is None:
        return
    seen.in_flight = frozenset(_words(entry.data))
    what = f"{entry.op} of {entry.data.get('name', entry.id)!r}, at {entry.state!r}, begun {entry.started}"
    if seen.busy:
        seen.findings.append(
            info("busy", seen.name, f"at work: {what}", "its files change now; check again afterwards")
        )
    else:
        seen.findings.append(warning("interrupted", seen.name, f"{what}; nothing is lost", remedy))


def _words(data: Any) -> Iterator[str]:
    if isinstance(data, str):
        yield data
        yield Path(data).name
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield str(key)
            yield from _words(value)
    elif isinstance(data, list):
        for value in data:
            yield from _words(value)


async def _ask(host: Host, seen: Look) -> None:
    """Ask the hypervisor, through the socket for those who only look."""
    try:
        driver = seen.driver(host)
    except DiskchainError as problem:
        seen.findings.append(warning("no-answer", seen.name, problem.message, problem.hint))
        return
    try:
        seen.memory_bytes = driver.memory_bytes()
        seen.state = await driver.state()
        if not seen.state.is_off:
            seen.active = await driver.active_files()
            seen.failed = await driver.failed_disks()
            if seen.state is VMState.PAUSED and seen.home and not seen.busy and await driver.stopped_by_save():
                seen.findings.append(left_by_save(seen.name))
            await _compare(seen, driver)
    except (DiskchainError, KeyError) as problem:
        said = problem.message if isinstance(problem, DiskchainError) else f"an answer without {problem}"
        seen.findings.append(warning("no-answer", seen.name, f"QEMU can't be asked: {said}",
                                     "look at qemu.log beside the catalog, and at its storage"))  # fmt: skip
    finally:
        await driver.close()


async def _compare(seen: Look, driver: Driver) -> None:
    try:
        seen.changed = driver.differences(await driver.live_definition(), driver.definition())
    except (DriverFailed, ValueError, KeyError, TypeError) as problem:
        seen.no_record = problem.message if isinstance(problem, DriverFailed) else "its run-time record is damaged"
