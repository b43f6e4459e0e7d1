"""Through the page cache or around it: what an engine of a merge is told (docs/merging.md, "How data is moved")."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from diskchain.chain.allocation import held_bytes, mean_run
from diskchain.chain.deletion import Fold
from diskchain.chain.model import GiB, Image, MiB
from diskchain.errors import DiskchainError
from diskchain.host import files
from diskchain.host.cached import cached_share, read_ahead
from diskchain.host.qemu_img import Caching, Pace
from diskchain.ops.allocation import allocated

# Around the page cache 2 GiB in one piece took 2.4 s, always; through it 2.0 to 5.5 s, what had to be read and what was
# written taking fresh memory for each page. In small pieces, or from a warm cache, around it takes 1.5 to 2.6 times as long.
AROUND_FROM, IN_PIECES_OF, CACHED_AT_MOST = 1 * GiB, 1 * MiB, 0.25
READ_AHEAD_UP_TO = 64 * MiB


def of_fold(fold: Fold, method: str, *, unclean: bool, pace: Pace) -> Caching:
    """Return how a fold is done: careful (`unclean`) and `idle` engines go around the page cache, and what is large and
    not in it.
    """
    plain = of_images((fold.into, *fold.gone, *fold.below), unclean=unclean, pace=pace)
    if plain is Caching.THROUGH and method == "commit" and _is_large_and_elsewhere(fold):
        return Caching.AROUND_NATIVE
    return plain


def of_images(images: Sequence[Image], *, unclean: bool, pace: Pace) -> Caching:
    """As `of_fold`, whatever their size. All of them are opened in one way, so all must be able to."""
    careful = (unclean or pace.idle) and all(supports_direct(i.path) for i in images)
    return Caching.AROUND if careful else Caching.THROUGH


def _is_large_and_elsewhere(fold: Fold) -> bool:
    if sum(files.allocated_bytes(i.path) for i in fold.gone) < AROUND_FROM:
        return False  # at once: their tables need not be read
    try:
        layers = [allocated(image.path) for image in fold.gone]
    except (DiskchainError, OSError):
        return False  # the checks to come say what is wrong
    return (
        sum(map(held_bytes, layers)) >= AROUND_FROM
        and all(mean_run(a) >= IN_PIECES_OF for a in layers if a.rows)
        and all(supports_direct(i.path) for i in (fold.into, *fold.gone, *fold.below))
        and all(cached_share(i.path) <= CACHED_AT_MOST for i in (fold.into, *fold.gone))
    )


def read_small_ahead(images: Sequence[Image]) -> None:
    """Let the disk begin with what an engine will read while the images are still checked; only what is small."""
    for image in images:
        if image.path.stat().st_size <= READ_AHEAD_UP_TO:
            read_ahead(image.path)


def supports_direct(path: Path) -> bool:
    """Whether the filesystem can read and write around its cache (O_DIRECT); FUSE and old tmpfs can't."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True
