"""The configuration that a snapshot recorded."""

from __future__ import annotations

import json

from diskchain.chain.model import Snapshot
from diskchain.drivers.protocol import Definition
from diskchain.errors import ChainDamaged
from diskchain.store.catalog import Home


def definition_at(home: Home, snapshot: Snapshot) -> Definition:
    """Return the configuration that a snapshot in these records has. Raise ChainDamaged when it is gone."""
    path = home.snapshot_dir(snapshot.id) / "machine.json"
    try:
        return Definition(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ChainDamaged(f"the configuration of snapshot {snapshot.name!r} can't be read: {path}",
                           hint="bring it back from a backup; its disks are listed in RECOVER.txt") from error  # fmt: skip
