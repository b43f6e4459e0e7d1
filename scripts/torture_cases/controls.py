"""Known bad: copies of diskchain with one safeguard taken out. The same cases and the same oracle must see the damage.

If one of them ends well, the zeros of the other campaigns mean nothing. The copies are made in a temporary directory by
replacing text; where the text is not there any more the control fails, too.
"""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from scripts.torture_cases.campaign import Campaign, Result, Worker
from scripts.torture_cases.faults import FaultsWorker, ShimTree
from scripts.torture_cases.mutation import Mutation
from scripts.torture_cases.shim import FAIL, Shim
from scripts.torture_cases.tree import EVERY, TreeRig, Trees, differing
from tests.support.console import Console
from tests.support.counted import count_on
from tests.support.rig import MiB, Rig
from tests.support.zygote import Zygote

UNLINKED_FIRST = Mutation((
    (
        "ops/delete.py",
        "        await _relink_all(vm, entry, guard)\n        _forget_layers(vm, entry)\n",
        "        for path in _gone_paths(entry):\n"
        "            files.unlink_durably(vm.home.disks_dir / path)\n"
        "        entry.advance('relinked')\n"
        "        await _relink_all(vm, entry, guard)\n"
        "        _forget_layers(vm, entry)\n",
    ),
))  # fmt: skip
NO_REPAIR = Mutation((
    ("ops/merge.py", "    direct = unclean and supports_direct(fold.into.path)\n    if unclean:\n        await make_whole",
     "    direct = unclean = False\n    if unclean:\n        await make_whole"),
    ("ops/merge.py", "    alone = _alone(image)\n    if (await qemu_img", "    return\n    if (await qemu_img"),
    ("ops/merge.py", "    if result.corruptions:\n        raise", "    if False:\n        raise"),
    ("ops/methods.py", "    if not _one_size((*fold.gone, fold.into)):\n        return", "    if True:\n        return"),
))  # fmt: skip
Look = Callable[[Path, Path], Result | None]  # given a directory, and where the copy stands
NO_SHARERS = Mutation((("ops/sharers.py", "    if users:\n", "    if users and False:\n"),))


class Controls(Campaign):
    """Safeguards taken out: each must be seen."""

    name: ClassVar[str] = "controls"
    unit: ClassVar[str] = "must be caught"
    counts: ClassVar[tuple[int, int, int]] = (4, 4, 4)

    def cases(self) -> Iterator[str]:
        yield from CONTROLS

    def worker(self, place: Path) -> Worker:
        return ControlsWorker(self.seed, place)


class ControlsWorker(Worker):
    """A copy of diskchain for each control."""

    def __init__(self, seed: int, place: Path) -> None:
        self._seed, self._place = seed, place

    def run(self, case: str) -> Result:
        shutil.rmtree(self._place, ignore_errors=True)
        seen = changed_disks(self._place) if case == "changed-disks" else self._on_a_copy(case)
        if seen is None:
            return Result(case, wrong=["was not caught: the other figures mean nothing"])
        return Result(case, note=f"caught: {seen.note}: {seen.wrong[0]}, {seen.lost} bytes lost")

    def _on_a_copy(self, case: str) -> Result | None:
        mutation, look = COPIES[case]
        return look(self._place / "tree", mutation.copy_to(self._place / "copy"))

    def close(self) -> None:
        shutil.rmtree(self._place, ignore_errors=True)


def on_a_tree(look: Callable[[ShimTree], Result | None]) -> Look:
    """Let a function see a branched tree whose commands are those of a copy."""

    def seen(place: Path, root: Path) -> Result | None:
        tree = ShimTree(place, root)
        try:
            return look(tree)
        finally:
            tree.close()

    return seen


@on_a_tree
def unlinked_first(tree: ShimTree) -> Result | None:
    """Layers go before what stands on them is relinked: a kill in between must be seen."""
    worker, name = FaultsWorker(Trees((EVERY, lambda: tree))), "delete-with-survivor"
    total = tree.count(EVERY[name])
    for n in sorted(range(1, total + 1), key=lambda n: abs(n - total * 2 // 3)):  # that is about where it is
        result = worker.run(f"{name}:{n}:kill")
        if result.wrong and result.lost:
            return replace(result, note=f"{result.case}, {result.note}")
    return None


def failed_sync_of_a_large_merge(place: Path, root: Path) -> Result | None:
    """Each sync of a merge fails once; recover; the guest writes: is anything gone? `root`: whose diskchain.

    The control: a failed fdatasync of qemu-img in its default cache mode, no check, no repair, no O_DIRECT. The merge must
    put data, tables and reference counts into the base on both sides of that fdatasync: small ones do not.
    """
    shim = Shim(place / "shim", place / "vm")
    rig = TreeRig(place / "vm", targets=("vda",))
    rig.prepare(place, Zygote(root, shim.env), shim.env)
    merged = ((1, 0, MiB), (0, MiB, MiB), (2, 2 * MiB, 8 * MiB), (6, 20 * MiB, 100 << 10))
    try:
        rig.build(guest=False)
        rig.write(1, 0, 3 * MiB)
        rig.ok("create", "vm", "s")
        for piece in merged[2:]:
            rig.write(*piece)
        _qemu_io(rig.active()["vda"], f"write -z {MiB} {MiB}")
        template, met = rig.save_template(), set[str]()
        for n in range(1, 100):
            rig.restore_template(template)
            shim.arm(FAIL, at=n, error=errno.EIO, syncs_only=True)
            answer = rig.run("delete", "vm", "s", "-y")
            _, hits, what = shim.disarm()
            if not hits:
                break
            met.add(what)
            rig.run("recover", "vm")
            rig.write(9, 40 * MiB, 6 * MiB)
            wrong = [p for p in (*merged, (9, 40 * MiB, 6 * MiB)) if not _reads(rig.active()["vda"], *p)]
            if wrong:
                return Result("", wrong=[f"pattern {p} at {o}: not there" for p, o, _ in wrong],
                              lost=sum(length for *_, length in wrong), note=f"sync {n}, {what} -> {answer.code}")  # fmt: skip
        assert "child fdatasync" in met, f"no sync of qemu-img was met, only {met}"
        return None
    finally:
        rig.destroy()


def _reads(path: Path, pattern: int, offset: int, length: int) -> bool:
    return "failed" not in _qemu_io(path, f"read -P {pattern} {offset} {length}")


def _qemu_io(path: Path, command: str) -> str:
    done = subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, str(path)], capture_output=True, text=True)
    return done.stdout + done.stderr


@on_a_tree
def shared_base(tree: ShimTree) -> Result | None:
    """Somebody else's overlay stands on the layer that is merged into; what it shows must not change unseen."""
    rig, command = tree.rig, EVERY["delete-into-now"]
    tree.restore(command)
    layer = rig.snapshots()["s3"]["vda"]
    sibling = rig.dir / "sibling"
    rig.qemu_img("create", "-q", "-f", "qcow2", "-b", str(layer), "-F", rig.fmt(layer), str(sibling))
    before, answer = rig.digest(sibling), rig.run(*command.args)
    after = rig.digest(sibling)
    if answer.code != 0 or after == before:
        return None
    lost = differing((rig.flat / before).read_bytes(), (rig.flat / after).read_bytes())
    return Result("", wrong=["somebody else's overlay shows something else"], lost=lost, note="delete s3")


def changed_disks(place: Path) -> Result | None:
    """Memory is loaded onto a disk that somebody changed in place, which no fingerprint shows: the guest must see it.

    A guest that was saved after its look at the disk and before its write does not look again: then another moment is tried.
    """
    for number in range(4):
        rig = Rig(place / f"vm{number}", size=64 * MiB)
        try:
            if seen := _changed_disk(rig):
                return Result("", wrong=[seen], note=f"revert s, moment {number + 1}")
        except AssertionError:
            return None
        finally:
            rig.destroy()
    return None


def _changed_disk(rig: Rig) -> str | None:
    """What the guest says of the disk that was changed below it; None when it goes on."""
    rig.build(guest=True)
    rig.ok("start", "vm")
    with Console(rig.console()) as console:
        console.wait(r"^C 50 bad=")
        frozen = rig.active()["vda"]
        rig.ok("create", "vm", "s", "--memory")
        rig.ok("stop", "vm", "--force", "-y")
        other = (count_on(frozen) + 128) % 256  # whatever the guest had counted to
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", f"write -P {other} 8 1", str(frozen)], check=True, capture_output=True
        )
        mark = console.mark()
        rig.ok("revert", "vm", "s", "--discard", "-y")
        try:
            return console.wait(r"^C MISMATCH mem=\d+ .*", timeout=20, after=mark).string.strip()
        except TimeoutError:
            return None


COPIES: Mapping[str, tuple[Mutation, Look]] = {
    "unlinked-first": (UNLINKED_FIRST, unlinked_first),
    "no-repair": (NO_REPAIR, failed_sync_of_a_large_merge),
    "shared-base": (NO_SHARERS, shared_base),
}
CONTROLS = (*COPIES, "changed-disks")
