"""A stopped machine with a branched tree that every test gets as it was."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.refusals import Picture, grow_tree, picture
from tests.support.rig import MiB, Rig


@pytest.fixture(scope="session")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, Path, Picture]]:
    """The machine, a copy of it all, and its picture."""
    rig = Rig(tmp_path_factory.mktemp("tree") / "vm", size=8 * MiB, raw=("vdb",))
    grow_tree(rig)
    template = rig.save_template()
    yield rig, template, picture(rig.dir)
    rig.destroy()
    shutil.rmtree(template)


@pytest.fixture
def tree(grown: tuple[Rig, Path, Picture]) -> Iterator[Rig]:
    """s1 - s2 - before-revert-1, s1 - s3 - (now); two disks, vda qcow2 and vdb raw."""
    rig, template, _ = grown
    rig.restore_template(template)
    known = dict(rig.expected)
    yield rig
    rig.expected = known  # what a test remembers is not what the next one gets
    assert rig.pid() is None or rig.run("stop", "vm", "--force", "-y").code == 0
