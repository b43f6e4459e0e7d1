"""The transaction that QEMU has read but for its last byte: it is carried out by that byte, and by nothing else."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diskchain.drivers.qemu import QemuDriver
from diskchain.drivers.ready_command import ReadyCommand
from diskchain.errors import DriverFailed, Unreachable
from tests.contract.cases import QemuCase, base_chains, paths
from tests.support.rig import ROOT

HOLDER = """
import asyncio, sys
from pathlib import Path
from diskchain.drivers.ready_command import ReadyCommand
async def hold():
    ready = await ReadyCommand.open(Path(sys.argv[1]), "stop")
    print("sent", flush=True)
    await asyncio.sleep(60)
asyncio.run(hold())
"""


@pytest.fixture
def case(tmp_path: Path) -> Iterator[QemuCase]:
    """A machine without a guest that would have to boot."""
    found = QemuCase(tmp_path)
    yield found
    found.cleanup()


def test_who_dies_before_the_last_byte_has_changed_nothing(case: QemuCase) -> None:
    """`stop` but for its last byte, and SIGKILL: the VM runs on, and the socket serves the next one."""

    async def story() -> None:
        driver = case.open()
        assert isinstance(driver, QemuDriver)
        await driver.start(base_chains(case))
        socket = driver.run_dir / "switch.sock"
        holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(socket)], cwd=ROOT, stdout=subprocess.PIPE)
        assert holder.stdout and holder.stdout.readline() == b"sent\n"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        ready = await ReadyCommand.open(socket, "query-status")
        assert (await ready.run())["status"] == "running"
        await ready.close()
        with pytest.raises(DriverFailed, match="gone"):
            await (await ReadyCommand.open(socket, "blockdev-del", **{"node-name": "gone"})).run()
        await driver.kill()
        with pytest.raises(Unreachable):
            await ReadyCommand.open(socket, "query-status")

    asyncio.run(story())


@pytest.mark.parametrize("older", [False, True])
def test_disks_are_switched_with_and_without_the_socket(case: QemuCase, older: bool) -> None:
    """A QEMU that an older diskchain started has none. What was prepared and given up is prepared again."""

    async def story() -> None:
        driver = case.open()
        assert isinstance(driver, QemuDriver)
        await driver.start(base_chains(case), paused=True)
        overlays = case.overlays(case.bases)
        await driver.prepare_disks(overlays)
        await driver.forget_prepared(overlays)
        if older:
            (driver.run_dir / "switch.sock").unlink()
        await driver.prepare_disks(overlays)
        assert await driver.active_files() == paths(case.bases)
        await driver.switch_disks(overlays)
        assert await driver.active_files() == paths(overlays)
        await driver.kill()

    asyncio.run(story())
