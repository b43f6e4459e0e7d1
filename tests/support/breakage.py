"""What `check --repair` puts right, done to a VM in two directories (places_cases.py): a base that was moved, a torn header,
leaked clusters, an overlay that no catalog names, a layer that was put away. And the same put right by hand.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from tests.support.rig import Rig
from tests.support.roaming import Roaming

SECTOR = 512
ORPHAN, TRASH = "vdb.vdb.0123456789ab.qcow2", ".vdb.vdb.0123456789ac.qcow2.trash"


def tear(image: Path) -> bytes:
    """The first sector was never written; return what it held."""
    with image.open("r+b") as file:
        held = file.read(SECTOR)
        file.seek(0)
        file.write(bytes(SECTOR))
    return held


def leak(image: Path) -> None:
    """Reserve a cluster that nothing uses: the refcount of the first free one becomes 1."""
    with image.open("r+b") as file:
        head = file.read(64)
        bits, table = struct.unpack(">I", head[20:24])[0], struct.unpack(">Q", head[48:56])[0]
        file.seek(table)
        (block,) = struct.unpack(">Q", file.read(8))
        number = (os.fstat(file.fileno()).st_size + (1 << bits) - 1) >> bits
        file.truncate((number + 1) << bits)
        file.seek(block + 2 * number)
        file.write(struct.pack(">H", 1))


def orphan(rig: Rig, name: str) -> None:
    """An overlay of ours without data, which no catalog names."""
    below = str(rig.active()["vdb"])
    Rig.qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", below, "-F", "qcow2", str(rig.dir / name), str(rig.size))


def break_all(rig: Roaming) -> None:
    """All of it, in the usual tree."""
    (rig.dir / "first-sector").write_bytes(tear(_torn(rig)))
    leak(rig.active()["vda"])
    orphan(rig, ORPHAN)
    (rig.dir / TRASH).write_bytes(bytes(4096))
    (rig.dir / "vda.qcow2").rename(_moved(rig))


def put_right(rig: Roaming) -> list[bool]:
    """For each of them, whether it is put right. Leaks harm nothing, and are not asked for."""
    return [
        rig.snapshots()["s1"]["vda"] == _moved(rig),
        _sector(rig) != bytes(SECTOR),
        not (rig.dir / ORPHAN).exists(),
        not (rig.dir / TRASH).exists(),
    ]


def mend(rig: Roaming) -> None:
    """Put right by hand what is not: every state must be whole then."""
    if rig.snapshots()["s1"]["vda"] != _moved(rig):
        _moved(rig).rename(rig.dir / "vda.qcow2")
    if _sector(rig) == bytes(SECTOR):
        with _torn(rig).open("r+b") as file:
            file.write((rig.dir / "first-sector").read_bytes())
    for name in (ORPHAN, TRASH):
        (rig.dir / name).unlink(missing_ok=True)


def _moved(rig: Roaming) -> Path:
    return rig.dir / "there/moved.qcow2"


def _torn(rig: Roaming) -> Path:
    return rig.snapshots()["s2"]["vda"]


def _sector(rig: Roaming) -> bytes:
    with _torn(rig).open("rb") as file:
        return file.read(SECTOR)
