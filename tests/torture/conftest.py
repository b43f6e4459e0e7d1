"""Machines that several of these files begin with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.rig import MiB, Rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A VM that runs its firmware, with two disks."""
    rig = Rig(tmp_path / "vm", size=8 * MiB, memory="64 MiB")
    rig.build(guest=False)
    rig.write(1, 0, MiB)
    rig.remember("now")
    rig.ok("start", "vm")
    yield rig
    rig.destroy()
