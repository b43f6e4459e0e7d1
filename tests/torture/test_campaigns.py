"""A seeded piece of each campaign of scripts/torture; the published figures come from the whole of them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.torture_cases.campaign import Campaign, Result
from scripts.torture_cases.controls import CONTROLS, Controls
from scripts.torture_cases.faults import Faults, Flushes
from scripts.torture_cases.kills import Kills
from scripts.torture_cases.power import Power

FEW = ("revert", "delete-into-now", "delete-fork-copy")  # counting the calls of all would take longer than their cases
SEED = int(os.environ.get("DISKCHAIN_SEED", "7"))


def results(kind: type[Campaign], place: Path, wanted: int) -> Iterator[Result]:
    """Carry out cases until so many have hit."""
    campaign = kind(SEED, place)
    cases = campaign.cases()
    worker = campaign.worker(place / "worker")
    try:
        hits = 0
        while hits < wanted and (case := next(cases, None)) is not None:
            result = worker.run(case)
            hits += result.hit
            yield result
    finally:
        worker.close()


class FewFaults(Faults):
    """Of these commands only."""

    commands = FEW


class FewFlushes(Flushes):
    """Of these commands only."""

    commands = FEW


@pytest.mark.parametrize(("kind", "wanted"), [(Kills, 10), (FewFaults, 8), (FewFlushes, 4), (Power, 14)])
def test_campaign_seeded_part_nothing_is_lost(kind: type[Campaign], wanted: int, tmp_path: Path) -> None:
    """No byte, no silence, ended by `recover` alone."""
    found = list(results(kind, tmp_path, wanted))
    wrong = [f"{r.case}: {r.note}: {w}" for r in found for w in r.wrong]
    assert not wrong, "\n".join(wrong)
    assert sum(r.hit for r in found) == wanted and not any(r.lost or r.silent or r.stuck for r in found)


@pytest.mark.parametrize("name", CONTROLS)
def test_control_safeguard_taken_out_is_seen(name: str, tmp_path: Path) -> None:
    """The same oracle that found nothing above."""
    worker = Controls(SEED, tmp_path).worker(tmp_path / "worker")
    try:
        result = worker.run(name)
    finally:
        worker.close()
    assert not result.wrong and "caught" in result.note, result


def test_cases_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    """What a failure prints repeats it."""
    one, other = (list(itertools.islice(Kills(seed, tmp_path).cases(), 5)) for seed in (1, 1))
    assert one == other
