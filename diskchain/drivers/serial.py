"""The serial console of a running machine: its output is a file that QEMU appends to, its input a FIFO.

Not a socket: QEMU's serial port waits for a client that is connected and does not read, and with it every process of the
guest that writes to its console; the log stands still too. Here nobody who looks can hold anybody up: the log is the
output. The FIFO is given to QEMU when somebody attaches (chardev-change: same file, and now an input).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from diskchain.errors import Busy
from diskchain.host import files
from diskchain.host.locks import vm_lock
from diskchain.host.process import ProcessId

CHARDEV = "console"
_INPUT, _LOCK = "console.in", "console.lock"


class Attached:
    """One who is attached. `output`: the log, which goes on growing; `input`: a descriptor that does not block."""

    def __init__(self, output: Path, input_: int, process: ProcessId, held: contextlib.ExitStack) -> None:
        self.output, self.input = output, input_
        self._process, self._held = process, held

    async def gone(self) -> None:
        """Return when the machine is down."""
        while not await self._process.gone(3600):
            pass

    def close(self) -> None:
        """Let the next one in. What was sent and not yet taken by the guest stays in the pipe until it is."""
        self._held.close()


async def attach(execute: Callable[..., Awaitable[Any]], run_dir: Path, output: Path, process: ProcessId,
                 name: str) -> Attached:  # fmt: skip
    """Attach to the console of a running QEMU. Raise Busy naming who is attached already."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(vm_lock(run_dir / _LOCK, f"console {name}", wait=0))
        except Busy as error:
            who = error.message.partition(": ")[2]
            raise Busy(f"the console of {name} is in use: {who}",
                       hint=f"leave it there with Ctrl-]; to look only: tail -f {output}") from error  # fmt: skip
        fifo = run_dir / _INPUT
        with files.os_errors(fifo, "make"):
            fifo.unlink(missing_ok=True)
            os.mkfifo(fifo, 0o600)
            both = os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)  # QEMU's open waits for a writer
            held.callback(fifo.unlink, missing_ok=True)
        try:
            await execute("chardev-change", id=CHARDEV, backend={"type": "file", "data": {
                "in": str(fifo), "out": str(output), "append": True}})  # fmt: skip
            with files.os_errors(fifo, "open"):
                ours = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            os.close(both)
        held.callback(os.close, ours)
        return Attached(output, ours, process, held.pop_all())
