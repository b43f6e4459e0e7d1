"""Through the page cache or around it: what an engine of a merge is told (docs/merging.md, "How data is moved")."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from diskchain.chain.allocation import held_bytes, mean_run
from diskchain.chain.deletion import Fold
from diskchain.chain.model import GiB, Image, KiB, MiB
from diskchain.errors import DiskchainError
from diskchain.host import files, readahead
from diskchain.host.cached import cached_share, memory_to_spare
from diskchain.host.qemu_img import AS_FAST_AS_IT_CAN, Caching, Pace
from diskchain.ops.allocation import allocated

# What goes is cached: read there and written around it 2 GiB in one piece took 1.3 s, through it 1.1 to 3.9 s (each new page costs,
# on some hosts dearly); 1 GiB in pieces of 256 KiB 1.1 s and 2.1 s; 256 MiB the same both ways.
CACHED_FROM, WRITES_FROM, WRITES_IN_PIECES_OF = 0.75, 512 * MiB, 256 * KiB
# It is not: all around it 2 GiB took 2.4 s, through it 2.0 to 5.5 s. 1 GiB in pieces of 4 MiB and less took as long or longer.
CACHED_AT_MOST, AROUND_FROM, IN_PIECES_OF = 0.25, 1 * GiB, 1 * MiB
# 1 GiB in pieces of 4 to 64 KiB all over the file, not cached: 1.75 s, without reading ahead 1.95 s. Of the memory to spare: what
# was read must still be there when it is asked for.
READ_AHEAD_OF_MEMORY = 0.25


def of_fold(fold: Fold, method: str, *, unclean: bool, pace: Pace) -> Caching:
    """Return how a fold is done: careful (`unclean`) and `idle` engines go around the page cache, and what is large writes
    around it and reads where its data are.
    """
    images = (fold.into, *fold.gone, *fold.below)
    plain = of_images(images, unclean=unclean, pace=pace)
    return _of_large(fold, images) if plain is Caching.THROUGH and method == "commit" else plain


def of_images(images: Sequence[Image], *, unclean: bool, pace: Pace) -> Caching:
    """As `of_fold`, whatever their size. All of them are opened in one way, so all must be able to."""
    return Caching.AROUND if (unclean or pace.idle) and _all_direct(images) else Caching.THROUGH


def _all_direct(images: Sequence[Image]) -> bool:
    return all(supports_direct(i.path) for i in images)


def _of_large(fold: Fold, images: Sequence[Image]) -> Caching:
    if sum(files.allocated_bytes(i.path) for i in fold.gone) < min(AROUND_FROM, WRITES_FROM):
        return Caching.THROUGH  # at once: nothing is opened, and no tables are read
    if not _all_direct(images):
        return Caching.THROUGH
    try:
        layers = [allocated(image.path) for image in fold.gone]
    except (DiskchainError, OSError):
        return Caching.THROUGH  # the checks to come say what is wrong
    held, piece = sum(map(held_bytes, layers)), min([mean_run(a) for a in layers if a.rows], default=0)
    cached = [cached_share(image.path) for image in fold.gone]
    if held >= WRITES_FROM and piece >= WRITES_IN_PIECES_OF and min(cached) >= CACHED_FROM:
        return Caching.WRITES_AROUND
    if held >= AROUND_FROM and piece >= IN_PIECES_OF and max(cached) <= CACHED_AT_MOST:
        return Caching.AROUND_NATIVE
    return Caching.THROUGH


def reading_ahead(images: Sequence[Image], how: Caching, pace: Pace) -> AbstractAsyncContextManager[None]:
    """While the block runs, read what goes ahead of an engine that takes it from the page cache: in the order of the file.

    Only what is in small pieces: in large ones the kernel reads ahead by itself. Nothing where others are to have the disk, too.
    """
    if how is not Caching.THROUGH or pace != AS_FAST_AS_IT_CAN:
        return contextlib.nullcontext()
    return readahead.reading_ahead(_worth_reading(images))


def _worth_reading(images: Sequence[Image]) -> Iterator[Path]:
    """Yield the files in small pieces that are not in the page cache; none where all of them would take much of the memory."""
    with contextlib.suppress(DiskchainError, OSError):  # the checks and the engine say what is wrong
        paths = [i.path for i in images if cached_share(i.path) < CACHED_FROM and _in_small_pieces(i)]
        if sum(map(files.allocated_bytes, paths)) <= memory_to_spare() * READ_AHEAD_OF_MEMORY:
            yield from paths


def _in_small_pieces(image: Image) -> bool:
    held = allocated(image.path)
    return bool(held.rows) and mean_run(held) < IN_PIECES_OF


def supports_direct(path: Path) -> bool:
    """Whether the filesystem can read and write around its cache (O_DIRECT); FUSE and old tmpfs can't."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True
