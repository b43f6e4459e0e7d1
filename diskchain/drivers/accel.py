"""Can KVM be trusted here? Found out by booting something on it, never by looking at /dev/kvm."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from pathlib import Path

from diskchain.errors import DiskchainError, DriverFailed, ToolFailed
from diskchain.host import files
from diskchain.host.process import boot_id, find_program, run

# The probe guest, assembled from probe_guest.S: what every 64-bit kernel does in its first second.
BOOT_SECTOR = (
    bytes.fromhex(
        "fafc31c08ed88ec08ed0bc007cbf0010b90030f3abc70600100320c70600200330c706003083000f0116e07c0f20e083"
        "c8200f22e066b8001000000f22d866b9800000c00f320d00010f300f20c0660d010000800f22c0ea5c7c080066b81000"
        "8ed0b980f0fa02ffc975fcbf0050000031c031d2bb01000000f0480fc70f7540833f01753bbf00620000b8b97c0800ab"
        "b8008e0000ab31c0abab0f011d45000000b011e620b020e621b004e621b001e621b0fee621fbf4ebfd66baf400b010ee"
        "faf4ebfc00000000000000000000000000000000009a200000000000009200001700c87c00000f020060"
    ).ljust(510, b"\0")
    + b"\x55\xaa"
)
_BOOTED = 33
# A working KVM needs well under a second, as emulation does (0.2 s). On nested hosts where ordinary guests hang, four bytes
# in real mode took 8 s on one and 1.8 s on another, whose KVM emulates a guest's kernel instruction by instruction (a
# page table hypervisor, PVM) until it meets one that it does not know (CMPXCHG16B): so the probe does such things, too.
_LIMIT = 4.0


async def kvm_works(state_dir: Path) -> bool:
    """Return whether a probe guest booted on KVM within 4 seconds. Asked once per boot of the host, QEMU and probe."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    qemu = Path(find_program("qemu-system-x86_64"))
    probe = hashlib.sha256(BOOT_SECTOR).hexdigest()[:16]
    key = f"{boot_id()} {qemu} {qemu.stat().st_mtime_ns} {cpu('kvm')} {probe}"
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
    """Boot the probe guest on an accelerator; return the seconds it took, or None when it did not get to its end.

    It enters 64-bit mode with paging, runs 50 million rounds of a loop, exchanges 16 bytes and waits for a timer interrupt.
    """
    with tempfile.TemporaryDirectory(prefix="diskchain-") as scratch:
        disk = Path(scratch) / "probe.img"
        disk.write_bytes(BOOT_SECTOR.ljust(1 << 20, b"\0"))
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
