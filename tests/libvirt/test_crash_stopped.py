"""SIGKILL of the command line on a domain that is off, then `recover` alone: contents, files, XML and catalog agree.

A seeded handful of points in the default run; DISKCHAIN_ALL_POINTS=1 takes them all.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.domain import DomainRig
from tests.support.libvirtd import Libvirtd
from tests.support.refusals import grow_tree
from tests.support.rig import MiB, wait_for

# what the present may hold afterwards; names that exist only when it was done
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "create": (("create", "vm", "s4"), ("now",), "s4"),
    "revert": (("revert", "vm", "s2", "-y"), ("now", "s2"), "before-revert-2"),
}


class Saved:
    """A domain with a branched tree, and how to bring files and definition back as they were."""

    def __init__(self, rig: DomainRig) -> None:
        self.rig = rig
        grow_tree(rig)
        rig.expected["s4"] = rig.expected["before-revert-2"] = rig.expected["now"]
        self.template = rig.save_template()
        self.xml = rig.virsh("dumpxml", "vm", "--inactive")

    def back(self) -> None:
        """Files and definition as they were."""
        self.rig.restore_template(self.template)
        path = self.rig.dir.with_suffix(".back.xml")
        path.write_text(self.xml)
        self.rig.virsh("define", str(path))


@pytest.fixture(scope="module")
def saved(daemon: Libvirtd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    """One for all tests here."""
    rig = DomainRig(tmp_path_factory.mktemp("matrix") / "vm", daemon=daemon, size=8 * MiB, raw=("vdb",))
    found = Saved(rig)
    yield found
    rig.destroy()
    shutil.rmtree(found.template)


def chosen(points: list[str]) -> list[str]:
    """All, or a few that are the same in every run."""
    return points if os.environ.get("DISKCHAIN_ALL_POINTS") else random.Random(4).sample(points, 4)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.timeout(400)
def test_kill_then_recover_leaves_states_and_definition_whole(
    saved: Saved, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wholly done or wholly undone, and libvirt's definition names what the catalog names."""
    rig, (args, presents, made), wrong = saved.rig, CASES[name], []
    saved.back()
    points = rig.points(*args)
    assert len(points) >= 14
    for point in chosen(points):
        saved.back()
        if not rig.killed(*args, at=point):
            wrong.append(f"{point}: was not reached")
        answer = rig.run("recover", "vm")
        if answer.code != 0:
            wrong.append(f"{point}: recover ended with {answer.code}: {answer.err}")
        verdicts = [rig.verdict(present=p) for p in presents]
        wrong += [f"{point}: {w}" for w in min(verdicts, key=len)]
        done = made in rig.snapshots()
        if name == "revert" and done != (not verdicts[1]):
            wrong.append(f"{point}: half done")
    with capsys.disabled():
        print(f" [{len(points)} points]", end="")
    assert not wrong, "\n".join(wrong)


def started_by_hand(rig: DomainRig, pattern: int) -> None:
    """`virsh start` behind us; the guest writes (qemu-io does it, through the layers that libvirt starts it on); it ends."""
    rig.virsh("start", "vm", "--paused")
    on = rig.sources()
    rig.virsh("destroy", "vm")
    wait_for(lambda: rig.virsh("domstate", "vm") == "shut off", "it is off")
    for path in on.values():
        command = f"write -P {pattern} {3 * MiB} {MiB}"
        subprocess.run(["qemu-io", "-f", rig.fmt(path), "-c", command, str(path)], check=True, capture_output=True)
    rig.expected["now"] = {t: rig.digest(p) for t, p in on.items()}


@pytest.mark.parametrize(
    "point",
    [
        "merge.committing#1",
        "merge.committed#1",
        "delete.committed-one#2",
        "delete.relink.after#1",
        "delete.aligned#1",
        "delete.relinked.after#1",
        "delete.trashed#1",
    ],
)
def test_what_a_guest_started_by_hand_wrote_survives_an_interrupted_merge(saved: Saved, point: str) -> None:
    """`virsh start` knows nothing of our journal: whatever layer it wrote to, recover loses none of it."""
    rig = saved.rig
    before = dict(rig.expected["now"])
    try:
        saved.back()
        assert rig.killed("delete", "vm", "s3", "-y", at=point)
        started_by_hand(rig, 77)
        assert rig.expected["now"] != before
        answer = rig.run("recover", "vm")
        assert answer.code == 0, answer.err
        assert rig.verdict(present="now") == [] and "s3" not in rig.snapshots()
    finally:
        rig.expected["now"] = before
