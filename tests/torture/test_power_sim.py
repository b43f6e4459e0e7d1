"""The simulator of power cuts: it must find what a careless program loses, and nothing where a careful one is at work."""

from __future__ import annotations

import copy
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.torture_cases import shim, sim
from scripts.torture_cases.shim import Shim
from tests.support.rig import ROOT

OLD, NEW = b"old" * 3000, b"new" * 5000
IMPORTS = f"import os, pathlib; from diskchain.host import files; new = {NEW!r}; d = pathlib.Path(os.environ['D'])\n"
CARELESS = {
    "without any sync": "(d / 't').write_bytes(new); os.rename(d / 't', d / 'file')",
    "in place": "f = open(d / 'file', 'r+b'); f.write(new); f.flush(); os.fsync(f.fileno())",
    "unlinked first": "(d / 'file').unlink(); files.write_durably(d / 'file', new)",
}


def found_after(place: Path, program: str, cuts: int) -> set[bytes | None]:
    """Run a program on a file that holds OLD; return what the file holds after power cuts at random instants."""
    tree, before = place / "tree", place / "before"
    tree.mkdir()
    (tree / "file").write_bytes(OLD)
    shutil.copytree(tree, before)
    disk, log = sim.Disk(tree), logged(Shim(place / "shim", tree), tree, program)
    assert log
    found = set()
    for n in range(cuts):
        rng, state = random.Random(n), copy.deepcopy(disk)
        state.replay(log[: rng.randrange(len(log) + 1)])
        shutil.rmtree(tree)
        shutil.copytree(before, tree)
        sim.put(state.cut(rng, rng.choice(sim.DATA), rng.choice(sim.NAMES), before), tree, before)
        found.add((tree / "file").read_bytes() if (tree / "file").exists() else None)
    return found


def logged(told: Shim, tree: Path, program: str) -> list[shim.Record]:
    """Run it under the shim."""
    told.arm(shim.LOG)
    env = {**os.environ, **told.env, "D": str(tree), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", IMPORTS + program], env=env, check=True)
    told.disarm()
    return told.logged()


@pytest.mark.parametrize("how", CARELESS)
def test_careless_program_is_caught(how: str, tmp_path: Path) -> None:
    """Control: a state that is neither the old one nor the new one."""
    assert found_after(tmp_path, CARELESS[how], 150) - {OLD, NEW}


def test_durable_write_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    """Whatever the power cut eats; and both happen."""
    assert found_after(tmp_path, "files.write_durably(d / 'file', new)", 300) == {OLD, NEW}


def test_durable_write_that_has_returned_stays(tmp_path: Path) -> None:
    """What is done before the last sync of the directory may be lost, what has returned not."""
    program = "files.write_durably(d / 'file', new)"
    tree, before = tmp_path / "tree", tmp_path / "before"
    tree.mkdir()
    (tree / "file").write_bytes(OLD)
    shutil.copytree(tree, before)
    disk, log = sim.Disk(tree), logged(Shim(tmp_path / "shim", tree), tree, program)
    disk.replay(log)
    found = disk.cut(random.Random(1), "none", "none", before)
    assert found["file"].content == NEW and list(found) == ["file"]
