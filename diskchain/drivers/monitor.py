"""A QMP connection: qemu.qmp, with our errors. One client at a time per socket is QEMU's rule, not ours."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from pathlib import Path
from typing import Any

from qemu.qmp import ExecuteError, QMPClient
from qemu.qmp.error import QMPError
from qemu.qmp.protocol import StateError

from diskchain.errors import DriverFailed, Unreachable

log = logging.getLogger(__name__)
_PATIENCE = 120.0  # seconds; every command that we send is answered at once by a QEMU that is alive
for _noisy in (
    "qemu.qmp",
    "asyncio",
):  # their tracebacks of a broken connection say nothing to an admin; ours name the cause
    logging.getLogger(_noisy).setLevel(logging.CRITICAL)


class Monitor:
    """An open connection to one QEMU."""

    def __init__(self, client: QMPClient, path: Path) -> None:
        self._client = client
        self.path = path

    @classmethod
    async def connect(cls, path: Path, *, timeout: float = 10) -> Monitor:
        """Connect to QEMU's socket. Raise Unreachable after `timeout` seconds (no QEMU, or another client has it)."""
        client = QMPClient("diskchain")
        end = time.monotonic() + timeout
        while True:
            try:
                await asyncio.wait_for(client.connect(str(path)), max(0.1, end - time.monotonic()))
                return cls(client, path)
            except (TimeoutError, QMPError, OSError) as error:
                await _reset(client)
                if time.monotonic() > end:
                    raise Unreachable(f"no answer from QEMU on {path}", hint="diskchain machine list") from error
                client = QMPClient("diskchain")
                await asyncio.sleep(0.004)

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command (`_` in argument names stands for `-`) and return its answer.

        Raise DriverFailed with QEMU's words; Unreachable when the connection broke: the outcome is unknown.
        """
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        log.debug("QMP %s %s", command, named)
        try:
            return await asyncio.wait_for(self._client.execute(command, named or None), _PATIENCE)
        except TimeoutError as error:
            raise Unreachable(f"QEMU did not answer {command} within {_PATIENCE:.0f} seconds",
                              hint="look at its storage; diskchain stop --force ends it") from error  # fmt: skip
        except ExecuteError as error:
            raise DriverFailed(f"QEMU refused {command}: {error}") from error
        except (QMPError, StateError, OSError, asyncio.IncompleteReadError) as error:
            raise Unreachable(f"the connection to QEMU broke during {command}", hint="diskchain recover") from error

    def send_fd(self, fd: int) -> None:
        """Pass a descriptor along; `getfd` names it next."""
        self._client.send_fd_scm(fd)

    async def close(self) -> None:
        """Close the connection; QEMU goes on."""
        await _reset(self._client)


async def _reset(client: QMPClient) -> None:
    with contextlib.suppress(QMPError, StateError, OSError, EOFError, TimeoutError):
        await asyncio.wait_for(client.disconnect(), 2)
