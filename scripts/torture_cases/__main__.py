"""`python -m scripts.torture_cases`, called by scripts/torture."""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.torture_cases.campaign import Campaign, Run, State, machine, table
from scripts.torture_cases.controls import Controls
from scripts.torture_cases.enospc import Enospc
from scripts.torture_cases.faults import Faults, Flushes
from scripts.torture_cases.fuzz import Fuzz
from scripts.torture_cases.histories import Histories
from scripts.torture_cases.kills import Kills
from scripts.torture_cases.memory import Memory
from scripts.torture_cases.power import Power
from scripts.torture_cases.power_live import PowerLive
from scripts.torture_cases.power_places import PowerPlaces
from scripts.torture_cases.starts import Starts

ALL: tuple[type[Campaign], ...] = (
    Kills,
    Faults,
    Flushes,
    Power,
    PowerLive,
    PowerPlaces,
    Enospc,
    Starts,
    Histories,
    Memory,
    Fuzz,
    Controls,
)
CAMPAIGNS = {kind.name: kind for kind in ALL}
CACHE = Path(__file__).resolve().parents[2] / ".cache/torture"
SLICE = 50  # cases of one campaign before the next has its turn, in a run of --hours


def main(words: Sequence[str]) -> int:
    """Run what was asked for; 0 when nothing was wrong."""
    options = parse(words)
    if options.list:
        print("\n".join(f"{name:10} {kind.counts[1]:6} cases   {kind.__doc__}" for name, kind in CAMPAIGNS.items()))
        return 0
    CACHE.mkdir(parents=True, exist_ok=True)
    state = State(CACHE / "results.jsonl")
    if options.case:
        state.path = Path(os.devnull)
    elif options.resume:
        state.load()
    else:
        state.path.write_text("")
    place = Path(tempfile.mkdtemp(prefix="dc-torture-", dir=os.environ.get("DISKCHAIN_TORTURE_DIR", "/var/tmp")))
    campaigns = [CAMPAIGNS[name](options.seed, place) for name in options.only or CAMPAIGNS]
    began = time.monotonic()
    try:
        carry_out(campaigns, options, state)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(f"{machine()}; {time.monotonic() - began:.0f} s\n\n{table(state, campaigns)}")
    found = [r for campaign in campaigns for r in state.of(campaign).values()]
    return int(any(r.wrong or r.stuck for r in found))


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the options; the wrapper script explains them."""
    parser = argparse.ArgumentParser("torture", add_help=False)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--hours", type=float)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", choices=list(CAMPAIGNS))
    parser.add_argument("--case", action="append", default=[])
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--count", type=int)
    parser.add_argument("--list", action="store_true")
    return parser.parse_args(words)


def carry_out(campaigns: Sequence[Campaign], options: argparse.Namespace, state: State) -> None:
    """Run the campaigns one after the other, or with --hours in turns until the time is over."""
    deadline = time.monotonic() + options.hours * 3600 if options.hours else float("inf")
    run = Run(state, CACHE / "failures", 1 if options.case else options.jobs, deadline, bool(options.case))
    if not options.hours:
        for campaign in campaigns:
            wanted = options.count or campaign.counts[0 if options.quick else 1]
            run.carry_out(campaign, wanted, only=options.case)
        return
    for turn in itertools.count(1):
        left = [c for c in campaigns if hits(state, c) < c.counts[2] and SLICE * (turn - 1) < c.counts[2]]
        if not left or time.monotonic() >= deadline:
            return
        for campaign in left:
            run.carry_out(campaign, min(SLICE * turn, campaign.counts[2]))


def hits(state: State, campaign: Campaign) -> int:
    """Return how many cases of a campaign counted so far."""
    return sum(r.hit for r in state.of(campaign).values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
