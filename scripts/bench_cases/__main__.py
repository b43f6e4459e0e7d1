"""`python -m scripts.bench_cases`, called by scripts/bench."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from scripts.bench_cases.bench import Bench, machine_facts, say
from scripts.bench_cases.cases import CASES
from scripts.bench_cases.figures import Row, median, ratio, spread, table


def main(words: Sequence[str]) -> int:
    """Run what was asked for; 0 also when a goal was not reached: figures are for people to judge."""
    options = parse(words)
    if options.list:
        print("\n".join(f"{name:14} {(case.__doc__ or '').splitlines()[0]}" for name, case in CASES.items()))
        return 0
    facts = machine_facts()
    rows = run_cases(options.only or list(CASES), options.level, tuple(options.size or ()))
    print("\n".join(f"{key}: {value}" for key, value in facts.items()), end="\n\n")
    print(table([row for found in rows.values() for row in found]))
    if options.json:
        options.json.write_text(json.dumps(as_json(facts, rows), indent=1) + "\n")
    return 0


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the options; the wrapper script explains them."""
    parser = argparse.ArgumentParser("bench", add_help=False)
    parser.add_argument("--quick", dest="level", action="store_const", const="quick", default="usual")
    parser.add_argument("--full", dest="level", action="store_const", const="full")
    parser.add_argument("--only", action="append", choices=list(CASES))
    parser.add_argument("--size", action="append", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--list", action="store_true")
    return parser.parse_args(words)


def run_cases(names: Sequence[str], level: str, sizes: tuple[int, ...] = ()) -> dict[str, list[Row]]:
    """Run the cases in a directory that is gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="diskchain-bench-", dir=os.environ.get("DISKCHAIN_BENCH_DIR", "/var/tmp")))
    bench = Bench(directory, level, sizes)
    rows: dict[str, list[Row]] = {}
    try:
        for name in names:
            began = time.monotonic()
            rows[name] = []
            for row in CASES[name](bench):
                rows[name].append(row)
                say(f"{row.what}: {spread(row.ours)} against {spread(row.reference)} {row.unit}")
            say(f"{name}: done in {time.monotonic() - began:.0f} s")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return rows


def as_json(facts: dict[str, str], rows: dict[str, list[Row]]) -> object:
    """Return everything, raw samples too, in the order they were taken."""
    return {
        "schema": 1,
        "machine": facts,
        "cases": {
            name: [
                {**asdict(row), "ratio": ratio(row.ours, row.reference), "median": median(row.ours),
                 "reference_median": median(row.reference), "reached": row.reached}
                for row in found
            ]
            for name, found in rows.items()
        },
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
