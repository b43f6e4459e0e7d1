"""doctor: the host. Nothing of diskchain's is written; KVM and the image locks are tried in a temporary directory, what the
filesystems of the images can do on unnamed files there, of which nothing is ever seen.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from diskchain.chain.rules import Finding, error, full_volume, info, qemu_traps, warning
from diskchain.chain.text import size
from diskchain.config import Config
from diskchain.drivers import accel, firmware
from diskchain.drivers.suitable import suitable
from diskchain.errors import DiskchainError, NotFound
from diskchain.host import hugepages, locks, probe
from diskchain.host.process import find_program, run, scope
from diskchain.ops import doctor_libvirt, orphans
from diskchain.ops.vm import Host
from diskchain.store import catalog as catalog_store
from diskchain.store.catalog import Home

_PACKAGES = ("click", "rich", "qemu.qmp", "libvirt-python")
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "fuse.glusterfs", "ceph")
_LONGEST_SOCKET = 107


async def doctor(host: Host) -> list[Finding]:
    """Return what is found about this host."""
    found = list(_software())
    found += [f async for f in _qemu()]
    found += list(_tools())
    found += [f async for f in _kvm()]
    found += list(_userfaultfd())
    found.append(_huge_pages(host.config))
    found += [f async for f in _image_locks()]
    found += list(_directories(host.config))
    found += [f async for f in _systemd()]
    found += list(doctor_libvirt.find(host))
    found += _allowed(_volumes(host))
    found += _allowed(orphans.find(host))
    return [*found, *_security()]


def _allowed(found: Iterator[Finding]) -> list[Finding]:
    """Return what can be found out without the right to read the state directory, of which is told already."""
    with contextlib.suppress(PermissionError):
        return list(found)
    return []


# -- programs ----------------------------------------------------------------------------------------------------------


def _software() -> Iterator[Finding]:
    yield info("kernel", "kernel", platform.release())
    yield info("python", "Python", f"{platform.python_version()} ({sys.executable})")
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    yield info("packages", "packages", ", ".join(versions))


async def _qemu() -> AsyncIterator[Finding]:
    try:
        program, version = find_program("qemu-system-x86_64"), await accel.qemu_version()
    except DiskchainError as problem:
        yield error("qemu-missing", "QEMU", problem.message, problem.hint)
        return
    yield info("qemu", "QEMU", f"{version} ({program})")
    for finding in qemu_traps(version, _why_no_rescue()):
        yield finding


def _why_no_rescue() -> str | None:
    """Why a process of ours could not be traced by us; None when it can."""
    if os.geteuid() == 0:
        return None
    scope_of = _text("/proc/sys/kernel/yama/ptrace_scope")
    return None if scope_of in ("", "0") else f"kernel.yama.ptrace_scope is {scope_of}, and we are not root"


def _tools() -> Iterator[Finding]:
    for name, needed in (("qemu-img", True), ("qemu-io", False), ("qemu-storage-daemon", False), ("fallocate", True)):
        try:
            yield info("tool", name, find_program(name))
        except NotFound as problem:
            hint = "apt install util-linux" if name == "fallocate" else problem.hint
            if needed:
                yield error("tool-missing", name, problem.message, hint)
            else:
                yield info("tool-missing", name, f"{problem.message}; only tests and repairs by hand use it", hint)
    yield from _machine_parts()


def _machine_parts() -> Iterator[Finding]:
    """What machines with UEFI or a TPM need; most need neither."""
    try:
        pair = firmware.find("pc-q35-7.2")
        yield info("uefi", "UEFI", f"{pair.code}, variables from {pair.template}")
    except NotFound as problem:
        yield info("uefi-missing", "UEFI", 'not installed; machines with firmware = "uefi" need it', problem.hint)
    try:
        yield info("swtpm", "TPM", find_program("swtpm"))
    except NotFound as problem:
        yield info("swtpm-missing", "TPM", "swtpm is not installed; machines with tpm = true need it", problem.hint)


async def _kvm() -> AsyncIterator[Finding]:
    device = Path("/dev/kvm")
    remedy = 'machines with accel = "auto" are emulated (tcg), much slower; switch virtualization on in the firmware'
    if not device.exists():
        yield warning("kvm-unusable", "KVM", "/dev/kvm does not exist", remedy)
        return
    if not os.access(device, os.R_OK | os.W_OK):
        yield warning("kvm-unusable", "KVM", "no right to open /dev/kvm", "add the user to the group kvm, log in again")
        return
    try:
        took = await accel.boots("kvm")
    except DiskchainError as problem:
        yield warning("kvm-unusable", "KVM", problem.message, problem.hint)
        return
    if took is None:
        yield warning("kvm-unusable", "KVM", "a probe guest did not boot on it within 4 seconds, though /dev/kvm is there",
                      'a nested host? machines with accel = "auto" are emulated (tcg) here')  # fmt: skip
    else:
        yield info("kvm", "KVM", f"a probe guest booted on it in {took:.2f} s")


def _userfaultfd() -> Iterator[Finding]:
    allowed = _text("/proc/sys/vm/unprivileged_userfaultfd")
    if os.geteuid() == 0:
        yield info("userfaultfd", "userfaultfd", "usable: we are root")
    elif allowed == "1":
        yield info("userfaultfd", "userfaultfd", "usable: vm.unprivileged_userfaultfd is 1")
    elif os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        yield info("userfaultfd", "userfaultfd", "/dev/userfaultfd can be opened; only newer QEMU uses that")
    else:
        yield warning("userfaultfd-unusable", "userfaultfd", "memory can't be saved while a guest runs: no right to it",
                      "sysctl vm.unprivileged_userfaultfd=1, or run diskchain as root")  # fmt: skip


def _huge_pages(config: Config) -> Finding:
    """Whether the guest's memory can be put back into huge pages after a save; tried on memory of our own."""
    why = hugepages.probe()
    if why:
        return info("huge-pages-unusable", "huge pages", f"split by a snapshot, memory stays so: {why}",
                    "snapshots work; from the second on their pauses are 3 to 5 times the first")  # fmt: skip
    off = "" if config.create.huge_pages else "; switched off (create.huge_pages)"
    return info("huge-pages", "huge pages", f"tried: memory can be put into them again after a snapshot{off}")


async def _image_locks() -> AsyncIterator[Finding]:
    """Guard an image as a merge does, and see whether QEMU's tools keep off it, and come back afterwards."""
    with tempfile.TemporaryDirectory(prefix="diskchain-") as scratch:
        image = Path(scratch) / "probe.img"
        image.write_bytes(bytes(1 << 20))
        look = ["qemu-img", "convert", "-f", "raw", "-O", "raw", str(image), f"{image}.copy"]  # info, map take no locks
        try:
            with locks.guard_images([image], wait=0, users=lambda path: "somebody"):
                kept_off = (await run(look, ok=(0, 1))).returncode == 1 and locks.has_writer(image)
            await run(look)
        except DiskchainError as problem:
            yield error("image-locks-broken", "image locks", f"in {scratch}: {problem.message}", problem.hint)
            return
        if kept_off:
            yield info("image-locks", "image locks", f"tried in {Path(scratch).parent}: QEMU keeps off a guarded image")
        else:
            yield error("image-locks-broken", "image locks", f"in {scratch}: qemu-img read an image that was guarded",
                        "a filesystem or a QEMU without OFD locks: start no VM while a merge runs")  # fmt: skip


# -- places ------------------------------------------------------------------------------------------------------------


def _directories(config: Config) -> Iterator[Finding]:
    for what, path in (("state_dir", config.state_dir), ("run_dir", config.run_dir)):
        yield from _directory(what, path)
    longest = len(os.fsencode(config.run_dir / ("0" * 36) / "watch.sock"))
    if longest > _LONGEST_SOCKET:
        yield error("run-dir-too-long", f"run_dir {config.run_dir}", f"its sockets would have names of {longest} bytes",
                    f"choose a shorter run_dir in the configuration (sockets: {_LONGEST_SOCKET} bytes)")  # fmt: skip


def _directory(what: str, path: Path) -> Iterator[Finding]:
    try:
        yield from _as_it_is(what, path)
    except PermissionError as refused:
        yield error("directory-not-writable", f"{what} {path}", f"{refused.filename} can't be looked at by us",
                    f"run as its owner or as root, or name another {what} in the configuration")  # fmt: skip


def _as_it_is(what: str, path: Path) -> Iterator[Finding]:
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    subject = f"{what} {path}"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield error("directory-not-writable", subject, f"{there} can't be written by us",
                    f"run as its owner, or name another {what} in the configuration")  # fmt: skip
        return
    if there != path:
        yield info("directory", subject, "not there yet; made when it is needed")
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o022:
        yield warning("directory-open", subject, f"mode {mode:o}: others can write there", f"chmod 700 {path}")
    else:
        yield info("directory", subject, f"mode {mode:o}, writable")


async def _systemd() -> AsyncIterator[Finding]:
    if not Path("/run/systemd/system").is_dir():
        yield info("scope", "systemd", "does not run here; machines live in sessions of their own")
    elif await scope("doctor"):
        yield info("scope", "systemd", "machines get a scope of their own")
    else:
        yield warning("scope-unavailable", "systemd", "it gives us no scope: machines may end with the session",
                      f"loginctl enable-linger {os.environ.get('USER', 'USER')}")  # fmt: skip


def _volumes(host: Host) -> Iterator[Finding]:
    mounts = _mounts()
    seen: set[int] = set()
    for directory in _image_directories(host):
        try:
            device, data = directory.stat().st_dev, os.statvfs(directory)
        except OSError as problem:
            yield warning("directory-unreadable", str(directory), f"images should be there: {problem.strerror}")
            continue
        if device in seen:
            continue
        seen.add(device)
        free, total = data.f_bavail * data.f_frsize, data.f_blocks * data.f_frsize
        tried = probe.directory(directory)
        yield info("volume", str(directory), f"{_kind(mounts, directory, tried)}; {size(free)} of {size(total)} free")
        yield from _lacking(tried, directory)
        yield from _network(mounts, directory)
        yield from full_volume(str(directory), directory, free, total)


def _image_directories(host: Host) -> list[Path]:
    found: set[Path] = set()
    for registered in host.machines.all():
        found |= {Path(d.image).parent for d in registered.machine.disks}
        try:
            found |= {i.path.parent for i in catalog_store.load(Home(registered.home)).images.values()}
        except DiskchainError:
            continue
    with contextlib.suppress(DiskchainError):  # a libvirt that can't be asked was named before
        for domain in host.domains.all():
            found |= {d.path.parent for d in suitable(domain.disks)[0].values() if d.path}
    return sorted(found)


def _mounts() -> dict[str, str]:
    """Return the filesystem type by mount point; of several on one point the last one counts."""
    found = {}
    for line in _text("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        found[before.split()[4].encode().decode("unicode_escape")] = after.split()[0]
    return found


def _fstype(mounts: dict[str, str], directory: Path) -> str:
    real = directory.resolve()
    return next((mounts[str(p)] for p in (real, *real.parents) if str(p) in mounts), "unknown")


def _kind(mounts: dict[str, str], directory: Path, tried: probe.Tried) -> str:
    kind = _fstype(mounts, directory)
    if tried.clone is None:
        return f"{kind}: cloning of files, O_DIRECT and reserving space not tried: {tried.why}"
    clones = "files can be cloned" if tried.clone else "files can't be cloned"
    direct = "O_DIRECT" if tried.direct else "no O_DIRECT"
    reserve = "space can be reserved" if tried.reserve else "space can't be reserved"
    return f"{kind}: {clones}, {direct}, {reserve} (tried on unnamed files)"


def _lacking(tried: probe.Tried, directory: Path) -> Iterator[Finding]:
    """What our own work needs of the places where images and records are."""
    if tried.direct is False:
        yield warning("volume-no-direct", str(directory), "no O_DIRECT: a merge after an unclean end could not be done the "
                      "careful way, past the page cache", "move the images to another filesystem")  # fmt: skip
    if tried.reserve is False:
        yield warning("volume-no-reserve", str(directory), "space can't be reserved (fallocate): a save of memory may run "
                      "out of it half-way", "keep twice the RAM of the VM free there, or move the images")  # fmt: skip


def _network(mounts: dict[str, str], directory: Path) -> Iterator[Finding]:
    kind = _fstype(mounts, directory)
    if kind in _NETWORK:
        yield warning("volume-on-network", str(directory), f"{kind}: locks and durability are those of its server",
                      "one host at a time; diskchain can't see the users of another host")  # fmt: skip


def _security() -> Iterator[Finding]:
    enabled = _text("/sys/module/apparmor/parameters/enabled")
    yield info("apparmor", "AppArmor", "on; machines of diskchain run without a profile" if enabled == "Y" else "off")
    enforcing = _text("/sys/fs/selinux/enforce")
    yield info("selinux", "SELinux", {"1": "enforcing", "0": "permissive"}.get(enforcing, "off"))


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
