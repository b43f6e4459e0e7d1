"""Frozen file systems: around the pause of a create, after an interrupted one, and after a saved memory was loaded.

What is frozen through the guard is thawed by the guard whoever of us dies; here is only what an operation makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diskchain.chain.model import Snapshot
from diskchain.drivers.protocol import PauseGuard, VMState
from diskchain.errors import AgentFailed, AgentMissing, DiskchainError, Refused
from diskchain.host.fault import point
from diskchain.ops.progress import Progress
from diskchain.ops.vm import VM

THAW_LIMIT = 30.0  # seconds that an agent gets to answer when something is frozen
STILL_FROZEN = "its file systems may still be frozen"
CLOCK_LIMIT = 5.0  # seconds that it gets after a revert, when nothing hangs on it


class Freeze:
    """The file systems of one guest, frozen around a pause. `why`: why the snapshot is not quiesced all the same."""

    def __init__(self, guard: PauseGuard, limit: float) -> None:
        self._guard, self._limit = guard, limit
        self._count = 0
        self.why = "interrupted"

    @property
    def held(self) -> bool:
        """Whether all that was frozen stayed so until we thawed it, after the pause."""
        return not self.why

    async def begin(self) -> None:
        """Freeze. Raise AgentFailed; nothing is frozen then, or it is thawed as soon as the guest lets us."""
        point("create.freezing")
        self._count = await self._guard.freeze(self._limit)
        point("create.frozen")
        if not self._count:
            raise AgentFailed("the guest agent found no file system that it could freeze",
                              hint="leave --quiesce away")  # fmt: skip

    async def verify(self) -> None:
        """Right before the pause: raise AgentFailed when the guest has thawed by itself."""
        if not await self._guard.still_frozen():
            raise AgentFailed("the file systems of the guest were thawed before the snapshot; nothing was changed",
                              hint="try again; or leave --quiesce away")  # fmt: skip
        point("create.still-frozen")

    async def end(self) -> None:
        """Thaw; the VM runs. What went wrong stands in `why`."""
        try:
            count = await self._guard.thaw()
        except DiskchainError as error:
            self.why = f"{STILL_FROZEN} ({error.message}); diskchain goes on trying to thaw them"
            return
        finally:
            point("create.thawed")
        self.why = "" if count >= self._count else "the guest thawed its file systems by itself"


async def refuse_without_agent(vm: VM, state: VMState) -> None:
    """Raise Refused, AgentMissing when a running VM can't be quiesced."""
    if state in (VMState.PAUSED, VMState.SUSPENDED):
        raise Refused(f"{vm.name} is {state.value}; its file systems can't be frozen now",
                      hint=f"diskchain resume {vm.name}, or leave --quiesce away")  # fmt: skip
    await vm.driver.check_agent()


def noted(snapshot: Snapshot, data: Mapping[str, Any]) -> Snapshot:
    """Return a snapshot with what its journal entry knows about the freeze."""
    if not data.get("quiesce"):
        return snapshot
    why = str(data.get("unquiesced", "interrupted"))
    usual = "crash" if why else "quiesced"
    return replace(snapshot, quiesced=not why, unquiesced=why,
                   consistency="memory" if snapshot.memory.saved else usual)  # fmt: skip


async def thaw(vm: VM, progress: Progress) -> bool:
    """Thaw the file systems of a running VM, if any is frozen; return whether one was. A failure is a warning."""
    if await vm.driver.state() is not VMState.RUNNING:
        return False
    try:
        return await vm.driver.thaw(THAW_LIMIT)
    except (AgentMissing, AgentFailed) as error:
        progress.warn(f"the file systems of {vm.name} may be frozen: {error.message}; when its agent answers: "
                      f"diskchain recover {vm.name}")  # fmt: skip
        return False


async def thaw_if_frozen(vm: VM) -> bool:
    """Nothing was interrupted, the lock is held: thaw what is frozen all the same; return whether anything was.

    Raise AgentFailed when the guest does not let us.
    """
    if await vm.driver.state() is not VMState.RUNNING or not vm.driver.has_agent():
        return False
    try:
        return await vm.driver.is_frozen() and await vm.driver.thaw(THAW_LIMIT)
    except AgentMissing:
        return False


async def wake(vm: VM, progress: Progress, *, frozen: bool) -> None:
    """The guest runs, from a saved memory. Thaw it if it was `frozen` in it, then set its clock. Failures are warnings."""
    if not vm.driver.has_agent() or await vm.driver.state() is not VMState.RUNNING:
        return
    if frozen:
        await thaw(vm, progress)
    point("revert.thawed")
    if not vm.config.revert.set_clock:
        return
    try:
        await vm.driver.set_clock(CLOCK_LIMIT)
    except (AgentMissing, AgentFailed) as error:
        progress.warn(f"the clock of {vm.name} was not set: {error.message}")
