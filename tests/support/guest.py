"""Where the micro guest is. scripts/make-guest builds it; fixtures/guest/init says what it can do."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def debian_disk() -> Path:
    """Return the disk of a real Debian (scripts/make-debian-guest). Raise FileNotFoundError if it has not been built."""
    disk = ROOT / os.environ.get("DISKCHAIN_DEBIAN_DIR", ".cache/debian-guest") / "debian.qcow2"
    if not disk.is_file():
        raise FileNotFoundError(f"{disk} is missing: run scripts/make-debian-guest first")
    return disk


def boot_words(modes: str) -> str:
    """Return the kernel's command line that makes the guest do this.

    What only costs a guest without KVM time is off: moving the kernel, rewriting it against Spectre, testing its ciphers
    (2.7 instead of 4.4 s to the first count). So is the test whether the timer ticks, a race with the processor's time:
    without KVM, on a busy machine, it ends in a panic ("IO-APIC + timer doesn't work").
    """
    return f"console=ttyS0 quiet nokaslr mitigations=off cryptomgr.notests no_timer_check dc={modes}"


def guest_files(*, agent: bool = False, uefi: bool = False) -> tuple[Path, Path]:
    """Return the paths of the kernel (for UEFI: vmlinuz) and the initrd (with the guest agent or without).

    Raise FileNotFoundError if the guest has not been built."""
    directory = ROOT / os.environ.get("DISKCHAIN_GUEST_DIR", ".cache/guest")
    files = (directory / ("vmlinuz" if uefi else "vmlinux"),
             directory / ("initrd-agent.cpio" if agent else "initrd.cpio"))  # fmt: skip
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: run scripts/make-guest first")
    return files


def qemu_version() -> tuple[int, int]:
    """The QEMU that is installed here."""
    said = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])
