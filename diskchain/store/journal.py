"""What is in flight: at most one open entry per VM, durable before the first effect, removed last.

An entry has an operation, a state (a word of operations.md's tables), and the operation's data. Each advance is one
durable write (about 2 ms). Trust order when sources differ: running QEMU, image headers, catalog, journal notes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diskchain.errors import DiskchainError, RecordDamaged, Unfinished
from diskchain.host import files
from diskchain.host.fault import point
from diskchain.host.process import boot_id
from diskchain.store import record
from diskchain.store.catalog import Home


@dataclass
class Entry:
    """An open entry. `data` is JSON; the operation that owns the entry knows its keys."""

    home: Home
    op: str
    id: str
    state: str
    data: dict[str, Any]
    started: str

    def advance(self, state: str, **data: Any) -> None:
        """Note durably that the operation has reached `state`, with more data. Raise NoSpace, Refused."""
        point(f"{self.op}.{state}.before")
        self.data.update(data)
        self.state = state
        self._write()
        point(f"{self.op}.{state}.after")

    def note(self, **data: Any) -> None:
        """Note data durably without changing the state."""
        self.data.update(data)
        self._write()

    def close(self) -> None:
        """Forget the entry: the operation is done or undone."""
        point(f"{self.op}.done.before")
        with files.os_errors(self._path, "unlink"):
            self._path.unlink(missing_ok=True)
        # It is done. Should a failed sync let the entry come back after a power cut, recovery finds everything done;
        # the next operation's entry syncs the directory again.
        with contextlib.suppress(DiskchainError, OSError):
            files.fsync_dir(self.home.journal)
            point(f"{self.op}.done.after")

    def withdraw(self) -> None:
        """Take back an entry that could not be opened. Raise Unfinished when it can't be taken back either."""
        with contextlib.suppress(DiskchainError, OSError):
            files.unlink_durably(self._path)
        if self._path.exists():
            raise Unfinished("the operation had hardly begun when the disk failed",
                             hint="put right the cause, then: diskchain recover") from None  # fmt: skip

    @property
    def _path(self) -> Any:
        return self.home.journal / f"{self.id}.json"

    def _write(self) -> None:
        body = {"op": self.op, "id": self.id, "state": self.state, "started": self.started,
                "pid": os.getpid(), "boot": boot_id(), "data": self.data}  # fmt: skip
        self.home.reserve.write(self._path, record.dump("journal", body))


def begin(home: Home, op: str, entry_id: str, started: str, data: Mapping[str, Any]) -> Entry:
    """Open an entry in state `intent`. The caller holds the VM's lock. Raise Unfinished when one is open already."""
    if is_open(home):
        raise Unfinished("an earlier operation on this VM was interrupted", hint="diskchain recover")
    home.fill_reserve()
    entry = Entry(home, op, entry_id, "intent", dict(data), started)
    try:
        entry.advance("intent")
    except (DiskchainError, OSError):
        entry.withdraw()  # it may be there, though it could not be synced: recovery would carry out what failed
        raise
    return entry


def is_open(home: Home) -> bool:
    """Whether an entry is open (readable or not)."""
    return home.journal.is_dir() and any(home.journal.glob("*.json"))


def contents(home: Home) -> dict[str, bytes]:
    """Return the open entries as they are on disk, to see whether they changed; what can't be read counts as empty."""
    found = {}
    for path in home.journal.glob("*.json") if home.journal.is_dir() else ():
        found[path.name] = b""
        with contextlib.suppress(OSError):
            found[path.name] = path.read_bytes()
    return found


def open_entry(home: Home) -> Entry | None:
    """Return the VM's open entry, or None. Raise RecordDamaged."""
    found = sorted(home.journal.glob("*.json")) if home.journal.is_dir() else []
    if not found:
        return None
    if len(found) > 1:
        raise RecordDamaged(
            f"{home.journal} holds more than one open entry", hint="keep them all; the newest is the one that counts"
        )
    body = record.read(found[0], "journal")
    try:
        return Entry(home, body["op"], body["id"], body["state"], dict(body["data"]), body["started"])
    except (KeyError, TypeError, ValueError):
        raise RecordDamaged(f"{found[0]} holds something else than a journal entry") from None
