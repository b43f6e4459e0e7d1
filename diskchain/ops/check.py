"""check: one VM's records, files and hypervisor against each other. Nothing is written, no lock is taken, no QEMU changed.

Made for damaged machines: each look stands alone, and what a look can't read becomes a finding, not an end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from diskchain.chain.model import Catalog, Image, Snapshot
from diskchain.chain.qcow2 import Header
from diskchain.chain.rules import Finding, deep_chains, detached, error, expired_snapshots, info, warning
from diskchain.chain.text import size
from diskchain.drivers.protocol import VMState
from diskchain.errors import (
    DiskchainError,
    HostileImage,
    MemoryDamaged,
    NotFound,
    RecordDamaged,
    Refused,
    ToolFailed,
    UnsupportedDisk,
)
from diskchain.host import files, locks, qemu_img
from diskchain.ops import check_domain, check_states, drift, layers, leftovers, moved
from diskchain.ops.approve import checked_header, differing, fingerprint
from diskchain.ops.definitions import verify_for_memory
from diskchain.ops.look import expired
from diskchain.ops.looked import Look, look, stands_still
from diskchain.ops.vm import Host, definition_at, naming
from diskchain.store import catalog as catalog_store
from diskchain.store import memory_file
from diskchain.store.catalog import Home

NO_RECORDS = Home(Path("/nonexistent"))


# -- check -------------------------------------------------------------------------------------------------------------


async def check(host: Host, name: str, *, deep: bool = False) -> list[Finding]:
    """Return everything that is found about a VM. Raise NotFound."""
    seen = await look(host, name)
    found = list(seen.findings)
    if seen.home is not None and seen.home.path.is_dir():
        found += _records(seen, seen.home)
    found += stands_still(seen)
    if seen.state is VMState.RUNNING and seen.home is not None:
        found += await _frozen_guest(host, seen, seen.home)
    if seen.catalog is not None and seen.domain and not seen.busy and not seen.in_flight:
        found += await check_domain.find(host, seen, seen.domain, seen.catalog)
    if seen.catalog is not None:
        found += expired_snapshots(seen.name, expired(seen.catalog, time.time()))
        home = seen.home or NO_RECORDS
        found += await asyncio.to_thread(_files, host, seen, seen.catalog, home, deep)
        if deep and seen.state is VMState.STOPPED and not seen.busy:
            found += await _images_inside(host, seen, seen.catalog, found)
    return found


async def _frozen_guest(host: Host, seen: Look, home: Home) -> list[Finding]:
    """Ask the guest agent, unless an operation is at work on the VM: it may be talking to it."""
    if seen.busy or locks.holder_operation(home.lock) or seen.state is not VMState.RUNNING:
        return []
    driver = seen.driver(host)
    try:
        if not driver.has_agent() or not await driver.is_frozen():
            return []
    except DiskchainError:
        return []  # no agent, or one that does not answer: that is no damage
    finally:
        await driver.close()
    return [error("guest-frozen", seen.name, "the guest's file systems are frozen: its programs wait as soon as they write",
                  f"diskchain recover {seen.name}")]  # fmt: skip


def _files(host: Host, seen: Look, catalog: Catalog, home: Home, deep: bool) -> list[Finding]:
    found = list(_active(seen, catalog))
    if seen.registered and not seen.in_flight:
        found += drift.definition(seen.registered, catalog)
        found += drift.run_record(seen.name, seen.changed, seen.no_record)
    if not seen.busy:
        for image in catalog.images.values():
            found += _layer(host, seen, catalog, image)
        found += _writers(seen, catalog)
    found += detached(catalog)
    found += deep_chains(seen.name, max((len(c) for c in catalog.active_chains().values()), default=0))
    if seen.domain and not seen.in_flight:
        found += drift.of_domain(seen.domain, catalog, known=seen.home is not None)
    if seen.state is not None and not seen.busy and not seen.in_flight:
        found += check_states.own(seen.name, catalog, seen.driver(host))
    for snapshot in catalog.snapshots.values():
        found += _snapshot(seen, home, snapshot, deep)
    own = set(map(str, seen.active.values()))  # where something else switched it to another file; `_active` says so
    found += [f for f in leftovers.find(host, catalog, home, seen.in_flight) if f.subject not in own]
    found += _pending(seen, catalog)
    return found


def _records(seen: Look, home: Home) -> Iterator[Finding]:
    mode = stat.S_IMODE(home.path.stat().st_mode)
    if mode & 0o077:
        yield warning("records-open", str(home.path), f"mode {mode:o}: others can look at the memory of guests",
                      f"chmod 700 {home.path}")  # fmt: skip
    if not home.recover_txt.is_file():
        yield warning("recover-text-missing", str(home.recover_txt), "it is not there",
                      f"any change writes it again: diskchain create {seen.name}")  # fmt: skip
    elif seen.catalog and not seen.busy and not seen.in_flight:
        with contextlib.suppress(OSError):
            if home.recover_txt.read_bytes() != catalog_store.recover_text(home, seen.catalog):
                yield info("recover-text-old", str(home.recover_txt), "it is not what the catalog says",
                           "the next change writes it again")  # fmt: skip


# -- layers ------------------------------------------------------------------------------------------------------------


def _layer(host: Host, seen: Look, catalog: Catalog, image: Image) -> Iterator[Finding]:
    """One image: there, approved, as the catalog says, unchanged since it was frozen."""
    where = f"{image.target} {image.path}"
    try:
        header, status = _opened(image)
    except DiskchainError as problem:
        yield _unusable(catalog.name, where, image, problem)
        if isinstance(problem, NotFound):
            yield from _alike(host, catalog, image, where)
        return
    then = f"; then: diskchain check --repair {catalog.name}" if image.fingerprint else ""
    if header is not None and header.snapshots:
        yield info("internal-snapshots", where, f"internal snapshots in it: {header.snapshots}; they stay, and keep it from "
                   "being merged", f"qemu-img snapshot -l '{image.path}'; let them go with -d, the VM off{then}")  # fmt: skip
    if header is not None and header.has_bitmaps:
        yield info("dirty-bitmaps", where, "it holds dirty bitmaps of a backup; they keep it from being merged",
                   f"qemu-img bitmap --remove '{image.path}' NAME, when no backup needs it{then}")  # fmt: skip
    moving = bool({image.id, image.path.name} & seen.in_flight)
    if status.st_nlink > 1:
        yield warning("hard-links", where, f"it has {status.st_nlink} names; who uses the others is not known",
                      "give it a file of its own: cp --reflink=auto, with the VM off")  # fmt: skip
    if header is not None and header.dirty and seen.state is VMState.STOPPED:
        yield info("layer-dirty", where, "it was not closed; QEMU repairs its counters at the next start")
    if not moving:
        yield from _against_catalog(catalog, image, header, where)
        yield from _frozen(catalog, image, where)


def _opened(image: Image) -> tuple[Header | None, os.stat_result]:
    with files.UntrustedFiles() as opener:
        opened = opener.open(image.path)
    try:
        return (None if image.fmt == "raw" else checked_header(opened)), opened.status
    finally:
        os.close(opened.fd)


def _unusable(name: str, where: str, image: Image, problem: DiskchainError) -> Finding:
    if isinstance(problem, NotFound):
        return error("layer-missing", where, "the file is not there; every state above it needs it",
                     f"bring {image.path.name} back to {image.path.parent}; if it was moved: "
                     f"diskchain check --repair {name}")  # fmt: skip
    codes: dict[type[DiskchainError], str] = {
        HostileImage: "layer-hostile", UnsupportedDisk: "layer-unsupported", Refused: "layer-unreadable",
    }  # fmt: skip
    return error(codes.get(type(problem), "layer-damaged"), where, problem.message,
                 naming(problem, name).hint or "bring the right file back")  # fmt: skip


def _alike(host: Host, catalog: Catalog, image: Image, where: str) -> Iterator[Finding]:
    """Files that could be a lost layer, and why `--repair` does not take them."""
    found = moved.find(host, catalog, image)
    for one in found if moved.place(found) is None else ():
        doubt, remedy = one.doubt or "is one of several that fit", one.remedy or f"mv the right one to '{image.path}'"
        yield info("layer-alike", where, f"{one.path} has its fingerprint, and {doubt}", remedy)


def _against_catalog(catalog: Catalog, image: Image, header: Header | None, where: str) -> Iterator[Finding]:
    below = catalog.images[image.backing] if image.backing else None
    if header is None:
        return
    if (header.backing_name is None) != (below is None) or (below and not _leads_to(image, header, below)):
        says = below.path if below else "no backing file"
        remedy = "something else than diskchain changed the chain; see RECOVER.txt"
        yield error("backing-differs", where, f"it names {header.backing_name!r}, the catalog says {says}", remedy)
    elif below and header.backing_format != below.fmt:
        yield error("backing-format-differs", where,
                    f"it names the format {header.backing_format!r}, the catalog says {below.fmt}",
                    f"with the VM off: qemu-img rebase -u -f qcow2 -F {below.fmt} -b {below.path} {image.path}")  # fmt: skip
    if header.virtual_size != image.virtual_size:
        yield warning("size-differs", where, f"the disk has {size(header.virtual_size)}, the catalog says "
                      f"{size(image.virtual_size)}", "was it resized? the next snapshot notes the size")  # fmt: skip


def _leads_to(image: Image, header: Header, below: Image) -> bool:
    named = image.path.parent / (header.backing_name or "")
    with contextlib.suppress(OSError, ValueError):
        return named == below.path or named.samefile(below.path)
    return False


def _frozen(catalog: Catalog, image: Image, where: str) -> Iterator[Finding]:
    if image.fingerprint is None:
        return
    try:
        now = fingerprint(image.path, image.fmt)
    except DiskchainError as problem:
        yield _unusable(catalog.name, where, image, problem)
        return
    changed = differing(image.fingerprint, now)
    if changed:
        yield error("layer-changed", where, f"it was changed since it was frozen ({', '.join(changed)} differ)",
                    layers.changed_hint(image).replace("--repair VM", f"--repair {catalog.name}"))  # fmt: skip


def _active(seen: Look, catalog: Catalog) -> Iterator[Finding]:
    """What a running QEMU writes to against the catalog."""
    if seen.state is None or seen.state.is_off or seen.in_flight or not seen.active:
        return
    way = f"diskchain {'adopt' if seen.domain else 'recover'} {seen.name}; do not stop the VM before you have a backup from inside"
    for target, image_id in catalog.active.items():
        says, path = seen.active.get(target), catalog.images[image_id].path
        if says is None:
            yield error(
                "active-differs", f"{seen.name} {target}", f"QEMU has no such disk, the catalog says {path}", way
            )
        elif says != path and not files.same_file(says, path) and not drift.is_stale(catalog, target, says):
            yield error(
                "active-differs", f"{seen.name} {target}", f"QEMU writes to {says}, the catalog says {path}", way
            )


def _writers(seen: Look, catalog: Catalog) -> Iterator[Finding]:
    """Somebody writes to a frozen layer, or to any layer of a VM that is off. What its own QEMU is on, `_active` judges."""
    active = set(catalog.active.values()) if seen.state is not VMState.STOPPED else set()
    for image in catalog.images.values():
        if image.id in active or image.path in seen.active.values() or seen.state is None:
            continue
        if not image.path.is_file() or image.path.is_symlink():
            continue
        with contextlib.suppress(OSError):
            if locks.has_writer(image.path):
                yield error("foreign-writer", f"{image.target} {image.path}",
                            f"{locks.open_by(image.path)} writes to it", "end that program now; then check again")  # fmt: skip


async def _images_inside(host: Host, seen: Look, catalog: Catalog, before: Iterable[Finding]) -> list[Finding]:
    """`qemu-img check` of every image that QEMU may be shown; no locks of QEMU's are taken."""
    bad = {f.subject for f in before if f.code.startswith("layer-")}
    found: list[Finding] = []
    for image in catalog.images.values():
        where = f"{image.target} {image.path}"
        if image.fmt != "raw" and where not in bad:
            found += await _image_inside(image, where)
    again = await look(host, seen.name)
    return found if again.state is VMState.STOPPED and not again.busy else []  # it started meanwhile: they mean nothing


async def _image_inside(image: Image, where: str) -> list[Finding]:
    try:
        result = await qemu_img.check(qemu_img.unlocked(image.path, image.fmt))
    except ToolFailed as problem:
        return [error("image-corrupt", where, problem.message, "bring the file back from a backup")]
    if result.corruptions:
        return [error("image-corrupt", where, f"qemu-img check counts {result.corruptions} corruptions",
                      "back up what can be read, then: qemu-img check -r all (with the VM off)")]  # fmt: skip
    if result.leaks:
        return [info("image-leaks", where, f"{result.leaks} clusters are reserved and unused; no data is affected")]
    return []


# -- snapshots ---------------------------------------------------------------------------------------------------------


def _snapshot(seen: Look, home: Home, snapshot: Snapshot, deep: bool) -> Iterator[Finding]:
    subject = f"{seen.name} {snapshot.name}"
    if {snapshot.id, snapshot.name} & seen.in_flight:
        return
    if not snapshot.deleted:
        code = "configuration-unreadable"
        try:
            definition_at(home, snapshot)
            code = "configuration-changed"
            verify_for_memory(home, snapshot)
        except DiskchainError as problem:
            yield error(code, subject, problem.message, problem.hint)
        yield from check_states.copies(home, snapshot, subject)
    if snapshot.memory.status == "failed":
        yield info("memory-failed", subject, f"its memory was not saved: {snapshot.memory.reason}")
    if snapshot.memory.status == "saving":
        yield warning("memory-unfinished", subject, "its memory is noted as being saved, and nobody saves it",
                      f"diskchain recover {seen.name}")  # fmt: skip
    if snapshot.memory.saved and not snapshot.deleted:
        yield from _memory(home.memory(snapshot.id), snapshot, subject, deep)


def _memory(path: Path, snapshot: Snapshot, subject: str, deep: bool) -> Iterator[Finding]:
    remedy = f"{memory_file.HINT}; or bring the file back"
    try:
        status = path.lstat()
    except OSError as problem:
        yield error("memory-missing", subject, f"{path}: {problem.strerror}", remedy)
        return
    try:
        if deep:
            os.close(memory_file.open_verified(path, snapshot.memory.bytes, snapshot.memory.sha256))
        else:
            memory_file.verify_outside(path, snapshot.memory.bytes)
    except (MemoryDamaged, OSError) as problem:
        yield error("memory-damaged", subject, str(problem), remedy)
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISREG(status.st_mode) and mode != 0o600:
        yield warning("memory-mode", subject, f"{path} has mode {mode:o}: guest memory is secrets", f"chmod 600 {path}")


def _pending(seen: Look, catalog: Catalog) -> Iterator[Finding]:
    for snapshot in catalog.pending():
        tops = [o.path for image_id in snapshot.disks.values() for o in catalog.overlays_on(image_id)]
        if catalog.is_fork(snapshot):
            yield info("layer-waits", seen.name, f"{snapshot.name!r} is deleted; several layers stand on its layer",
                       "it is merged when one is left; or now: delete the other branches")  # fmt: skip
            continue
        count = 0
        for path in tops:
            with contextlib.suppress(DiskchainError):
                count += files.allocated_bytes(path)
        yield info("pending-merge", seen.name, f"{snapshot.name!r} is deleted; {size(count)} are to be merged",
                   f"diskchain merge {seen.name} (when it is off)")  # fmt: skip


def all_names(host: Host) -> list[str]:
    """Return the names of all VMs. Raise RecordDamaged where the state directory can't be read."""
    try:
        return host.names()
    except OSError as problem:
        raise RecordDamaged(f"{host.machines.dir} can't be read: {problem.strerror}",
                            hint="run diskchain as the user who owns it") from problem  # fmt: skip
