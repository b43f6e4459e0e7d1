"""A part of doctor: libvirt. Its daemon is asked and its qemu.conf read; nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from diskchain.chain.rules import Finding, error, info, warning
from diskchain.drivers.domains import Facts
from diskchain.errors import DiskchainError
from diskchain.host.as_user import name_of, uid_of
from diskchain.ops.setup import HOOKS, hook_path, is_ours
from diskchain.ops.vm import Host

_SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")


def find(host: Host) -> Iterator[Finding]:
    """Return what is found about the libvirt that -c, LIBVIRT_DEFAULT_URI or the usual socket names."""
    if host.domains.uri is None:
        yield info("libvirt", "libvirt", "no daemon is asked: none runs here, its Python module is missing, or -c none",
                   "for domains: apt install libvirt-daemon-system python3-libvirt")  # fmt: skip
        return
    try:
        facts, domains = host.domains.facts(), host.domains.all()
    except DiskchainError as problem:
        yield error("libvirt-unreachable", f"libvirt {host.domains.uri}", problem.message, problem.hint)
        return
    running = sum(domain.active for domain in domains)
    yield info("libvirt", "libvirt", f"{_dotted(facts.libvirt)} with QEMU {_dotted(facts.qemu)} at {host.domains.uri}; "
               f"{len(domains)} domains, {running} on")  # fmt: skip
    user = user_of(facts)
    yield info(
        "libvirt-user", "libvirt's QEMU", f"runs as {user or 'a user that libvirt does not name'}; {_owner(facts)}"
    )
    yield from userfaultfd(facts, user, _sysctl())
    yield _security(facts)
    yield from _lock_manager(facts)
    yield _hook()


def _dotted(version: int) -> str:
    return f"{version // 1000000}.{version // 1000 % 1000}.{version % 1000}"


def _owner(facts: Facts) -> str:
    if not facts.settings and facts.config is not None and not _readable(facts.config):
        return f"{facts.config} can't be read, defaults are taken as given"
    if facts.settings.get("dynamic_ownership", "1") == "0":
        return "dynamic_ownership is off: images must be its own"
    return "libvirt gives it the images of a domain that starts"


def _readable(path: Path) -> bool:
    try:
        return path.read_bytes() is not None
    except OSError:
        return False


def user_of(facts: Facts) -> str:
    """Return the name of the user that QEMU runs as; nothing when libvirt does not say."""
    uid = uid_of(facts.security.owner.partition(":")[0])
    return "" if uid is None else name_of(uid)


def _sysctl() -> str:
    try:
        return _SYSCTL.read_text().strip()
    except OSError:
        return ""


def userfaultfd(facts: Facts, user: str, sysctl: str) -> Iterator[Finding]:
    """Whether QEMU as that user can save memory while a guest runs; versions decide what gives it the right."""
    device = facts.libvirt >= 10001000 and facts.qemu >= 8000000
    if user == "root":
        yield info("libvirt-userfaultfd", "libvirt's QEMU", "memory can be saved while a guest runs: it is root")
    elif sysctl == "1":
        yield info("libvirt-userfaultfd", "libvirt's QEMU",
                   "memory can be saved while a guest runs: vm.unprivileged_userfaultfd is 1")  # fmt: skip
    elif device:
        yield info("libvirt-userfaultfd", "libvirt's QEMU",
                   "memory can be saved while a guest runs: libvirt gives it /dev/userfaultfd")  # fmt: skip
    else:
        yield warning("libvirt-userfaultfd-unusable", "libvirt's QEMU",
                      f"memory can't be saved while a guest runs: {user or 'its user'} may not track the guest's writes",
                      "sysctl vm.unprivileged_userfaultfd=1; or create --disk-only, --memory=paused")  # fmt: skip
    if device and facts.settings.get("namespaces", "").replace(" ", "") == "[]":
        yield warning("libvirt-no-namespaces", "libvirt's QEMU", "namespaces = [] in qemu.conf: libvirt gives the host's own "
                      "/dev/userfaultfd to QEMU's user", "leave namespaces at its default")  # fmt: skip


def _security(facts: Facts) -> Finding:
    confined = facts.security.confined_by
    if confined == "apparmor":
        says = "AppArmor; new layers beside the disks are added to a domain's profile by libvirt"
    elif confined == "selinux":
        says = "SELinux; saving memory was never tried there, --disk-only needs less"
    else:
        says = f"none that confines QEMU ({', '.join(facts.security.models) or 'no model'})"
    return info("libvirt-security", "libvirt's security driver", says)


def _lock_manager(facts: Facts) -> Iterator[Finding]:
    manager = facts.settings.get("lock_manager", "nop")
    if manager in ("", "nop"):
        yield info("libvirt-lock-manager", "libvirt's lock manager", "none (qemu.conf: lock_manager)")
    else:
        yield info("libvirt-lock-manager", "libvirt's lock manager", f"{manager} holds the layers of running domains; merges "
                      "are made with the VM off, outside of it", "while a VM merges, start it on no other host")  # fmt: skip


def _hook() -> Finding:
    path = hook_path(HOOKS)
    try:
        ours = is_ours(path)
    except OSError:
        ours = False
    if ours:
        return info("libvirt-hook", "libvirt hook", f"installed ({path})")
    return info("libvirt-hook", "libvirt hook", "not installed; it keeps libvirt from starting a domain on a frozen layer",
                "diskchain setup --hook")  # fmt: skip
