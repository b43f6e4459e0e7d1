"""adopt and forget: taking up the records of a VM that others have managed, and letting go of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from diskchain.chain.model import Catalog, Image
from diskchain.chain.plan import Plan
from diskchain.chain.qcow2 import ApprovedImage
from diskchain.chain.text import size
from diskchain.drivers.domains import Domain
from diskchain.drivers.suitable import suitable
from diskchain.errors import ChainDamaged, DiskchainError, NotFound, Refused
from diskchain.host import files
from diskchain.ops import layers
from diskchain.ops.adopt import refreshed
from diskchain.ops.approve import approve_chain
from diskchain.ops.ids import new_id
from diskchain.ops.vm import VM, Host, refuse_unfinished
from diskchain.store import catalog as catalog_store
from diskchain.store.catalog import Home


@dataclass(frozen=True)
class Adopted:
    """What `adopt` found: the layers that it took up, and remarks for the admin."""

    taken: tuple[Path, ...]
    remarks: tuple[str, ...]


def adopt(vm: VM) -> Adopted:
    """Take up what was done to a domain's chain behind us. Its lock is held; its records exist (made now, or before).

    New layers on our active ones (virsh snapshot-create) become part of the chain. Raise ChainDamaged when layers that
    snapshots need were merged or replaced, naming the snapshots.
    """
    refuse_unfinished(vm)
    domain = vm.host.domains.get(vm.driver.uuid)
    before = set(vm.catalog.images)
    catalog = vm.catalog
    roots = [*vm.config.image_roots, *(i.path.parent for i in catalog.images.values())]
    for target, disk in suitable(domain.disks)[0].items():
        known = catalog.active.get(target)
        if known and disk.path and not files.is_same(catalog.images[known].path, disk.path):
            catalog = _grown(catalog, target, approve_chain(disk.path, disk.fmt or "raw", roots=roots))
    catalog = refreshed(catalog, domain, roots)
    vm.save(catalog)
    taken = tuple(i.path for k, i in catalog.images.items() if k not in before)
    return Adopted(taken, tuple(_remarks(domain, catalog)))


def _grown(catalog: Catalog, target: str, chain: list[ApprovedImage]) -> Catalog:
    """Return the catalog whose disk goes on in a new top, above the layer that was active."""
    active = catalog.images[catalog.active[target]]
    above: list[ApprovedImage] = []
    for layer in chain:
        if files.is_same(layer.path, active.path):
            break
        above.append(layer)
    else:
        raise ChainDamaged(_gone(catalog, target, chain),
                           hint=f"bring the files back; or give the records up: diskchain forget {catalog.name}")  # fmt: skip
    below = active.id
    for layer in reversed(above):
        image = Image(new_id(), layer.path, layer.fmt, target, layer.virtual_size, below)
        catalog = catalog.with_images([image])
        below = image.id
    frozen = [active.id, *(i.id for i in catalog.images.values() if i.path in {a.path for a in above[1:]})]
    return replace(layers.freeze(catalog, frozen), active={**catalog.active, target: below})


def _gone(catalog: Catalog, target: str, chain: list[ApprovedImage]) -> str:
    lost = [s.name for s in catalog.visible() if target in s.disks and not _is_whole(catalog, s.disks[target], chain)]
    names = f"; of the snapshots {', '.join(lost)} it can't be said what they hold" if lost else ""
    return (f"{target} of {catalog.name} is on {chain[0].path} now, which does not stand on the layer that was active: "
            f"something merged or replaced layers{names}")  # fmt: skip


def _is_whole(catalog: Catalog, frozen: str, chain: list[ApprovedImage]) -> bool:
    """Whether a frozen image and all below it are still below what the disk is on now, and as they were frozen."""
    below = [layer.path for layer in chain[1:]]
    try:
        for image in catalog.chain(frozen):
            if not any(files.is_same(image.path, path) for path in below):
                return False
            layers.verify_frozen(image)
    except DiskchainError:
        return False
    return True


def _remarks(domain: Domain, catalog: Catalog) -> list[str]:
    found = []
    if domain.snapshots:
        count = len(domain.snapshots)
        found.append(f"libvirt has {count} snapshot{'s'[: count - 1]} of its own of {domain.name}; "
                     "virsh snapshot-delete and snapshot-revert would change the chain behind us")  # fmt: skip
    for image in catalog.images.values():
        header = approve_chain(image.path, image.fmt)[0].header if image.path.exists() else None
        if header and header.snapshots:
            found.append(
                f"{image.path} holds {header.snapshots} internal snapshots; they stay, and keep it from being merged"
            )
        if header and header.has_bitmaps:
            found.append(f"{image.path} holds dirty bitmaps; they stay, and keep it from being merged")
    return found


def find_in(host: Host, name: str, directory: Path) -> Home:
    """Return the records of a domain that lie in another directory than its disks. Raise NotFound."""
    domain = host.domains.get(name.removeprefix("libvirt:"))
    for place in (directory / ".diskchain" / domain.uuid, directory / domain.uuid, directory):
        if (place / "catalog.json").is_file() and catalog_store.load(Home(place)).uuid == domain.uuid:
            return Home(place)
    raise NotFound(f"no records of {domain.name} ({domain.uuid}) lie in {directory}",
                   hint="name the directory that holds .diskchain")  # fmt: skip


def bring(found: Home, home: Home) -> None:
    """Move the records of a VM to where its first disk is now. Raise Refused when records are there, or across volumes."""
    if home.path.exists():
        raise Refused(f"there are records already: {home.path}", hint="keep the right ones, move the others away")
    if found.path.stat().st_dev != home.disks_dir.stat().st_dev:
        raise Refused(f"{found.path} is on another volume than {home.disks_dir}", hint=f"mv {found.path} {home.path}")
    files.make_dirs_durably(home.path.parent)
    files.rename_durably(found.path, home.path)


def plan_forget(vm: VM) -> Plan:
    """Return what `forget` would do. Raise Refused when there is nothing to forget, or an operation is open."""
    if not vm.known:
        raise Refused(f"diskchain has no records of {vm.name}", hint=f"diskchain list {vm.name}")
    refuse_unfinished(vm)
    catalog = vm.catalog
    memory = [s for s in catalog.visible() if s.memory.saved]
    present = {i.id for chain in catalog.active_chains().values() for i in chain}
    aside = [i.path for i in catalog.images.values() if i.id not in present]
    lost = [f"the names and configurations of {len(catalog.visible())} snapshots"] if catalog.visible() else []
    lost += [f"the memory of {s.name} ({size(s.memory.bytes)})" for s in memory]
    steps = ["remove the records; every image stays as it is, the VM too", f"records: {vm.home.path}"]
    steps += [f"{path} stays, and nothing will name it" for path in aside]
    return Plan(f"{vm.name}: forget", tuple(steps), lost=tuple(lost), point_of_no_return="at once")


def forget(vm: VM) -> Path:
    """Remove the records of a VM; no image is touched. Its lock is held. Return where a last RECOVER.txt lies."""
    plan_forget(vm)
    left = vm.home.disks_dir / f"RECOVER-{vm.driver.uuid}.txt"
    files.write_durably(left, catalog_store.recover_text(vm.home, vm.catalog))
    gone = vm.home.path.with_name(f".forgotten-{new_id()}")
    files.rename_durably(vm.home.path, gone)
    catalog_store.remove(gone)
    vm.catalog = replace(vm.catalog, snapshots={})  # nothing of it is to be listed by libvirt
    return left
