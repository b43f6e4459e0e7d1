"""Drift of the definition, and rubbish: what of it is beyond doubt. See repair.py."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from diskchain.chain.model import Catalog, Image, layer_stem
from diskchain.chain.text import size
from diskchain.errors import DiskchainError, NotFound, Refused
from diskchain.host import files, locks
from diskchain.ops import directories, images_known, layers, redefine, sharers
from diskchain.ops.vm import VM

OLD = 3600.0  # seconds; a temporary file that is younger may be somebody's who is at work
_OURS = re.compile(r"(?P<stem>.+)\.(?P<target>[^.]+)\.(?P<id>[0-9a-f]{12})\.qcow2")


# -- the definition ----------------------------------------------------------------------------------------------------


async def drifted(vm: VM) -> list[tuple[str, str, str]]:
    """Return for each disk whose definition can safely follow the catalog: subject, evidence, step."""
    return list(_of_machine(vm)) if vm.registered else await _of_domain(vm)


def _of_machine(vm: VM) -> Iterator[tuple[str, str, str]]:
    """A machine's image only identifies its chain: the catalog decides what it starts on."""
    assert vm.registered
    for disk in vm.registered.machine.disks:
        image = vm.catalog.image_at(Path(disk.image))
        if disk.target in vm.catalog.active and (image is None or image.target != disk.target):
            base = vm.catalog.chain(vm.catalog.active[disk.target])[-1]
            evidence = f"the definition names {disk.image}, no image of its chain; the catalog decides what starts"
            yield f"{vm.name} {disk.target}", evidence, f"let it name {base.path}"


async def _of_domain(vm: VM) -> list[tuple[str, str, str]]:
    """Something defined the domain on a frozen layer of ours: harmless as long as nothing was written there."""
    found = []
    for target, path in (await vm.driver.next_files() or {}).items():
        active = vm.catalog.active.get(target)
        if active is None or files.same_file(vm.catalog.images[active].path, path):
            continue
        chain = vm.catalog.chain(active)
        named = next((image for image in chain[1:] if files.same_file(image.path, path)), None)
        if named is None or not _whole(chain):
            continue
        evidence = f"it is defined with {path}, a frozen layer of its own chain, and that is as it was frozen"
        found.append((f"{vm.name} {target}", evidence, f"define it with {chain[0].path}, as the catalog says"))
    return found


def _whole(chain: list[Image]) -> bool:
    try:
        layers.verify_active(_only(chain))
    except DiskchainError:
        return False
    return all(image.fingerprint for image in chain[1:])


def _only(chain: list[Image]) -> Catalog:
    return Catalog("", "", {image.id: image for image in chain}, {chain[0].target: chain[0].id})


async def realign(vm: VM, image_id: str, path: Path, begin: Callable[[], None]) -> None:
    """Let the definition follow the catalog."""
    begin()
    if vm.registered is None:
        await vm.driver.align(vm.catalog.active_chains())
        return
    disks = {d.target: Path(d.image) for d in vm.registered.machine.disks}
    wrong = {named: vm.catalog.chain(vm.catalog.active[target])[-1] for target, named in disks.items()
             if target in vm.catalog.active and vm.catalog.image_at(named) is None}  # fmt: skip
    await redefine.follow(vm, wrong)


# -- rubbish -----------------------------------------------------------------------------------------------------------


def rubbish(vm: VM) -> Iterator[tuple[Path, str]]:
    """Yield the files beside the images and in the records that are ours beyond doubt and of no use, with the evidence."""
    known = {catalog_image.path for _, c in images_known.catalogs(vm.host) for catalog_image in c.images.values()}
    for directory in sorted({image.path.parent for image in vm.catalog.images.values()}):
        for path in sorted(directory.iterdir()):
            if path.is_symlink() or not path.is_file() or path in known or locks.is_open(path):
                continue
            evidence = _useless(vm, path)
            if evidence:
                yield path, f"{evidence}, {size(files.allocated_bytes(path))}"
    yield from _unfinished_saves(vm)


def _useless(vm: VM, path: Path) -> str:
    """Why a file that no catalog names may go; nothing where there is a doubt."""
    if path.name.startswith(files.TEMPORARY):
        return "a record that was not written to its end" if _is_old(path) else ""
    away = path.name.startswith(".") and path.name.endswith(".trash")
    name = _our_name(vm, path, away)
    if not name:
        return ""
    if away:
        return "a layer of this VM that was merged and put away; nothing stands on it" if _is_free(path, name) else ""
    with contextlib.suppress(DiskchainError):  # what can't be read is no rubbish
        below = directories.backings(path)
        stands = any(directories.identity(i.path) in below for i in vm.catalog.images.values())
        if not stands or not layers.is_empty(path) or sharers.overlays_beside(path):
            return ""
        return "an overlay of ours on a layer of this VM, in no catalog, and no cluster of it holds data"
    return ""


def _our_name(vm: VM, path: Path, away: bool) -> str:
    """Return the name that we gave to a file, or to one that was put away under this name, as a layer of this VM: the stem
    of one of its bases, one of its disks, an id that is gone. Nothing if we did not.
    """
    found = _OURS.fullmatch(path.name.removesuffix(".trash"))
    if found is None or found["target"] not in vm.catalog.targets or found["id"] in vm.catalog.images:
        return ""
    for target, chain in vm.catalog.active_chains().items():
        for stem in (layer_stem(chain[-1].path, target), chain[-1].path.stem[:100]):  # the second: older versions'
            name = f"{stem}.{found['target']}.{found['id']}.qcow2"
            if (layers.trash_of(path.with_name(name)) if away else path.with_name(name)) == path:
                return name
    return ""


def _is_free(path: Path, name: str) -> bool:
    """Whether nothing in the directory stands on a file that was put away, by its old name or its new one."""
    if path.with_name(name).exists():
        return False
    return not any(_may_stand_on(other, path, name) for other in path.parent.iterdir() if other != path)


def _may_stand_on(other: Path, path: Path, name: str) -> bool:
    """Whether a file names one that was put away, or can't be asked."""
    try:
        if not other.is_file() or other.stat().st_size < directories.SMALLEST:
            return False
        named = [place / one for one in directories.backing_names(other) for place in directories.bases(other)]
    except (OSError, DiskchainError) as error:
        return not isinstance(error, NotFound)
    home = directories.identity(path.parent)
    return any(one.name in (name, path.name) and directories.identity(one.parent) == home for one in named)


def _is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > OLD


def _unfinished_saves(vm: VM) -> Iterator[tuple[Path, str]]:
    """Directories of snapshots that no catalog has, and that hold nothing but an unfinished save."""
    place = vm.home.path / "snapshots"
    for directory in sorted(place.iterdir()) if place.is_dir() else ():
        if directory.name in vm.catalog.snapshots or not directory.is_dir():
            continue
        inside = list(directory.iterdir())
        if all(p.name.endswith(".part") or p.name.startswith(files.TEMPORARY) for p in inside):
            yield directory, f"no snapshot has it, and it holds {len(inside)} unfinished files"


async def remove(vm: VM, image_id: str, path: Path, begin: Callable[[], None]) -> None:
    """Remove a file, or the directory of an unfinished save, after a second look. Raise Refused when it is no rubbish now."""
    if not os.path.lexists(path):
        return
    if path not in dict(rubbish(vm)):
        raise Refused(f"{path} is not what it was a moment ago", hint=f"diskchain check {vm.name}")
    begin()
    if path.is_dir():
        for entry in path.iterdir():
            files.unlink_durably(entry)
        path.rmdir()
        files.fsync_dir(path.parent)
    else:
        files.unlink_durably(path)
