"""base seal, verify, users: an image that several VMs stand on, protected, watched over, and who they are.

A seal is a mode (0444) and a record beside the image: its fingerprint, its time, on request the digest of every byte.
A sealed image is never merged into and never unlinked. What the seal holds and when it is looked at: docs/merging.md.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diskchain.chain.plan import Plan
from diskchain.chain.text import size
from diskchain.drivers.domains import Domain
from diskchain.errors import Busy, ChainDamaged, DiskchainError, HasSharers, NotFound, Refused, UsageError
from diskchain.host import files, locks, mounts
from diskchain.host.fault import point
from diskchain.ops import directories, images_known
from diskchain.ops.approve import approve_chain, differing, fingerprint
from diskchain.ops.directories import Identity
from diskchain.ops.ids import now_utc
from diskchain.ops.progress import QUIET, Progress
from diskchain.ops.vm import Host
from diskchain.ops.written import refuse_unwritable
from diskchain.store import seal as seal_store
from diskchain.store.seal import Seal

MODE = 0o444


# -- seal --------------------------------------------------------------------------------------------------------------


def format_of(host: Host, image: Path, said: str | None) -> str:
    """Return the format of an image: as said, as a catalog or its seal has it, as it is called; never probed.

    Raise UsageError when that says nothing, NotFound.
    """
    if said:
        return said
    identity = files.identity(image)
    for _, catalog in images_known.catalogs(host):
        for known in catalog.images.values():
            if known.path.exists() and files.identity(known.path) == identity:
                return known.fmt
    known_seal = seal_store.load(image)
    by_name = {".qcow2": "qcow2", ".raw": "raw"}.get(image.suffix)
    fmt = known_seal.fmt if known_seal else by_name
    if fmt is None:
        raise UsageError(f"the format of {image} is not clear from its name", hint="--format qcow2, or --format raw")
    return fmt


def plan_seal(host: Host, image: Path, fmt: str, *, digest: bool) -> Plan:
    """Look at what stands in the way of a seal, and return what it does. Changes nothing.

    Raise BadName, NotFound, HostileImage, Busy when somebody writes to it, HasSharers when a VM does so when it runs, ChainDamaged
    when it is not any more what an older seal says.
    """
    refuse_unwritable(image)
    found = approve_chain(image, fmt)[0]
    refuse_writer(image)
    writers = [user.who for user in users(host, image) if user.how == "writes to it"]
    if writers:
        raise HasSharers(f"{', '.join(writers)} writes to {image}: it is no base",
                         hint="take a snapshot of that VM, and stand on what that freezes; or seal a copy")  # fmt: skip
    old = seal_store.load(image)
    if old is not None and (wrong := _differing(image, old)) not in ([], ["mtime_ns"]):
        raise ChainDamaged(f"{image} was changed since it was sealed ({', '.join(wrong)} differ)",
                           hint=f"bring the right file back; if the change was meant: rm '{seal_store.place(image)}'")  # fmt: skip
    mode = stat.S_IMODE(image.stat().st_mode)
    steps = [f"note its fingerprint in {seal_store.place(image)}"]
    steps += [f"read all {size(found.file_size)} of it for its digest"] if digest else []
    steps += [f"mode {mode:04o} -> {MODE:04o}"] if mode != MODE else []
    return Plan(f"{image}: seal", tuple(steps))


def refuse_writer(image: Path) -> None:
    """Raise Busy when somebody has the image open for writing. Raise NotFound."""
    with files.os_errors(image, "look at"):
        if locks.has_writer(image):
            raise Busy(f"{image} is being written by {locks.open_by(image)}", hint="end that program first")


def seal(host: Host, image: Path, fmt: str, *, digest: bool, progress: Progress = QUIET) -> Seal:
    """Seal an image; return the seal. Can be repeated; killed anywhere, the image is as it was, but for its mode.

    Raise as `plan_seal`, Busy when it was written meanwhile.
    """
    plan_seal(host, image, fmt, digest=digest)
    old = seal_store.load(image)
    with files.os_errors(image, "protect"):
        image.chmod(MODE)
    files.fsync_file(image)
    point("seal.protected")
    before = image.stat().st_mtime_ns
    mark, whole = fingerprint(image, fmt), _digest(image, progress) if digest else ""
    if image.stat().st_mtime_ns != before or locks.has_writer(image):
        raise Busy(f"{image} was written while it was sealed", hint="end that program, then try again")
    kept = old.sha256 if old is not None and not digest and old.mtime_ns == before else ""
    found = Seal(image.name, fmt, mark, before, whole or kept, now_utc(), getpass.getuser())
    seal_store.save(image, found)
    point("seal.written")
    return found


def _digest(image: Path, progress: Progress) -> str:
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress.update(done)

    progress.begin(f"reading {image.name}", image.stat().st_size, note="safe to interrupt")
    try:
        return files.file_digest_progress(image, 0, on_bytes)
    finally:
        progress.end()


def _differing(image: Path, seal: Seal) -> list[str]:
    """What is not as it was sealed."""
    now = {**fingerprint(image, seal.fmt), "mtime_ns": image.stat().st_mtime_ns}
    was = {**seal.fingerprint, "mtime_ns": seal.mtime_ns}
    return differing(was, now)


# -- verify ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verified:
    """A base that is what was sealed. `deep`: every byte was compared; `remarks`: what an admin should know all the same."""

    image: Path
    seal: Seal
    deep: bool
    remarks: tuple[str, ...]


def verify(host: Host, image: Path, *, deep: bool, progress: Progress = QUIET) -> Verified:
    """Compare an image with its seal; `deep`: every byte of it.

    Raise NotFound without image or seal, ChainDamaged saying what differs or where it was moved, Refused for `deep` of a
    seal without digest.
    """
    found = seal_store.load(image)
    if not os.path.lexists(image):
        raise _gone(host, image, found)
    if found is None:
        found = _of_before(image)
    wrong = _differing(image, found)
    if deep and not found.sha256:
        raise Refused(f"{image} was sealed without a digest", hint=f"diskchain base seal --digest '{image}'")
    if wrong not in ([], ["mtime_ns"]) or (wrong and not deep):
        again = f"; if only its time was changed, this tells: diskchain base verify --deep '{image}'"
        raise ChainDamaged(f"{image} is not what was sealed on {found.created} ({', '.join(wrong)} differ)",
                           hint="bring the right file back" + (again if found.sha256 else ""))  # fmt: skip
    if deep and _digest(image, progress) != found.sha256:
        raise ChainDamaged(f"{image} is not what was sealed on {found.created}: its content differs",
                           hint="bring the right file back from a backup")  # fmt: skip
    return Verified(image, found, deep, tuple(_remarks(image, found, wrong)))


def _remarks(image: Path, seal: Seal, wrong: list[str]) -> Iterator[str]:
    if wrong:
        yield "its time was changed, its content was not"
    mode = stat.S_IMODE(image.stat().st_mode)
    if mode & 0o222:
        yield f"its mode is {mode:04o}: it can be written; diskchain base seal protects it again"
    if seal.name != image.name:
        yield f"it was called {seal.name} when it was sealed; diskchain base seal notes its new name"


def _of_before(image: Path) -> Seal:
    """The seal of an image that was renamed in its directory. Raise NotFound."""
    for _, seal in seal_store.beside(image.parent):
        with contextlib.suppress(DiskchainError):
            if _differing(image, seal) == []:
                return seal
    raise NotFound(f"{image} is not sealed", hint=f"diskchain base seal '{image}'")


def _gone(host: Host, image: Path, seal: Seal | None) -> DiskchainError:
    if seal is None:
        return NotFound(f"{image} does not exist", hint="correct the name")
    places = find(host, {**seal.fingerprint}, seal.fmt, image.parent)
    if not places:
        return ChainDamaged(f"{image} is gone, and nothing like it is in a known directory", hint="bring it back")
    return ChainDamaged(f"{image} is gone; its fingerprint fits {', '.join(map(str, places))}",
                        hint="mv it back; or let each VM follow it: diskchain check VM --repair")  # fmt: skip


def find(host: Host, wanted: dict[str, object], fmt: str, *more: Path) -> list[Path]:
    """Return the files of known directories that a fingerprint fits, one name of each. Files of other sizes are not read."""
    found = []
    for names in images_known.scan(images_known.directories(host, *more)).names.values():
        with contextlib.suppress(DiskchainError, OSError):
            path = next((name for name in names if not name.is_symlink()), names[0])
            if path.stat().st_size == wanted.get("size") and not differing(wanted, fingerprint(path, fmt)):
                found.append(path)
    return sorted(found)


# -- users -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class User:
    """Who uses a base, in words (`the machine web1`, `the file PATH`), how, and by which file."""

    who: str
    how: str
    path: Path
    state: str = ""  # of a VM: defined, running, saved


def users(host: Host, image: Path) -> list[User]:
    """Return everybody who uses an image, its other names, and what can't be read: it may be a user, too.

    Raise NotFound, Unreachable when libvirt does not answer.
    """
    target = files.identity(image)
    scan = images_known.scan(images_known.directories(host, image.parent))
    above = dict(scan.overlays_of(target))
    vms = list(_vms(host, target, above))
    named = {directories.identity(user.path) for user in vms} | _layers(host)
    overlays = [User(f"the file {path}", "stands on it", path) for i, path in sorted(above.items(), key=lambda x: x[1])
                if i not in named]  # fmt: skip
    unread = [User(f"perhaps {one.path}", f"it can't be read ({one.why})", one.path) for one in scan.unread]
    return [*vms, *overlays, *_names(image, scan.names.get(target, [])), *_holders(image), *unread]


def _vms(host: Host, target: Identity, above: dict[Identity, Path]) -> Iterator[User]:
    states = {d.uuid: _state(d) for d in host.domains.all()}
    known = {neighbour.uuid: catalog for neighbour, catalog in images_known.catalogs(host)}
    for other in host.neighbours():
        state, catalog = states.get(other.uuid, "defined"), known.get(other.uuid)
        if catalog is not None:
            active = [catalog.images[i].path for i in catalog.active.values() if i in catalog.images]
            paths = [i.path for i in catalog.images.values()]
        else:
            active = paths = list(other.disks)
        if any(directories.identity(path) == target for path in active):
            yield User(other.label, "writes to it", next(p for p in active if directories.identity(p) == target), state)
        elif hit := next((p for p in paths if directories.identity(p) == target), None):
            top = next((p for p in active if directories.identity(p) in above), hit)
            yield User(other.label, "stands on it", top, state)
        elif hit := next((p for p in (*paths, *other.disks) if directories.identity(p) in above), None):
            yield User(other.label, "stands on it", hit, state)


def _state(domain: Domain) -> str:
    return "running" if domain.active else "saved" if domain.managed_save else "defined"


def _layers(host: Host) -> set[Identity | None]:
    """Return every file that is a layer in some catalog: its VM was named."""
    return {directories.identity(i.path) for _, catalog in images_known.catalogs(host) for i in catalog.images.values()}


def _names(image: Path, found: list[Path]) -> Iterator[User]:
    """Symlinks and hard links in known directories, hard links elsewhere, bind mounts."""
    for path in found:
        if path != image.resolve() and path != image:
            yield User(f"the name {path}", "symlink" if path.is_symlink() else "hard link", path)
    hard = [path for path in found if not path.is_symlink()]
    missing = image.stat().st_nlink - max(1, len(hard))
    if missing > 0:
        yield User(
            f"{missing} more name{'s'[: missing - 1]} (hard links), no known directory has them", "hard link", image
        )
    for path in mounts.other_names(image):
        if path not in found:
            yield User(f"the name {path}", "bind mount", path)


def _holders(image: Path) -> Iterator[User]:
    if locks.is_open(image):
        yield User(f"the process {locks.open_by(image)}", "has it open", image)
