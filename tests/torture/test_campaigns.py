"""A seeded piece of each campaign of scripts/torture; the published figures come from the whole of them."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from scripts.torture_cases.campaign import Result, Worker
from scripts.torture_cases.controls import COPIES, Controls, failed_sync_of_a_large_merge
from scripts.torture_cases.faults import (
    FaultsWorker,
    FlushesWorker,
    ShimTree,
    points,
    shim_trees,
    shuffled,
    sync_points,
)
from scripts.torture_cases.fuzz import FuzzWorker
from scripts.torture_cases.kills import KillsWorker
from scripts.torture_cases.memory import KINDS, Memory, MemoryWorker
from scripts.torture_cases.parsers import NAMES
from scripts.torture_cases.power import PowerWorker
from scripts.torture_cases.power_live import PowerLiveWorker
from scripts.torture_cases.power_places import PowerPlacesWorker
from scripts.torture_cases.starts import Starts
from scripts.torture_cases.tree import Trees
from tests.support.rig import ROOT

SEED = int(os.environ.get("DISKCHAIN_SEED", "7"))
# counting the calls of all would take longer than their cases
FEW = ("revert", "detach", "delete-into-now", "delete-fork-copy")


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trees[ShimTree]]:
    """One of each kind for all tests; it is put back before each case."""
    trees = shim_trees(tmp_path_factory.mktemp("campaigns"))
    yield trees
    trees.close()


def require_nothing_lost(worker: Worker, cases: Iterable[str], wanted: int) -> None:
    """Carry out cases until so many have hit: no byte, no silence, ended by `recover` alone."""
    found: list[Result] = []
    for case in cases:
        found.append(worker.run(case))
        if sum(r.hit for r in found) == wanted:
            break
    wrong = [f"{r.case}: {r.note}: {w}" for r in found for w in r.wrong]
    assert not wrong, "\n".join(wrong)
    assert sum(r.hit for r in found) == wanted and not any(r.lost or r.silent or r.stuck for r in found)


def test_random_kills_lose_nothing(trees: Trees[ShimTree]) -> None:
    """Of diskchain, its qemu-img, both; in the recovery too."""
    require_nothing_lost(KillsWorker(SEED, trees), (str(n) for n in itertools.count()), 8)


def test_faults_at_exact_calls_lose_nothing(trees: Trees[ShimTree]) -> None:
    """Killed there, EIO, ENOSPC, once and for ever."""
    require_nothing_lost(FaultsWorker(trees), shuffled(points(trees, FEW), random.Random(SEED)), 10)


def test_failed_flushes_then_writes_of_the_guest_lose_nothing(trees: Trees[ShimTree]) -> None:
    """What is written afterwards does not meet what was merged."""
    found = sync_points(trees, FEW[1:])
    random.Random(SEED).shuffle(found)
    require_nothing_lost(FlushesWorker(SEED, trees), (f"{case}:0" for case in found), 5)


def test_a_failed_sync_of_a_large_merge_loses_nothing(tmp_path: Path) -> None:
    """Each of its syncs. What `no-repair` loses data in: tables and reference counts are written on both sides of one."""
    assert failed_sync_of_a_large_merge(tmp_path / "tree", ROOT) is None


def test_power_cuts_lose_nothing(trees: Trees[ShimTree]) -> None:
    """Data and names that were not synced are lost, kept or torn."""
    require_nothing_lost(PowerWorker(SEED, trees.of("create")), (str(n) for n in itertools.count()), 14)


def test_power_cuts_while_memory_is_saved_leave_no_torn_memory(tmp_path: Path) -> None:
    """A memory whose end of the save is in the journal loads, whatever was lost (it had been noted before it was synced)."""
    rng = random.Random(SEED)
    worker = PowerLiveWorker(SEED, tmp_path / "live")
    try:
        cases = [*(f"tail:{n}" for n in (16, 17, 18, 19, rng.randrange(16))), "1", "2", "4"]
        require_nothing_lost(worker, cases, len(cases))
    finally:
        worker.close()


def test_power_cuts_of_moves_keep_the_records(tmp_path: Path) -> None:
    """The new directory of the records had a name that was never synced, and the old one was removed."""
    worker = PowerPlacesWorker(SEED, tmp_path / "places")
    try:
        require_nothing_lost(worker, ("move:46", "move:13", "1", "2", "3", "4", "5", "6"), 8)
    finally:
        worker.close()


def test_an_edit_whose_sync_fails_does_not_say_that_nothing_changed(trees: Trees[ShimTree]) -> None:
    """The new catalog was there, and `undelete` ended with 1."""
    every = [case for case in points(trees, ("undelete", "delete-later")) if case.endswith("-sticky")]
    cases = random.Random(SEED).sample(every, 12)
    require_nothing_lost(FaultsWorker(trees), cases, len(cases))


def test_damaged_memory_is_refused_before_any_qemu_is_started(tmp_path: Path) -> None:
    """Every kind of damage; memory, or the configuration, of another machine type and of other devices among them."""
    worker = MemoryWorker(SEED, tmp_path / "memory")
    try:
        require_nothing_lost(worker, Memory(SEED, tmp_path).cases(), 2 * len(KINDS))
    finally:
        worker.close()


def test_starts_in_the_middle_of_a_merge_lose_nothing(tmp_path: Path) -> None:
    """By a plain QEMU, diskchain, virsh and qemu-io, each of which writes if it gets in; a backup reads."""
    campaign = Starts(SEED, tmp_path)
    worker = campaign.worker(tmp_path / "starts")
    try:
        require_nothing_lost(worker, campaign.cases(), 5)
    finally:
        worker.close()


def test_damaged_input_is_answered_in_words() -> None:
    """300 inputs for each parser."""
    require_nothing_lost(FuzzWorker(SEED, 300), (f"{name}:0" for name in NAMES), len(NAMES))


@pytest.mark.parametrize("name", COPIES)
def test_control_can_be_made(name: str, tmp_path: Path) -> None:
    """What it takes out still stands in diskchain as it looks for it."""
    mutation, _ = COPIES[name]
    mutation.copy_to(tmp_path)


@pytest.mark.parametrize("name", [*COPIES])  # changed-disks starts a guest
def test_control_safeguard_taken_out_is_seen(name: str, tmp_path: Path) -> None:
    """The same oracle that found nothing above."""
    worker = Controls(SEED, tmp_path).worker(tmp_path / "worker")
    try:
        result = worker.run(name)
    finally:
        worker.close()
    assert not result.wrong and "caught" in result.note, result
