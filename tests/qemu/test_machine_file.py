"""Machine files that are wrong, that come again, or that name what belongs to somebody else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.refusals import refused, unchanged
from tests.support.rig import MiB, Rig

HEAD = ['name = "other"', 'memory = "64 MiB"', 'accel = "tcg"']


def machine_file(rig: Rig, *images: str, head: list[str] | None = None) -> str:
    """Write a machine file beside the rig's and return its path."""
    lines = list(HEAD if head is None else head)
    for letter, image in zip("abc", images, strict=False):
        lines += ["[[disk]]", f'target = "vd{letter}"', f'image = "{image}"']
    path = rig.dir / "other.toml"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Rig]:
    """A directory without machines."""
    rig = Rig(tmp_path / "vm")
    Rig.qemu_img("create", "-q", "-f", "qcow2", str(rig.dir / "good.qcow2"), str(8 * MiB))
    yield rig
    rig.destroy()


WRONG = {
    'nmae = "x"': (1, "nmae"), 'memory = "17 TiB"': (3, "memory"), 'memory = "lots"': (3, "memory"),
    "cpus = 0": (3, "cpus"), 'uuid = "no"': (3, "uuid"), 'name = "../x"': (3, "name"), "memory = -1": (3, "memory"),
    'firmware = "efi"': (3, "firmware"), 'initrd = "x"': (3, "kernel"), 'extra = "-S"': (3, "extra"),
}  # fmt: skip


def test_wrong_key_or_value_is_named_with_its_line(fresh: Rig) -> None:
    """Exit 2; nothing is defined."""
    for line, (_, says) in WRONG.items():
        key = line.partition(" ")[0]
        head = ["# a comment", *(h for h in HEAD if not h.startswith(f"{key} "))]
        file = machine_file(fresh, "good.qcow2", head=[*head, line])
        with unchanged(fresh):
            error = refused(fresh, "machine", "define", file, code=2, says=says)
            assert f"line {len(head) + 1}" in error["message"], error
    for text in ("not toml at all", "", 'name = "x"\nmemory = "64M"\n', "\x00", 'name = "x"\n[disk]\ntarget = "vda"'):
        Path(file).write_text(text)
        refused(fresh, "machine", "define", file, code=2)
    Path(file).write_bytes(b'name = "\xff"\n')
    refused(fresh, "machine", "define", file, code=2)
    refused(fresh, "machine", "define", str(fresh.dir / "nosuch.toml"), code=4)
    refused(fresh, "machine", "define", str(fresh.dir), code=2)
    os.mkfifo(fresh.dir / "fifo.toml")
    refused(fresh, "machine", "define", str(fresh.dir / "fifo.toml"), code=2)
    refused(fresh, "machine", "define", str(fresh.dir / "fifo.toml"), "-n", code=2)
    assert fresh.ok("machine", "list", "--json").json["machines"] == []


def test_image_that_is_none_is_refused(fresh: Rig) -> None:
    """Missing 4; directory, FIFO, device, wrong format 6 or 8; a backing file in /etc 6."""
    (fresh.dir / "dir.qcow2").mkdir()
    os.mkfifo(fresh.dir / "fifo.qcow2")
    (fresh.dir / "null.raw").symlink_to("/dev/null")
    (fresh.dir / "empty.qcow2").touch()
    (fresh.dir / "loop.qcow2").symlink_to("loop.qcow2")
    shutil.copy(fresh.dir / "good.qcow2", fresh.dir / "looks.raw")
    for name, backing, fmt in (("shadow", "/etc/shadow", "raw"), ("pipe", "fifo.qcow2", "raw"),
                               ("folder", "dir.qcow2", "qcow2"), ("json", "json:{}", "raw"),
                               ("nbd", "nbd://127.0.0.1:9", "raw"), ("self", "self.qcow2", "qcow2")):  # fmt: skip
        path = str(fresh.dir / f"{name}.qcow2")
        Rig.qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", fmt, path, "8M")
    codes = {"missing.qcow2": 4, "dir.qcow2": 6, "fifo.qcow2": 6, "null.raw": 6, "empty.qcow2": 8, "looks.raw": 6,
             "shadow.qcow2": 6, "pipe.qcow2": 6, "folder.qcow2": 6, "json.qcow2": 6, "nbd.qcow2": 6,
             "self.qcow2": 6, "loop.qcow2": 6}  # fmt: skip
    for image, code in codes.items():
        file = machine_file(fresh, image)
        with unchanged(fresh):
            refused(fresh, "machine", "define", file, code=code)
    refused(fresh, "machine", "define", machine_file(fresh, "noformat.img"), code=2, says="format")
    refused(fresh, "machine", "define", machine_file(fresh, "good.qcow2", "good.qcow2"), code=2, says="two disks")
    assert not list(fresh.dir.glob(".diskchain/*/catalog.json"))
    fresh.ok("machine", "define", machine_file(fresh, "good.qcow2"))


def test_more_memory_than_there_is_fails_at_start_with_what_qemu_says(fresh: Rig) -> None:
    """Exit 1; the machine stays stopped."""
    file = machine_file(fresh, "good.qcow2", head=['name = "other"', 'memory = "15 TiB"', 'accel = "tcg"'])
    fresh.ok("machine", "define", file)
    refused(fresh, "start", "other", code=1, says="QEMU did not start")
    assert fresh.pid() is None and not fresh.journal()


def test_defined_again_it_starts_on_the_top_layer_and_not_on_the_base(tree: Rig) -> None:
    """The file still names the base: QEMU opens it read-only, and writes to the layer the catalog names."""
    with unchanged(tree):
        tree.ok("machine", "define", str(tree.dir / "vm.toml"))
    active = tree.active()
    tree.ok("start", "vm", "--paused")
    writable = set(open_files(tree.pid() or 0, os.O_RDWR))
    reading = set(open_files(tree.pid() or 0, os.O_RDONLY))
    assert set(active.values()) <= writable
    assert {tree.dir / "vda.qcow2", tree.dir / "vdb.raw"} <= reading - writable
    tree.ok("machine", "define", str(tree.dir / "vm.toml"))
    assert tree.active() == active
    tree.ok("stop", "vm", "--force", "-y")
    assert tree.verdict(present="now") == []


def open_files(pid: int, mode: int) -> Iterator[Path]:
    """The images that a process has open for reading only, or for writing."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        flags = int(Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text().split("flags:")[1].split()[0], 8)
        target = os.readlink(entry)
        if flags & os.O_ACCMODE == mode and target.endswith((".qcow2", ".raw")):
            yield Path(target)


def test_image_of_another_machine_is_refused_whichever_layer(tree: Rig) -> None:
    """The active one, the base, one in between, through a symlink, a hard link, and as a second disk."""
    Rig.qemu_img("create", "-q", "-f", "qcow2", str(tree.dir / "own.qcow2"), str(8 * MiB))
    (tree.dir / "sym.qcow2").symlink_to("vda.qcow2")
    os.link(tree.dir / "vda.qcow2", tree.dir / "hard.qcow2")
    layers = ["vda.qcow2", tree.active()["vda"].name, tree.snapshots()["s2"]["vda"].name, "sym.qcow2", "hard.qcow2"]
    for images in (*([name] for name in layers), ["own.qcow2", "vda.qcow2"]):
        file = machine_file(tree, *images)
        with unchanged(tree):
            refused(tree, "machine", "define", file, code=6)


def test_layer_of_an_undefined_machine_is_refused_as_a_disk_of_a_new_one(tree: Rig) -> None:
    """Its records are still there; so are its overlays."""
    Rig.qemu_img("create", "-q", "-f", "qcow2", str(tree.dir / "own.qcow2"), str(8 * MiB))
    tree.ok("machine", "undefine", "vm", "-y")
    uuid = 'uuid = "12345678-1234-1234-1234-123456789abc"'
    for images, head in ((["own.qcow2", "vda.qcow2"], HEAD), (["vda.qcow2"], [*HEAD, uuid]),
                         ([tree.active()["vda"].name, "own.qcow2"], HEAD)):  # fmt: skip
        file = machine_file(tree, *images, head=head)
        with unchanged(tree):
            refused(tree, "machine", "define", file, code=6)
    (tree.dir / "own.qcow2").unlink()
    tree.ok("machine", "define", str(tree.dir / "vm.toml"))
    assert tree.verdict(present="now") == []
    tree.ok("create", "vm", "x")


def test_disk_exchanged_while_there_are_snapshots_is_refused(tree: Rig) -> None:
    """Exit 6; the snapshots would not fit any more."""
    Rig.qemu_img("create", "-q", "-f", "qcow2", str(tree.dir / "own.qcow2"), str(8 * MiB))
    head = ['name = "vm"', 'memory = "128 MiB"', 'accel = "tcg"']
    for images in (["own.qcow2", "vdb.raw"], ["own.qcow2"], ["own.qcow2", "vdb.raw", "vda.qcow2"]):
        file = machine_file(tree, *images, head=head)
        with unchanged(tree):
            refused(tree, "machine", "define", file, code=6)


def test_a_machine_on_another_machines_active_layer_is_refused(tree: Rig) -> None:
    """What stands on it would change with every write of the other; on a frozen layer it is fine."""
    other = tree.dir / "other"
    other.mkdir()
    for name, below in (("a", tree.active()["vda"]), ("b", tree.snapshots()["s1"]["vda"])):
        tree.qemu_img("create", "-q", "-f", "qcow2", "-b", str(below), "-F", "qcow2", str(other / f"{name}.qcow2"))
        (other / f"{name}.toml").write_text(
            f'name = "{name}"\nmemory = "64 MiB"\n[[disk]]\ntarget = "vda"\nimage = "{name}.qcow2"\n'
        )
    (tree.dir / "config.toml").write_text(f'image_roots = ["{tree.dir}"]\n')
    answer = tree.run("--config", str(tree.dir / "config.toml"), "machine", "define", str(other / "a.toml"))
    assert answer.code == 6 and "writes to" in answer.err
    tree.ok("--config", str(tree.dir / "config.toml"), "machine", "define", str(other / "b.toml"))
