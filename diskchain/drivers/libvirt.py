"""A libvirt domain. libvirt does all it can do; only the memory stream, which it has no API for, goes by the monitor.

What was measured (docs/facts.md): disks are switched by `snapshotCreateXML` onto overlays that we made and verified
(REUSE_EXT does not look into them), memory is saved through monitor passthrough into a file descriptor (`exec:` kills the
VM), libvirt follows STOP and RESUME and survives its own restart meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import libvirt

from diskchain.chain.model import Image
from diskchain.drivers import domain_xml, libvirt_blocks, migration
from diskchain.drivers.domain_xml import DomainDisk
from diskchain.drivers.libvirt_access import DomainAccess
from diskchain.drivers.libvirt_agent import DomainAgent, WatchedDomain
from diskchain.drivers.libvirt_api import LOOK, asked, called, connect_now, is_alive, patient
from diskchain.drivers.libvirt_blocks import is_among
from diskchain.drivers.libvirt_list import (
    INACTIVE,
    MIGRATABLE,
    SECURE,
    find_domain,
    host_facts,
    list_domains,
    resolved,
    with_files,
)
from diskchain.drivers.libvirt_listed import DomainSnapshots
from diskchain.drivers.libvirt_monitor import Passthrough
from diskchain.drivers.libvirt_state import DomainState
from diskchain.drivers.migration import Commander
from diskchain.drivers.pause_guard import WatchdogGuard
from diskchain.drivers.protocol import Chains, Definition, Driver, PauseGuard, SaveProgress, Serial, VMState
from diskchain.drivers.suitable import Unsuitable, suitable
from diskchain.errors import DiskchainError, DriverFailed, MemoryNotSaved, NotFound, Refused, Unreachable
from diskchain.host.process import ProcessId, find_process

__all__ = [
    "LibvirtDriver",
    "WatchedDomain",
    "asked",
    "connect_now",
    "find_domain",
    "host_facts",
    "is_alive",
    "list_domains",
    "open_driver",
]

_STATES = {
    libvirt.VIR_DOMAIN_RUNNING: VMState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: VMState.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: VMState.PAUSED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: VMState.SUSPENDED,
    libvirt.VIR_DOMAIN_SHUTDOWN: VMState.RUNNING,  # it is about to end; until then its process has the disks
    libvirt.VIR_DOMAIN_SHUTOFF: VMState.STOPPED,
    libvirt.VIR_DOMAIN_CRASHED: VMState.CRASHED,
}

_RESTART = 60.0  # seconds that a daemon that is being restarted has


def open_driver(connection: Any, uuid: str, uri: str, log: Path) -> Driver:
    """Return the driver of a domain; its watchdogs write to `log`. Raise NotFound, Unreachable."""
    return LibvirtDriver(connection, asked(f"look for {uuid}", connection.lookupByUUIDString, uuid), uri, log)


class LibvirtDriver(DomainAgent, DomainSnapshots, DomainState, DomainAccess):
    """One domain, by its uuid: a domain that was renamed is still the same."""

    kind = "libvirt"

    def __init__(self, connection: Any, domain: Any, uri: str, log: Path) -> None:
        self._connection = connection
        self._log = log
        self._domain = domain
        self.uri = uri
        self.name = str(domain.name())
        self.uuid = str(domain.UUIDString())
        self._monitor = Passthrough(domain)
        self._given_up = False
        self._below: dict[str, Path] = {}  # what the prepared overlays stand on

    async def _commander(self) -> Commander:
        return self._monitor

    async def close(self) -> None:
        """The connection is shared, and ends with us."""

    # -- looking ---------------------------------------------------------------------------------------------------

    @patient
    async def _xml(self, flags: int) -> str:
        return str(await called("read the definition", self._domain.XMLDesc, flags))

    def _xml_now(self, flags: int) -> str:
        return str(asked("read the definition", self._domain.XMLDesc, flags))

    def _is_persistent(self) -> bool:
        return bool(asked("ask whether the domain is defined", self._domain.isPersistent))

    @patient
    async def state(self) -> VMState:
        """Ask libvirt. A transient domain that ended is gone."""
        state, reason = await called("ask for the state", self._domain.state)
        if state == libvirt.VIR_DOMAIN_PAUSED and reason == libvirt.VIR_DOMAIN_PAUSED_IOERROR:
            return VMState.CRITICAL
        if state == libvirt.VIR_DOMAIN_PAUSED and reason == libvirt.VIR_DOMAIN_PAUSED_CRASHED:
            return VMState.CRASHED
        return _STATES.get(state, VMState.PAUSED)

    async def active_files(self) -> dict[str, Path]:
        """The sources of the live XML."""
        found = resolved(self._connection, await self._xml(SECURE))
        return _files(found)

    @patient
    async def written_files(self) -> dict[str, Path]:
        """query-block, by libvirt's aliases; what QEMU does not tell is as the live XML says."""
        xml = await self._xml(SECURE)
        said = await libvirt_blocks.written_files(self._monitor, domain_xml.aliases(xml))
        return {t: _the_same(path, said.get(t)) for t, path in _files(resolved(self._connection, xml)).items()}

    @patient
    async def next_files(self) -> dict[str, Path]:
        """The sources of the persistent XML; of the live one where there is no other."""
        flags = INACTIVE if self._is_persistent() else SECURE
        return _files(resolved(self._connection, await self._xml(flags)))

    async def unsuitable(self) -> list[Unsuitable]:
        """Network disks, block devices, shared ones, other formats."""
        return suitable(resolved(self._connection, await self._xml(SECURE)))[1]

    async def refuse(self, operation: str) -> None:
        """A managed save holds memory that fits only the disks as they are; a job of libvirt's moves their data."""
        await self.refuse_elsewhere()
        if await called("ask for a managed save", self._domain.hasManagedSaveImage, 0):
            raise Refused(f"{self.name} has a managed save: its memory fits the disks only as they are now",
                          hint=f"virsh start {self.name}, or drop it: virsh managedsave-remove {self.name}")  # fmt: skip
        if operation in ("revert", "restart") and not self._is_persistent():
            raise Refused(f"{self.name} is transient: libvirt forgets it when it ends, and could not start it again",
                          hint=f"define it: virsh dumpxml {self.name} --migratable > {self.name}.xml; "
                          f"virsh define {self.name}.xml")  # fmt: skip
        if operation == "create":
            self.refuse_state(await self._xml(SECURE))
        state = await self.state()
        if state.is_off:
            return
        if operation == "create" and state is VMState.SUSPENDED:
            raise Refused(f"the guest of {self.name} sleeps (suspended to RAM); libvirt makes no snapshot of it now",
                          hint=f"wake it: diskchain resume {self.name}")  # fmt: skip
        if (await called("ask for jobs", self._domain.jobInfo))[0] != libvirt.VIR_DOMAIN_JOB_NONE:
            raise Refused(f"libvirt is at work on {self.name}", hint=f"virsh domjobinfo {self.name}; wait for its end")
        believed = await self.active_files()
        if operation == "create":
            libvirt_blocks.refuse_stale(self.name, believed, await self.written_files())
        for target in believed:
            if await called("ask for block jobs", self._domain.blockJobInfo, target, 0):
                raise Refused(f"a block job is at work on {target} of {self.name}",
                              hint=f"virsh blockjob {self.name} {target}; wait for its end")  # fmt: skip

    @patient
    async def refuse_elsewhere(self) -> None:
        """libvirt knows why a domain is off, until it is started again."""
        state, reason = await called("ask for the state", self._domain.state)
        if (state, reason) == (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED):
            raise Refused(f"{self.name} was migrated to another host, where its disks may be in use",
                          hint="run diskchain there; if it is off there and is to run here again: "
                          f"virsh start {self.name}")  # fmt: skip

    async def failed_disks(self) -> dict[str, str]:
        """libvirt's record of I/O errors."""
        errors = await called("ask for I/O errors", self._domain.diskErrors)
        words = {libvirt.VIR_DOMAIN_DISK_ERROR_NO_SPACE: "nospace"}
        return {str(target): words.get(code, "failed") for target, code in errors.items() if code}

    def memory_bytes(self) -> int:
        """The most that the guest can have."""
        return domain_xml.memory_bytes(self._xml_now(SECURE))

    def definition(self) -> Definition:
        """The persistent definition (a transient domain has only its live one)."""
        xml = self._xml_now(INACTIVE if self._is_persistent() else MIGRATABLE)
        return _definition(persistent=with_files(self._connection, xml))

    async def live_definition(self) -> Definition:
        """What runs, as a restore needs it, and the persistent definition."""
        if (await self.state()).is_off:
            return self.definition()
        persistent = self.definition()
        return _definition(
            persistent=_persistent(persistent), live=with_files(self._connection, await self._xml(MIGRATABLE))
        )

    def differences(self, old: Definition, new: Definition) -> list[str]:
        """Compare two domains in words."""
        return domain_xml.differences(_persistent(old), _persistent(new))

    def renewed(self, definition: Definition) -> Definition:
        """A new generation id, where the domain has one. (At a restore of memory libvirt makes one by itself.)"""
        text = json.loads(definition.text)
        fresh = domain_xml.with_genid(str(text["persistent"]), str(uuid4()))
        return _definition(persistent=fresh, live=text["live"])

    def disks(self, definition: Definition) -> dict[str, Path]:
        """Those that can be written, of the live definition where there is one."""
        return _files(resolved(self._connection, _live(definition)))

    def without_memory(self, definition: Definition, attached: Collection[str]) -> Definition:
        """`virsh attach-disk --live` is in no definition of the next start."""
        persistent = _persistent(definition)
        return _definition(persistent=domain_xml.with_disks_of(persistent, _live(definition), attached))

    def missing_files(self, definition: Definition) -> list[str]:
        """Kernel, initrd, loader."""
        root = domain_xml.parse(_persistent(definition))
        places = [(word, root.findtext(f"./os/{word}")) for word in ("kernel", "initrd", "loader")]
        return [f"{word} {place} does not exist" for word, place in places if place and not Path(place).is_file()]

    # -- besides disks and memory: libvirt_state.py -------------------------------------------------------------------

    def check_helpers(self) -> None:
        """libvirt watches its helpers itself."""

    def memory_loads_with(self, definition: Definition) -> list[str]:
        """The stream carries firmware and devices; the machine type: `unsupported`."""
        return []

    async def unsupported(self, definition: Definition) -> list[str]:
        """Ask libvirt whether its QEMU has the machine type."""
        wanted, kinds = domain_xml.machine_type(_persistent(definition)), self._machine_types()
        if not wanted or not kinds or wanted in kinds:
            return []
        return [f"libvirt's QEMU here has no machine type {wanted}"]

    def _machine_types(self) -> set[str]:
        return domain_xml.machine_types(str(asked("ask for the machine types", self._connection.getCapabilities)))

    async def open_serial(self) -> Serial:
        """virsh has a console of its own."""
        raise Refused(f"{self.name} is a libvirt domain", hint=f"virsh console {self.name}")

    # -- power -----------------------------------------------------------------------------------------------------

    async def start(self, chains: Chains, *, paused: bool = False) -> None:
        """Start the domain as it is defined: with these chains, or its definition would have been refused before."""
        await self.refuse_elsewhere()
        flags = libvirt.VIR_DOMAIN_START_PAUSED if paused else 0
        await called("start the domain", self._domain.createWithFlags, flags)

    async def start_from_memory(self, definition: Definition, chains: Chains, memory: int) -> None:
        """Restore from the file behind the descriptor, with the XML of then and the disks of now, paused."""
        path = os.readlink(f"/proc/self/fd/{memory}")  # noqa: PTH115 - libvirtd opens it itself
        xml = domain_xml.with_sources(self.as_named_now(definition, _live(definition)), _tops(chains))
        flags = libvirt.VIR_DOMAIN_SAVE_PAUSED
        await called("load the memory", self._connection.restoreFlags, path, xml, flags)
        state = await self.state()
        if state is not VMState.PAUSED:
            await self.kill()
            raise DriverFailed(f"after loading the memory the VM is {state.value}, not paused")

    async def power_off(self, timeout: float) -> bool:
        """Press the power button, again every 10 seconds; wait until libvirt says that it is off."""
        end, pressed = time.monotonic() + timeout, 0.0
        while (left := end - time.monotonic()) > 0:
            if (await self._state_or_gone()).is_off:
                return True
            if time.monotonic() - pressed > 10:
                with contextlib.suppress(DriverFailed, Unreachable):
                    await called("press the power button", self._domain.shutdown)
                pressed = time.monotonic()
            await asyncio.sleep(min(0.1, left))
        return (await self._state_or_gone()).is_off

    async def _state_or_gone(self) -> VMState:
        try:
            return await self.state()
        except NotFound:
            return VMState.STOPPED

    async def quit(self) -> None:
        """Stop the CPUs, then end QEMU with SIGTERM: it writes its caches into the images."""
        if (await self._state_or_gone()).is_off:
            return
        with contextlib.suppress(DriverFailed):
            await called("pause the domain", self._domain.suspend)
        await self._destroy(libvirt.VIR_DOMAIN_DESTROY_GRACEFUL)

    async def kill(self) -> None:
        """End QEMU, by SIGKILL if it does not end otherwise."""
        if not (await self._state_or_gone()).is_off:
            await self._destroy(0)

    async def _destroy(self, flags: int) -> None:
        process = self.process()
        try:
            await called("end the domain", self._domain.destroyFlags, flags)
        except DiskchainError:
            if not (await self._state_or_gone()).is_off:
                raise
        if process and not await process.gone(60):
            raise Unreachable(f"QEMU (pid {process.pid}) does not end; it waits for its storage")

    async def pause(self) -> None:
        """Suspend."""
        await called("pause the domain", self._domain.suspend)

    @patient
    async def resume(self) -> None:
        """Resume, unless it runs: looked up in QEMU, which after a background save may know better than libvirt."""
        if (await self._monitor.execute("query-status"))["status"] == "running":
            return
        if await self.state() is VMState.RUNNING:  # libvirt missed nothing yet: QEMU stood still behind its back
            await self._monitor.execute("cont")
            return
        await called("resume the domain", self._domain.resume)

    async def wake_up(self) -> None:
        """What virsh calls dompmwakeup."""
        await called("wake the guest", self._domain.pMWakeup, 0)

    # -- configuration ---------------------------------------------------------------------------------------------

    @patient
    async def define(self, definition: Definition, chains: Chains) -> None:
        """defineXML with these chains as disks. A transient domain has no next start."""
        if not self._is_persistent():
            return
        xml = domain_xml.with_sources(_persistent(definition), _tops(chains))
        xml = domain_xml.with_name(xml, domain_xml.name(await self._xml(INACTIVE)))  # it may have been renamed since
        await called("define the domain", self._connection.defineXML, xml)

    @patient
    async def align(self, chains: Chains, was: Collection[Path] = ()) -> list[str]:
        """Define the domain again if its persistent definition names other layers of these chains, or one that `was`.

        What libvirt noted there of the layers below, when it switched a running domain, it would believe at the next start.
        """
        if not self._is_persistent():
            return []
        now = await self._xml(INACTIVE)
        named = {d.target: (d.path, d.fmt) for d in resolved(self._connection, now)}
        noted = domain_xml.noted_backing(now)
        tops = {target: top for target, top in _tops(chains).items() if target in noted or named.get(target) != top}
        foreign = [t for t in tops if t in named and not is_among(named[t][0], [*(i.path for i in chains[t]), *was])]
        ours = {target: chain for target, chain in chains.items() if target in tops and target not in foreign}
        if ours:
            await self.define(_definition(persistent=now), ours)
        return foreign

    async def memory_label(self, disks: Mapping[str, Path]) -> str:
        """The live XML: with it `virsh restore` starts the domain, on overlays that are made first (RECOVER.txt)."""
        return domain_xml.with_sources(await self._xml(MIGRATABLE), {t: (p, "qcow2") for t, p in disks.items()})

    # -- snapshot --------------------------------------------------------------------------------------------------

    def pause_guard(self, *, limit: float | None) -> contextlib.AbstractAsyncContextManager[PauseGuard]:
        """A watchdog process connected to libvirt."""
        self._log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        words = ["libvirt", self.uri, self.uuid]
        return WatchdogGuard.guarding(WatchedDomain(self.uri, self.uuid), words, self._log, limit)

    async def prepare_disks(self, overlays: Mapping[str, Image]) -> None:
        """libvirt opens them itself, and does not look what they stand on: that is noted for `switch_disks`."""
        self._below = {target: libvirt_blocks.backing_of(image.path) for target, image in overlays.items()}

    async def forget_prepared(self, overlays: Mapping[str, Image]) -> None:
        """What a libvirtd that was killed in the switch had opened is closed: a second one would collide with it."""
        self._below = {}
        if self.process():
            with contextlib.suppress(DriverFailed):
                await libvirt_blocks.drop_unused(self._monitor, [image.path for image in overlays.values()])

    async def switch_disks(self, overlays: Mapping[str, Image]) -> None:
        """One external snapshot of exactly these disks, onto files that exist, without metadata in libvirt."""
        flags = (libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
                 | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA)  # fmt: skip
        now = await self._xml(SECURE)
        if (await self.state()).is_off:  # libvirt would switch what it starts with next
            raise DriverFailed(f"{self.name} is off since a moment ago")
        libvirt_blocks.refuse_other_layers(self.name, self._below, _files(resolved(self._connection, now)))
        xml = domain_xml.snapshot(now, overlays)
        await called("switch the disks", self._domain.snapshotCreateXML, xml, flags)

    @patient
    async def save_progress(self) -> SaveProgress:
        """query-migrate."""
        return await migration.progress(self._monitor)

    async def check_memory_save(self) -> None:
        """Host devices keep their state to themselves; a QEMU that has let go of its disks would end."""
        devices = domain_xml.passthrough(await self._xml(SECURE))
        if devices:
            raise MemoryNotSaved(f"the memory of {self.name} can't be saved: devices of the host are passed to it "
                                 f"({', '.join(devices)})", hint="use --disk-only")  # fmt: skip
        if await libvirt_blocks.are_let_go(self._monitor):
            raise MemoryNotSaved(f"{self.name} was migrated while it was paused, and has not run since: QEMU can't save it",
                                 hint=f"let it run for a moment: virsh resume {self.name}; virsh suspend {self.name}; "
                                 "or use --disk-only")  # fmt: skip

    async def reconnect(self) -> None:
        """Look for the domain at a new daemon, until it answers. Raise Unreachable after a minute, NotFound.

        That minute is given once: whoever cleans up after it does not wait for the same daemon again and again.
        """
        end = time.monotonic() + (0 if self._given_up else _RESTART)
        while True:
            try:
                connection = await asyncio.to_thread(connect_now, self.uri, max(LOOK, end - time.monotonic()))
                domain = await called("look for the domain", connection.lookupByUUIDString, self.uuid)
                break
            except Unreachable:
                if time.monotonic() > end:
                    self._given_up = True
                    raise
            await asyncio.sleep(0.2)
        self._given_up = False
        self._connection, self._domain, self._monitor = connection, domain, Passthrough(domain)

    def process(self) -> ProcessId | None:
        """The domain's QEMU, by the uuid on its command line."""
        return find_process("-uuid", self.uuid)


def _files(disks: Sequence[DomainDisk]) -> dict[str, Path]:
    return {target: disk.path for target, disk in suitable(disks)[0].items() if disk.path is not None}


def _the_same(believed: Path, said: Path | None) -> Path:
    return believed if said is None or is_among(said, [believed]) else said


def _tops(chains: Chains) -> dict[str, tuple[Path, str]]:
    return {target: (chain[0].path, chain[0].fmt) for target, chain in chains.items()}


def _definition(*, persistent: str, live: str | None = None) -> Definition:
    return Definition("libvirt", json.dumps({"persistent": persistent, "live": live}))


def _persistent(definition: Definition) -> str:
    return str(json.loads(definition.text)["persistent"])


def _live(definition: Definition) -> str:
    text = json.loads(definition.text)
    return str(text["live"] or text["persistent"])
