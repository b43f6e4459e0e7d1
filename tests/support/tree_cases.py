"""Every command that changes the layers of a stopped VM, on one branched tree, and what may be true afterwards."""

from __future__ import annotations

from dataclasses import dataclass

from tests.support.refusals import grow_tree
from tests.support.rig import Rig


@dataclass(frozen=True)
class Case:
    """One command, and which states the present may be in afterwards: done or undone."""

    args: tuple[str, ...]
    presents: tuple[str, ...]  # the first: when it was undone; the last: when it was done
    at_least: int  # fault points that must have been hit, so that the matrix can't shrink unnoticed
    done: tuple[str, ...] = ()  # names that exist only when it was done
    gone: tuple[str, ...] = ()  # names that exist only when it was undone
    let_go: tuple[str, ...] = ()  # files that are not ours, and that nothing of ours stands on any more
    before: tuple[tuple[str, ...], ...] = ()  # commands that make its situation


# s1 - s2 - before-revert-1
#    - s3 - (now)
CASES = {
    "create": Case(("create", "vm", "s4"), ("now",), 14, done=("s4",)),
    "revert": Case(("revert", "vm", "s2", "-y"), ("now", "s2"), 17, done=("before-revert-2",)),
    "revert-discard": Case(("revert", "vm", "s2", "--discard", "-y"), ("now", "s2"), 17),
    "revert-only": Case(("revert", "vm", "s2", "--only", "vdb", "-y"), ("now", "mix"), 17, done=("before-revert-2",)),
    "revert-only-discard": Case(("revert", "vm", "s2", "--only", "vdb", "--discard", "-y"), ("now", "mix"), 17),
    "create-partial": Case(("create", "vm", "s4", "--skip-disk", "vdb"), ("now",), 13, done=("s4",)),
    "undo": Case(("undo", "vm", "-y"), ("now", "before-revert-1"), 17, done=("before-revert-2",)),
    "delete-leaf": Case(("delete", "vm", "before-revert-1", "-y"), ("now",), 10, gone=("before-revert-1",)),
    "delete-into-now": Case(("delete", "vm", "s3", "-y"), ("now",), 20, gone=("s3",)),
    "delete-with-survivor": Case(("delete", "vm", "s2", "-y"), ("now",), 20, gone=("s2",)),
    "delete-fork": Case(("delete", "vm", "s1", "-y"), ("now",), 9, gone=("s1",)),
    "delete-fork-copy": Case(
        ("delete", "vm", "s1", "--copy", "-y"), ("now",), 25, gone=("s1",), let_go=("vda.qcow2", "vdb.raw")
    ),
    "delete-children": Case(("delete", "vm", "s2", "--children", "-y"), ("now",), 10, gone=("s2", "before-revert-1")),
    "delete-many": Case(
        ("delete", "vm", "s1", "s3", "before-revert-1", "-y"), ("now",), 12, gone=("s1", "s3", "before-revert-1")
    ),
    "accept": Case(("accept", "vm", "--drop-branches", "-y"), ("now",), 20, gone=("s1", "s2", "s3", "before-revert-1")),
}
_LATER = ("delete", "vm", "s3", "--when-stopped", "-y")
ALSO = {  # fault points are few here; a kill can fall anywhere all the same
    "delete-later": Case(_LATER, ("now",), 0, gone=("s3",)),
    "undelete": Case(("undelete", "vm", "s3"), ("now",), 0, done=("s3",), before=(_LATER,)),
    "merge": Case(("merge", "vm"), ("now",), 0, before=(_LATER,)),
    "delete-gap": Case(  # s4 stays: what is left between is an overlay of one merge, and takes the other's data
        ("delete", "vm", "s3", "s5", "-y"),
        ("now",),
        0,
        gone=("s3", "s5"),
        before=(("create", "vm", "s4"), ("create", "vm", "s5")),
    ),
}


def grow(rig: Rig) -> None:
    """Make the tree, and say what it holds after each command."""
    grow_tree(rig)
    rig.expected["s4"] = rig.expected["s5"] = rig.expected["before-revert-2"] = rig.expected["now"]
    rig.expected["mix"] = {"vda": rig.expected["now"]["vda"], "vdb": rig.expected["s2"]["vdb"]}


def judge(rig: Rig, case: Case) -> list[str]:
    """What is wrong now: contents of every state, files, and whether the command is wholly done or wholly undone."""
    best: list[str] | None = None
    for present in case.presents:
        wrong = rig.verdict(present=present)
        best = wrong if best is None or len(wrong) < len(best) else best
        if not wrong:
            break
    best = without_let_go(best or [], case)
    names = set(rig.snapshots())
    done = {n in names for n in case.done} | {n not in names for n in case.gone}
    if len(done) > 1:
        best = [*best, f"half done: {sorted(names)}"]
    return best


def without_let_go(wrong: list[str], case: Case) -> list[str]:
    """Leave out what is no orphan, because it was somebody else's to begin with."""
    return [w for w in wrong if w not in {f"orphan {name}" for name in case.let_go}]


def not_undone(rig: Rig, case: Case) -> list[str]:
    """What was done all the same, given that the command said that nothing is changed."""
    names = set(rig.snapshots())
    wrong = [f"nothing changed, but {n} is there" for n in case.done if n in names]
    wrong += [f"nothing changed, but {n} is gone" for n in case.gone if n not in names]
    if without_let_go(rig.verdict(present=case.presents[0]), case):
        wrong += [f"nothing changed, but the present is not {case.presents[0]}"]
    return wrong


def not_done(rig: Rig, case: Case) -> list[str]:
    """What is missing, given that the command said that it is done."""
    names = set(rig.snapshots())
    wrong = [f"done, but no {n}" for n in case.done if n not in names]
    wrong += [f"done, but {n} is still there" for n in case.gone if n in names]
    if without_let_go(rig.verdict(present=case.presents[-1]), case):
        wrong += [f"done, but the present is not {case.presents[-1]}"]
    return wrong
