"""Samples into figures, figures into a table. Nothing here measures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


def median(samples: Sequence[float]) -> float:
    """Return the middle sample, or the mean of the two in the middle."""
    return statistics.median(samples)


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """Return the bounds of the middle half; a single sample is both."""
    if len(samples) == 1:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


def ratio(ours: Sequence[float], reference: Sequence[float]) -> float:
    """Return the ratio of the medians: 1 = as much as the reference, below 1 = less."""
    return median(ours) / median(reference)


def difference(ours: Sequence[float], reference: Sequence[float]) -> float:
    """Return the median difference of the pairs: what both have in common with their moment falls out."""
    return median([a - b for a, b in zip(ours, reference, strict=True)])


@dataclass(frozen=True)
class Goal:
    """The most that the ratio may be; or, if given, that the difference of the medians may be."""

    ratio: float
    or_difference: float | None = None

    def text(self, unit: str) -> str:
        """As it stands in the table."""
        more = "" if self.or_difference is None else f" or +{self.or_difference:g} {unit}"
        return f"<= {self.ratio:.2f}{more}"


@dataclass(frozen=True)
class Row:
    """One comparison: the same thing done by diskchain and by the reference, so many times in turns."""

    what: str
    ours: Sequence[float]
    reference: Sequence[float]
    against: str
    unit: str = "ms"
    goal: Goal | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None = there is none."""
        if self.goal is None:
            return None
        close = self.goal.or_difference
        more = median(self.ours) - median(self.reference)
        return ratio(self.ours, self.reference) <= self.goal.ratio or (close is not None and more <= close)

    def cells(self) -> list[str]:
        """The row as text."""
        goal = "-" if self.goal is None else self.goal.text(self.unit)
        return [
            self.what,
            f"{spread(self.ours)} {self.unit}",
            f"{spread(self.reference)} {self.unit}",
            self.against,
            str(len(self.ours)),
            f"{ratio(self.ours, self.reference):.2f}",
            f"{difference(self.ours, self.reference):+.3g} {self.unit}",
            goal,
            {None: "-", True: "yes", False: "NO"}[self.reached],
        ]


def spread(samples: Sequence[float]) -> str:
    """Return the median and, in brackets, the quartiles."""
    low, high = quartiles(samples)
    return f"{median(samples):.3g} ({low:.3g}-{high:.3g})" if len(samples) > 1 else f"{samples[0]:.3g}"


HEAD = ["what", "diskchain", "reference", "against", "n", "ratio", "pairs differ by", "goal (ratio)", "reached"]


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table that can be read as text, too."""
    lines = [HEAD, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)
