"""Every command that writes layers into another directory, on one branched tree, and what may be true afterwards."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.refusals import grow_tree
from tests.support.rig import MiB
from tests.support.roaming import Roaming


@dataclass(frozen=True)
class Case:
    """One command; snapshots that are gone when it was done; files that it lets go of."""

    args: tuple[str, ...]
    at_least: int
    gone: tuple[str, ...] = ()
    let_go: tuple[str, ...] = ()


THERE = "THERE"
# s1 - s2 - before-revert-1
#    - s3 - s4 - (now, THERE)
CASES = {
    "move": Case(("move", "vm", "--to", THERE), 30, let_go=("vda.qcow2", "vdb.raw")),
    "detach": Case(("detach", "vm"), 10, let_go=("base/template.qcow2",)),
    "detach-to": Case(("detach", "vm", "--to", THERE), 12, let_go=("base/template.qcow2",)),
    "delete-to": Case(("delete", "vm", "s4", "--to", THERE, "-y"), 16, gone=("s4",)),
    "delete-to-relinks": Case(
        ("delete", "vm", "s1", "s2", "before-revert-1", "--to", THERE, "-y"), 18,
        gone=("s1", "s2", "before-revert-1"), let_go=("vda.qcow2", "vdb.raw"),
    ),
    "delete-to-gap": Case(
        ("delete", "vm", "s1", "s2", "before-revert-1", "s4", "--to", THERE, "-y"), 26,
        gone=("s1", "s2", "before-revert-1", "s4"), let_go=("vda.qcow2", "vdb.raw"),
    ),
}  # fmt: skip


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


def judge(rig: Roaming, case: Case) -> list[str]:
    """What is wrong now: contents of every state, files, and whether the command is wholly done or wholly undone."""
    wrong = [w for w in rig.verdict(present="now") if w not in {f"orphan {name}" for name in case.let_go}]
    names = set(rig.snapshots())
    if len({n in names for n in case.gone}) > 1:
        wrong.append(f"half done: {sorted(names)}")
    return wrong


def is_done(rig: Roaming, case: Case) -> bool:
    """Whether the command did what it was for."""
    if case.gone:
        return set(case.gone).isdisjoint(rig.snapshots())
    if case.args[0] == "detach":
        return rig.template not in rig.images()
    return {path.parent for path in rig.images() - {rig.template}} == {rig.dir / "there"}
