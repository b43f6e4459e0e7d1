"""Saving and loading guest memory over QMP, shared by every driver that speaks to QEMU.

Background save = capability `background-snapshot` (QEMU >= 6.0) and `migrate` into a plain file. What was measured
(facts.md): `active` comes too early; the instant is captured when the first page is counted. QEMU 7.2 then resumes by
itself, even a VM that was paused; QEMU 10 restores the earlier state. On QEMU < 10 a save that fails or is cancelled
hangs the guest, so it is never cancelled, and the file is preallocated.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any, Protocol

from diskchain.drivers.protocol import SaveProgress
from diskchain.errors import DriverFailed, MemoryNotSaved

_UNLIMITED = 1 << 40  # bytes per second; QEMU's own default is 128 MiB/s


class Commander(Protocol):
    """What is needed of a monitor."""

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command."""

    def send_fd(self, fd: int) -> None:
        """Pass a descriptor along."""


async def set_background(monitor: Commander, on: bool) -> None:
    """Switch the capability. Raise MemoryNotSaved when this host or VM can't (QEMU says why)."""
    try:
        await monitor.execute("migrate-set-capabilities",
                              capabilities=[{"capability": "background-snapshot", "state": on}])  # fmt: skip
    except DriverFailed as error:
        raise MemoryNotSaved(
            f"memory can't be saved while the VM runs: {error.message}",
            hint="" if os.geteuid() == 0 else "sysctl vm.unprivileged_userfaultfd=1",
        ) from error


async def devices(monitor: Commander) -> list[str]:
    """Return the names of the devices that were given to QEMU, at its start or since; a memory loads only into the same ones.

    QEMU takes and gives back none while it saves (`device_add`, `device_del`: "not allowed while migrating").
    """
    found = []
    for place in ("peripheral", "peripheral-anon"):
        children = await monitor.execute("qom-list", path=f"/machine/{place}")
        found += [str(child["name"]) for child in children if str(child["type"]).startswith("child<")]
    return sorted(found)


async def pass_file(monitor: Commander, fd: int) -> None:
    """Give QEMU the memory file. It goes on from the offset that it shares with our descriptor."""
    monitor.send_fd(fd)
    await monitor.execute("getfd", fdname="diskchain-memory")
    await monitor.execute("migrate-set-parameters", max_bandwidth=_UNLIMITED)


async def begin(monitor: Commander, *, background: bool) -> None:
    """Begin the save into the file passed before; return when the instant is captured. Raise MemoryNotSaved."""
    await monitor.execute("migrate", uri="fd:diskchain-memory")
    while background:
        answer = await monitor.execute("query-migrate")
        ram = answer.get("ram", {})
        if ram.get("normal", 0) + ram.get("duplicate", 0) > 0 or answer.get("status") == "completed":
            return
        if answer.get("status") in ("failed", "cancelled"):
            raise MemoryNotSaved(f"saving memory did not start: {_why(answer)}")
        await asyncio.sleep(0.0003)  # asked without a breath, QEMU's main loop keeps its save thread waiting


async def progress(monitor: Commander) -> SaveProgress:
    """Return how far the save is. It is over when the VM can go on: QEMU says `completed` a moment before."""
    answer = await monitor.execute("query-migrate")
    status = answer.get("status", "none")
    ram = answer.get("ram", {})
    known = {"completed": "completed", "failed": "failed", "cancelled": "failed", "none": "failed"}
    said = known.get(status, "running")
    if said != "running" and await run_state(monitor) == "finish-migrate":
        said = "running"
    return SaveProgress(said, ram.get("total", 0) - ram.get("remaining", 0), ram.get("total", 0), _why(answer))


async def run_state(monitor: Commander) -> str:
    """Return QEMU's own word for what the VM does."""
    return str((await monitor.execute("query-status"))["status"])


async def give_up_plain(monitor: Commander) -> bool:
    """Cancel a save that would stop the VM as soon as it is over; return whether there was one, which may still be ending.

    That is each one but a background save. Those are left alone: cancelled, they hang the guest of QEMU < 10.
    """
    if (await progress(monitor)).status != "running":
        return False
    capabilities = await monitor.execute("query-migrate-capabilities")
    if any(one["capability"] == "background-snapshot" and one["state"] for one in capabilities):
        return False
    with contextlib.suppress(DriverFailed):  # it has ended by itself
        await monitor.execute("migrate_cancel")
    return True


def _why(answer: Any) -> str:
    return str(answer.get("error-desc") or f"status {answer.get('status', 'none')}")


async def load(monitor: Commander, fd: int) -> None:
    """Load memory from the descriptor into a QEMU that waits with `-incoming defer -S`. Success = completed, paused."""
    await pass_file(monitor, fd)
    await monitor.execute("migrate-incoming", uri="fd:diskchain-memory")
    while True:
        answer = await monitor.execute("query-migrate")
        status = answer.get("status", "none")
        if status == "completed":
            break
        if status in ("failed", "cancelled"):
            raise DriverFailed(f"QEMU could not load the memory: {_why(answer)}")
        await asyncio.sleep(0.005)
    run_state = (await monitor.execute("query-status"))["status"]
    if run_state not in ("paused", "prelaunch"):
        raise DriverFailed(f"after loading the memory the VM is {run_state!r}, not paused")
