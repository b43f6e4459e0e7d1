"""The small process that lets a paused VM go on when diskchain can't: `python -m diskchain.drivers.watchdog SOCKET`.

It is connected to QEMU before the pause begins. On stdin: `arm` (the pause begins), `done` (it is over); end of file
while armed = diskchain is dead. It acts then, or `LIMIT` seconds after `arm`. On stdout: `ready`, and `fired` if it acted.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from pathlib import Path

from diskchain.drivers.monitor import Monitor
from diskchain.errors import DiskchainError

_GIVE_UP = 600.0  # seconds after which a VM that can't be resumed is left to `recover`


async def watch(socket: Path, limit: float | None) -> None:
    """Stay until told `done`; resume the VM when the writer of our stdin dies, or the limit is over."""
    monitor = await Monitor.connect(socket)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    print("ready", flush=True)
    if await lines.readline() != b"arm\n":
        return
    try:
        if await asyncio.wait_for(lines.readline(), limit) == b"done\n":
            return
    except TimeoutError:
        pass
    with contextlib.suppress(OSError):
        print("fired", flush=True)
    await let_go_on(monitor)


async def let_go_on(monitor: Monitor) -> None:
    """Resume the VM as soon as it can be resumed."""
    end = time.monotonic() + _GIVE_UP
    while time.monotonic() < end:
        try:
            status = (await monitor.execute("query-status"))["status"]
            if status not in ("paused", "postmigrate", "finish-migrate"):
                return
            if status != "finish-migrate":
                await monitor.execute("cont")
                return
        except DiskchainError:
            return
        await asyncio.sleep(0.1)


def main() -> None:
    """Run from the command line: SOCKET [LIMIT in seconds]."""
    limit = float(sys.argv[2]) if len(sys.argv) > 2 else None
    with contextlib.suppress(DiskchainError, BrokenPipeError):
        asyncio.run(watch(Path(sys.argv[1]), limit))


if __name__ == "__main__":
    main()
