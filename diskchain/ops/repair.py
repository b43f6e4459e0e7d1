"""check --repair: what is put right of a VM that is off, each thing with the evidence for it; what is unsure is left alone.

relink      a layer is gone from its place, and exactly one file that is nobody else's has its fingerprint, and the time of
            its last write or the digest of its seal (moved.py)
header      a layer's header is torn or names something else, and with the header that the catalog knows its fingerprint
            is the one that was recorded: proven before anything is written
name        an overlay of ours names the file below it, beside it, so that QEMU takes the name for a protocol (`web:1.qcow2`):
            that is what we wrote ourselves before we wrote `./web:1.qcow2`
shed        bitmaps or internal snapshots were removed from a layer, and nothing else of it was changed
touched     a base's time was changed, and a person sealed it again since
leaks       `qemu-img check` counts clusters that are reserved and unused; no data is affected
definition  the definition names another file than the catalog, and nothing was written there
rubbish     files of ours that a kill left behind, and that nothing names

Each is journalled (operation `repair`). What was begun and did not end, by a kill or an error, is done again by `recover`, or
let go of when it does not apply any more: what is wrong is found anew by the next check.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from diskchain.chain.model import Image
from diskchain.errors import DiskchainError, DriverFailed, Unfinished, VMRunning
from diskchain.host.fault import point
from diskchain.ops import moved, repair_files, repair_images
from diskchain.ops.vm import VM, new_id, now_utc, refuse_unfinished
from diskchain.store import journal
from diskchain.store.journal import Entry


@dataclass(frozen=True)
class Repair:
    """One thing that can be put right. `image`: a catalog's id; `path`: the file that is meant, or where it is now."""

    kind: str
    subject: str
    evidence: str
    step: str
    image: str = ""
    path: Path = Path()


Begin = Callable[[], None]  # called before the first write: from then on it is not let go of, but finished
_DO: dict[str, Callable[[VM, str, Path, Begin], Awaitable[None]]] = {
    "relink": repair_images.relink,
    "header": repair_images.write_header,
    "name": repair_images.write_path,
    "shed": repair_images.take_shed,
    "touched": repair_images.take_seal,
    "leaks": repair_images.repair_leaks,
    "definition": repair_files.realign,
    "rubbish": repair_files.remove,
}


async def find(vm: VM) -> list[Repair]:
    """Return what can be put right of a VM. Raise VMRunning when it is on, Unfinished, Refused (a managed save)."""
    if not (await vm.driver.state()).is_off:
        raise VMRunning(f"{vm.name} is on; a repair needs it to be off", hint=f"diskchain stop {vm.name}")
    refuse_unfinished(vm)
    await vm.driver.refuse("merge")
    if not vm.known:
        return []
    found: list[Repair] = []
    for image in vm.catalog.images.values():
        found += await _of_image(vm, image)
    found += [
        Repair("definition", subject, evidence, step) for subject, evidence, step in await repair_files.drifted(vm)
    ]
    for path, evidence in await asyncio.to_thread(lambda: list(repair_files.rubbish(vm))):
        found.append(Repair("rubbish", str(path), evidence, f"rm '{path}'", path=path))
    return sorted(found, key=lambda repair: repair.kind == "relink")  # a header must be whole before it is written anew


async def _of_image(vm: VM, image: Image) -> list[Repair]:
    where = f"{image.target} {image.path}"
    if not os.path.lexists(image.path):
        found = moved.place(await asyncio.to_thread(moved.find, vm.host, vm.catalog, image))
        if found is None:
            return []
        evidence = f"it is not there; {found.path} has its fingerprint and {found.proof}, and no other file in a known directory"
        return [Repair("relink", where, evidence, f"go on with {found.path}", image.id, found.path)]
    with contextlib.suppress(DiskchainError):
        if await repair_images.header_for(vm, image):
            evidence = (
                "its header is not what was recorded; with the one that the catalog knows its fingerprint fits again"
            )
            return [Repair("header", where, evidence, "write that header", image.id, image.path)]
        if below := repair_images.misnamed(vm, image):
            evidence = f"it names {below.name}, which is beside it, and QEMU takes that for a protocol"
            return [Repair("name", where, evidence, f"name it ./{below.name}", image.id, image.path)]
        if await repair_images.has_shed(image):
            evidence = "bitmaps or internal snapshots were removed; each guest cluster lies where it lay"
            return [Repair("shed", where, evidence, "record it as it is", image.id, image.path)]
        if seal := await asyncio.to_thread(repair_images.sealed_again, image):
            evidence = (
                f"only its time differs from what was recorded, and {seal.by} sealed it as it is on {seal.created}"
            )
            return [Repair("touched", where, evidence, "record it as it is", image.id, image.path)]
        if leaks := await repair_images.leaks_of(vm, image):
            evidence = f"qemu-img check counts {leaks} clusters that are reserved and unused, and nothing wrong"
            return [Repair("leaks", where, evidence, "qemu-img check -r leaks", image.id, image.path)]
    return []


async def carry_out(vm: VM, repair: Repair) -> None:
    """Put one thing right. The VM's lock is held, its journal is empty.

    Raise what stands in the way, nothing was written then; Unfinished when something was, and the journal knows.
    """
    data = {"name": f"{repair.kind} {repair.path.name or repair.subject}", "kind": repair.kind, "image": repair.image,
            "path": str(repair.path), "begun": False}  # fmt: skip
    entry = journal.begin(vm.home, "repair", new_id(), now_utc(), data)
    try:
        await redo(vm, entry)
    except BaseException as error:
        if not entry.data["begun"]:
            entry.close()
        elif isinstance(error, DiskchainError | OSError):
            raise _unfinished(vm, entry, error) from error
        raise
    entry.close()


async def redo(vm: VM, entry: Entry) -> None:
    """Do what an entry says, from wherever it stopped."""
    await _DO[entry.data["kind"]](vm, entry.data["image"], Path(entry.data["path"]), lambda: _begin(entry))
    point("repair.done-one")


def _begin(entry: Entry) -> None:
    if not entry.data["begun"]:
        entry.note(begun=True)
        point("repair.begun")


def _unfinished(vm: VM, entry: Entry, error: Exception) -> Unfinished:
    return Unfinished(f"{entry.data['name']}: {error}; stopped half-way",
                      hint=f"put right the cause, then: diskchain recover {vm.name} (with --undo it is let go of)")  # fmt: skip


async def resume(vm: VM, entry: Entry, *, undo: bool = False) -> tuple[str, str]:
    """Recovery. What was not begun, or does not apply any more, is let go of: it must not keep the VM from anything.

    Raise Unfinished when the disk failed once more (`undo`: let go of it).
    """
    if not entry.data.setdefault("begun", True):  # an entry of before this was noted
        entry.close()
        return "undone", f"nothing was written; diskchain check {vm.name} --repair finds it again"
    if undo:
        entry.close()
        return "undone", f"it is let go of; diskchain check {vm.name} says how it is"
    try:
        await redo(vm, entry)
    except (DiskchainError, OSError) as error:
        if not isinstance(error, DriverFailed) and getattr(error, "exit_code", 1) in (1, 7, 9):
            raise _unfinished(vm, entry, error) from error
        entry.close()
        return "undone", f"it can't be done any more ({error}); diskchain check {vm.name} says how it is"
    entry.close()
    return "finished", "it is put right"
