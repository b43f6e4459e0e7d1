"""Somebody else's file under a name that an operation meant to use, or had used: it is never removed nor written to, and
never taken for ours; whenever it came."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.places_cases import CASES, grown, is_done, judge, words
from tests.support.refusals import check_error
from tests.support.rig import Answer, MiB, Rig, process_state, wait_for
from tests.support.roaming import Roaming
from tests.support.sample import some

FOREIGN = b"all that another VM has" * 1000


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Roaming, Path]]:
    """The usual tree, vda on a template, the active layers in another directory; and a copy of it all."""
    with grown(tmp_path_factory.mktemp("taken")) as made:
        yield made


class Intruder:
    """Puts files of its own under every name that an operation wants, over what is there."""

    def __init__(self, rig: Roaming, names: set[Path]) -> None:
        self._rig, self._names = rig, names
        self.files: set[Path] = set()

    def come(self) -> None:
        """Now."""
        for path in self._names:
            mine = path.with_name("mine.tmp")
            mine.write_bytes(FOREIGN)
            mine.replace(path)
            self.files.add(path)
        records = self._rig.dir / "there/.diskchain" / self._uuid
        if not records.exists():
            records.mkdir(parents=True)
            (records / "memory").write_bytes(FOREIGN)
            self.files.add(records / "memory")

    def make_way(self) -> None:
        """Let the files go where they are in nobody's way, as the hint says."""
        away = self._rig.dir / "away"
        away.mkdir()
        self.files = {path.rename(away / str(number)) for number, path in enumerate(sorted(self.files))}

    def harmed(self) -> list[str]:
        """What became of them."""
        return [str(path) for path in self.files if not path.exists() or path.read_bytes() != FOREIGN]

    @property
    def _uuid(self) -> str:
        return next(path.name for path in (self._rig.dir / ".diskchain").iterdir())

    def others(self, wrong: list[str]) -> list[str]:
        """What is wrong with the VM itself."""
        mine = [f"orphan {os.path.relpath(path, self._rig.dir)}" for path in self.files]
        return [w for w in wrong if w not in mine and not w.startswith("second records")]


@pytest.mark.timeout(600)
def test_foreign_files_after_a_kill_in_move_are_left_alone(places: tuple[Roaming, Path]) -> None:
    """At every step while the old place counts: all undone. Later, while it can be told: recover says what is in its way."""
    rig, template = places
    case = CASES["move"]
    args, wrong, refused = words(rig, case), [], 0
    rig.restore_template(template)
    before = rig.images()
    points = rig.points(*args)
    names = {path for path in rig.images() - before if path.suffix in (".qcow2", ".raw")}
    last = next(i for i, p in enumerate(points) if p.startswith("move.trashed"))
    for point in {*some(points[:last], 5), points[last - 1]}:
        rig.restore_template(template)
        if not rig.killed(*args, at=point):
            wrong.append(f"{point}: was not reached")
            continue
        intruder = Intruder(rig, names)
        intruder.come()
        answer = rig.run("--json", "recover", "vm")
        wrong += [f"{point}: {path} was harmed" for path in intruder.harmed()]
        if answer.code:
            refused += 1
            says = check_error(answer, code=6, says="move it away")
            intruder.make_way()
            rig.ok("recover", "vm")
            wrong += [] if is_done(rig, case) else [f"{point}: undone after {says['message']}"]
        wrong += [f"{point}: {w}" for w in intruder.others(judge(rig, case))]
        wrong += [f"{point}: {path} was harmed at last" for path in intruder.harmed()]
    assert not wrong, "\n".join(wrong)
    assert refused


@pytest.mark.timeout(300)
def test_file_that_comes_while_the_first_layer_is_copied_is_left_alone(places: tuple[Roaming, Path]) -> None:
    """No kill: exit 6, and everything is where it was."""
    rig, template = places
    rig.restore_template(template)
    answer, foreign = during(rig, "elsewhere.made-one#1", rig.dir / "there/vdb.raw")
    check_error(answer, code=6, says="vdb.raw")
    assert foreign.read_bytes() == FOREIGN
    foreign.unlink()
    assert judge(rig, CASES["move"]) == [] and not is_done(rig, CASES["move"])
    assert {p.name for p in (rig.dir / "there").iterdir()} == {p.name for p in rig.active().values()}


@pytest.mark.timeout(300)
def test_file_that_takes_the_name_of_a_copy_is_neither_written_to_nor_taken_for_it(
    places: tuple[Roaming, Path],
) -> None:
    """The name was ours a moment ago."""
    rig, template = places
    rig.restore_template(template)
    answer, foreign = during(rig, "elsewhere.created#1", rig.dir / "there/vda.qcow2")
    check_error(answer, code=6, says="vda.qcow2 is not the file that diskchain wrote there")
    assert foreign.read_bytes() == FOREIGN
    foreign.unlink()
    assert judge(rig, CASES["move"]) == [] and not is_done(rig, CASES["move"])


def during(rig: Roaming, point: str, path: Path) -> tuple[Answer, Path]:
    """Let the move stand at a point until somebody's file is there; return what it said then, and the file."""
    process = rig.popen("--json", *words(rig, CASES["move"]), fault=f"stop:{point}")
    wait_for(lambda: process_state(process.pid) in ("T", "t"), "the move stands")
    mine = path.with_name("mine.tmp")
    mine.write_bytes(FOREIGN)
    mine.replace(path)
    os.kill(process.pid, signal.SIGCONT)
    out, err = process.communicate(timeout=150)
    return Answer(process.returncode, out, err), path


@pytest.mark.timeout(300)
def test_two_machines_with_the_same_names_that_move_to_one_directory_both_stay_whole(tmp_path: Path) -> None:
    """The second finds its name taken in the middle, by the only copy of the first."""
    rigs = []
    for name in ("a", "b"):
        rig = Rig(tmp_path / name, name=name, targets=("vda",), size=MiB)
        rig.configure(f'image_roots = ["{tmp_path}"]\n')
        rig.build(guest=False)
        rig.write(ord(name), 0, 64 * 1024)
        rig.remember("now")
        (rig.dir / "own").mkdir()
        rig.ok("move", name, "--to", str(rig.dir / "own"))  # from now on its files are diskchain's to remove
        rigs.append(rig)
    a, b = rigs
    (both := tmp_path / "both").mkdir()
    try:
        process = b.popen("--json", "move", "b", "--to", str(both), fault="stop:move.intent.after")
        wait_for(lambda: process_state(process.pid) in ("T", "t"), "the second stands")
        a.ok("move", "a", "--to", str(both))
        os.kill(process.pid, signal.SIGCONT)
        out, err = process.communicate(timeout=150)
        check_error(Answer(process.returncode, out, err), code=6, says="exists already")
        assert a.digest(both / "vda.qcow2") == a.expected["now"]["vda"]
        assert b.digest(b.dir / "own/vda.qcow2") == b.expected["now"]["vda"]
        assert not list(both.glob(".diskchain-new-*")) and len(list((both / ".diskchain").iterdir())) == 1
        a.ok("create", "a", "s1")
        b.ok("create", "b", "s1")
    finally:
        a.destroy()
        b.destroy()


@pytest.mark.parametrize("name", ["move", "delete-to-relinks"])
@pytest.mark.timeout(300)
def test_new_file_under_the_name_of_an_old_layer_is_not_removed_by_recover(
    places: tuple[Roaming, Path], name: str
) -> None:
    """The old one was removed, then came a kill."""
    rig, template = places
    rig.restore_template(template)
    (rig.dir / "own").mkdir()
    rig.ok("move", "vm", "--to", str(rig.dir / "own"))
    case, before = CASES[name], rig.images()
    kind = "move" if name == "move" else "delete-to"
    for point in (f"{kind}.trashed", f"{kind}.trash-emptied", "elsewhere.marks-forgotten"):
        after_kill = rig.save_template("after")
        assert rig.killed(*words(rig, case), at=point)
        gone = [path for path in before if not path.exists()]
        assert rig.dir / "own/vdb.raw" in gone
        for path in gone:
            path.write_bytes(FOREIGN)
        rig.ok("recover", "vm")
        assert [path for path in gone if path.read_bytes() != FOREIGN] == [], point
        for path in gone:
            path.unlink()
        assert judge(rig, case) == []
        rig.restore_template(after_kill)
        shutil.rmtree(after_kill)


@pytest.mark.parametrize("point", ["delete.trashed", "delete.trash-emptied"])
def test_new_file_under_the_name_of_a_merged_layer_is_not_removed_by_recover(tree: Rig, point: str) -> None:
    """delete: the name is one with an id, so somebody has to mean it."""
    gone = tree.active()
    assert tree.killed("delete", "vm", "s3", "-y", at=point)
    for path in gone.values():
        assert not path.exists()
        path.write_bytes(FOREIGN)
    tree.ok("recover", "vm")
    for path in gone.values():
        assert path.read_bytes() == FOREIGN
        path.unlink()
    assert tree.verdict(present="now") == []
