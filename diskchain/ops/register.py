"""Our snapshots in libvirt's own list, where an admin asked for that: what is to stand there, and that it does.

It is opt-in. What stands in that list can be used: `virsh snapshot-delete` commits and deletes files behind our back,
`virsh snapshot-revert` of newer libvirt deletes the layers of the present, and libvirt refuses to undefine or migrate the
domain. The list follows the catalog: whatever a command did, it is compared at its end and written anew where it differs.
"""

from __future__ import annotations

from collections.abc import Iterator

from diskchain.chain.model import Catalog
from diskchain.chain.rules import Finding, warning
from diskchain.errors import DiskchainError, Refused
from diskchain.ops.listed import of_others, wanted
from diskchain.ops.vm import VM
from diskchain.store.catalog import Home

WARNING = ("it is in virsh snapshot-list now: virsh snapshot-delete would commit and delete its layers behind diskchain, "
           "virsh snapshot-revert lose the present; use diskchain for both")  # fmt: skip

LONGEST = 255 - len(".xml")  # bytes; libvirt keeps each in a file of its name


def refuse_bad(vm: VM, name: str) -> None:
    """Raise Refused where there is no list of libvirt's, or it can't have that name."""
    if vm.driver.kind == "qemu":
        raise Refused(f"{vm.name} is a machine of diskchain's; libvirt does not know it", hint="leave --register away")
    if len(name.encode()) > LONGEST:
        raise Refused(
            f"libvirt can't list a snapshot whose name has more than {LONGEST} bytes", hint="choose another name"
        )
    if name.startswith(".") or any(s[0] == name for s in of_others(vm.host.domains.get(vm.driver.uuid), vm.catalog)):
        raise Refused(f"libvirt can't list a snapshot {name!r}: it begins with a dot, or libvirt has one of that name",
                      hint="choose another name")  # fmt: skip


def differences(name: str, catalog: Catalog, home: Home, actual: dict[str, str]) -> Iterator[Finding]:
    """Given the ids of our snapshots in libvirt's list, by name there, say where it differs from the catalog."""
    try:
        should = {one.name: one.id for one in wanted(catalog, home)}
    except DiskchainError:
        return  # a lost configuration is a finding of its own
    missing = sorted(set(should) - set(actual))
    extra = sorted(set(actual) - set(should))
    if missing:
        what = f"virsh snapshot-list lacks {', '.join(missing)}: something else took it out, perhaps with its files"
        yield warning(
            "register-differs", name, what, "see what check says of its layers; the next change lists it again"
        )
    if extra:
        what = f"virsh snapshot-list has {', '.join(extra)}, which diskchain has not any more"
        yield warning(
            "register-differs", name, what, "the next change takes it out; or virsh snapshot-delete --metadata"
        )
