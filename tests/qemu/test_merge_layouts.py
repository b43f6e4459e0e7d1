"""A merge keeps every byte, whatever the layouts of the two layers: cluster sizes, subclusters, raw, compressed, sizes.

The present is compared byte for byte before and after; regions that are no multiple of either cluster are written.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.refusals import refused, unchanged
from tests.support.rig import MiB, Rig

LAYOUTS = [
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=64k",
    "cluster_size=2M",
    "extended_l2=on,cluster_size=128k",
    "compat=0.10",
    "preallocation=metadata",
    "compression_type=zstd",
]


def scribble(path: Path, seed: int, count: int = 12, *, fmt: str = "qcow2", size: int = 16 * MiB) -> None:
    """Write patterns, zeroes and discards at odd places, as a guest would."""
    rng = random.Random(seed)
    words: list[str] = []
    for _ in range(count):
        offset, length = rng.randrange(0, size // 512 - 2048) * 512, rng.randrange(1, 300) * 512
        verb = rng.choice(
            [f"write -P {rng.randrange(1, 255)}", f"write -P {rng.randrange(1, 255)}", "write -z", "discard"]
        )
        words += ["-c", f"{verb} {offset} {length}"]
    done = subprocess.run(["qemu-io", "-f", fmt, "-d", "unmap", *words, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", [1, 2])
def test_merge_into_any_layout_keeps_every_byte(tmp_path: Path, layout: str, seed: int) -> None:
    """template <- (layout) the VM's image <- our overlay; the overlay is folded into the VM's image."""
    rig = Rig(tmp_path / "vm", targets=("vda",), size=16 * MiB)
    rig.build(guest=False)
    rig.ok("machine", "undefine", "vm", "-y")
    template, image = rig.dir / "template.qcow2", rig.dir / "vda.qcow2"
    for path in rig.dir.glob(".diskchain"):
        subprocess.run(["rm", "-r", str(path)], check=True)
    image.rename(template)
    scribble(template, seed)
    backed = ["-b", template.name, "-F", "qcow2"] if "preallocation" not in layout else []
    rig.qemu_img("create", "-q", "-f", "qcow2", "-o", layout, *backed, str(image), str(16 * MiB))
    scribble(image, seed + 100)
    rig.ok("machine", "define", str(rig.dir / "vm.toml"))
    before = template.read_bytes()
    rig.remember("s1")
    rig.ok("create", "vm", "s1")
    scribble(rig.active()["vda"], seed + 200)
    rig.remember("s2")
    rig.ok("create", "vm", "s2")
    scribble(rig.active()["vda"], seed + 300)
    rig.remember("now")
    rig.ok("delete", "vm", "s1", "-y")
    wrong = [w for w in rig.verdict(present="now") if "orphan template" not in w]
    rig.ok("delete", "vm", "s2", "-y")
    wrong += [w for w in rig.verdict(present="now") if "orphan template" not in w]
    assert wrong == [] and rig.active()["vda"] == image
    assert template.read_bytes() == before, "the shared template was written to"
    rig.destroy()


SHORTER = {  # bytes and format of a template, layout of the 16 MiB image on it
    "half": (8 * MiB, "qcow2", "cluster_size=64k"),
    "no multiple of a cluster": (5 * MiB + 3 * 512, "qcow2", "cluster_size=64k"),
    "no multiple of a sector": (5 * MiB + 1000, "raw", "cluster_size=64k"),
    "subclusters": (5 * MiB + 3 * 512, "qcow2", "extended_l2=on,cluster_size=2M"),
    "small clusters": (5 * MiB + 512, "raw", "cluster_size=512"),
}


def on_template(rig: Rig, size: int, fmt: str, layout: str, *, burden: Sequence[str] = ()) -> Path:
    """A template with data up to its last byte, and a machine with an image of 16 MiB on it; return the template."""
    template = rig.dir / f"template.{fmt}"
    rig.qemu_img("create", "-q", "-f", fmt, str(template), str(size))
    scribble(template, 1, fmt=fmt, size=size)
    if fmt == "raw":
        with template.open("r+b") as file:
            file.seek(size - 700)
            file.write(b"\x55" * 700)
    else:
        subprocess.run(
            ["qemu-io", "-f", fmt, "-c", f"write -P 5 {size - 1024} 1k", template], check=True, capture_output=True
        )
    if burden:
        rig.qemu_img(*burden, str(template))
    image, words = rig.dir / "vda.qcow2", ["-o", layout, "-b", template.name, "-F", fmt]
    rig.qemu_img("create", "-q", "-f", "qcow2", *words, str(image), str(16 * MiB))
    scribble(image, 2)
    (rig.dir / "vm.toml").write_text('name = "vm"\nmemory = "64 MiB"\naccel = "tcg"\n[[disk]]\ntarget = "vda"\n'
                                     'image = "vda.qcow2"\n')  # fmt: skip
    rig.ok("machine", "define", str(rig.dir / "vm.toml"))
    return template


@pytest.mark.parametrize("name", SHORTER)
def test_template_that_is_shorter_than_the_disk_is_copied_up_byte_for_byte(tmp_path: Path, name: str) -> None:
    """delete --copy of the layer on it into two branches, then detach: every state is what it was, the rest reads zeros."""
    rig = Rig(tmp_path / "vm", targets=("vda",), size=16 * MiB)
    template = on_template(rig, *SHORTER[name])
    before = template.read_bytes()
    rig.remember("s1")
    rig.ok("create", "vm", "s1")
    scribble(rig.active()["vda"], 3)
    rig.remember("before-revert-1")
    rig.ok("revert", "vm", "s1", "-y")
    scribble(rig.active()["vda"], 4)
    rig.remember("now")
    again = rig.save_template()
    rig.ok("delete", "vm", "s1", "--copy", "-y")
    assert [w for w in rig.verdict(present="now") if "orphan" not in w] == [] and "s1" not in rig.snapshots()
    rig.ok("detach", "vm")
    assert template.read_bytes() == before
    template.unlink()
    assert [w for w in rig.verdict(present="now") if "orphan vda" not in w] == []
    rig.restore_template(again)
    rig.ok("detach", "vm")  # into the image itself
    assert template.read_bytes() == before
    template.unlink()
    assert rig.verdict(present="now") == []
    rig.destroy()


def test_copy_is_refused_where_a_longer_image_below_would_show(tmp_path: Path) -> None:
    """The disk was made smaller, then larger again: beyond the smaller layer's end it reads zeros, not what lies below."""
    rig = Rig(tmp_path / "vm", targets=("vda",), size=16 * MiB)
    rig.build(guest=False)
    for number, size in enumerate((16, 4, 16)):
        rig.qemu_img("resize", "-q", "--shrink", "-f", "qcow2", str(rig.active()["vda"]), str(size * MiB))
        rig.write(number + 1, 0, size * MiB // (number + 1))
        rig.remember(f"s{number}")
        rig.ok("create", "vm", f"s{number}")
    rig.remember("before-revert-1")
    rig.ok("revert", "vm", "s1", "-y")
    rig.qemu_img("resize", "-q", "-f", "qcow2", str(rig.active()["vda"]), str(16 * MiB))
    rig.remember("now")
    with unchanged(rig):
        refused(rig, "delete", "vm", "s1", "--copy", "-y", code=6, says="was resized")
    assert rig.verdict(present="now") == []
    rig.destroy()


def test_detach_from_a_template_with_internal_snapshots_leaves_it_as_it_is(tmp_path: Path) -> None:
    """The file stays, so nothing in it is lost."""
    rig = Rig(tmp_path / "vm", targets=("vda",), size=16 * MiB)
    template = on_template(rig, *SHORTER["half"], burden=("snapshot", "-c", "x"))
    before = template.read_bytes()
    rig.remember("now")
    rig.ok("detach", "vm")
    assert template.read_bytes() == before
    template.unlink()
    assert rig.verdict(present="now") == []
    rig.destroy()
