"""A machine with UEFI and a TPM, and what it keeps besides its disks as the test itself reads it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.console import Console
from tests.support.rig import Rig, has_ended, wait_for

UEFI = 'firmware = "uefi"'
TPM = "tpm = true"
States = dict[str, bytes]


def home(rig: Rig) -> Path:
    """Where the machine's records are."""
    (found,) = rig.dir.glob(".diskchain/*/catalog.json")
    return found.parent


def present(rig: Rig) -> States:
    """The machine's own NVRAM and TPM."""
    return _read(home(rig) / "nvram.fd", home(rig) / "tpm")


def copies(rig: Rig) -> dict[str, States]:
    """Those of every snapshot that an admin sees."""
    found = {}
    for snapshot in rig.catalog()["snapshots"].values():
        if not snapshot["deleted"] and not snapshot["creating"]:
            directory = home(rig) / "snapshots" / snapshot["id"]
            found[snapshot["name"]] = _read(directory / "nvram", directory / "tpm")
    return found


def _read(nvram: Path, tpm: Path) -> States:
    found = {"nvram": nvram.read_bytes()} if nvram.exists() else {}
    if tpm.is_dir():
        found |= {f"tpm/{p.name}": p.read_bytes() for p in sorted(tpm.iterdir()) if p.name != ".lock"}
    return found


def leftovers(rig: Rig) -> list[str]:
    """Files of an operation that should be gone when it is over."""
    found = [*home(rig).glob(".*"), *home(rig).glob("snapshots/*/*.part"), *home(rig).glob("snapshots/*/.*")]
    return [f"leftover {path.relative_to(home(rig))}" for path in found]


def write_present(rig: Rig, mark: bytes) -> None:
    """What a guest would have written: other bytes in the NVRAM (its size stays) and in the TPM's state."""
    nvram = home(rig) / "nvram.fd"
    data = nvram.read_bytes()
    nvram.write_bytes(data[:1024] + mark.ljust(64) + data[1088:])
    (home(rig) / "tpm" / "tpm2-00.permall").write_bytes(b"a TPM, " + mark * 20)


def swtpms(rig: Rig) -> list[int]:
    """The TPM processes of this machine."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"dir={home(rig)}/tpm".encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def kill_swtpm(rig: Rig) -> None:
    """SIGKILL the TPM."""
    (pid,) = swtpms(rig)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: has_ended(pid), "swtpm is gone")


def describe(directory: Path, name: str, code: Path, template: Path, **changes: Any) -> None:
    """Write a descriptor; `features`, `machines`, `format`, `device` and `kind` may differ from a plain one."""
    directory.mkdir(exist_ok=True)
    data = {
        "interface-types": [changes.get("kind", "uefi")],
        "mapping": {
            "device": changes.get("device", "flash"),
            "executable": {"filename": str(code), "format": changes.get("format", "raw")},
            "nvram-template": {"filename": str(template), "format": "raw"},
        },
        "targets": [{"architecture": "x86_64", "machines": changes.get("machines", ["pc-q35-*"])}],
        "features": changes.get("features", ["acpi-s3"]),
    }
    (directory / name).write_text(json.dumps(data))


class Parts:
    """A running machine with UEFI and TPM, and its console."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.console = Console(rig.console())

    def boots(self, mark: int = 0) -> int:
        """The EFI variable, as the guest reads it after the mark."""
        return int(self.console.wait(r"^E (\d+)$", after=mark)[1])

    def resets(self, mark: int = 0) -> int:
        """The TPM's count of its resets, as the guest reads it after the mark."""
        return int(self.console.wait(r"^P \d+ resets=(\d+)$", after=mark)[1])

    def rounds(self, mark: int, count: int = 4) -> list[str]:
        """Wait until the guest has looked some more times; return what it has to say against it."""
        for _ in range(count):
            after = self.console.mark()
            self.boots(after)
            self.resets(after)
        return self.console.bad(after=mark) + self.complaints(mark)

    def complaints(self, mark: int) -> list[str]:
        """Lines in which the guest says that memory does not fit NVRAM or TPM."""
        return [line for _, line in self.console.lines(mark) if "MISMATCH" in line or "GUEST ERROR" in line]

    def restart(self) -> int:
        """Shut it down and start it; return the mark in between."""
        self.rig.ok("stop", "vm")
        mark = self.console.mark()
        self.rig.ok("start", "vm")
        return mark


@contextlib.contextmanager
def running(directory: Path, modes: str, **options: Any) -> Iterator[Parts]:
    """Start a machine with UEFI and TPM; wait until its guest looks at both."""
    rig = Rig(directory / "vm", memory="256 MiB", modes=modes, parts=(UEFI, TPM), targets=("vda",), **options)
    try:
        rig.build(guest=True)
        rig.ok("start", "vm")
        parts = Parts(rig)
        try:
            parts.console.wait(r"^GUEST UP", timeout=120)
            yield parts
        finally:
            parts.console.close()
    finally:
        rig.destroy()
