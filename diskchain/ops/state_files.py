"""What a VM keeps besides disks and memory (UEFI variables, TPM): made once, copied into every snapshot, put back.

Which there are and where, the driver says (`Driver.state_files`); what they mean is its business too.

A copy in a pause: everything is prepared before it (file, space, descriptor); in it the states are read and written
through that descriptor, nothing is made and nothing synced; afterwards the copy is unpacked, synced and gets its digests.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from diskchain.chain.model import Catalog, MiB, Snapshot
from diskchain.chain.text import name_with
from diskchain.drivers.protocol import Definition, Driver, StateFile, VMState
from diskchain.errors import DiskchainError, Refused, StateMissing
from diskchain.host import files
from diskchain.host.fault import point
from diskchain.ops.vm import VM
from diskchain.store import state_copy
from diskchain.store.catalog import Home

LARGEST = 64 * MiB  # NVRAM has half a MiB, a TPM some KiB
SPARE = MiB // 4  # a TPM's files may grow until the pause


# -- the VM's own ------------------------------------------------------------------------------------------------------


async def provide(driver: Driver, catalog: Catalog) -> Catalog:
    """See that the VM has the state files that its next start needs; return the catalog that knows them.

    One that never was is made. One that was is never made anew in silence: boot entries and keys would be lost. Raise
    StateMissing then; NotFound when something must be installed.
    """
    definition = driver.definition()
    for state in driver.state_files(definition):
        there = os.path.lexists(state.path)
        if state.made_by_manager and not there and state.name not in catalog.state_files:
            continue
        if there:
            refuse_unusable(driver, definition, state)
        elif state.name in catalog.state_files:
            raise StateMissing(
                f"the {label(state.name)} of {catalog.name} is gone: {state.path}", hint=_way_out(catalog)
            )
        else:
            await driver.make_state_file(state)
            point("state.made")
        if state.name not in catalog.state_files:
            catalog = replace(catalog, state_files=(*catalog.state_files, state.name))
    return catalog


def _is_due(state: StateFile) -> bool:
    """Whether the VM must have it: not what its manager has still to make at the first start.

    Only who may look can say that it is not there.
    """
    if not state.made_by_manager or state.in_use:
        return True
    try:
        state.path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def present(vm: VM, definition: Definition) -> list[StateFile]:
    """Return what a VM with this configuration keeps, without what its manager has still to make."""
    return [s for s in vm.driver.state_files(definition) if _is_due(s) or s.name in vm.catalog.state_files]


def refuse_unusable(driver: Driver, definition: Definition, state: StateFile) -> None:
    """Raise StateMissing when the VM's own state can't be read, or is not one that it could start with."""
    sizes = {Path(name).name: len(data) for name, data in read_state(state).items()}
    problem = driver.unusable(definition, state.name, sizes)
    if problem:
        raise StateMissing(f"{state.path} can't be used: {problem}", hint="bring the right one back from a backup")


def _way_out(catalog: Catalog) -> str:
    return (f"bring it back from a backup, or go back to a snapshot: diskchain revert --discard {catalog.name} NAME "
            "(docs/recovery.md says how to begin with a new one)")  # fmt: skip


def label(name: str) -> str:
    """Return the word that admins know."""
    return {"nvram": "NVRAM", "tpm": "TPM state"}.get(name, name)


def read_state(state: StateFile) -> dict[str, bytes]:
    """Return the files of one state, by their place below a snapshot's directory. Raise StateMissing."""
    return read_files(state, state.path, state.name)


def read_files(state: StateFile, path: Path, name: str) -> dict[str, bytes]:
    """Given where the files of a state are (the VM's own, or a copy), return them by their place below `name`."""
    try:
        if not state.directory:
            return {name: _read(path)}
        found = {}
        for entry in sorted(path.iterdir()):
            if fnmatchcase(entry.name, state.pattern):
                with contextlib.suppress(FileNotFoundError):  # it was replaced by its next version while we looked
                    found[f"{name}/{entry.name}"] = _read(entry)
        return found
    except OSError as error:
        hint = "run diskchain as root" if isinstance(error, PermissionError) else "bring it back from a backup"
        raise StateMissing(f"the {label(state.name)} can't be read: {error.strerror} ({path})", hint=hint) from error


def _read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return files.read_span(fd, 0, min(os.fstat(fd).st_size, LARGEST))  # asked for more, Python allocates it first
    finally:
        os.close(fd)


# -- the copy in a snapshot --------------------------------------------------------------------------------------------


def check_can_capture(vm: VM, definition: Definition, state: VMState, save: str) -> None:
    """Raise what stands in the way of a copy: Refused (a helper died; not safe without memory), StateMissing."""
    states = present(vm, definition)
    if states and not state.is_off:
        vm.driver.check_helpers()
    if save == "never" and not state.is_off and (names := [label(s.name) for s in states if not s.settles]):
        raise Refused(f"{vm.name} is on and has {' and '.join(names)}: a snapshot without memory is not known to be safe",
                      hint=f"leave --disk-only and --skip-disk away, or stop it first: diskchain stop {vm.name}")  # fmt: skip
    for one in states:
        read_state(one)


async def check_can_keep(vm: VM, *, with_memory: bool) -> None:
    """Raise what keeps a revert from keeping the present's states: StateMissing; Refused when a helper has died."""
    if with_memory:
        vm.driver.check_helpers()
    for one in present(vm, await vm.driver.live_definition()):
        try:
            read_state(one)
        except StateMissing as error:
            raise StateMissing(error.message, hint=_way_out(vm.catalog)) from error


def part_of(home: Home, snapshot_id: str) -> Path:
    """Return the name of a copy that is not unpacked yet."""
    return home.snapshot_dir(snapshot_id) / "state.part"


class Capture:
    """The copy of one moment. Made before it, `copy()` in it, `finish()` after it."""

    def __init__(self, vm: VM, snapshot_id: str, definition: Definition) -> None:
        self._states = present(vm, definition)
        self._fd: int | None = None
        if self._states:
            path = part_of(vm.home, snapshot_id)
            size = sum(len(data) for s in self._states for data in read_state(s).values())
            self._fd = files.create_exclusive(path)
            with files.os_errors(path, "reserve space for"):
                os.posix_fallocate(self._fd, 0, size + SPARE)
            files.fsync_dir(path.parent)  # after a power cut the file must be there: it says whether all came over
            point("state.prepared")

    def copy(self) -> None:
        """Copy now. Raise DiskchainError; nothing was changed then."""
        if self._fd is None:
            return
        data = state_copy.pack({s.name: read_state(s) for s in self._states})
        with files.os_errors("the copy of NVRAM and TPM", "write"):
            point("state.copying")
            view, offset = memoryview(data), 0
            while offset < len(data):
                offset += os.pwrite(self._fd, view[offset:], offset)
        point("state.copied")

    def close(self) -> None:
        """Let go of the descriptor."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def finish_capture(vm: VM, snapshot_id: str, definition: Definition) -> dict[str, dict[str, str]]:
    """Unpack the copy durably; return the digests that the snapshot records. Can be repeated.

    A copy that a power cut has eaten is made again: then the VM is off, and the present is as it was at that moment.
    """
    states = present(vm, definition)
    if not states:
        return {}
    part, directory = part_of(vm.home, snapshot_id), vm.home.snapshot_dir(snapshot_id)
    found = _packed(part) if part.exists() else _unpacked(states, directory)
    contents = found or {s.name: read_state(s) for s in states}
    for state in (s for s in states if s.name in contents):
        if state.directory:
            with files.os_errors(directory, "create"):
                (directory / state.name).mkdir(mode=0o700, exist_ok=True)
        for name, data in contents[state.name].items():
            files.write_durably(directory / name, data)
            point("state.unpacked-one")
    for path in (*directory.glob(files.TEMPORARY + "*"), *directory.glob(f"*/{files.TEMPORARY}*")):
        files.unlink_durably(path)  # an earlier try was killed while it wrote
    files.fsync_dir(directory)
    files.unlink_durably(part)
    return {name: {path: _digest(data) for path, data in each.items()} for name, each in contents.items()}


def _packed(part: Path) -> dict[str, dict[str, bytes]] | None:
    with files.os_errors(part, "read"):
        return state_copy.unpack(_read(part))


def _unpacked(states: list[StateFile], directory: Path) -> dict[str, dict[str, bytes]] | None:
    """What an earlier run unpacked; only looked at when the packed copy is gone, which it removes last."""
    try:
        return {s.name: read_files(s, directory / s.name, s.name) for s in states}
    except StateMissing:
        return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def moved_on(vm: VM, snapshot: Snapshot, definition: Definition) -> str:
    """After a background save: say which state the saved memory holds as of a later moment; nothing when none does."""
    for state in vm.driver.state_files(definition):
        if state.saved_late and state.name in snapshot.captured:
            try:
                now = {name: _digest(data) for name, data in read_state(state).items()}
            except DiskchainError as error:
                return error.message
            if now != snapshot.captured[state.name]:
                return f"the guest wrote to its {label(state.name)} while its memory was saved; try again"
    return ""


def read_copies(vm: VM, snapshot: Snapshot, definition: Definition, *, all_of: bool) -> dict[str, dict[str, bytes]]:
    """Return a snapshot's copies that fit a configuration, each compared with its digest.

    `all_of`: it is the snapshot's own, so none may be lacking. Raise StateMissing naming the file.
    """
    found = {}
    for state in vm.driver.state_files(definition):
        if (not all_of or state.made_by_manager) and state.name not in snapshot.captured:
            continue  # the machine had no such part, or had not begun it, then: it keeps what it has
        found[state.name] = _verified(vm.home, snapshot, state)
        sizes = {Path(name).name: len(data) for name, data in found[state.name].items()}
        problem = vm.driver.unusable(definition, state.name, sizes)
        if problem:
            raise StateMissing(f"the {label(state.name)} of {snapshot.name!r} can't be used: {problem}",
                               hint="install the firmware of then")  # fmt: skip
    return found


def _verified(home: Home, snapshot: Snapshot, state: StateFile) -> dict[str, bytes]:
    found = {}
    for problem in problems(home, snapshot, state.name):
        raise StateMissing(problem, hint="bring the file back from a backup; the disks of that snapshot are not affected: "
                           "RECOVER.txt")  # fmt: skip
    for name in snapshot.captured[state.name]:
        found[name] = _read(home.snapshot_dir(snapshot.id) / name)
    return found


def problems(home: Home, snapshot: Snapshot, name: str) -> list[str]:
    """Return in words what is wrong with a snapshot's copy of one state."""
    if name not in snapshot.captured:
        return [f"snapshot {snapshot.name!r} has no copy of the {label(name)}"]
    found = []
    for place, digest in snapshot.captured[name].items():
        path = home.snapshot_dir(snapshot.id) / place
        try:
            if _digest(_read(path)) != digest:
                found.append(f"the {label(name)} of {snapshot.name!r} was changed: {path}")
        except (OSError, DiskchainError) as error:
            why = error.strerror if isinstance(error, OSError) else error.message
            found.append(f"the {label(name)} of {snapshot.name!r} is gone: {path} ({why})")
    return found


# -- back into the VM: a part of revert --------------------------------------------------------------------------------


@dataclass(frozen=True)
class PutBack:
    """One state of a revert that is in the journal: where it belongs, whether there was one before."""

    name: str
    path: Path
    there: bool

    def _beside(self, what: str, entry_id: str) -> Path:
        return self.path.with_name(name_with(f".{what}-{entry_id}.", self.path.name, ""))

    def staged(self, entry_id: str) -> Path:
        """The copy that is to come in."""
        return self._beside("revert", entry_id)

    def before(self, entry_id: str) -> Path:
        """What was there, until the revert is done."""
        return self._beside("before", entry_id)


def to_put_back(vm: VM, definition: Definition, copies: Mapping[str, object]) -> dict[str, bool]:
    """Return for each state that comes back whether the VM has one now; for the journal."""
    return {s.name: os.path.lexists(s.path) for s in vm.driver.state_files(definition) if s.name in copies}


def _put_backs(vm: VM, definition: Definition, there: Mapping[str, bool]) -> list[PutBack]:
    return [PutBack(s.name, s.path, there[s.name]) for s in vm.driver.state_files(definition) if s.name in there]


def stage(vm: VM, entry_id: str, definition: Definition, there: Mapping[str, bool],
          copies: Mapping[str, Mapping[str, bytes]]) -> None:  # fmt: skip
    """Write the verified copies beside their places, durably; nothing of the VM is touched."""
    for one in _put_backs(vm, definition, there):
        staged = one.staged(entry_id)
        for place, data in copies[one.name].items():
            if place == one.name:
                files.write_durably(staged, data)
            else:
                _make_dir(staged)
                files.write_durably(staged / Path(place).name, data)
        if not copies[one.name]:
            _make_dir(staged)
        files.fsync_dir(staged.parent)
        point("revert.state-staged")


def _make_dir(path: Path) -> None:
    with files.os_errors(path, "create"):
        path.mkdir(mode=0o700, exist_ok=True)


def put_back(vm: VM, entry_id: str, definition: Definition, there: Mapping[str, bool]) -> None:
    """Let the copies take their places; what was there is kept until the end. Can be repeated."""
    for one in _put_backs(vm, definition, there):
        staged, before = one.staged(entry_id), one.before(entry_id)
        if not os.path.lexists(staged):
            continue  # done by an earlier try
        if os.path.lexists(one.path):
            _own_alike(one.path, staged)
            files.rename_durably(one.path, before)
            point("revert.state-away")
        files.rename_durably(staged, one.path)
        point("revert.state-back")
    names = [name for name in there if name not in vm.catalog.state_files]
    if names:
        vm.save(replace(vm.catalog, state_files=(*vm.catalog.state_files, *names)))


def _own_alike(like: Path, staged: Path) -> None:
    """What comes in belongs to whom the present one does: a TPM's is of the user that swtpm runs as. Can be repeated."""
    files.copy_owner(like, staged)
    if not staged.is_dir():
        return
    for inner in staged.iterdir():
        known = like / inner.name
        if known.is_file() and not known.is_symlink():
            files.copy_owner(known, inner)
        else:
            os.chown(inner, like.stat().st_uid, like.stat().st_gid)


def take_back(vm: VM, entry_id: str, definition: Definition, there: Mapping[str, bool]) -> None:
    """Undo `put_back`: what was there before takes its place again. The VM is off. Can be repeated."""
    for one in _put_backs(vm, definition, there):
        staged, before = one.staged(entry_id), one.before(entry_id)
        came_in = not os.path.lexists(staged)
        if os.path.lexists(before):
            if os.path.lexists(one.path):
                files.rename_durably(one.path, staged)
            files.rename_durably(before, one.path)
        elif came_in and not one.there and os.path.lexists(one.path):
            files.rename_durably(one.path, staged)
        point("revert.state-undone")


def forget(vm: VM, entry_id: str, definition: Definition, there: Mapping[str, bool]) -> None:
    """Remove what was kept for either direction: the revert is done, or undone. Can be repeated."""
    for one in _put_backs(vm, definition, there):
        for path in (one.staged(entry_id), one.before(entry_id)):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, or a directory of files, durably. Can be repeated."""
    if path.is_dir() and not path.is_symlink():
        with files.os_errors(path, "remove"):
            for inner in path.iterdir():
                inner.unlink()
            path.rmdir()
        files.fsync_dir(path.parent)
    else:
        files.unlink_durably(path)
