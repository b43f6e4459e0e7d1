"""machine import: a machine file around images that are there, whoever made them; then the machine is defined from it.

-         chains, headers, users, rights; what `machine define` would refuse    nothing was written
written   the machine file is there, whole                                     define it, or remove it and import again
defined   as after `machine define`
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diskchain.chain import qcow2
from diskchain.chain.machine import DiskSpec, Machine, parse_machine_file
from diskchain.chain.model import MiB, vm_name
from diskchain.chain.plan import Plan
from diskchain.chain.qcow2 import ApprovedImage
from diskchain.chain.text import counted, printable, size
from diskchain.errors import BadMachineFile, Busy, DiskchainError, NotFound, Refused, UnsupportedDisk, UsageError
from diskchain.host import files, locks
from diskchain.host.as_user import name_of
from diskchain.host.fault import point
from diskchain.ops import sharers
from diskchain.ops.machine import Chains, Defined, define, examine
from diskchain.ops.vm import Host
from diskchain.store import catalog as catalog_store
from diskchain.store.catalog import Home

SECTOR = 512


@dataclass(frozen=True)
class Wanted:
    """One `--disk`; "" where nothing was said."""

    image: Path
    fmt: str = ""
    target: str = ""
    role: str = ""


@dataclass(frozen=True)
class Request:
    """What was asked for. `file`: where the machine file goes; None = beside the first disk."""

    name: str
    disks: Sequence[Wanted]
    memory: int
    cpus: int = 1
    firmware: str = "bios"
    file: Path | None = None


@dataclass(frozen=True)
class Prepared:
    """What is decided before anything is written. `notes`: what an admin should know of these images."""

    file: Path
    text: str
    machine: Machine
    chains: Chains
    notes: list[str]


async def prepare(host: Host, request: Request) -> Prepared:
    """Look at everything that could stand in the way of an import. Changes nothing.

    Raise BadName, UsageError, NotFound; Refused and its kin for names, files and images that can't be used; Busy for an
    image that somebody has open; as `machine.define` for chains.
    """
    name = vm_name(request.name)
    if name in host.machines.names():
        raise Refused(
            f"there is a machine {name} already", hint="choose another name; diskchain machine list shows all"
        )
    disks = _specs(request)
    file = (request.file or Path(disks[0].image).parent / f"{name}.toml").absolute()
    _refuse_place(file)
    text = _machine_file(replace(request, name=name), disks, file.parent)
    _, machine, home, chains = await examine(host, file, parse_machine_file(text, str(file)))
    for chain in chains.values():
        _refuse_unusable(chain)
    _refuse_overlays(chains)
    return Prepared(file, text, machine, chains, [*_notes(chains), *_records_note(home)])


async def import_machine(host: Host, prepared: Prepared) -> Defined:
    """Write the machine file and define the machine. Raise as `prepare`; then the file is gone again."""
    _write_new(prepared.file, prepared.text.encode())
    try:
        with files.os_errors(prepared.file, "define"):
            point("import.written")
        return await define(host, prepared.file)
    except BaseException:
        if prepared.machine.name not in host.machines.names():
            files.unlink_durably(prepared.file)
        raise


def plan(prepared: Prepared) -> Plan:
    """Return what the import would do."""
    machine = prepared.machine
    steps = [f"write {prepared.file}"]
    steps += [f"define {machine.name} with {size(machine.memory)} of memory and {counted(machine.cpus, 'CPU')}"]
    for disk in machine.disks:
        chain = prepared.chains[disk.target]
        below = "".join(f" on {image.path}" for image in chain[1:])
        steps.append(f"{disk.target}: {chain[0].path} ({disk.fmt}, {size(chain[0].virtual_size)}){below}")
    return Plan(f"{machine.name}: import", tuple(steps), warnings=tuple(prepared.notes))


# -- what was asked for ------------------------------------------------------------------------------------------------


def _specs(request: Request) -> list[DiskSpec]:
    taken = {wanted.target for wanted in request.disks}
    free = (t for t in (f"vd{a}{b}" for a in ("", *"abcdefghijklmnopqrstuvwxyz") for b in "abcdefghijklmnopqrstuvwxyz")
            if t not in taken)  # fmt: skip
    return [
        DiskSpec(
            wanted.target or next(free), str(_real(wanted)), _format(wanted), wanted.role or ("data" if i else "os")
        )
        for i, wanted in enumerate(request.disks)
    ]


def _real(wanted: Wanted) -> Path:
    path = Path(os.path.realpath(wanted.image))
    if not path.exists():
        raise NotFound(f"{wanted.image} does not exist", hint="name each disk's topmost image")
    return path


def _format(wanted: Wanted) -> str:
    """As said, else by the name. Never by content, which belongs to the guest: it is only shown what that looks like."""
    path = _real(wanted)
    fmt = wanted.fmt or {".qcow2": "qcow2", ".raw": "raw"}.get(path.suffix, "")
    if not fmt:
        fd = files.open_untrusted(path)
        with open(fd, "rb") as opened:
            looks = "qcow2" if opened.read(4) == qcow2.MAGIC else "raw"
        raise UsageError(f"the format of {path.name} is not clear from its name (it begins like {looks})",
                         hint=f"say which: --disk {shlex.quote(str(wanted.image))},format={looks}")  # fmt: skip
    return fmt


def _refuse_place(file: Path) -> None:
    if os.path.lexists(file):
        raise Refused(f"{file} is there already; it is never overwritten",
                      hint=f"name another with --file; or, if it is what you want: diskchain machine define {file}")  # fmt: skip
    if not file.parent.is_dir():
        raise NotFound(f"the directory {file.parent} does not exist", hint="make it, or name another file with --file")
    if not os.access(file.parent, os.W_OK | os.X_OK, effective_ids=True):
        raise Refused(
            f"no file can be made in {file.parent} by us", hint="run as its owner, or name a --file elsewhere"
        )


# -- the machine file --------------------------------------------------------------------------------------------------


def _machine_file(request: Request, disks: Sequence[DiskSpec], directory: Path) -> str:
    day = time.strftime("%Y-%m-%d", time.gmtime())
    whole = request.memory % MiB == 0 and request.memory > 0
    lines = [
        f"# {request.name}: made by `diskchain machine import` on {day}, around images that were there.",
        "# After a change: diskchain machine define THIS-FILE. Every key: docs/machine-file.md",
        "",
        f"name = {_quoted(request.name)}",
        f"memory = {_quoted(f'{request.memory // MiB} MiB') if whole else request.memory}",
        f"cpus = {request.cpus}",
        f"firmware = {_quoted(request.firmware)}",
    ]
    for disk in disks:
        lines += [
            "",
            "[[disk]]",
            f"target = {_quoted(disk.target)}",
            f"image = {_quoted(_relative(Path(disk.image), directory))}",
            f"format = {_quoted(disk.fmt)}",
            f"role = {_quoted(disk.role)}",
        ]
    lines += ["", "# `image` says which chain this is. Which layer of it is written to, only the catalog knows:",
              "# once there are snapshots it is another one, and this file stays as it is."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _relative(path: Path, directory: Path) -> str:
    real = Path(os.path.realpath(directory))
    return str(path.relative_to(real)) if path.is_relative_to(real) else str(path)


def _quoted(text: str) -> str:
    """As a TOML string. Raise BadMachineFile for a name that TOML can't hold, or that would be several lines."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = ""
    if not text or re.search(r"[\x00-\x1f\x7f]", text):
        raise BadMachineFile("a path with control characters, or with bytes that are no UTF-8, can't stand in a machine file",
                             hint="rename the file or its directory")  # fmt: skip
    return json.dumps(text, ensure_ascii=False)


def _write_new(path: Path, data: bytes) -> None:
    """Write a file that did not exist, durably. Raise Refused when it is there by now, NoSpace."""
    try:
        fd = files.create_exclusive(path, 0o644)
    except DiskchainError as error:
        if os.path.lexists(path):
            raise Refused(
                f"{path} is there already; it is never overwritten", hint="name another with --file"
            ) from error
        raise
    try:
        with files.os_errors(path, "write"), open(fd, "wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    files.fsync_dir(path.parent)


# -- the images --------------------------------------------------------------------------------------------------------


def _refuse_unusable(chain: Sequence[ApprovedImage]) -> None:
    """Raise Busy when somebody has the top open, or writes to what it stands on; Refused for what we can't write."""
    top = Path(chain[0].path)
    if locks.image_in_use(top):
        raise Busy(f"{top} is in use by {locks.open_by(top)}",
                   hint="stop that first, and never start it again: two writers destroy a disk")  # fmt: skip
    for below in (image.path for image in chain[1:]):
        if locks.has_writer(below):
            raise Busy(f"{below}, on which {top.name} stands, is written to by {locks.open_by(below)}",
                       hint="nobody may write to the lower layers of a chain; stop that first")  # fmt: skip
    _refuse_rights(top)
    _refuse_size(chain[0])


def _refuse_rights(top: Path) -> None:
    status = top.stat()
    if not os.access(top, os.R_OK | os.W_OK, effective_ids=True):
        raise Refused(f"{top} can't be written by us: mode {stat.S_IMODE(status.st_mode):o}, owner {name_of(status.st_uid)}",
                      hint="run diskchain as its owner or as root, or change owner and mode; see also lsattr, findmnt")  # fmt: skip
    if not os.access(top.parent, os.W_OK | os.X_OK, effective_ids=True):
        raise Refused(f"overlays and records go beside {top.name}, and no file can be made in {top.parent} by us",
                      hint="run diskchain as the owner of the directory or as root")  # fmt: skip


def _refuse_size(top: ApprovedImage) -> None:
    """Lower layers may have any size: nothing is ever written to them."""
    given = top.file_size if top.header is None else top.header.virtual_size
    name = shlex.quote(str(top.path))
    if given == 0:
        raise UnsupportedDisk(f"{top.path} is empty: a disk of 0 bytes", hint="name the right file")
    if given % SECTOR and top.header is not None:
        raise UnsupportedDisk(f"{top.path}: {given} bytes are no multiple of {SECTOR}; QEMU leaves the end away",
                              hint=f"qemu-img resize -f qcow2 {name} {-(-given // SECTOR) * SECTOR}")  # fmt: skip
    if given % SECTOR:
        raise UnsupportedDisk(f"{top.path}: {given} bytes are no multiple of {SECTOR}; its last sector is not whole",
                              hint=f"fill it up with zeroes, nothing is lost: truncate -s %{SECTOR} {name}")  # fmt: skip


def _refuse_overlays(chains: Chains) -> None:
    """Raise Refused when something stands on a disk, in any directory that these chains name."""
    directories = {Path(image.path).parent for chain in chains.values() for image in chain}
    for chain in chains.values():
        for directory in sorted(directories):
            found = sharers.overlays_in(directory, Path(chain[0].path))
            if found:
                raise Refused(f"{chain[0].path} is the backing file of {found[0]}; a VM that writes to it destroys that",
                              hint="name the topmost image of the chain instead, or move its overlays away")  # fmt: skip


def _notes(chains: Chains) -> Iterator[str]:
    for target, chain in chains.items():
        for image in chain:
            if image.header and image.header.snapshots:
                count = image.header.snapshots
                yield (f"{target}: {image.path} holds {counted(count, 'internal snapshot')}: kept as it is; "
                       "a later merge into this layer is refused")  # fmt: skip
            if image.header and image.header.has_bitmaps:
                yield (f"{target}: {image.path} holds dirty bitmaps: kept as they are; "
                       "a later merge into this layer is refused")  # fmt: skip
        if chain[0].path.stat().st_nlink > 1:
            yield f"{target}: {chain[0].path} has several names (hard links); a later merge into it is refused"
        if len({image.virtual_size for image in chain}) > 1:
            yield f"{target}: its layers differ in size; the disk has the {size(chain[0].virtual_size)} of the topmost"


def _records_note(home: Home) -> Iterator[str]:
    try:
        catalog = catalog_store.load(home)
    except DiskchainError:
        return
    yield (f"records of {printable(catalog.name)} were found beside it: its {len(catalog.visible())} snapshots come back, "
           "and the machine writes to the layer that its catalog names")  # fmt: skip
