"""Every command that writes layers into another directory, on one branched tree, and what may be true afterwards."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.support import breakage, tree_cases
from tests.support.image_bytes import backing
from tests.support.refusals import grow_tree
from tests.support.rig import MiB
from tests.support.roaming import Roaming
from tests.support.tree_cases import Case

THERE = "THERE"
# s1 - s2 - before-revert-1
#    - s3 - s4 - (now, THERE)
CASES = {
    "move": Case(("move", "vm", "--to", THERE), ("now",), 30, let_go=("vda.qcow2", "vdb.raw")),
    "detach": Case(("detach", "vm"), ("now",), 10, let_go=("base/template.qcow2",)),
    "detach-to": Case(("detach", "vm", "--to", THERE), ("now",), 12, let_go=("base/template.qcow2",)),
    "delete-to": Case(("delete", "vm", "s4", "--to", THERE, "-y"), ("now",), 16, gone=("s4",)),
    "delete-to-relinks": Case(
        ("delete", "vm", "s1", "s2", "before-revert-1", "--to", THERE, "-y"), ("now",), 18,
        gone=("s1", "s2", "before-revert-1"), let_go=("vda.qcow2", "vdb.raw"),
    ),
    "delete-to-gap": Case(
        ("delete", "vm", "s1", "s2", "before-revert-1", "s4", "--to", THERE, "-y"), ("now",), 26,
        gone=("s1", "s2", "before-revert-1", "s4"), let_go=("vda.qcow2", "vdb.raw"),
    ),
}  # fmt: skip
BROKEN = (("(broken)",),)  # no command makes that situation
ALSO = {"repair": Case(("check", "vm", "--repair", "-y"), ("now",), 0, before=BROKEN)}


def grow(rig: Roaming) -> None:
    """The usual tree, vda on a template, the active layers in another directory."""
    grow_tree(rig)
    rig.ok("create", "vm", "s4", "--overlay-dir", str(rig.dir / "there"))
    rig.expected["s4"] = rig.expected["now"]
    rig.write(6, 5 * MiB, 200 * 1024)
    rig.remember("now")


def words(rig: Roaming, case: Case) -> list[str]:
    """What is typed."""
    return [str(rig.dir / "there") if word == THERE else word for word in case.args]


@contextlib.contextmanager
def grown(directory: Path) -> Iterator[tuple[Roaming, Path]]:
    """Make the places in a directory; give them with a copy of it all."""
    rig = Roaming(directory / "vm", size=8 * MiB)
    grow(rig)
    template = rig.save_template()
    yield rig, template
    rig.destroy()
    shutil.rmtree(template)


def arrange(rig: Roaming, case: Case) -> None:
    """Make the situation of a case, in a tree that was just grown or put back."""
    if case.before == BROKEN:
        breakage.break_all(rig)


def judge(rig: Roaming, case: Case) -> list[str]:
    """What is wrong now: contents of every state, files, headers, and whether the command is wholly done or wholly undone.

    Each thing that is repaired is so for itself; what was not is put right by hand first.
    """
    half = []
    if case.before == BROKEN:
        breakage.mend(rig)
    elif len(set(traces(rig, case))) > 1:
        half.append(f"half done: {case.args}")
    return [*half, *tree_cases.judge(rig, case), *misnamed(rig)]


def misnamed(rig: Roaming) -> list[str]:
    """The overlays whose header names another file than the catalog does."""
    images = rig.catalog()["images"]
    wrong = []
    for image in images.values():
        path, below = rig.path_of(image), image["backing"] and rig.path_of(images[image["backing"]])
        if path.exists() and backing(path) != below:
            wrong.append(f"header of {path.name}: {backing(path)}, the catalog says {below}")
    return wrong


def traces(rig: Roaming, case: Case) -> list[bool]:
    """For each thing that the command does, whether it is done."""
    if case.before == BROKEN:
        return breakage.put_right(rig)
    if case.gone:
        return [name not in rig.snapshots() for name in case.gone]
    if case.args[0] == "detach":
        return [rig.template not in rig.images()]
    return [path.parent == rig.dir / "there" for disks in rig.snapshots().values() for path in disks.values()]


def is_done(rig: Roaming, case: Case) -> bool:
    """Whether the command did what it was for."""
    return all(traces(rig, case))
