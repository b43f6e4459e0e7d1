"""The machine file of the embedded driver: TOML text <-> Machine value. Pure; names key and line of what is wrong."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from diskchain.chain.model import GiB, KiB, MiB, vm_name
from diskchain.errors import BadMachineFile, DiskchainError


@dataclass(frozen=True)
class DiskSpec:
    """One `[[disk]]`. `image` identifies the chain; which layer of it is active only the catalog knows."""

    target: str
    image: str
    fmt: str = ""  # "" = told from the file's first bytes once, at define, then recorded
    role: str = "data"


@dataclass(frozen=True)
class NetSpec:
    """One `[[net]]`: `user` (built-in NAT), `bridge` or `tap`; the MAC is made at define and kept."""

    type: str = "user"
    mac: str = ""
    bridge: str = ""
    ifname: str = ""
    model: str = "virtio-net-pci"


@dataclass(frozen=True)
class Machine:
    """What `machine define` was told, completed (uuid, MACs, versioned machine type). `memory` in bytes."""

    name: str
    memory: int
    disks: tuple[DiskSpec, ...]
    uuid: str = ""
    genid: str = ""  # a new one at each revert, so that the guest knows it; "" = no such device (then old memory loads)
    cpus: int = 1
    accel: str = "auto"
    cpu: str = ""
    firmware: str = "bios"
    machine: str = "q35"
    kernel: str = ""
    initrd: str = ""
    append: str = ""
    console: str = "log"
    agent: bool = False
    tpm: bool = False
    nets: tuple[NetSpec, ...] = (NetSpec(),)
    extra: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that `from_dict` reads."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Machine:
        """Given the JSON form, return the machine. Unknown keys of a newer version are an error (KeyError)."""
        known = {f.name for f in fields(cls)}
        unknown = set(data) - known
        if unknown:
            raise KeyError(f"unknown machine keys: {', '.join(sorted(unknown))}")
        values = dict(data)
        values["disks"] = tuple(DiskSpec(**d) for d in data["disks"])
        values["nets"] = tuple(NetSpec(**n) for n in data["nets"])
        values["extra"] = tuple(data["extra"])
        return cls(**values)


def is_scsi(target: str) -> bool:
    """Whether a disk sits on the machine's SCSI controller (sda, sdb, ...) instead of being a virtio-blk device."""
    return target.startswith("sd")


def is_q35(kind: str) -> bool:
    """Whether a machine type is of the q35 family."""
    return kind == "q35" or kind.startswith("pc-q35-")


_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?B)?|B)?\s*", re.IGNORECASE)
_UNIT = {None: 1, "K": KiB, "M": MiB, "G": GiB, "T": 1024 * GiB}


def parse_size(text: str) -> int:
    """Given `1 GiB`, `512M` or a plain number of bytes, return bytes (binary units). Raise ValueError."""
    match = _SIZE.fullmatch(text)
    if not match or len(text) > 40:  # a float holds no more than 309 digits
        raise ValueError(f"{text[:40]!r} is no size; write for example 512M or 1 GiB")
    return int(float(match[1]) * _UNIT[match[2].upper() if match[2] else None])


class _File:
    """A parsed TOML file that can say on which line a key stands (tomllib itself does not keep lines)."""

    def __init__(self, text: str, source: str) -> None:
        self.lines = text.splitlines()
        self.source = source

    def line_of(self, key: str, table: str = "", index: int = 0) -> int:
        """Return the 1-based line of `key` in the index-th `[[table]]` (or in the head of the file)."""
        now, seen = "", -1
        for number, line in enumerate(self.lines, 1):
            header = re.match(r"\s*\[\[?\s*([A-Za-z_-]+)", line)
            if header:
                now = header[1]
                seen += now == table
                if key == now and not table:
                    return number
            here = now == table and (not table or seen == index)
            if here and re.match(rf"""\s*["']?{re.escape(key)}["']?\s*=""", line):
                return number
        return self.line_of_table(table, index) if table else 1

    def line_of_table(self, table: str, index: int) -> int:
        numbers = [n for n, line in enumerate(self.lines, 1) if re.match(rf"\s*\[\[\s*{re.escape(table)}\s*\]\]", line)]
        return numbers[index] if index < len(numbers) else 1

    def wrong(self, what: str, key: str, table: str = "", index: int = 0) -> BadMachineFile:
        where = f"{self.source}, line {self.line_of(key, table, index)}"
        return BadMachineFile(f"{where}: {what}", hint="look into docs/machine-file.md: it lists every key")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text in quotes")
    if "\0" in value or "\n" in value:
        raise ValueError("must be one line")
    return value


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError('must be a size like "1 GiB"')
    size = parse_size(str(value))
    if not 16 * MiB <= size <= 16 * 1024 * GiB or size % MiB:
        raise ValueError("must be whole MiB, from 16 MiB to 16 TiB")
    return size


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1024:
        raise ValueError("must be a whole number from 1 to 1024")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError("must be a list of texts")
    return tuple(_text(v) for v in value)


def _one_of(*choices: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return str(value)

    return check


def _matching(pattern: str, what: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not re.fullmatch(pattern, _text(value)):
            raise ValueError(f"must be {what}")
        return str(value)

    return check


TARGET = r"[sv]d[a-z]{1,2}"  # of a disk; s: is_scsi
_UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_MACHINE_KEYS: dict[str, Callable[[Any], Any]] = {
    "name": lambda v: vm_name(_text(v)),
    "uuid": _matching(_UUID, "a UUID in lower case"),
    "memory": _size,
    "cpus": _count,
    "accel": _one_of("auto", "kvm", "tcg"),
    "cpu": _matching(r"[A-Za-z0-9._+,=-]*", "a CPU model as 'qemu-system-x86_64 -cpu help' lists them"),
    "firmware": _one_of("bios", "uefi"),
    "machine": _matching(r"(pc|q35)|pc-(q35|i440fx)-[0-9.]+(\+[a-z0-9]+)?", "q35, pc or a version like pc-q35-7.2"),
    "kernel": _text,
    "initrd": _text,
    "append": _text,
    "console": _one_of("log", "none"),
    "agent": _flag,
    "tpm": _flag,
    "extra": _words,
}  # fmt: skip
_DISK_KEYS: dict[str, Callable[[Any], Any]] = {
    "target": _matching(TARGET, "vda, vdb, ... or sda, sdb, ..."),
    "image": _text,
    "format": _one_of("qcow2", "raw"),
    "role": _one_of("os", "data"),
}
_NET_KEYS: dict[str, Callable[[Any], Any]] = {
    "type": _one_of("user", "bridge", "tap", "none"),
    "mac": _matching(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", "a MAC address like 52:54:00:12:34:56"),
    "bridge": _matching(r"[A-Za-z0-9._-]{1,15}", "a bridge's name"),
    "ifname": _matching(r"[A-Za-z0-9._-]{1,15}", "an interface's name"),
    "model": _matching(r"[a-z0-9-]+", "a QEMU network device"),
}


def parse_machine_file(text: str, source: str) -> Machine:
    """Given a machine file's text and name, return the machine (uuid and MACs may still be empty).

    Raise BadMachineFile naming file, line and key of the first thing that is wrong.
    """
    file = _File(text, source)
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5000 digits is no TOMLDecodeError
        raise BadMachineFile(
            f"{source} is not valid TOML: {error}", hint="look into docs/machine-file.md: it has examples"
        ) from None
    disks, nets = data.pop("disk", None), data.pop("net", None)
    values = _checked(file, data, _MACHINE_KEYS)
    for key in ("name", "memory"):
        if key not in values:
            raise file.wrong(f"{key} is missing", key)
    values["disks"] = _disks(file, disks)
    if nets is not None:
        values["nets"] = _nets(file, nets)
    machine = Machine(**values)
    _check_together(file, machine)
    return machine


def _checked(file: _File, data: Mapping[str, Any], keys: Mapping[str, Callable[[Any], Any]], table: str = "",
             index: int = 0) -> dict[str, Any]:  # fmt: skip
    values = {}
    for key, value in data.items():
        if key not in keys:
            raise file.wrong(f"there is no key {key!r}; known: {', '.join(keys)}", key, table, index)
        try:
            values[key] = keys[key](value)
        except ValueError as error:
            raise file.wrong(f"{key} {error}", key, table, index) from None
        except DiskchainError as error:
            raise file.wrong(f"{key}: {error.message}", key, table, index) from None
    return values


def _tables(file: _File, value: Any, table: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise file.wrong(f"write each {table} as [[{table}]]", table)
    return value


def _disks(file: _File, value: Any) -> tuple[DiskSpec, ...]:
    if not value:
        raise file.wrong("at least one [[disk]] is needed", "disk")
    disks: list[DiskSpec] = []
    for index, table in enumerate(_tables(file, value, "disk")):
        keys = _checked(file, table, _DISK_KEYS, "disk", index)
        for key in ("target", "image"):
            if key not in keys:
                raise file.wrong(f"this [[disk]] has no {key}", key, "disk", index)
        disk = DiskSpec(keys["target"], keys["image"], keys.get("format", ""), keys.get("role", "data"))
        if any(d.target == disk.target for d in disks):
            raise file.wrong(f"{disk.target} stands twice", "target", "disk", index)
        disks.append(disk)
    return tuple(disks)


def _nets(file: _File, value: Any) -> tuple[NetSpec, ...]:
    nets = []
    for index, table in enumerate(_tables(file, value, "net")):
        net = NetSpec(**_checked(file, table, _NET_KEYS, "net", index))
        if net.type == "bridge" and not net.bridge:
            raise file.wrong('a bridge needs bridge = "br0"', "type", "net", index)
        if net.type == "tap" and not net.ifname:
            raise file.wrong('a tap needs ifname = "tap0"', "type", "net", index)
        if net.type != "none":
            nets.append(net)
    return tuple(nets)


def _check_together(file: _File, machine: Machine) -> None:
    if machine.firmware == "uefi" and not is_q35(machine.machine):
        raise file.wrong(f'UEFI needs machine = "q35", this one is {machine.machine}', "firmware")
    if (machine.initrd or machine.append) and not machine.kernel:
        raise file.wrong("initrd and append need kernel", "initrd" if machine.initrd else "append")
    if len(machine.disks) > 64:
        raise file.wrong("at most 64 disks", "disk")
