"""How each merge is done: the quickest right way by what the layers hold and where they lie (facts.md, docs/merging.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from diskchain.chain.allocation import Allocation, held_bytes, mean_run, union
from diskchain.chain.deletion import Deletion, Fold, Pull, with_survivors
from diskchain.chain.model import Catalog, Image, KiB, MiB
from diskchain.host import probe
from diskchain.ops import delete_plan, merge
from diskchain.ops.allocation import allocated
from diskchain.ops.approve import virtual_size

# The mean piece from which sharing blocks beats copying: 64 KiB, 1 GiB in all: XFS 5x, btrfs 2x; 2 MiB: 40x and more. Few MiB
# in small pieces: btrfs 0.5x (the fsync of shared blocks).
CLONE_FROM, CLONE_FEW_FROM, FEW = 64 * KiB, 256 * KiB, 64 * MiB
# One layer is committed: with the disk at work meanwhile (host/writeback.py) that is quicker than convert, 1.11 s against 1.38 s
# for 2 GiB from a warm cache, 2.8 s against 3.2 s from a cold one, and the same for 1 GiB in small pieces.
CONVERT_UP_TO = 1.25  # what several layers hold, counted for each, against what is to be seen of it: from there commit
# ... and how much must be moved for each layer beyond the first: each is a process of its own, with a flush of its own
# (8 layers of 128 MiB, warm: 1.9 s, by commit 1.4 s)
CONVERT_A_LAYER = 256 * MiB
CLONE_A_LAYER = 32 * MiB
UP_BELOW = 0.6  # a pull flushes every write, and is worth it only where it moves clearly less ...
UP_SAVES = 64 * MiB  # ... and much less


def choose_all(catalog: Catalog, deletions: Sequence[Deletion]) -> list[Deletion]:
    """Return the deletions with the way that is best for each merge; their layers are verified before they are read.

    Raise HostileImage, ChainDamaged.
    """
    for deletion in deletions:
        delete_plan.verify(catalog, deletion)
    return [choose(d) for d in deletions]


def choose(deletion: Deletion) -> Deletion:
    """Return a deletion of verified layers with the way that is best for each merge."""
    if any(s.merge_begun for s in deletion.snapshots):
        return deletion  # after what did not end well only the careful way, which is `commit`
    folds, pulls = [], list(deletion.pulls)
    for fold in deletion.folds:
        upwards = _upwards(fold)
        if upwards:
            pulls.append(upwards)
        else:
            folds.append(replace(fold, method=_method(fold)))
    return replace(deletion, folds=tuple(folds), pulls=tuple(with_survivors(folds, pulls)))


def _method(fold: Fold) -> str:
    """Several layers are converted one after the other: each cluster is written as often as it is held."""
    if not _one_size((*fold.gone, fold.into)):
        return "commit"
    layers = [allocated(image.path) for image in fold.gone]
    each, shown = sum(map(held_bytes, layers)), held_bytes(union(layers))
    one_more = len(layers) - 1
    if (
        _shares_blocks(fold)
        and all(mean_run(a) >= (CLONE_FROM if held_bytes(a) >= FEW else CLONE_FEW_FROM) for a in layers if a.rows)
        and shown >= CLONE_A_LAYER * one_more
    ):
        return "clone"
    if not one_more or each > CONVERT_UP_TO * shown or shown < CONVERT_A_LAYER * one_more:
        return "commit"
    return "convert"


def _shares_blocks(fold: Fold) -> bool:
    into = fold.into.path.parent
    here = {image.path.stat().st_dev for image in (*fold.gone, fold.into)}
    return len(here) == 1 and bool(probe.directory(into).clone)


def _upwards(fold: Fold) -> Pull | None:
    """The same merge the other way, where that moves clearly less and the lower layers are ours to unlink."""
    gone = (*fold.through, fold.into)
    below = fold.below[0] if fold.below else None
    if not all(i.ours for i in gone) or not _one_size((fold.top, *gone, *fold.below[:1])):
        return None
    pull = Pull(fold.target, gone, (fold.top,), below)
    down, up = held_bytes(_held(fold.gone)), merge.pulled(pull, fold.top)
    return pull if up < UP_BELOW * down and down - up > UP_SAVES else None


def _held(images: Sequence[Image]) -> Allocation:
    return union([allocated(i.path) for i in images])


def _one_size(images: Sequence[Image]) -> bool:
    return len({virtual_size(i.path, i.fmt) for i in images}) == 1
