"""What is left in the state and run directories: definitions without records, machines that nobody knows, dead sockets."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from diskchain.chain.rules import Finding, error, info, warning
from diskchain.drivers.machines import Registered
from diskchain.errors import DiskchainError
from diskchain.host import files
from diskchain.host.process import find_process
from diskchain.ops.vm import Host

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def find(host: Host) -> Iterator[Finding]:
    """Look through both directories. Nothing is removed."""
    known: list[Registered] = []
    for name in host.machines.names():
        try:
            known.append(host.machines.get(name))
        except DiskchainError as problem:
            yield error("definition-damaged", name, problem.message, problem.hint)
    yield from _definitions(host.machines.dir, known)
    yield from _run_dirs(host.config.run_dir, {r.machine.uuid: r.machine.name for r in known})


def _definitions(directory: Path, known: list[Registered]) -> Iterator[Finding]:
    by_home: dict[Path, list[str]] = defaultdict(list)
    for registered in known:
        name = registered.machine.name
        by_home[registered.home].append(name)
        if not registered.home.is_dir():
            yield error("records-missing", name, f"{registered.home} does not exist",
                        f"bring it back from a backup; if the VM is gone for good: diskchain machine undefine {name}")  # fmt: skip
    for home, names in by_home.items():
        if len(names) > 1:
            yield error("definition-twice", ", ".join(names), f"they have the same records, {home}, and the same disks",
                        "before any of them starts, keep one: diskchain machine undefine NAME")  # fmt: skip
    for path in _entries(directory):
        if path.name.startswith(files.TEMPORARY):
            yield info("leftover-temporary", str(path), "a definition that was not written to its end", f"rm '{path}'")


def _run_dirs(run_dir: Path, names: dict[str, str]) -> Iterator[Finding]:
    for path in _entries(run_dir):
        if not _UUID.fullmatch(path.name) or not path.is_dir():
            continue
        process = find_process("-uuid", path.name)
        if path.name in names:
            dead = sorted(p.name for p in _entries(path) if p.is_socket()) if process is None else []
            if dead:
                yield info("leftover-sockets", names[path.name], f"{', '.join(dead)} in {path}: its QEMU was killed",
                           "the next start removes them")  # fmt: skip
        elif process:
            yield warning("machine-unknown", str(path), f"QEMU (pid {process.pid}) runs, no machine of this uuid is defined",
                          "define it again from its machine file; nothing else can stop it cleanly")  # fmt: skip
        else:
            yield info("leftover-run-dir", str(path), "of a machine that is not defined any more", f"rm -r '{path}'")


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []
