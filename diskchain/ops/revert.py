"""revert: back to a snapshot on new overlays; the present is kept as `before-revert-N` unless it is to be discarded.

-         lock; memory digest, fingerprints of every frozen image, files of the configuration   nothing changed
intent    journal; new empty overlays on F(S)                                        undo: resume or start again
stopped   vCPUs stopped, QEMU quit: the active layers themselves are F(keep)         undo: start the old definition
switched  catalog and definition name the new overlays                               redo while they are empty
loaded    memory loaded, VM paused; or started; or left off                          forward: counts as done
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diskchain.chain.model import Catalog, Image, Memory, Snapshot
from diskchain.drivers.protocol import Definition, VMState
from diskchain.errors import (
    DiskchainError,
    DriverFailed,
    Unfinished,
)
from diskchain.host import files
from diskchain.host.fault import point
from diskchain.ops import layers, quiesce, save_memory, state_files
from diskchain.ops.progress import QUIET, Progress
from diskchain.ops.revert_plan import Prepared, Request, prepare, undo_target
from diskchain.ops.vm import VM, definition_at, new_id, now_utc, record_configuration, remove_snapshot_dir
from diskchain.store import journal, memory_file
from diskchain.store.journal import Entry

__all__ = [
    "Prepared",
    "Request",
    "Reverted",
    "finish",
    "prepare",
    "resume_load",
    "revert",
    "undo",
    "undo_target",
    "wake",
]


@dataclass(frozen=True)
class Reverted:
    """What was done."""

    snapshot: Snapshot
    kept_as: str | None
    state: str
    config_changes: list[str]
    seconds: float
    disks: tuple[str, ...]  # went back
    left_as_now: tuple[str, ...]  # hold what they held before


async def revert(vm: VM, request: Request, progress: Progress = QUIET) -> Reverted:
    """Go back to a snapshot. The VM's lock is held, its journal is empty. Raise as `prepare`.

    When the memory can't be loaded, everything is put back (a VM that ran is started again from its disks).
    """
    began = time.monotonic()
    known = vm.catalog
    prepared = await prepare(vm, request)
    if vm.catalog != known:
        vm.save(vm.catalog)  # with the disks that it has now
    with _verified_memory(vm, prepared) as memory:
        entry = journal.begin(vm.home, "revert", new_id(), now_utc(), _journal_data(vm, prepared))
        with contextlib.ExitStack() as held:
            try:
                await layers.make_overlays(vm.catalog, prepared.overlays)
                await vm.driver.check_files([image.path for image in prepared.overlays.values()], written=True)
                state_files.stage(vm, entry.id, prepared.definition, entry.data["states"], prepared.copies)
                if prepared.state.is_off:
                    held.enter_context(layers.kept_off(vm.catalog))
                await _stop(vm, entry, prepared, progress)
            except (DiskchainError, OSError, asyncio.CancelledError):
                held.close()
                await vm.driver.refuse_elsewhere()
                await undo(vm, entry)
                raise
            entry.advance("switched")
            await _switch(vm, entry)
        await _load(vm, entry, memory)
    await wake(vm, entry, progress)
    await finish(vm, entry)
    final = await vm.driver.state()
    return Reverted(prepared.snapshot, prepared.keep.name if prepared.keep else None, final.value, prepared.changes,
                    round(time.monotonic() - began, 3), prepared.disks.covered, tuple(prepared.disks.left_alone))  # fmt: skip


@contextlib.contextmanager
def _verified_memory(vm: VM, prepared: Prepared) -> Iterator[int | None]:
    if not prepared.with_memory:
        yield None
        return
    fd = open_memory(vm, prepared.snapshot)
    try:
        yield fd
    finally:
        os.close(fd)


def open_memory(vm: VM, snapshot: Snapshot) -> int:
    """Return a descriptor of a snapshot's verified memory, placed at the stream. Raise MemoryDamaged.

    Its label gets the VM's name of now.
    """
    path = vm.home.memory(snapshot.id)
    fd = memory_file.open_verified(path, snapshot.memory.bytes, snapshot.memory.sha256)
    try:
        label = memory_file.read_header(fd).xml
        now = vm.driver.label_now(definition_at(vm.home, snapshot), label)
        if now != label:
            _relabel(path, now)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _relabel(path: Path, label: str) -> None:
    with files.os_errors(path, "write"):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            memory_file.relabel(fd, label)
        finally:
            os.close(fd)


def _journal_data(vm: VM, prepared: Prepared) -> dict[str, Any]:
    old = vm.driver.definition()
    return {
        "snapshot": prepared.snapshot.id,
        "name": prepared.snapshot.name,
        "keep": asdict(prepared.keep) if prepared.keep else None,
        "before": {"active": dict(vm.catalog.active), "current": vm.catalog.current, "left": vm.catalog.left,
                   "keeps": vm.catalog.keeps, "targets": list(vm.catalog.targets),
                   "detached": list(vm.catalog.detached), "definition": asdict(old),
                   "restart": asdict(prepared.restart or old)},
        "targets": list(prepared.targets),
        "waiting": list(prepared.waiting),
        "stays": dict(prepared.disks.stays),
        "current": prepared.disks.current or (prepared.keep.id if prepared.keep else None),
        "definition": asdict(prepared.definition),
        "overlays": {t: {"id": i.id, "path": str(i.path), "on": i.backing, "size": i.virtual_size}
                     for t, i in prepared.overlays.items()},
        "was": prepared.state.value,
        "with_memory": prepared.with_memory,
        "states": state_files.to_put_back(vm, prepared.definition, prepared.copies),
        "power": prepared.power,
    }  # fmt: skip


async def _stop(vm: VM, entry: Entry, prepared: Prepared, progress: Progress) -> None:
    """Stop the VM where it stands; with its memory if that was asked for. What is kept of it is whole then."""
    keep = prepared.keep
    if keep is None:
        point("revert.stopping")
        await _quit(vm, prepared)
    else:
        definition = await record_configuration(vm, keep.id)
        with contextlib.closing(state_files.Capture(vm, keep.id, definition)) as capture:
            if keep.memory.status == "saving":
                memory = await _save_while_stopped(vm, keep, progress)
                entry.data["keep"]["memory"] = asdict(memory)
                entry.data["keep"]["consistency"] = "memory"
            point("revert.stopping")
            await _quit(vm, prepared)
            capture.copy()  # now nobody writes to them any more
        entry.data["keep"]["captured"] = state_files.finish_capture(vm, keep.id, definition)
    entry.advance("stopped")


async def _quit(vm: VM, prepared: Prepared) -> None:
    """End the VM that was looked at, as it was: not one that was started since, nor one whose disks something else switched
    (what the guest wrote since would be in layers that no record names). Raise Busy, ChainDamaged.
    """
    if prepared.state.is_off:
        await vm.require_off()
    else:
        if prepared.state is VMState.RUNNING:
            await vm.driver.pause()
        await vm.verify_running(same_disks=False)
    await vm.driver.quit()


async def _save_while_stopped(vm: VM, keep: Snapshot, progress: Progress) -> Memory:
    began = time.monotonic()
    fd = await save_memory.make_file(vm, keep.id, was_running=keep.was == "running")
    try:
        await vm.driver.prepare_memory_save(fd, background=False)
        await save_memory.refuse_sleeping(vm.driver, "leave --keep-memory away, or try again when it is awake")
        await vm.driver.pause()
        point("revert.saving")
        await vm.driver.start_memory_save(background=False)
        progress.begin("saving memory", vm.driver.memory_bytes())
        while (now := await vm.driver.save_progress()).status == "running":
            progress.update(now.done)
            await asyncio.sleep(0.05)
        progress.end()
        if now.status != "completed":
            raise DriverFailed(
                f"the memory of the present could not be saved: {now.error}", hint="leave --keep-memory away"
            )
    finally:
        os.close(fd)
    return await save_memory.seal(vm.home, keep.id, time.monotonic() - began)


def _overlays(vm: VM, entry: Entry) -> dict[str, Image]:
    return {
        t: Image(o["id"], vm.home.disks_dir / o["path"], "qcow2", t, o["size"], o["on"], ours=True)
        for t, o in entry.data["overlays"].items()
    }


async def _switch(vm: VM, entry: Entry) -> None:
    """Let catalog and definition name the new overlays. Can be repeated."""
    catalog, before = vm.catalog, entry.data["before"]
    keep = entry.data["keep"]
    left = None
    if keep:
        snapshot = Snapshot(**{**keep, "memory": Memory(**keep["memory"]), "partial": tuple(keep["partial"])})
        catalog = layers.freeze(catalog.with_snapshot(snapshot), snapshot.disks.values())
        left = snapshot.id
    catalog = catalog.switched_to(_overlays(vm, entry), entry.data["current"])
    tops = {**entry.data["stays"], **{t: o["id"] for t, o in entry.data["overlays"].items()}}
    active = {t: tops[t] for t in entry.data["targets"]}
    waiting = {t: tops[t] for t in entry.data.get("waiting", ())}
    counted = before["keeps"] + (1 if keep and keep["automatic"] else 0)
    asleep = entry.data["with_memory"] and entry.data["power"] == "paused"
    vm.save(replace(catalog, active=active, left=left, keeps=counted, targets=tuple(active),
                    detached=_detached(entry, active, waiting, keep), asleep=asleep))  # fmt: skip
    point("revert.catalog")
    state_files.put_back(vm, entry.id, Definition(**entry.data["definition"]), entry.data.get("states", {}))
    chains = {**vm.catalog.active_chains(), **{t: vm.catalog.chain(i) for t, i in waiting.items()}}
    await vm.driver.define(Definition(**entry.data["definition"]), chains)
    point("revert.definition")


def _detached(entry: Entry, active: Mapping[str, str], waiting: Mapping[str, str],
              keep: Mapping[str, Any] | None) -> tuple[str, ...]:  # fmt: skip
    """The last layers of disks that the VM has no more, or gets at its next start; those of a kept present are that
    snapshot's.
    """
    before = entry.data["before"]
    gone = [] if keep else [i for t, i in before["active"].items() if t not in active]
    found = dict.fromkeys((*before["detached"], *gone, *waiting.values()))
    return tuple(i for i in found if i not in active.values())


async def _load(vm: VM, entry: Entry, memory: int | None) -> None:
    """Start the VM on the new overlays as the plan says; when it does not start, put everything back."""
    try:
        if memory is not None and entry.data["power"] != "stopped":
            definition = Definition(**entry.data["definition"])
            await vm.driver.start_from_memory(definition, vm.catalog.active_chains(), memory)
        elif entry.data["power"] != "stopped":
            await vm.driver.start(vm.catalog.active_chains(), paused=True)
    except DriverFailed as error:
        await undo(vm, entry)
        raise DriverFailed(f"{error.message}; everything was put back", hint=error.hint) from error
    entry.advance("loaded")
    if entry.data["power"] == "running":
        await vm.driver.resume()
    point("revert.resumed")


async def wake(vm: VM, entry: Entry, progress: Progress) -> None:
    """A guest that runs from its saved memory again is thawed if that froze it, and told the time. Can be repeated."""
    if entry.data["with_memory"] and entry.data["power"] == "running":
        await quiesce.wake(vm, progress, frozen=vm.catalog.snapshots[entry.data["snapshot"]].frozen)


async def finish(vm: VM, entry: Entry) -> None:
    """From `loaded` to the end: what was discarded is put away. Can be repeated."""
    if entry.data["keep"] is None:
        ids = _discarded(vm.catalog, entry)
        paths = [vm.catalog.images[i].path for i in ids if i in vm.catalog.images]
        entry.note(trash=[str(p) for p in paths] or entry.data.get("trash", []))
        layers.to_trash(paths)
        vm.save(vm.catalog.without_images(ids))
        await layers.empty_trash([vm.home.disks_dir / p for p in entry.data["trash"]])
    state_files.forget(vm, entry.id, Definition(**entry.data["definition"]), entry.data.get("states", {}))
    entry.close()


def _discarded(catalog: Catalog, entry: Entry) -> list[str]:
    """Return the former active layers of disks that went back, those that we made and that nothing stands on."""
    return [
        i
        for t, i in entry.data["before"]["active"].items()
        if t in entry.data["overlays"]
        and i in catalog.images
        and catalog.images[i].ours
        and not catalog.overlays_on(i)
        and catalog.frozen_by(i) is None
        and i not in catalog.active.values()
    ]


async def resume_load(vm: VM, entry: Entry, progress: Progress) -> str:
    """Recovery from `switched`: finish the revert; return in words what was done."""
    if await _runs_elsewhere(vm, entry):  # somebody else started it on its layers of before
        await undo(vm, entry)
        return "undone"
    await _switch(vm, entry)
    untouched = all(layers.is_empty(i.path) for i in _overlays(vm, entry).values())
    state = await vm.driver.state()
    if not state.is_off and untouched and state is not VMState.RUNNING:
        await vm.driver.kill()  # it may have been loading its memory when we died
        state = VMState.STOPPED
    if state.is_off and untouched:
        snapshot = vm.catalog.snapshots[entry.data["snapshot"]]
        memory = open_memory(vm, snapshot) if entry.data["with_memory"] else None
        try:
            await _load(vm, entry, memory)
        finally:
            if memory is not None:
                os.close(memory)
    await wake(vm, entry, progress)
    await finish(vm, entry)
    return "finished"


async def undo(vm: VM, entry: Entry) -> None:
    """Take back a revert whose new overlays hold no data: old catalog, old definition, and a VM that ran runs again."""
    overlays, before = _overlays(vm, entry), entry.data["before"]
    if entry.state == "intent" and not (await vm.driver.state()).is_off:
        await vm.driver.give_up_save()  # of the present's memory: it would stop the VM after we let it go on
    if entry.state in ("switched", "loaded") and not await _runs_elsewhere(vm, entry):
        await _end_untouched(vm, overlays)
        entry.note(undoing=True)  # from here on it is undone, also when we are killed and somebody else goes on
        state_files.take_back(vm, entry.id, Definition(**entry.data["definition"]), entry.data.get("states", {}))
    vm.reload()
    keep = entry.data["keep"]
    snapshots = {k: s for k, s in vm.catalog.snapshots.items() if not keep or k != keep["id"]}
    catalog = replace(vm.catalog.without_images([i.id for i in overlays.values()]), snapshots=snapshots,
                      active=before["active"], current=before["current"], left=before["left"],
                      keeps=before["keeps"], targets=tuple(before["targets"]),
                      detached=tuple(before["detached"]))  # fmt: skip
    catalog = catalog.with_images(replace(catalog.images[i], fingerprint=None) for i in before["active"].values())
    restarts = entry.data["was"] != "stopped" and (await vm.driver.state()).is_off
    old = before.get("restart", before["definition"]) if restarts else before["definition"]
    if entry.state != "intent" or restarts:  # until then nothing was defined; what is may be somebody else's doing
        await vm.driver.define(Definition(**old), catalog.active_chains())
    vm.save(catalog)
    for image in overlays.values():
        files.unlink_durably(image.path)
    if keep:
        remove_snapshot_dir(vm, keep["id"])
    state_files.forget(vm, entry.id, Definition(**entry.data["definition"]), entry.data.get("states", {}))
    await _power_as_before(vm, entry.data["was"])
    entry.close()


async def _runs_elsewhere(vm: VM, entry: Entry) -> bool:
    """Whether the VM runs on other layers than the new overlays: only a manager besides us can have started that."""
    if (await vm.driver.state()).is_off:
        return False
    running = await vm.driver.written_files()
    return not any(running.get(t) == image.path for t, image in _overlays(vm, entry).items())


async def _end_untouched(vm: VM, overlays: dict[str, Image]) -> None:
    """End the VM if it has written nothing to the new overlays. Raise Unfinished otherwise; it goes on then."""
    state = await vm.driver.state()
    if not state.is_off and not await _is_on(vm, overlays):
        return  # an undo that was cut off had started it again already, on its disks of before
    if not state.is_off:
        await vm.driver.pause()
    if not all(layers.is_empty(i.path) for i in overlays.values()):
        if state is VMState.RUNNING:
            await vm.driver.resume()
        raise Unfinished("the VM wrote to the reverted disks already; the revert can't be taken back that way",
                         hint=f"diskchain recover {vm.name} --finish, then: diskchain undo {vm.name}")  # fmt: skip
    await vm.driver.kill()


async def _is_on(vm: VM, overlays: Mapping[str, Image]) -> bool:
    active = (await vm.driver.written_files()).values()
    return any(image.path in active for image in overlays.values())


async def _power_as_before(vm: VM, was: str) -> None:
    state = await vm.driver.state()
    if state.is_off and was in ("running", "paused", "suspended"):
        await vm.driver.start(vm.catalog.active_chains(), paused=was == "paused")
    elif not state.is_off:
        await save_memory.let_do_as_before(vm, was)
