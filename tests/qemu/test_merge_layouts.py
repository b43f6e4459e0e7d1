"""A merge keeps every byte, whatever the layouts of the two layers: cluster sizes, subclusters, raw, compressed, sizes.

The present is compared byte for byte before and after; regions that are no multiple of either cluster are written.
"""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

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


def scribble(path: Path, seed: int, count: int = 12) -> None:
    """Write patterns, zeroes and discards at odd places, as a guest would."""
    rng = random.Random(seed)
    words: list[str] = []
    for _ in range(count):
        offset, length = rng.randrange(0, 15 * 2048) * 512, rng.randrange(1, 300) * 512
        verb = rng.choice(
            [f"write -P {rng.randrange(1, 255)}", f"write -P {rng.randrange(1, 255)}", "write -z", "discard"]
        )
        words += ["-c", f"{verb} {offset} {length}"]
    done = subprocess.run(["qemu-io", "-f", "qcow2", "-d", "unmap", *words, str(path)], capture_output=True, text=True)
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
