"""The definitions of the machines that diskchain runs itself: one record a machine in the state directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diskchain.chain.machine import DiskSpec, Machine
from diskchain.errors import DriverFailed, NotFound, Refused
from diskchain.host import files


@dataclass(frozen=True)
class Registered:
    """A defined machine; `home` is the directory of its records, `source` the file it was defined from."""

    machine: Machine
    home: Path
    source: str


class Machines:
    """The definitions below one state directory."""

    def __init__(self, state_dir: Path) -> None:
        self.dir = state_dir / "machines"

    def _path(self, name: str) -> Path:
        return self.dir / f"{name}.json"

    def names(self) -> list[str]:
        """Return the names of all defined machines, sorted."""
        return sorted(p.stem for p in self.dir.glob("*.json")) if self.dir.is_dir() else []

    def get(self, name: str) -> Registered:
        """Return a machine. Raise NotFound, or DriverFailed when its definition can't be read."""
        path = self._path(name)
        try:
            data = json.loads(path.read_bytes())
            body = data["machine"]
            if data["sha256"] != _digest(body):
                raise ValueError("checksum")
            return Registered(Machine.from_dict(body), Path(data["home"]), data["source"])
        except FileNotFoundError:
            raise NotFound(f"there is no VM {name!r}", hint="diskchain machine list") from None
        except PermissionError as error:
            raise Refused(
                f"{path} can't be read: {error.strerror}", hint="run diskchain as the user who defined it"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise DriverFailed(f"the definition {path} is damaged ({error!r:.60})",
                               hint="define it again from its machine file: diskchain machine define FILE") from None  # fmt: skip

    def all(self) -> Iterator[Registered]:
        """Yield every machine whose definition can be read."""
        for name in self.names():
            try:
                yield self.get(name)
            except DriverFailed:
                continue

    def put(self, registered: Registered) -> None:
        """Write a machine's definition durably."""
        files.make_dirs_durably(self.dir)
        body = registered.machine.to_dict()
        data: dict[str, Any] = {"diskchain": "machine", "machine": body, "home": str(registered.home),
                                "source": registered.source, "sha256": _digest(body)}  # fmt: skip
        files.write_durably(self._path(registered.machine.name), json.dumps(data, indent=1).encode() + b"\n")

    def remove(self, name: str) -> None:
        """Forget a definition; no image and no snapshot is touched."""
        files.unlink_durably(self._path(name))


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def differences(old: Machine, new: Machine) -> list[str]:
    """Return in words what changes from one machine to the other; disks by their target only."""
    found = []
    a, b = old.to_dict(), new.to_dict()
    for key in a:
        if key not in ("disks", "nets", "genid") and a[key] != b[key]:
            found.append(f"{key} {_shown(key, a[key])} -> {_shown(key, b[key])}")
    if old.nets != new.nets:
        found.append("network devices differ")
    before, after = {d.target for d in old.disks}, {d.target for d in new.disks}
    found += [f"{t} detached, its file kept" for t in sorted(before - after)]
    found += [f"{t} attached" for t in sorted(after - before)]
    return found


def _shown(key: str, value: Any) -> str:
    if key == "memory":
        return f"{value >> 20} MiB"
    return json.dumps(value) if not isinstance(value, (str, int)) else str(value) or "-"


def with_absolute_paths(machine: Machine, base: Path) -> Machine:
    """Given a machine from a file in `base`, return it with every path absolute."""

    def absolute(text: str) -> str:
        return str((base / text).absolute()) if text else ""

    disks = tuple(DiskSpec(d.target, absolute(d.image), d.fmt, d.role) for d in machine.disks)
    return replace(machine, disks=disks, kernel=absolute(machine.kernel), initrd=absolute(machine.initrd))
