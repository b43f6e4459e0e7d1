"""SIGKILL at every named step of what writes layers into another directory, each followed by `recover` alone.

The VM is off; what its guest would have written was written with qemu-io, so every state's content is known.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.places_cases import CASES, grown, is_done, judge, words
from tests.support.refusals import check_error
from tests.support.roaming import Roaming
from tests.support.sample import some


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Roaming, Path]]:
    """The usual tree, vda on a template, the active layers in another directory; and a copy of it all."""
    with grown(tmp_path_factory.mktemp("places")) as made:
        yield made


@pytest.mark.parametrize("name", CASES)
@pytest.mark.timeout(400)
def test_kill_at_every_step_then_recover_leaves_every_state_whole(
    tree: tuple[Roaming, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then the command, again where it was undone, ends well; check finds no error; a new snapshot can be taken."""
    rig, template = tree
    case, wrong = CASES[name], []
    rig.restore_template(template)
    args = words(rig, case)
    points = rig.points(*args)
    assert judge(rig, case) == [] and is_done(rig, case)
    tried = some(points, 4)
    for point in tried:
        rig.restore_template(template)
        if not rig.killed(*args, at=point):
            wrong.append(f"{point}: was not reached")
            continue
        recovered = rig.run("recover", "vm")
        wrong += [] if recovered.code == 0 else [f"{point}: recover ended with {recovered.code}: {recovered.err}"]
        wrong += [f"{point}: {w}" for w in judge(rig, case)]
        if not is_done(rig, case):
            again = rig.run(*args)
            wrong += [] if again.code == 0 else [f"{point}: again ended with {again.code}: {again.err}"]
            wrong += [f"{point}, again: {w}" for w in judge(rig, case)]
    rig.ok("create", "vm", "after")
    rig.expected["after"] = rig.expected["now"]
    wrong += [f"after: {w}" for w in judge(rig, case)]
    wrong += [str(f) for f in rig.run("--json", "check", "vm").json["findings"] if f["severity"] == "error"]
    with capsys.disabled():
        print(f" [{len(tried)} of {len(points)} points]", end="")
    assert not wrong, "\n".join(wrong)
    assert len(points) >= case.at_least


@pytest.mark.parametrize("name", ["move", "delete-to-relinks"])
@pytest.mark.timeout(400)
def test_kill_during_recovery_then_recover_again(tree: tuple[Roaming, Path], name: str) -> None:
    """Before the switch, in it, and after it."""
    rig, template = tree
    case, wrong, hit = CASES[name], [], 0
    rig.restore_template(template)
    args = words(rig, case)
    points = rig.points(*args)
    middle = next(i for i, p in enumerate(points) if ".switch.after" in p)
    for point in (points[middle - 2], points[middle], points[-4]):
        rig.restore_template(template)
        assert rig.killed(*args, at=point)
        again = rig.save_template("again")
        for second in some(rig.points("recover", "vm"), 2):
            rig.restore_template(again)
            hit += rig.killed("recover", "vm", at=second)
            rig.ok("recover", "vm")
            wrong += [f"{point} then {second}: {w}" for w in judge(rig, case)]
        shutil.rmtree(again)
    assert not wrong, "\n".join(wrong)
    assert hit >= 6


FAULTS = [
    ("move", "full:copy.piece#3", 7),
    ("move", "fail:move.record-copied", 1),
    ("delete-to", "full:elsewhere.filled-one#3", (1, 7)),
    ("detach-to", "fail:elsewhere.compared", 1),
    ("delete-to-relinks", "fail:elsewhere.relinked-one#1", 3),
    ("move", "fail:move.records-whole", 3),
]


@pytest.mark.parametrize(("name", "fault", "code"), FAULTS)
def test_error_of_the_filesystem_puts_everything_back_or_goes_on(
    tree: tuple[Roaming, Path], name: str, fault: str, code: int | tuple[int, ...]
) -> None:
    """Before the switch nothing was changed; in it, exit 3, and `recover` ends it. The command works afterwards."""
    rig, template = tree
    case = CASES[name]
    rig.restore_template(template)
    answer = rig.run("--json", *words(rig, case), fault=fault)
    check_error(answer, code=code)
    if code == 3:
        rig.ok("recover", "vm")
    assert judge(rig, case) == []
    rig.run(*words(rig, case))
    assert judge(rig, case) == []
