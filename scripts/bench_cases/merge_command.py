"""The whole command around a merge, and how long a large tree is planned."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from diskchain.chain.deletion import plan_all
from diskchain.chain.model import Catalog, Image, Snapshot
from diskchain.ops import methods
from scripts.bench_cases.bench import Bench, MiB, say, timed
from scripts.bench_cases.figures import Goal, Row
from scripts.bench_cases.merge_data import random_file, sequential, write
from tests.support.rig import Answer, Rig


def whole_command(bench: Bench, place: Path, size: int, count: int) -> Iterator[Row]:
    """`diskchain delete -y` of a stopped machine against the step in it that moves the data."""
    say(f"delete -y, {size // 4 // MiB} MiB: {count} times")
    source = random_file(place)
    rig = Rig(place / "vm", targets=("vda",), size=size)
    whole, step = [], []
    try:
        rig.build(guest=False)
        write(rig.dir / "vda.qcow2", sequential(source, 0, size // 2))
        for _ in range(count + 1):
            rig.ok("create", "vm", "s")
            write(rig.active()["vda"], sequential(source, 3 * size // 8, size // 4))
            subprocess.run(["sync", "-f", str(place)], check=True)
            answers: list[Answer] = []
            whole.append(timed(lambda into=answers: into.append(rig.ok("delete", "vm", "s", "-y", "--json"))))  # type: ignore[misc]
            step.append(1000 * answers[0].json["merged"][0]["seconds"])
    finally:
        rig.destroy()
    what = f"delete -y of {size // 4 // MiB} MiB, the whole command"
    yield Row(what, whole[1:], step[1:], "its engine step", goal=Goal(0.0, 500))  # the first one only warms up


def planning(bench: Bench, place: Path) -> Iterator[Row]:
    """Five branches of 100 images: all but their ends go. Verified, read, planned, the way of merging chosen."""
    catalog = tree(place / "plan", 5, 100)
    ids = [s.id for s in catalog.snapshots.values() if not s.protected]
    taken = [timed(lambda: methods.choose_all(catalog, plan_all(catalog, ids))) for _ in range(bench.pairs(5, 2))]
    yield Row("a tree of 500 images planned", taken, [1000.0] * len(taken), "a second", goal=Goal(1.0))


def tree(directory: Path, branches: int, depth: int) -> Catalog:
    """Make branches of empty layers on one base, and the catalog; the snapshots of the base and of the ends are protected."""
    say(f"making {branches * depth} layers")
    directory.mkdir()
    images = {"i": _layer(directory, "i", None)}
    snapshots = {"i": Snapshot("i", "i", "", None, {"vda": "i"}, protected=True)}
    for branch in range(branches):
        below = "i"
        for number in range(depth):
            name = f"{branch}-{number}"
            images[name] = _layer(directory, name, below)
            snapshots[name] = Snapshot(name, name, "", below, {"vda": name}, protected=number == depth - 1)
            below = name
    images["now"] = _layer(directory, "now", below)
    os.sync()
    return Catalog("0" * 32, "vm", images, {"vda": "now"}, snapshots, below, targets=("vda",))


def _layer(directory: Path, name: str, below: str | None) -> Image:
    path = directory / f"{name}.qcow2"
    on = ["-u", "-b", f"{below}.qcow2", "-F", "qcow2"] if below else []
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *on, path, "1G"], check=True)
    return Image(name, path, "qcow2", "vda", 1024 * MiB, below, ours=True)
