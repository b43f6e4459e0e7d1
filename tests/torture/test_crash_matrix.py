"""SIGKILL of the real command line before and after every named step, each followed by `recover` alone.

The VM is off here; what its guest would have written is written with qemu-io, so every state's content is known
beforehand. The live matrix (tests/torture/test_crash_live.py) does the same with a counting guest.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.rig import MiB, Rig
from tests.support.sample import some
from tests.support.tree_cases import CASES, grow, judge


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, Path]]:
    """A stopped machine with a branched tree, one disk qcow2 and one raw, and a copy of it all."""
    rig = Rig(tmp_path_factory.mktemp("matrix") / "vm", size=8 * MiB, raw=("vdb",))
    grow(rig)
    template = rig.save_template()
    yield rig, template
    rig.destroy()
    shutil.rmtree(template)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.timeout(400)
def test_kill_at_every_step_then_recover_leaves_every_state_whole(
    tree: tuple[Rig, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every point of the command, killed; then `recover`; then every state is compared with what was written."""
    rig, template = tree
    case, wrong = CASES[name], []
    rig.restore_template(template)
    points = rig.points(*case.args)
    assert judge(rig, case) == []
    tried = some(points, 4)
    for point in tried:
        rig.restore_template(template)
        if not rig.killed(*case.args, at=point):
            wrong.append(f"{point}: was not reached")
            continue
        recovered = rig.run("recover", "vm")
        if recovered.code != 0:
            wrong.append(f"{point}: recover ended with {recovered.code}: {recovered.err}")
        wrong += [f"{point}: {w}" for w in judge(rig, case)]
    with capsys.disabled():
        print(f" [{len(tried)} of {len(points)} points]", end="")
    assert not wrong, "\n".join(wrong)
    assert len(points) >= case.at_least


@pytest.mark.parametrize(
    "name", ["create", "revert", "delete-into-now", "delete-with-survivor", "delete-fork-copy", "accept"]
)
@pytest.mark.timeout(400)
def test_kill_during_recovery_then_recover_again(tree: tuple[Rig, Path], name: str) -> None:
    """A seeded choice of points; at each, `recover` itself is killed at every one of its steps."""
    rig, template = tree
    case, wrong = CASES[name], []
    rig.restore_template(template)
    points = rig.points(*case.args)
    hit = 0
    for point in random.Random(7).sample(points, 3):
        rig.restore_template(template)
        assert rig.killed(*case.args, at=point)
        again = rig.save_template("again")
        for second in some(rig.points("recover", "vm"), 2):
            rig.restore_template(again)
            hit += rig.killed("recover", "vm", at=second)
            answer = rig.run("recover", "vm")
            if answer.code != 0:
                wrong.append(f"{point} then {second}: recover ended with {answer.code}: {answer.err}")
            wrong += [f"{point} then {second}: {w}" for w in judge(rig, case)]
        rig.restore_template(template)
    assert not wrong, "\n".join(wrong)
    assert hit >= 6


@pytest.mark.parametrize(
    "point", ["merge.committing#1", "merge.committed#1", "delete.committed-one#1", "merge.committed#2"]
)
def test_start_wins_over_an_interrupted_merge_and_the_merge_is_done_later(tree: tuple[Rig, Path], point: str) -> None:
    """The VM starts on its overlay over a half-merged base; what it shows is whole; the merge is done at the stop."""
    rig, template = tree
    rig.restore_template(template)
    assert rig.killed("delete", "vm", "s3", "-y", at=point)
    try:
        rig.ok("start", "vm", "--paused")
        assert rig.verdict(present="now") == []
        assert [p["op"] for p in rig.ok("list", "vm", "--json").json["pending"]] == ["merge"]
        rig.ok("stop", "vm", "--force", "-y")
        assert rig.verdict(present="now") == []
        assert "s3" not in rig.snapshots() and rig.ok("list", "vm", "--json").json["pending"] == []
    finally:
        pid = rig.pid()
        if pid:
            rig.run("stop", "vm", "--force", "-y")


def test_control_the_oracle_sees_a_changed_base(tree: tuple[Rig, Path]) -> None:
    """Known bad: if the oracle would pass this, its silence elsewhere would mean nothing."""
    rig, template = tree
    rig.restore_template(template)
    base = rig.dir / "vda.qcow2"
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 99 64k 4k", str(base)], check=True, capture_output=True)
    assert any("content differs" in w for w in rig.verdict(present="now"))
    rig.restore_template(template)
    overlay = next(iter(rig.snapshots()["s3"].values()))
    overlay.unlink()
    assert any("missing" in w for w in rig.file_verdict())
