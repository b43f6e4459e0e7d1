"""How each merge is done: the quickest right way by what the layers hold and where they lie (facts.md, docs/merging.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from diskchain.chain.allocation import Allocation, has_subclusters, held_bytes, mean_run, union
from diskchain.chain.deletion import Deletion, Fold, Pull, with_survivors
from diskchain.chain.model import Catalog, Image, KiB, MiB
from diskchain.host import probe
from diskchain.ops import delete_plan, merge
from diskchain.ops.allocation import allocated
from diskchain.ops.approve import virtual_size

# The mean piece from which sharing blocks beats copying: 64 KiB, 1 GiB in all: XFS 5x, btrfs 2x; 2 MiB: 40x and more. Few MiB
# in small pieces: btrfs 0.5x (the fsync of shared blocks).
CLONE_FROM, CLONE_FEW_FROM, FEW = 64 * KiB, 256 * KiB, 64 * MiB
# Only subclusters are converted: commit moves whole clusters of them, 1026 MiB against 766, cold 2.0 s against 1.4 s. Of others
# commit is as quick or quicker (2 GiB from a warm cache 1.11 s against 1.38 s; 4 layers of 512 MiB 1.5 s against 2.0 s), and
# several layers are one pass of it, in which each cluster is written once.
CONVERT_UP_TO = 1.25  # what several layers hold, counted for each, against what is to be seen of it: from there commit
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
    """Clone what is in large pieces; convert what is in pieces of clusters, one layer after the other; commit the rest."""
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
    return "convert" if any(map(has_subclusters, layers)) and each <= CONVERT_UP_TO * shown else "commit"


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
