"""What every driver does alike that reaches a QEMU by its monitor and runs on the same host: save memory, free a guest."""

from __future__ import annotations

import asyncio
import contextlib

from diskchain.drivers import migration
from diskchain.drivers.migration import Commander
from diskchain.drivers.protocol import SaveProgress
from diskchain.errors import DiskchainError
from diskchain.host import hugepages, rescue
from diskchain.host.process import ProcessId, boot_id


class MemorySaver:
    """To be mixed into a driver; see `Driver` for what each method promises."""

    def process(self) -> ProcessId | None:
        """Return the VM's QEMU, or None."""
        raise NotImplementedError

    async def _commander(self) -> Commander:
        """Return its monitor."""
        raise NotImplementedError

    async def check_background_save(self) -> None:
        """Set the capability, see whether QEMU takes it, and take it back."""
        monitor = await self._commander()
        await migration.set_background(monitor, True)
        await migration.set_background(monitor, False)

    async def memory_blockers(self) -> list[str]:
        """query-migrate: devices that can't be saved, and what else blocks a migration."""
        answer = await (await self._commander()).execute("query-migrate")
        return [str(reason) for reason in answer.get("blocked-reasons", [])]

    async def devices(self) -> list[str]:
        """qom-list of what was given to QEMU."""
        return await migration.devices(await self._commander())

    async def prepare_memory_save(self, memory: int, *, background: bool) -> None:
        """Capability and descriptor."""
        monitor = await self._commander()
        await migration.set_background(monitor, background)
        await migration.pass_file(monitor, memory)

    async def start_memory_save(self, *, background: bool) -> None:
        """Begin the migration into the file that was passed before."""
        await migration.begin(await self._commander(), background=background)

    async def save_progress(self) -> SaveProgress:
        """query-migrate."""
        return await migration.progress(await self._commander())

    async def give_up_save(self) -> None:
        """migrate_cancel, until nothing is at work any more."""
        monitor = await self._commander()
        while await migration.give_up_plain(monitor):
            await asyncio.sleep(0.02)

    async def stopped_by_save(self) -> bool:
        """QEMU's `postmigrate`."""
        return await migration.run_state(await self._commander()) == "postmigrate"

    async def end_memory_save(self) -> None:
        """Take the capability back."""
        with contextlib.suppress(DiskchainError):
            await migration.set_background(await self._commander(), False)

    async def rescue(self) -> bool:
        """Lift the write protection that QEMU < 10 leaks when a background save fails."""
        process = self.process()
        return bool(process and await asyncio.to_thread(rescue.release, process.pid))

    async def restore_huge_pages(self, limit: float) -> str:
        """MADV_COLLAPSE from outside, by a thread of ours."""
        process = self.process()
        return await hugepages.collapse_in_thread(process, limit) if process else ""

    def save_owner(self) -> str:
        """pid, start time and boot of this QEMU."""
        process = self.process()
        return f"{process.pid}:{process.start}:{boot_id()}" if process else ""
