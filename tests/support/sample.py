"""The short form of a long campaign: a seeded choice of its points. `scripts/test --full` takes them all.

DISKCHAIN_SEED=N chooses others.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
FULL = os.environ.get("DISKCHAIN_FULL") == "1"


def some(points: Sequence[T], keep: int) -> list[T]:
    """Return at most `keep` of the points in their order: the first, the last, and a seeded choice between them."""
    if FULL or len(points) <= keep:
        return list(points)
    seed = int(os.environ.get("DISKCHAIN_SEED", "7"))
    between = random.Random(seed).sample(range(1, len(points) - 1), keep - 2)
    return [points[i] for i in [0, *sorted(between), len(points) - 1]]
