#!/usr/bin/python3
# diskchain libvirt hook: installed by `diskchain setup --hook`; may be removed at any time.
"""Refuse to start a libvirt domain that would write to a frozen layer of a diskchain chain.

libvirt calls it as qemu.d/diskchain NAME OPERATION SUB-OPERATION EXTRA, with the domain's XML on stdin
(https://libvirt.org/hooks.html); a non-zero exit at `prepare begin` refuses the start, and stderr is shown. It is a copy of
this file and needs nothing of diskchain. Where it can't tell, it lets the domain start.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

CHECKED = ("prepare", "restore")


def writable_files(text: str) -> list[Path]:
    """The files that the domain would write to."""
    found = []
    for disk in ET.fromstring(text).iter("disk"):  # noqa: S314 - libvirtd's own
        source = disk.find("source")
        if source is None or disk.find("readonly") is not None or disk.get("device", "disk") not in ("disk", "lun"):
            continue
        if source.get("file"):
            found.append(Path(source.get("file", "")))
    return found


def catalogs_near(path: Path) -> list[Path]:
    """The catalogs beside a file, under its own name and where it really lies."""
    places = dict.fromkeys((path.parent, path.resolve().parent))
    return [found for place in places for found in sorted(place.glob(".diskchain/*/catalog.json"))]


def frozen(path: Path, catalog: Path) -> str | None:
    """Why the file must not be written, by that catalog; None when it may."""
    body: dict[str, Any] = json.loads(catalog.read_bytes())["body"]
    root = catalog.parent.parent.parent
    active = set(body["active"].values()) | set(body.get("detached", ()))
    for key, image in body["images"].items():
        if key not in active and _same(root / image["path"], path):
            holders = [s["name"] for s in body["snapshots"].values() if key in s["disks"].values() and not s["deleted"]]
            what = f"snapshot {', '.join(holders)}" if holders else "a layer that others stand on"
            return f"{path} is frozen: {what} of {body['name']}"
    return None


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def main(argv: list[str], text: str) -> int:
    """Return 1, with the reason on stderr, when the domain must not start."""
    if len(argv) < 4 or argv[2] not in CHECKED or argv[3] != "begin":
        return 0
    try:
        for path in writable_files(text):
            for catalog in catalogs_near(path):
                why = frozen(path, catalog)
                if why:
                    sys.stderr.write(f"diskchain: {why}; look: diskchain check {argv[1]}\n")
                    return 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ET.ParseError) as error:
        sys.stderr.write(f"diskchain: the hook could not look at the disks of {argv[1]}: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv, sys.stdin.read()))
