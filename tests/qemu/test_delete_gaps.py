"""Snapshots that go at once with one between them that stays: its layer is an overlay of one merge and has a part in the next.

A line s1 - s2 - s3 - s4 - s5 - (now); vda is qcow2, vdb raw. Writes begin and end within clusters.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.rig import MiB, Rig
from tests.support.sample import some

KiB = 1024
Line = tuple[Rig, Path]


@pytest.fixture(scope="module")
def grown_line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    rig = Rig(tmp_path_factory.mktemp("line") / "vm", size=8 * MiB, raw=("vdb",))
    rig.build(guest=False)
    for number in range(1, 6):
        write_some(rig, number)
        rig.remember(f"s{number}")
        rig.ok("create", "vm", f"s{number}")
    write_some(rig, 6)
    rig.remember("now")
    template = rig.save_template("line-template")
    yield rig, template
    rig.destroy()
    shutil.rmtree(template)


def write_some(rig: Rig, number: int) -> None:
    """Something over what the others wrote, and something of its own."""
    rig.write(number, 100 * KiB * number, 300 * KiB)
    rig.write(100 + number, MiB * (1 + number) + 512, 70 * KiB)


@pytest.fixture
def line(grown_line: Line) -> Iterator[Rig]:
    rig, template = grown_line
    rig.restore_template(template)
    known = dict(rig.expected)
    yield rig
    rig.expected = known
    assert rig.pid() is None or rig.run("stop", "vm", "--force", "-y").code == 0


def sound(rig: Rig) -> None:
    """Every state holds what it held; and the next ones can be made, and all of it merged."""
    assert rig.verdict(present="now") == [] and rig.journal() == []
    rig.expected["more"] = rig.expected["now"]
    rig.ok("create", "vm", "more")
    rig.ok("accept", "vm", "-y")
    assert rig.verdict(present="now") == []
    assert len(rig.catalog()["images"]) == len(rig.targets)


@pytest.mark.parametrize("names", ["s1 s3", "s1 s4", "s2 s4", "s1 s3 s5", "s1 s2 s4 s5", "s5 s2"])
def test_what_is_between_stays_whole(line: Rig, names: str) -> None:
    line.ok("delete", "vm", *names.split(), "-y")
    assert not set(names.split()) & set(line.snapshots())
    sound(line)


def test_deleted_one_by_one_while_it_could_not_be_merged(line: Rig) -> None:
    """As on a running VM: recorded, each for itself; merged together."""
    for name in ("s1", "s3", "s4"):
        line.ok("delete", "vm", name, "--when-stopped", "-y")
    assert line.verdict(present="now") == []
    assert len(line.ok("merge", "vm", "--json").json["merged"]) == 4
    sound(line)


def test_older_than_with_a_protected_one_between(line: Rig) -> None:
    line.ok("protect", "vm", "s2")
    line.ok("protect", "vm", "s4")
    answer = line.run("delete", "vm", "--older-than", "0s", "-y")
    assert answer.code in (0, 12), answer.err
    assert set(line.snapshots()) == {"s2", "s4"}
    line.ok("unprotect", "vm", "s2")
    line.ok("unprotect", "vm", "s4")
    sound(line)


def test_killed_anywhere(line: Rig) -> None:
    """Every point is passed at least twice as often as with one merge; whatever was done, `recover` ends it."""
    template, args = line.save_template("again"), ("delete", "vm", "s1", "s3", "-y")
    points = line.points(*args)
    assert len(points) > 25
    for point in some(points, 6):
        line.restore_template(template)
        assert line.killed(*args, at=point), point
        line.ok("recover", "vm")
        assert line.verdict(present="now") == [], point
        assert len({"s1", "s3"} & set(line.snapshots())) in (0, 2), point


@pytest.mark.timeout(300)
def test_one_goes_down_and_the_next_up(tmp_path: Path) -> None:
    """s2's few bytes go down into s1's layer, which is large; s3's few bytes go up into the present, which is: what that
    stood on is then gone, and it stands on what took it. The same killed in the middle of it.
    """
    rig = Rig(tmp_path / "vm", targets=("vda",), size=160 * MiB)
    rig.build(guest=False)
    for name, number, length in (("s1", 1, 100 * MiB), ("s2", 2, MiB), ("s3", 3, MiB)):
        rig.write(number, number * MiB + 512, length)
        rig.remember(name)
        rig.ok("create", "vm", name)
    rig.write(4, 8 * MiB, 120 * MiB)
    rig.remember("now")
    template = rig.save_template("two-ways")
    args = ("delete", "vm", "s1", "s3", "-y")
    methods = [m["method"] for m in rig.ok(*args, "--json").json["merged"]]
    assert sorted(methods) == ["commit", "stream"] and rig.verdict(present="now") == []
    rig.restore_template(template)
    for point in some(rig.points(*args), 4):
        rig.restore_template(template)
        assert rig.killed(*args, at=point), point
        rig.ok("recover", "vm")
        assert rig.verdict(present="now") == [], point
    sound(rig)
    rig.destroy()
