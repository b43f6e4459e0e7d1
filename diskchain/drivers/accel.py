"""Can KVM be trusted here? Found out by booting something on it, never by looking at /dev/kvm."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from pathlib import Path

from diskchain.errors import DiskchainError, DriverFailed, ToolFailed
from diskchain.host import files
from diskchain.host.process import boot_id, find_program, run

# mov dx,0xf4; mov al,0x10; out dx,al; hlt; jmp $-1   -> QEMU's isa-debug-exit ends with (0x10 << 1) | 1
_BOOT_SECTOR = bytes.fromhex("baf400b010eef4ebfd").ljust(510, b"\0") + b"\x55\xaa"
_BOOTED = 33
# A working KVM boots it in well under a second. On nested hosts where ordinary guests hang, the same sector
# took 8.4-8.9 s (TCG there: 0.05 s), so slow is as bad as never.
_LIMIT = 4.0


async def kvm_works(state_dir: Path) -> bool:
    """Return whether a probe guest booted on KVM within 4 seconds. Asked once per boot of the host and QEMU version."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    qemu = Path(find_program("qemu-system-x86_64"))
    key = f"{boot_id()} {qemu} {qemu.stat().st_mtime_ns} {cpu('kvm')}"
    cache = state_dir / "kvm-probe.json"
    try:
        known = json.loads(cache.read_bytes())
        if known["key"] == key:
            return bool(known["works"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    works = await boots("kvm") is not None
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    files.write_durably(cache, json.dumps({"key": key, "works": works}).encode())
    return works


async def boots(accel: str) -> float | None:
    """Boot the probe sector on an accelerator; return the seconds it took, or None when it did not come up."""
    with tempfile.TemporaryDirectory(prefix="diskchain-") as scratch:
        disk = Path(scratch) / "probe.img"
        disk.write_bytes(_BOOT_SECTOR.ljust(1 << 20, b"\0"))
        argv = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none",
                "-machine", "q35", "-accel", accel, "-cpu", cpu(accel), "-m", "64M",
                "-device", "isa-debug-exit,iobase=0xf4,iosize=0x01",
                "-drive", f"file={disk},format=raw,if=none,id=d", "-device", "virtio-blk-pci,drive=d"]  # fmt: skip
        began = time.monotonic()
        try:
            await run(argv, timeout=_LIMIT, ok=(_BOOTED,))
        except ToolFailed:
            return None
        return time.monotonic() - began


def cpu(accel: str) -> str:
    """Return the CPU model that a machine has which names none: the probe must have it, too.

    On a nested host whose KVM lacks some of the processor's MSRs (QEMU: "failed to set MSR 0x10a") the probe came up with
    QEMU's default model, and every machine failed.
    """
    return "host" if accel == "kvm" else "max"


async def decide(wanted: str, state_dir: Path) -> str:
    """Given `auto`, `kvm` or `tcg`, return the accelerator to use. Raise DriverFailed when kvm is a must and broken."""
    if wanted == "tcg":
        return "tcg"
    works = await kvm_works(state_dir)
    if wanted == "kvm" and not works:
        raise DriverFailed("KVM does not work here: a probe guest did not boot on it within 4 seconds",
                           hint='accel = "auto" falls back to emulation (tcg)')  # fmt: skip
    return "kvm" if works else "tcg"


async def versioned_machine(name: str) -> str:
    """Given `q35` or `pc`, return the versioned machine type it stands for in this QEMU; others come back as they are.

    A saved memory can only be loaded into the same type, so it is fixed when the machine is defined.
    """
    if name not in ("q35", "pc"):
        return name
    listing = (await run(["qemu-system-x86_64", "-machine", "help"])).stdout
    found = re.search(rf"^{name}\s.*\(alias of (\S+)\)", listing, re.MULTILINE)
    if not found:
        raise DriverFailed(f"this QEMU has no machine type {name}")
    return found[1]


async def machine_types() -> frozenset[str]:
    """Return the machine types that this QEMU can start."""
    listing = (await run(["qemu-system-x86_64", "-machine", "help"])).stdout
    return frozenset(line.split()[0] for line in listing.splitlines()[1:] if line.strip())


async def qemu_version() -> str:
    """Return QEMU's version, like 7.2.22."""
    said = (await run(["qemu-system-x86_64", "--version"])).stdout
    found = re.search(r"version (\d+\.\d+(?:\.\d+)?)", said)
    if not found:
        raise DiskchainError("qemu-system-x86_64 does not say its version")
    return found[1]
