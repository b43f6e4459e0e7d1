"""A part of check: NVRAM and TPM, the VM's own and the copies in its snapshots."""

from __future__ import annotations

import os
from collections.abc import Iterator

from diskchain.chain.model import Catalog, Snapshot
from diskchain.chain.rules import Finding, error
from diskchain.drivers.protocol import Driver
from diskchain.errors import DiskchainError, Refused
from diskchain.ops import state_files
from diskchain.store.catalog import Home


def copies(home: Home, snapshot: Snapshot, subject: str) -> Iterator[Finding]:
    """The copies in a snapshot: there, and as they were made."""
    for name in snapshot.captured:
        for problem in state_files.problems(home, snapshot, name):
            yield error("state-copy-damaged", subject, problem,
                        "bring the file back from a backup; RECOVER.txt says how to open the disks without it")  # fmt: skip


def own(name: str, catalog: Catalog, driver: Driver) -> Iterator[Finding]:
    """The VM's own: there, if they ever were; whole; and the process that a running VM needs for them."""
    definition = driver.definition()
    for state in driver.state_files(definition):
        if not os.path.lexists(state.path) and state.name not in catalog.state_files:
            continue  # it is made at the first start
        try:
            state_files.refuse_unusable(driver, definition, state)
        except DiskchainError as problem:
            yield error("state-missing", name, problem.message, problem.hint)
    try:
        driver.check_helpers()
    except Refused as problem:
        yield error("helper-gone", name, problem.message, problem.hint)
