"""Memory of a snapshot: the file before, the waiting during, the seal after."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path

from diskchain.chain.model import Memory, MiB, Snapshot
from diskchain.chain.text import size as text_of
from diskchain.drivers.protocol import Driver, VMState
from diskchain.errors import DiskchainError, MemoryNotSaved, NoSpace, Refused, ToolFailed
from diskchain.host import files
from diskchain.host.fault import point, skipped
from diskchain.host.process import our_module, run, spawn_detached, uninterrupted
from diskchain.ops import state_files
from diskchain.ops.definitions import definition_at, digest_at
from diskchain.ops.progress import Progress
from diskchain.ops.vm import VM
from diskchain.store import memory_file
from diskchain.store.catalog import Home, restore_overlay
from diskchain.store.journal import Entry

RESERVE = 64 * MiB  # stays free on the volume when `auto` decides for memory


def space_for(ram: int) -> int:
    """Given RAM in bytes, return the most that its saved memory can take: all pages, 2 % of framing, devices."""
    return ram + ram // 50 + 32 * MiB


def part_of(home: Home, snapshot_id: str) -> Path:
    """Return the name of a memory file that is not finished."""
    return home.memory(snapshot_id).with_name("memory.part")


async def make_file(vm: VM, snapshot_id: str, *, was_running: bool) -> int:
    """Create the memory file (0600), write its header, reserve its space; return the descriptor at the stream's place.

    The space is reserved beyond the end of the file (fallocate --keep-size), so that the file's size always is the end
    of what QEMU wrote, also when we did not live to see it. Raise NoSpace before anything of the VM was touched.
    """
    path, ram = part_of(vm.home, snapshot_id), vm.driver.memory_bytes()
    frozen = {t: vm.catalog.images[i].path for t, i in vm.catalog.active.items()}
    label = await vm.driver.memory_label({t: restore_overlay(p, t, snapshot_id) for t, p in frozen.items()})
    fd = files.create_exclusive(path)
    try:
        with files.os_errors(path, "write"):
            memory_file.write_header(fd, label, was_running=was_running)
        await _reserve(fd, space_for(ram), path)
    except BaseException:
        os.close(fd)
        raise
    return fd


async def _reserve(fd: int, size: int, path: Path) -> None:
    if skipped("memory.reserve"):
        return
    try:
        await run(["fallocate", "--keep-size", "--length", str(size), f"/proc/self/fd/{fd}"], pass_fds=[fd])
    except ToolFailed as error:
        if "No space" in error.stderr:
            raise NoSpace(f"no room for the memory: {text_of(size)} are needed beside {path.parent.name}",
                          hint="free space, or use --disk-only") from error  # fmt: skip
        if files.free_bytes(path) < size:  # a filesystem that can't reserve
            raise NoSpace(f"no room for the memory: {text_of(size)} are needed", hint="use --disk-only") from error


async def refuse_sleeping(driver: Driver, hint: str) -> None:
    """Raise Refused when the guest sleeps (S3): after a save QEMU 10 ends with an error, and that of 7.2 never wakes."""
    if await driver.state() is VMState.SUSPENDED:
        raise Refused(f"the guest of {driver.name} sleeps (suspended to RAM); its memory can't be saved now", hint=hint)


async def wait_and_seal(vm: VM, entry: Entry, snapshot: Snapshot, progress: Progress) -> Snapshot:
    """Wait for the save that runs in QEMU, then make its file the snapshot's memory; or record that it failed.

    Journal state `saving` before, `saved` after. Returns the snapshot as it is in the catalog then.
    """
    others = await _other_devices(vm, entry)
    failure = await _wait(vm, progress)
    if not failure and entry.data["save"] == "background":
        failure = state_files.moved_on(vm, snapshot, definition_at(vm.home, snapshot))
    if not failure and snapshot.partial:  # nobody asked for that: then no memory is saved at all
        failure = f"{', '.join(snapshot.partial)} was attached while the snapshot was made"
    failure = failure or others
    seconds = max(0.0, time.time() - float(entry.data["captured_at"]))  # for display
    if failure:
        await let_go_on(vm, snapshot)
        memory = Memory("failed", reason=failure)
        files.unlink_durably(part_of(vm.home, snapshot.id))
    else:
        memory = await seal_or_give_up(vm.home, snapshot.id, seconds, entry=entry)
    snapshot = replace(vm.catalog.snapshots[snapshot.id], memory=memory,
                       consistency=_consistency(snapshot, memory))  # fmt: skip
    vm.save(vm.catalog.with_snapshot(snapshot))
    with contextlib.suppress(DiskchainError):
        await vm.driver.end_memory_save()
    return snapshot


async def _other_devices(vm: VM, entry: Entry) -> str:
    """Say which devices came or went between `create`'s look and the instant. The saved configuration has others then, and
    the memory would never load.
    """
    before = entry.data.get("devices")
    if before is None:
        return ""  # begun by an older diskchain
    try:
        now = await vm.driver.devices()
    except DiskchainError:
        return ""  # it ended; the wait says so
    said = [f"{name} was attached" for name in now if name not in before]
    said += [f"{name} was detached" for name in before if name not in now]
    return f"{', '.join(said)} while the snapshot was made" if said else ""


async def let_go_on(vm: VM, snapshot: Snapshot) -> None:
    """After a save that failed: free the guest if it hangs on it, and see that it does what it did before."""
    if vm.driver.save_owner():
        await vm.driver.rescue()
        await let_do_as_before(vm, snapshot.was)


async def let_do_as_before(vm: VM, was: str) -> None:
    """A VM that is paused runs again if it did; if a save stopped it, it takes its disks back. No save is at work."""
    if await vm.driver.state() is not VMState.PAUSED:
        return
    if was == "running":
        await vm.driver.resume()
    elif await vm.driver.stopped_by_save():
        await uninterrupted(take_disks_back(vm, paused=was == "paused"))


async def take_disks_back(vm: VM, *, paused: bool) -> None:
    """After a plain save QEMU has let go of its disks (`postmigrate`): let the VM go on; `paused`: then pause it again.

    So it runs for about a millisecond; QEMU has no other way.
    """
    await vm.driver.resume()
    if paused:
        await vm.driver.pause()


async def is_left(vm: VM) -> bool:
    """Whether a save stopped the VM, and whoever began it is gone. (Asked of QEMU; one that does not answer was not left.)"""
    with contextlib.suppress(DiskchainError):
        if vm.home.path.is_dir():  # no business of ours otherwise
            return await vm.driver.state() is VMState.PAUSED and await vm.driver.stopped_by_save()
    return False


async def let_go_on_if_left(vm: VM) -> bool:
    """Nothing was interrupted, the lock is held: a VM that was left by a save runs again; return whether it was."""
    if not await is_left(vm):
        return False
    await vm.driver.resume()
    return True


def _consistency(snapshot: Snapshot, memory: Memory) -> str:
    return "memory" if memory.saved else snapshot.consistency


async def _wait(vm: VM, progress: Progress) -> str:
    """Wait until the save is over; return why it failed, or nothing."""
    shown = False
    try:
        while True:
            now = await vm.driver.save_progress()
            if now.status != "running":
                return "" if now.status == "completed" else now.error
            if now.total and not shown:
                progress.begin("saving memory", now.total, note="the guest runs; Ctrl-C leaves it to the background")
                shown = True
            if shown:
                progress.update(now.done)
            await asyncio.sleep(0.05)
    except DiskchainError as error:
        if await vm.driver.state() is VMState.STOPPED:
            return "the VM ended before its memory was saved"
        raise error
    finally:
        if shown:
            progress.end()


async def wait_until_over(vm: VM, progress: Progress) -> None:
    """Wait until no save is running in the VM; what it saved does not matter."""
    await _wait(vm, progress)


async def seal_or_give_up(home: Home, snapshot_id: str, seconds: float, *, entry: Entry | None = None) -> Memory:
    """As `seal`; what the disk lost a part of is removed and counts as failed, or a second try might call it saved.

    `entry`: becomes `saved`, once the stream is on the disk: after a power cut that word is all that recovery has.
    """
    try:
        if entry:
            await _make_durable(part_of(home, snapshot_id))
            entry.advance("saved")
        return await seal(home, snapshot_id, seconds)
    except MemoryNotSaved as error:
        with contextlib.suppress(DiskchainError):
            files.unlink_durably(part_of(home, snapshot_id))
        return Memory("failed", reason=error.message)


async def _make_durable(part: Path) -> None:
    with files.os_errors(part, "finish"):
        fd = os.open(part, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            await asyncio.to_thread(memory_file.sync, fd)
        finally:
            os.close(fd)


async def seal(home: Home, snapshot_id: str, seconds: float) -> Memory:
    """Make the finished stream the snapshot's memory: drop the reserve, sync, flip the magic, digest, rename.

    Can be repeated at any point.
    """
    part, final = part_of(home, snapshot_id), home.memory(snapshot_id)
    path = part if part.exists() else final
    with files.os_errors(path, "finish"):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            size = os.fstat(fd).st_size
            if await asyncio.to_thread(memory_file.ran, fd):
                raise MemoryNotSaved("the VM was resumed by something else before its memory was captured")
            os.ftruncate(fd, size)  # gives back what was reserved beyond the end
            await asyncio.to_thread(memory_file.seal, fd)
            point("memory.sealed")
            stream = memory_file.read_header(fd).stream
            digest = await asyncio.to_thread(memory_file.stream_digest, fd, stream)
        finally:
            os.close(fd)
    if path == part:
        files.rename_durably(part, final)
    point("memory.renamed")
    return Memory("saved", size, digest, round(seconds, 3), configuration=digest_at(home, snapshot_id))


def leave_to_finisher(vm: VM) -> None:
    """Start a small process of ours that waits for our lock and finishes the save. Used when we are interrupted."""
    argv, env = our_module("diskchain")
    argv += ["--quiet", "recover", vm.name, "--finish", "--wait", "1h", "--yes"]
    env |= {"DISKCHAIN_STATE_DIR": str(vm.config.state_dir), "DISKCHAIN_RUN_DIR": str(vm.config.run_dir)}
    spawn_detached(argv, vm.home.path / "finisher.log", env=env)
