"""The presents that reverts kept by themselves (before-revert-N): the newest stays, older ones go after `revert.keep`."""

from __future__ import annotations

import time
from collections.abc import Collection

from diskchain.chain.deletion import plan_all
from diskchain.chain.model import Catalog, Snapshot
from diskchain.ops import delete, delete_plan
from diskchain.ops.look import age
from diskchain.ops.progress import Progress
from diskchain.ops.vm import VM


def due(catalog: Catalog, keep: float, *, stays: Collection[str], one_more: bool) -> list[Snapshot]:
    """Return those that are older than `keep` seconds. `stays`: ids that are needed yet; `one_more`: a newer one will be made.

    Protected and renamed ones are not ours to delete. What `undo` goes back to is the newest.
    """
    kept = sorted((s for s in catalog.visible() if s.automatic), key=lambda s: s.created)
    older = kept if one_more else kept[:-1]
    ages = [(s, age(s.created, time.time())) for s in older if not s.protected and s.id not in stays]
    return [s for s, seconds in ages if seconds is not None and seconds > keep]


async def delete_due(vm: VM, keep: float, stays: Collection[str], progress: Progress) -> list[str]:
    """Delete them, after a revert; merges that this needs wait for the next stop. Return their names.

    The VM's lock is held. Raise as `delete_plan.check` and `delete`: nothing or all of it is done, or `recover` ends it.
    """
    going = due(vm.catalog, keep, stays=stays, one_more=False)
    deletions = plan_all(vm.catalog, [s.id for s in going], data=False) if going else []
    await delete_plan.check(vm, deletions)
    for deletion in deletions:
        await delete.delete(vm, deletion, progress)
    return [s.name for s in going]
