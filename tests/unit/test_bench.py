"""The arithmetic of scripts/bench. What it measures is for people to judge; nothing here depends on time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.bench_cases.__main__ import as_json, parse
from scripts.bench_cases.bench import Bench, in_turns
from scripts.bench_cases.cases import CASES
from scripts.bench_cases.figures import Goal, Row, difference, median, quartiles, ratio, spread, table


def test_median_of_odd_and_even_counts() -> None:
    assert median([9, 1, 5]) == 5
    assert median([4, 1, 2, 9]) == 3


def test_quartiles_bound_the_middle_half() -> None:
    assert quartiles([1, 2, 3, 4, 5]) == (2, 4)
    assert quartiles([7]) == (7, 7)


def test_ratio_is_that_of_the_medians_not_of_the_means() -> None:
    assert ratio([2, 2, 1000], [4, 4, 4]) == 0.5


def test_difference_is_that_of_the_pairs() -> None:
    assert difference([11, 22, 33], [10, 20, 30]) == 2
    with pytest.raises(ValueError, match="zip"):
        difference([1, 2], [1])


def test_spread_shows_quartiles_only_where_there_are_some() -> None:
    assert spread([1, 2, 3, 4, 5]) == "3 (2-4)"
    assert spread([0.12345]) == "0.123"


@pytest.mark.parametrize(
    ("goal", "reached"),
    [(None, None), (Goal(1.2), True), (Goal(1.1), False), (Goal(1.1, 2), True), (Goal(1.1, 1), False)],
)
def test_goal_is_reached_by_ratio_or_by_difference(goal: Goal | None, reached: bool | None) -> None:
    assert Row("x", [12, 12], [10, 10], "y", goal=goal).reached is reached


def test_table_is_aligned_and_says_what_is_not_reached() -> None:
    rows = [Row("pause", [3], [2], "bare", goal=Goal(1.1, 0.5)), Row("a longer name", [1, 1], [2, 2], "bare")]
    lines = table(rows).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["pause", "3 ms", "2 ms", "bare", "1", "1.50", "+1 ms", "<= 1.10 or +0.5 ms", "NO"]


def test_pairs_are_measured_in_alternating_order() -> None:
    order: list[str] = []

    def sample(name: str) -> float:
        order.append(name)
        return len(order)

    ours, reference = in_turns(3, lambda: sample("a"), lambda: sample("b"), settle=0)
    assert "".join(order) == "abbaab"
    assert (ours, reference) == ([1, 4, 5], [2, 3, 6])


def test_json_holds_the_raw_samples_and_what_follows() -> None:
    answer = json.loads(json.dumps(as_json({"cores": "2"}, {"pause": [Row("x", [1, 3, 2], [4, 4, 4], "bare")]})))
    (row,) = answer["cases"]["pause"]
    assert row["ours"] == [1, 3, 2] and row["reference_median"] == 4
    assert (row["median"], row["ratio"], row["reached"]) == (2, 0.5, None)


def test_options_name_cases_and_levels() -> None:
    assert parse(["--quick", "--only", "pause", "--only", "gap"]).only == ["pause", "gap"]
    assert (parse([]).level, parse(["--quick"]).level, parse(["--full"]).level) == ("usual", "quick", "full")
    assert parse(["--size", "256", "--size", "4096"]).size == [256, 4096]
    with pytest.raises(SystemExit):
        parse(["--only", "nothing"])
    assert all(case.__doc__ for case in CASES.values())


def test_sizes_are_those_of_the_level_that_were_asked_for() -> None:
    def sizes(*bench: object) -> list[int]:
        return Bench(Path("/nowhere"), *bench).sizes(quick=[1], usual=[1, 2], full=[1, 2, 3])  # type: ignore[arg-type]

    assert (sizes("quick"), sizes("usual"), sizes("full")) == ([1], [1, 2], [1, 2, 3])
    assert sizes("full", (2, 3, 4)) == [2, 3]
