"""A watchdog that does not get ready: an error in words, and no process is left."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from diskchain.drivers import pause_guard
from diskchain.drivers.pause_guard import WatchdogGuard
from diskchain.drivers.watched import WatchedQemu
from diskchain.errors import DriverFailed
from diskchain.host import process
from tests.support.rig import wait_for


@pytest.mark.parametrize(("program", "limit", "says"), [("import time; time.sleep(1000)", 1, "was not ready within 1 s"),
                                                        ("print('ready?')", 60, "did not start")])  # fmt: skip
def test_start_without_a_ready_watchdog_says_so_and_ends_it(
    program: str, limit: float, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for ever, nothing stays connected to the VM."""
    started: list[process.Piped] = []

    async def stand_in(argv: Sequence[str], log: Path, *, env: dict[str, str]) -> process.Piped:
        started.append(await process.spawn_piped([sys.executable, "-c", program], log, env=env))
        return started[-1]

    monkeypatch.setattr(pause_guard, "_READY", limit)
    monkeypatch.setattr(pause_guard, "spawn_piped", stand_in)
    with pytest.raises(DriverFailed, match=says):
        asyncio.run(WatchdogGuard.start(WatchedQemu(tmp_path), ["qemu", str(tmp_path)], tmp_path / "log", None))
    wait_for(lambda: started[0].returncode is not None, "it is gone")
