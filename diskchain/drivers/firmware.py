"""UEFI firmware: code and variable template by QEMU's descriptors, and the two flash chips on the command line.

Descriptors are JSON files (QEMU's docs/interop/firmware.json); a file of the same name in /etc overrides one in
/usr/share, an empty one masks it; sorted by name, the first that fits is taken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from diskchain.errors import DriverFailed, NotFound
from diskchain.host import files

_UNWANTED = {"secure-boot", "requires-smm", "enrolled-keys"}  # they need SMM, which is not on the machine we start
_LARGEST = 64 << 20  # bytes; real ones have 2 to 4 MiB


@dataclass(frozen=True)
class Firmware:
    """A pair of files that belong together: the code, and the template of the variables."""

    code: Path
    template: Path

    def recorded(self) -> dict[str, Any]:
        """Return what must be remembered of the code: saved memory carries it, and loads only where its size fits."""
        return {"code": str(self.code), "size": self.code.stat().st_size, "sha256": files.sha256_file(self.code)}


def _directories() -> list[Path]:
    """Where descriptors are, the overriding one first. The variable is for tests and for odd installations."""
    named = os.environ.get("DISKCHAIN_FIRMWARE_PATH")
    return (
        [Path(p) for p in named.split(":")] if named else [Path("/etc/qemu/firmware"), Path("/usr/share/qemu/firmware")]
    )


def descriptors() -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yield the descriptors in their order; what can't be read is passed over."""
    found: dict[str, Path] = {}
    for directory in reversed(_directories()):
        found.update({path.name: path for path in directory.glob("*.json")})
    for _, path in sorted(found.items()):
        try:
            data = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(data, dict):
            yield path, data


def find(machine: str) -> Firmware:
    """Given a machine type (`pc-q35-7.2`), return the first plain UEFI pair for it. Raise NotFound with the way out."""
    for _, data in descriptors():
        pair = _fitting(data, machine)
        if pair and pair.code.is_file() and pair.template.is_file():
            return pair
    raise NotFound(f"no UEFI firmware for {machine} is installed", hint="apt install ovmf")


def _fitting(data: Mapping[str, Any], machine: str) -> Firmware | None:
    try:
        mapping = data["mapping"]
        fits = (
            "uefi" in data["interface-types"]
            and not _UNWANTED & set(data["features"])
            and mapping["device"] == "flash"
            and mapping.get("mode", "split") == "split"
            and mapping["executable"]["format"] == mapping["nvram-template"]["format"] == "raw"
            and any(_names(target, machine) for target in data["targets"])
        )
        return (
            Firmware(Path(mapping["executable"]["filename"]), Path(mapping["nvram-template"]["filename"]))
            if fits
            else None
        )
    except (KeyError, TypeError):
        return None


def _names(target: Mapping[str, Any], machine: str) -> bool:
    return target["architecture"] == "x86_64" and any(fnmatchcase(machine, m) for m in target["machines"])


def recorded_code(recorded: Mapping[str, Any]) -> Path:
    """Return the code that a machine ran with. Raise DriverFailed when it is gone or has another size."""
    path = Path(recorded["code"])
    try:
        size = path.stat().st_size
    except OSError:
        raise DriverFailed(f"the firmware {path} is gone", hint="apt install ovmf, or revert with --cold") from None
    if size != recorded["size"]:
        raise DriverFailed(f"the firmware {path} has {size} bytes, the memory was saved with one of {recorded['size']}",
                           hint="install the package of then, or revert with --cold")  # fmt: skip
    return path


def other_code(recorded: Mapping[str, Any]) -> str | None:
    """Say that the code is not the one of then; None when it is. It only fits in size: the stream carries the code."""
    path = recorded_code(recorded)
    if files.sha256_file(path) == recorded["sha256"]:
        return None
    return f"{path} is another version now; the VM runs with that of then until it is started the next time"


def make_nvram(path: Path, template: Path) -> None:
    """Make a VM's own variables from the template: mode 0600, durable; an existing file is never replaced."""
    with files.os_errors(template, "read"):
        if template.stat().st_size > _LARGEST:
            raise DriverFailed(f"{template} is no template of UEFI variables: {template.stat().st_size} bytes")
        data = template.read_bytes()
    files.write_new_durably(path, data)


def words(code: Path, nvram: Path) -> list[str]:
    """Return the words for QEMU: code read-only, variables writable; nothing is probed."""
    nodes = [_node("firmware-code", code, read_only=True), _node("firmware-vars", nvram, read_only=False)]
    given = [word for node in nodes for word in ("-blockdev", json.dumps(node))]
    return [*given, "-machine", "pflash0=firmware-code,pflash1=firmware-vars"]


def _node(name: str, path: Path, *, read_only: bool) -> dict[str, Any]:
    file = {"driver": "file", "node-name": f"{name}-file", "filename": str(path), "read-only": read_only}
    return {"driver": "raw", "node-name": name, "read-only": read_only, "file": file}
