"""Layers that are not what they were: refused before anything is touched; with the file back, everything works."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.refusals import KiB, refused, unchanged
from tests.support.rig import MiB, Rig

COMMANDS = [
    ("start", "vm", "--paused"), ("create", "vm", "x"), ("revert", "vm", "s2", "-y"), ("delete", "vm", "s3", "-y"),
]  # fmt: skip
Damage = Callable[[Path], None]


def _truncated(size: int) -> Damage:
    def damage(path: Path) -> None:
        os.truncate(path, size)

    return damage


def _cut_last(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(64 * KiB))


def _replaced(path: Path) -> None:
    """Another image of the same name: as large, with the same backing file, but empty."""
    info = Rig.qemu_img("info", "-U", "--output=json", "-f", "qcow2", str(path))
    backing = ["-b", "vda.qcow2", "-F", "qcow2"] if "backing-filename" in info else []
    path.unlink()
    Rig.qemu_img("create", "-q", "-f", "qcow2", *backing, str(path), str(8 * MiB))


def _symlink(path: Path) -> None:
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere").name)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _header_zeroed(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(512))


def _rebased(path: Path) -> None:
    Rig.qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "vdb.raw", str(path))


def _rebased_to_shadow(path: Path) -> None:
    Rig.qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow", str(path))


def _rebased_to_itself(path: Path) -> None:
    Rig.qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", path.name, str(path))


def _written(path: Path) -> None:
    command = ["qemu-io", "-f", "qcow2", "-c", "write -P 99 7M 64k", str(path)]
    subprocess.run(command, check=True, capture_output=True)


def _missing(path: Path) -> None:
    path.unlink()


FROZEN: dict[str, tuple[Damage, int | tuple[int, ...]]] = {
    "missing": (_missing, 8), "replaced": (_replaced, 8), "empty": (_truncated(0), 8), "one-byte": (_truncated(1), 8),
    "103-bytes": (_truncated(103), 8), "header-only": (_truncated(64 * KiB), 8), "half": (_half, 8),
    "cut-last-byte": (_cut_last, 8), "grown": (_grown, 8), "header-zeroed": (_header_zeroed, (6, 8)),
    "symlink": (_symlink, 6), "fifo": (_fifo, 6), "directory": (_directory, 6), "rebased": (_rebased, 8),
    "rebased-to-shadow": (_rebased_to_shadow, 6), "rebased-to-itself": (_rebased_to_itself, (6, 8)),
    "written": (_written, 8),
}  # fmt: skip
ACTIVE = ["missing", "empty", "one-byte", "header-only", "header-zeroed", "symlink", "fifo", "directory", "rebased",
          "rebased-to-shadow"]  # fmt: skip


def spoil(path: Path, kind: str, rig: Rig) -> Path:
    """Put a good copy aside (beside the rig), do the damage, return the copy."""
    copy = rig.dir.parent / "good"
    subprocess.run(["cp", "--preserve=all", "--sparse=always", str(path), str(copy)], check=True)
    FROZEN[kind][0](path)
    return copy


def put_back(path: Path, copy: Path) -> None:
    """The right file is in its place again."""
    path.with_suffix(".elsewhere").unlink(missing_ok=True)
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    shutil.move(copy, path)


def works(rig: Rig) -> None:
    """Everything that was refused works, and every state is whole."""
    rig.ok("start", "vm", "--paused")
    rig.ok("stop", "vm", "--force", "-y")
    rig.expected["before-revert-2"] = rig.expected["x"] = rig.expected["now"]
    rig.ok("create", "vm", "x")
    rig.ok("revert", "vm", "s2", "-y")
    rig.ok("delete", "vm", "s3", "-y")
    assert rig.verdict(present="s2") == []


@pytest.mark.parametrize("kind", FROZEN)
def test_base_damaged_every_command_refuses_before_anything_is_touched(tree: Rig, kind: str) -> None:
    """The base that every state stands on; no command goes on, list and tree still do."""
    base = tree.dir / "vda.qcow2"
    copy = spoil(base, kind, tree)
    with unchanged(tree):
        for args in COMMANDS:
            refused(tree, *args, code=FROZEN[kind][1])
        if kind in ("missing", "fifo"):
            for args in (("list", "vm"), ("tree", "vm"), ("show", "vm", "s1")):
                tree.ok(*args)
    put_back(base, copy)
    if kind == "symlink":
        works(tree)


@pytest.mark.parametrize("kind", ["missing", "half", "symlink", "rebased-to-shadow"])
def test_layer_of_another_branch_damaged_only_what_needs_it_is_refused(tree: Rig, kind: str) -> None:
    """s2's own layer: reverting to it and deleting it are refused; the present, which does not stand on it, is not."""
    layer = tree.snapshots()["s2"]["vda"]
    copy = spoil(layer, kind, tree)
    with unchanged(tree):
        refused(tree, "revert", "vm", "s2", "-y", code=FROZEN[kind][1])
        refused(tree, "delete", "vm", "s2", "-y", code=FROZEN[kind][1])
    tree.ok("create", "vm", "x")
    put_back(layer, copy)
    tree.expected["x"] = tree.expected["now"]
    tree.ok("delete", "vm", "s2", "-y")
    assert tree.verdict(present="now") == []


@pytest.mark.parametrize("kind", ["missing", "half", "symlink", "replaced"])
def test_leaf_that_is_to_be_deleted_is_looked_at_first(tree: Rig, kind: str) -> None:
    """What lies there may not be ours: it is not unlinked."""
    layer = tree.snapshots()["before-revert-1"]["vda"]
    copy = spoil(layer, kind, tree)
    with unchanged(tree):
        refused(tree, "delete", "vm", "before-revert-1", "-y", code=FROZEN[kind][1])
    put_back(layer, copy)
    tree.ok("delete", "vm", "before-revert-1", "-y")
    assert tree.verdict(present="now") == []


@pytest.mark.parametrize("kind", ["missing", "fifo"])
def test_survivor_that_must_be_relinked_is_looked_at_before_the_merge(tree: Rig, kind: str) -> None:
    """Deleting s2 relinks nothing here; with an overlay on its overlay it does: that one is verified beforehand."""
    tree.ok("revert", "vm", "before-revert-1", "-y")
    tree.expected["before-revert-2"] = tree.expected["now"]
    layer = tree.active()["vda"]
    copy = spoil(layer, kind, tree)
    with unchanged(tree):
        refused(tree, "delete", "vm", "s2", "-y", code=FROZEN[kind][1])
    put_back(layer, copy)
    tree.ok("delete", "vm", "s2", "-y")
    assert tree.verdict(present="before-revert-1") == []


@pytest.mark.parametrize("kind", ACTIVE)
def test_active_layer_damaged_nothing_starts_and_nothing_is_kept_of_it(tree: Rig, kind: str) -> None:
    """It has no fingerprint, but it must be there, regular, whole as a qcow2 and name the right backing file."""
    layer = tree.active()["vda"]
    copy = spoil(layer, kind, tree)
    with unchanged(tree):
        for args in COMMANDS:
            refused(tree, *args, code=FROZEN[kind][1])
    put_back(layer, copy)
    if kind == "missing":
        works(tree)


@pytest.mark.parametrize("kind", ["missing", "header-zeroed"])
def test_present_that_is_damaged_can_be_left_with_discard(tree: Rig, kind: str) -> None:
    """The way out that the hint names: the snapshots are whole, only the present is lost."""
    layer = tree.active()["vda"]
    spoil(layer, kind, tree)
    assert "--discard" in refused(tree, "revert", "vm", "s3", "-y", code=8)["hint"]
    tree.ok("revert", "vm", "s3", "--discard", "-y")
    assert tree.verdict(present="s3") == []
    assert not layer.exists()


def test_raw_base_that_was_written_is_refused(tree: Rig) -> None:
    """A raw base has no tables; its time and size tell."""
    with (tree.dir / "vdb.raw").open("r+b") as file:
        file.write(b"x")
    with unchanged(tree):
        for args in COMMANDS:
            refused(tree, *args, code=8, says="vdb.raw")
