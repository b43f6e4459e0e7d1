"""What can be put right in an image, and the proof for it: see repair.py."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from diskchain.chain import qcow2
from diskchain.chain.model import Catalog, Image
from diskchain.errors import ChainDamaged, DiskchainError
from diskchain.host import files, locks, qemu_img, qemu_img_repair
from diskchain.host.fault import point
from diskchain.ops import directories, layers, redefine, sharers
from diskchain.ops.approve import differing, fingerprint, l2_tables, map_of
from diskchain.ops.vm import VM
from diskchain.store import seal as seal_store
from diskchain.store.seal import Seal


def _differing(image: Image) -> list[str] | None:
    """What differs from the recorded fingerprint; None where there is none, or the file can't be read."""
    if image.fingerprint is None:
        return None
    try:
        now = fingerprint(image.path, image.fmt)
    except DiskchainError:
        return ["header"]
    return differing(image.fingerprint, now)


# -- moved -------------------------------------------------------------------------------------------------------------


async def relink(vm: VM, image_id: str, place: Path, begin: Callable[[], None]) -> None:
    """Let everything that stands on a layer name it where it is now: headers, catalog, definition. Can be repeated."""
    image = vm.catalog.images[image_id]
    here = replace(image, path=place)
    layers.verify_frozen(here)
    seal = _seal_to_bring(image.path, place)
    overlays = vm.catalog.overlays_on(image_id)
    for overlay in overlays:
        if not layers.names_backing(overlay.path, here):
            layers.verify_frozen(overlay)
    begin()
    if seal is not None:
        _bring_seal(seal, image.path, place)
    for overlay in overlays:
        await _name(overlay, here)
        point("repair.relinked-one")
    active = set(vm.catalog.active.values())
    catalog = vm.catalog.with_images([here])
    vm.save(layers.freeze(catalog, [o.id for o in overlays if o.id not in active and o.fingerprint is not None]))
    point("repair.catalog")
    await redefine.follow(vm, {image.path: here})


async def _name(overlay: Image, below: Image) -> None:
    if not layers.names_backing(overlay.path, below):
        with files.synced(overlay.path):
            await qemu_img.rebase(overlay.path, qemu_img.backing_name_for(overlay.path, below.path), below.fmt)
    layers.verify_reference(overlay, below)


def _seal_to_bring(was: Path, now: Path) -> Seal | None:
    """Return the seal that lies where an image was; with a digest in it that is compared first. Raise ChainDamaged."""
    seal = seal_store.load(was)
    if seal is None or seal_store.is_sealed(now):
        return None
    if seal.sha256 and files.sha256_file(now) != seal.sha256:
        raise ChainDamaged(f"{now} has the fingerprint of {was}, and other content than was sealed",
                           hint="bring the right file back from a backup")  # fmt: skip
    return seal


def _bring_seal(seal: Seal, was: Path, now: Path) -> None:
    seal_store.save(now, replace(seal, name=now.name, mtime_ns=now.stat().st_mtime_ns))
    files.unlink_durably(seal_store.place(was))


# -- headers -----------------------------------------------------------------------------------------------------------


async def header_for(vm: VM, image: Image) -> bytes | None:
    """Return the header that a frozen overlay of ours must have, when with it, and only with it, its fingerprint fits."""
    if not image.ours or image.fmt != "qcow2" or image.backing is None or not _differing(image):
        return None
    candidate = await _fresh_header(image, vm.catalog.images[image.backing])
    return candidate if _fits(image, candidate) else None


async def _fresh_header(image: Image, below: Image) -> bytes:
    """The first cluster of an overlay of this size on this image, as we make them."""
    fd = os.memfd_create("header", os.MFD_CLOEXEC)
    try:
        name = qemu_img.backing_name_for(image.path, below.path)
        await qemu_img.create(fd, name, below.fmt, image.virtual_size)
        head = files.read_span(fd, 0, 1 << 16)
        return head[: qcow2.parse_header(head, os.fstat(fd).st_size).cluster_size]
    finally:
        os.close(fd)


def _fits(image: Image, candidate: bytes) -> bool:
    """Whether candidate, L1 table and L2 tables together have the recorded digest."""
    assert image.fingerprint
    fd = files.open_untrusted(image.path)
    try:
        size = os.fstat(fd).st_size
        header = qcow2.parse_header(candidate, size)
        digest = hashlib.sha256(candidate)
        for offset in l2_tables(fd, header, size, str(image.path), digest.update):
            digest.update(files.read_span(fd, offset, header.cluster_size))
        return size == image.fingerprint.get("size") and digest.hexdigest() == image.fingerprint.get("sha256")
    finally:
        os.close(fd)


async def write_header(vm: VM, image_id: str, path: Path, begin: Callable[[], None]) -> None:
    """Write the header that fits, and verify it. Nothing is done when it is right already. Raise ChainDamaged."""
    image = vm.catalog.images[image_id]
    if not _differing(image):
        return
    header = await header_for(vm, image)
    if header is None:
        raise ChainDamaged(f"{path}: the header that the catalog knows does not fit", hint="bring the file back")
    begin()
    _overwrite(path, header)
    layers.verify_frozen(image)


def _overwrite(path: Path, header: bytes) -> None:
    with files.os_errors(path, "write"):
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.pwrite(fd, header[:512], 0)
            point("repair.header-half")
            os.pwrite(fd, header, 0)
            os.fsync(fd)
        finally:
            os.close(fd)


# -- names -------------------------------------------------------------------------------------------------------------


def misnamed(vm: VM, image: Image) -> Path | None:
    """Return the file below an overlay of ours that names it, as it was frozen, without the `./` that a colon needs."""
    if not image.ours or image.backing is None or _differing(image):
        return None
    below = vm.catalog.images[image.backing].path
    named = [n for n in directories.backing_names(image.path) if qcow2.has_protocol(n)]
    return below if any(image.path.parent / name == below for name in named) else None


async def write_path(vm: VM, image_id: str, path: Path, begin: Callable[[], None]) -> None:
    """Write the name that QEMU takes for a path, and record the overlay with it. Can be repeated."""
    image = vm.catalog.images[image_id]
    below = vm.catalog.images[image.backing or ""]
    if misnamed(vm, image):
        begin()
        with files.synced(path):
            await qemu_img.rebase(path, qemu_img.backing_name_for(path, below.path), below.fmt)
    layers.verify_reference(image, below)
    point("repair.named")
    if image.fingerprint is not None:
        vm.save(layers.freeze(vm.catalog, [image_id]))


# -- bitmaps, internal snapshots ---------------------------------------------------------------------------------------


async def has_shed(image: Image) -> bool:
    """Whether all that changed in a frozen layer is that bitmaps or internal snapshots were removed: each guest cluster
    lies where it lay, and the metadata is clean.
    """
    recorded = image.fingerprint or {}
    if "map" not in recorded or not set(_differing(image) or ["nothing"]) <= {"sha256", "size"}:
        return False
    if locks.image_in_use(image.path) or map_of(image.path) != recorded["map"]:
        return False
    return not (await qemu_img.check(qemu_img.unlocked(image.path, image.fmt))).corruptions


async def take_shed(vm: VM, image_id: str, path: Path, begin: Callable[[], None]) -> None:
    """Record a layer as it is, if that is so."""
    if await has_shed(vm.catalog.images[image_id]):
        begin()
        vm.save(layers.freeze(vm.catalog, [image_id]))


# -- times, leaks ------------------------------------------------------------------------------------------------------


def sealed_again(image: Image) -> Seal | None:
    """Return the seal of a base of which only the time is not as recorded, and that was sealed as it is now."""
    if image.ours or _differing(image) != ["mtime_ns"]:
        return None
    seal = seal_store.load(image.path)
    return seal if seal and seal.mtime_ns == image.path.stat().st_mtime_ns else None


async def take_seal(vm: VM, image_id: str, path: Path, begin: Callable[[], None]) -> None:
    """Record a base as it is."""
    image = vm.catalog.images[image_id]
    if sealed_again(image):
        begin()
        vm.save(layers.freeze(vm.catalog, [image_id]))


async def leaks_of(vm: VM, image: Image) -> int:
    """Return how many clusters of an image of this VM alone are reserved and unused; 0 where anything else is wrong."""
    if image.fmt != "qcow2" or _differing(image) or locks.image_in_use(image.path):
        return 0
    found = await qemu_img.check(qemu_img.unlocked(image.path, image.fmt))
    if found.corruptions or not found.leaks:
        return 0
    sharers.refuse_shared(vm, image, vm.catalog.images.values())
    return found.leaks


async def repair_leaks(vm: VM, image_id: str, path: Path, begin: Callable[[], None]) -> None:
    """Let the clusters go, under the image guard; what a guest reads stays as it is, and so do its tables."""
    image = vm.catalog.images[image_id]
    with locks.guard_images([path], wait=locks.GUARD_WAIT, users=locks.open_by) as guard:
        begin()
        await qemu_img_repair.repair_leaks(qemu_img.unlocked(path, image.fmt), guard.fds)
        point("repair.leaks")
        guard.sync(path)
        if not (await qemu_img.check(qemu_img.unlocked(path, image.fmt))).clean:
            raise ChainDamaged(f"{path} is not clean after the repair", hint="keep every file of the chain")
    vm.save(_frozen_again(vm.catalog, image))


def _frozen_again(catalog: Catalog, image: Image) -> Catalog:
    if image.fingerprint is None:
        return catalog
    with contextlib.suppress(DiskchainError):
        now = fingerprint(image.path, image.fmt)
        if now["sha256"] == image.fingerprint.get("sha256"):  # the tables are those that were frozen
            return catalog.with_images([replace(image, fingerprint=now)])
    return catalog
