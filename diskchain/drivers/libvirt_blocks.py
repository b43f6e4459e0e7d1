"""What QEMU itself says of a domain's disks. libvirt may know less: a daemon that was killed while QEMU switched them.

The new daemon goes on with the layers that the old one had noted (measured: docs/facts.md).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from diskchain.chain import qcow2
from diskchain.drivers.migration import Commander
from diskchain.errors import ChainDamaged, DriverFailed
from diskchain.host import files


async def written_files(monitor: Commander, aliases: Mapping[str, str]) -> dict[str, Path]:
    """Given libvirt's alias of each target, return the file of the layer that QEMU writes to, for those it tells."""
    found = {}
    for block in await monitor.execute("query-block"):
        words = str(block.get("qdev", "")).split("/")
        path = file_of(str(block.get("inserted", {}).get("file", "")))
        target = next((t for t, alias in aliases.items() if alias in words), None)
        if target and path:
            found[target] = path
    return found


async def are_let_go(monitor: Commander) -> bool:
    """Whether a QEMU before 10 holds no disk for writing: after a migration of a paused domain it takes them when it runs.

    Told to let go of them once more, it ends (an assertion in bdrv_inactivate_recurse).
    """
    with contextlib.suppress(DriverFailed):
        if (await monitor.execute("query-version"))["qemu"]["major"] >= 10:
            return False
        graph = await monitor.execute("x-debug-query-block-graph")
        disks = {node["id"] for node in graph["nodes"] if node["type"] == "block-backend"}
        rights = [edge["perm"] for edge in graph["edges"] if edge["parent"] in disks]
        return bool(rights) and not any("write" in right for right in rights)
    return False


async def drop_unused(monitor: Commander, paths: Collection[Path]) -> None:
    """Close images that a daemon had opened for a switch and was killed before; one that is in use stays."""
    nodes = [n for n in await monitor.execute("query-named-block-nodes", flat=True) if _is_one_of(n, paths)]
    for node in sorted(nodes, key=lambda n: n.get("drv") == "file"):  # the format's node before what it stands on
        with contextlib.suppress(DriverFailed):
            await monitor.execute("blockdev-del", node_name=node["node-name"])


def _is_one_of(node: Mapping[str, Any], paths: Collection[Path]) -> bool:
    return file_of(str(node.get("file", ""))) in paths


def backing_of(overlay: Path) -> Path:
    """Return the file that an overlay's header names below it. Raise NotFound, HostileImage."""
    fd = files.open_untrusted(overlay)
    try:
        header = qcow2.parse_header(files.read_span(fd, 0, 1 << 16), os.fstat(fd).st_size)
    finally:
        os.close(fd)
    return overlay.parent / (header.backing_name or "")


def is_among(path: Path | None, known: Collection[Path]) -> bool:
    """Whether it is one of these files, by whatever name."""
    return path is not None and any(path == other or files.same_file(path, other) for other in known)


def file_of(name: str) -> Path | None:
    """Given what QEMU calls an image (a path, or `json:{...}` where it was opened with options), return its file."""
    if not name.startswith("json:"):
        return Path(name) if name.startswith("/") else None
    try:
        found = json.loads(name.removeprefix("json:"))
        while isinstance(found, dict) and "filename" not in found:
            found = found["file"]
        return Path(found["filename"]) if isinstance(found, dict) else None
    except (ValueError, KeyError):
        return None


def refuse_stale(name: str, believed: Mapping[str, Path], written: Mapping[str, Path]) -> None:
    """Raise ChainDamaged when libvirt believes a disk of the domain `name` on another file than QEMU writes to."""
    for target, path in written.items():
        if believed[target] != path:
            raise ChainDamaged(f"QEMU writes {target} of {name} to {path}, libvirt believes {believed[target]}",
                               hint="libvirtd was killed while it switched the disks; "
                               f"put it right: diskchain stop {name}; diskchain start {name}")  # fmt: skip


def refuse_other_layers(name: str, below: Mapping[str, Path], active: Mapping[str, Path]) -> None:
    """Given what new overlays stand on, raise ChainDamaged unless the domain still writes to that.

    libvirt does not look: it would put the overlay on whatever is active, and leave a wrong name in its header.
    """
    for target, path in below.items():
        now = active.get(target)
        if not is_among(now, [path]):
            raise ChainDamaged(f"{target} of {name} was switched to {now} by something else just now",
                               hint=f"take it up: diskchain adopt {name}")  # fmt: skip
