"""ENOSPC and EIO at every named step of create, revert and delete: a documented end, and `recover` puts it right."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.refusals import KiB, check_error
from tests.support.rig import MiB, Rig
from tests.support.sample import some

CASES = {
    "create": (("create", "vm", "s3"), {"now"}, "s3", 13),
    "revert": (("revert", "vm", "s1", "-y"), {"now", "s1"}, "before-revert-1", 16),
    "revert-discard": (("revert", "vm", "s1", "--discard", "-y"), {"now", "s1"}, "", 16),
    "delete": (("delete", "vm", "s1", "-y"), {"now"}, "s1", 16),
}


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, Path]]:
    """s1 - s2 - (now) on one disk, and a copy of it all."""
    rig = Rig(tmp_path_factory.mktemp("faults") / "vm", targets=("vda",), size=2 * MiB)
    rig.build(guest=False)
    for number, name in enumerate(("s1", "s2", "now"), 1):
        rig.write(number, number * 256 * KiB, 512 * KiB)
        rig.remember(name)
        if name != "now":
            rig.ok("create", "vm", name)
    rig.expected["s3"] = rig.expected["before-revert-1"] = rig.expected["now"]
    template = rig.save_template()
    yield rig, template
    rig.destroy()
    shutil.rmtree(template)


def judge(rig: Rig, presents: set[str], new: str) -> list[str]:
    """What is wrong: contents, files; whether it is wholly done or wholly undone."""
    active = rig.digest(rig.active()["vda"])
    now = [name for name in presents if rig.expected[name]["vda"] == active]
    if not now:
        return ["the present is none of those that it may be"]
    wrong = rig.verdict(present=now[0])
    if new == "before-revert-1" and (now[0] == "s1") != (new in rig.snapshots()):
        wrong.append("half done: the present of before is not kept")
    return wrong


@pytest.mark.parametrize("action", ["full", "fail"])
@pytest.mark.parametrize("name", CASES)
def test_error_at_every_step_ends_documented_and_recover_puts_it_right(
    line: tuple[Rig, Path], name: str, action: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the command, before `recover`, no state is damaged; after it everything is whole and the journal empty."""
    rig, template = line
    args, presents, new, at_least = CASES[name]
    rig.restore_template(template)
    points = rig.points(*args)
    ends: dict[int, int] = {}
    wrong = []
    tried = some(points, 5)
    for point in tried:
        rig.restore_template(template)
        answer = rig.run("--json", *args, fault=f"{action}:{point}")
        ends[answer.code] = ends.get(answer.code, 0) + 1
        try:
            if answer.code:
                check_error(answer, code=(1, 3, 7), what=point)
            if answer.code != 3 and rig.journal():
                wrong.append(f"{point}: exit {answer.code} with an open journal")
            if answer.code in (1, 7) and rig.digest(rig.active()["vda"]) != rig.expected["now"]["vda"]:
                wrong.append(f"{point}: exit {answer.code}, but the present changed")
            if answer.code == 3:
                rig.ok("recover", "vm")
        except AssertionError as error:
            wrong.append(f"{point}: {error}")
            continue
        wrong += [f"{point}: exit {answer.code}: {w}" for w in judge(rig, presents, new)]
    with capsys.disabled():
        print(f" [{len(tried)} of {len(points)} points, ends {ends}]", end="")
    assert not wrong, "\n".join(wrong)
    assert len(points) >= at_least


def test_delete_that_fails_after_its_snapshots_are_gone_is_unfinished(line: tuple[Rig, Path]) -> None:
    """Not exit 1, which says that nothing changed (found by scripts/torture, faults)."""
    rig, template = line
    rig.restore_template(template)
    check_error(
        rig.run("--json", "delete", "vm", "s1", "-y", fault="fail:delete.trashed"), code=3, says="diskchain recover"
    )
    assert "s1" not in rig.snapshots()
    rig.ok("recover", "vm")
    assert judge(rig, {"now"}, "s1") == []


def test_journal_entry_that_can_not_be_synced_is_taken_back(line: tuple[Rig, Path]) -> None:
    """The command says that nothing changed: no later recovery carries it out."""
    rig, template = line
    rig.restore_template(template)
    check_error(rig.run("--json", "delete", "vm", "s1", "-y", fault="fail:delete.intent.after"), code=1)
    assert not rig.journal()
    rig.ok("recover", "vm")
    assert "s1" in rig.snapshots() and judge(rig, {"now"}, "s1") == []


def test_definition_that_changed_before_the_disk_failed_is_unfinished(line: tuple[Rig, Path]) -> None:
    """Exit 1 would say that nothing changed; where that is so it is said. Each can be done again."""
    rig, template = line
    rig.restore_template(template)
    file = rig.dir / "vm.toml"

    def failing(command: str, what: str, point: str, code: int) -> None:
        more = ("-y",) if command == "undefine" else ()
        check_error(rig.run("--json", "machine", command, what, *more, fault=f"fail:{point}"), code=code)

    failing("define", str(file), "define.definition", 1)  # as it was
    file.write_text(file.read_text().replace("cpus = 1", "cpus = 2"))
    failing("define", str(file), "define.catalog", 1)
    failing("define", str(file), "define.definition", 3)
    rig.ok("machine", "define", str(file))
    assert judge(rig, {"now"}, "s1") == []
    failing("undefine", "vm", "undefine.removed", 3)
    assert rig.run("machine", "undefine", "vm", "-y").code == 4
    rig.ok("machine", "define", str(file))
    assert judge(rig, {"now"}, "s1") == []
