"""One private libvirtd for the session, a domain for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.domain import DomainRig
from tests.support.libvirtd import Libvirtd


@pytest.fixture(scope="session")
def daemon() -> Iterator[Libvirtd]:
    """The daemon."""
    found = Libvirtd()
    found.start()
    yield found
    found.destroy()


@pytest.fixture
def domain(daemon: Libvirtd, tmp_path: Path) -> Iterator[Callable[..., DomainRig]]:
    """Make domains: `domain(size=..., modes=...)`; they are built and destroyed at the end."""
    made: list[DomainRig] = []

    def make(*, guest: bool = True, **options: Any) -> DomainRig:
        rig = DomainRig(tmp_path / f"d{len(made)}", daemon=daemon, **options)
        made.append(rig)
        rig.build(guest=guest)
        return rig

    yield make
    for rig in made:
        rig.destroy()
