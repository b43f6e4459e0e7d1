"""What stands in the way of a deletion, where no VM is needed to see it."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diskchain.chain.deletion import Deletion, Fold
from diskchain.chain.model import Image, Memory, MiB, Snapshot
from diskchain.errors import NoSpace
from diskchain.host import files
from diskchain.ops import delete_plan


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A directory on another filesystem."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        if Path(name).stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("one filesystem has both")
        yield Path(name)


def fold_of_a_megabyte(directory: Path) -> Deletion:
    """One snapshot with 8 MiB of memory, whose layer takes up to about 1 MiB more."""
    images = []
    for name, backing in (("base", None), ("top", "base.qcow2")):
        path, below = directory / f"{name}.qcow2", ["-b", backing, "-F", "qcow2"] if backing else []
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *below, path, "8M"], check=True)
        images.append(Image(name, path, "qcow2", "vda", 8 * MiB, backing=backing and "base"))
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", images[1].path], check=True, capture_output=True)
    snapshot = Snapshot("s", "one", "", None, {"vda": "base"}, memory=Memory("saved", 8 * MiB))
    return Deletion((snapshot,), (Fold("vda", images[1], images[0]),))


def test_memory_gives_room_on_its_own_filesystem_only(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge next to it counts on it; one on another filesystem would stop half-way."""
    deletion, memory = fold_of_a_megabyte(tmp_path), {"at": tmp_path / "memory"}
    vm: Any = SimpleNamespace(home=SimpleNamespace(memory=lambda _: memory["at"]))
    monkeypatch.setattr(files, "free_bytes", lambda _: 0)
    for place in (tmp_path, elsewhere):
        files.write_durably(place / "memory", b"\1" * 8 * MiB)
    delete_plan._check_space(vm, [deletion])
    for memory["at"] in (elsewhere / "memory", tmp_path / "gone"):
        with pytest.raises(NoSpace, match="needs up to 1"):
            delete_plan._check_space(vm, [deletion])
