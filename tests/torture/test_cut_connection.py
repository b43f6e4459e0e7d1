"""The connection over which the disks are switched breaks in the transaction: what QEMU did is asked, not guessed."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

import pytest

from tests.support.bare_qmp import Qmp
from tests.support.monitor_tap import MonitorTap
from tests.support.rig import Rig


class Cut(MonitorTap):
    """Passes all on but for the answer to the command whose last byte comes alone; then the connection is closed.

    `reaches`: whether that byte gets to QEMU.
    """

    def __init__(self, path: Path, *, reaches: bool) -> None:
        self._reaches, self.cut = reaches, threading.Event()
        super().__init__(path)

    def _forward(self, client: socket.socket, qemu: socket.socket) -> None:
        while (data := client.recv(1 << 16)) not in (b"", b"}"):
            qemu.sendall(data)
        if data:
            self.cut.set()
            self._muted = True
            self._answered.clear()
            if self._reaches:
                qemu.sendall(data)
                self._answered.wait(30)


@pytest.mark.parametrize("memory", ["--memory", "--disk-only"])
@pytest.mark.parametrize("reaches", [True, False], ids=["carried-out", "not-carried-out"])
def test_connection_breaks_in_the_transaction_and_the_snapshot_is_whole_or_not_there(
    rig: Rig, memory: str, reaches: bool
) -> None:
    """The VM runs on, on one layer or the other; nothing is lost or left behind; the next create and a merge work."""
    (path,) = rig.run_dir.glob("*/switch.sock")
    proxy = Cut(path, reaches=reaches)
    try:
        answer = rig.run("--json", "create", "vm", "s1", memory)
    finally:
        proxy.close()
    assert proxy.cut.is_set()
    wanted = {True: 12 if memory == "--memory" else 0, False: 9}[reaches]
    assert answer.code == wanted, (answer.code, answer.out, answer.err)
    with contextlib.closing(Qmp(next(rig.run_dir.glob("*/info.sock")))) as qmp:
        assert qmp("query-status")["status"] == "running"
        written = {Path(b["qdev"]).parent.name: b["inserted"]["image"]["filename"] for b in qmp("query-block")}
        held = [node for node in qmp("query-named-block-nodes", flat=True) if node["drv"] == "qcow2"]
    assert len(written) == 2 and all(str(path) in written[target] for target, path in rig.active().items())
    assert rig.journal() == [] and rig.snapshots().keys() == ({"s1"} if reaches else set())
    assert len(held) == (4 if reaches else 2), "what was prepared is closed again"
    if reaches:
        rig.expected["s1"] = rig.expected["now"]
    rig.ok("create", "vm", "s2", memory)
    rig.expected["s2"] = rig.expected["now"]
    rig.ok("stop", "vm", "--force", "-y")
    assert rig.verdict(present="now") == []
    rig.ok("delete", "vm", "s2", "-y")
    assert rig.verdict(present="now") == []
