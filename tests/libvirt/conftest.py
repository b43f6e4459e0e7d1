"""A domain for each test, on the session's private libvirtd (tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.domain import DomainRig
from tests.support.libvirtd import Libvirtd


@pytest.fixture
def domain(daemon: Libvirtd, tmp_path: Path) -> Iterator[Callable[..., DomainRig]]:
    """Make domains: `domain(size=..., modes=...)`; they are built and destroyed at the end.

    At that end libvirt's XML, the headers and our catalog must agree, unless the test says `rig.broken = True`.
    """
    made: list[DomainRig] = []

    def make(*, guest: bool = True, **options: Any) -> DomainRig:
        rig = DomainRig(tmp_path / f"d{len(made)}", daemon=daemon, **options)
        made.append(rig)
        rig.build(guest=guest)
        return rig

    yield make
    try:
        wrong = [
            f"{rig.dir.name}: {what}" for rig in made if not rig.broken and rig.exists() for what in rig.agreement()
        ]
    finally:
        for rig in made:
            rig.destroy()
    assert wrong == []
