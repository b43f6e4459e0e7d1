"""The configuration that a snapshot recorded."""

from __future__ import annotations

import hashlib
import json

from diskchain.chain.model import Snapshot
from diskchain.drivers.protocol import Definition
from diskchain.errors import ChainDamaged
from diskchain.store.catalog import Home


def definition_at(home: Home, snapshot: Snapshot) -> Definition:
    """Return the configuration that a snapshot in these records has. Raise ChainDamaged when it is gone."""
    path = home.configuration(snapshot.id)
    try:
        return Definition(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ChainDamaged(f"the configuration of snapshot {snapshot.name!r} can't be read: {path}",
                           hint="bring it back from a backup; its disks are listed in RECOVER.txt") from error  # fmt: skip


def digest_at(home: Home, snapshot_id: str) -> str:
    """Return the sha256 of a recorded configuration as it lies there; nothing when it can't be read."""
    try:
        return hashlib.sha256(home.configuration(snapshot_id).read_bytes()).hexdigest()
    except OSError:
        return ""


def verify_for_memory(home: Home, snapshot: Snapshot) -> None:
    """Raise ChainDamaged unless a snapshot's configuration is the one that its memory was saved with.

    QEMU tells another machine type only when it loads, after the present was stopped, and another device not at all.
    """
    if snapshot.memory.configuration not in ("", digest_at(home, snapshot.id)):
        raise ChainDamaged(f"the configuration of snapshot {snapshot.name!r} was changed since its memory was saved: "
                           f"{home.configuration(snapshot.id)}",
                           hint="bring it back from a backup; or go to its disks only: revert --cold --config keep")  # fmt: skip
