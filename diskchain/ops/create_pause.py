"""The pause of a create: nothing happens in it that can be done before or after; no file is made, nothing is synced."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from diskchain.chain.model import Image
from diskchain.drivers.protocol import Driver, PauseGuard
from diskchain.errors import MemoryNotSaved
from diskchain.host.fault import point
from diskchain.ops.quiesce import Freeze
from diskchain.ops.save_memory import refuse_sleeping
from diskchain.ops.state_files import Capture

LIMIT = 9.0  # seconds until the watchdog lets the VM go on: the guest runs again within 10


class Pause:
    """One pause. `save`: never, background or paused; `ran`: whether the VM ran before."""

    def __init__(
        self,
        driver: Driver,
        guard: PauseGuard,
        overlays: Mapping[str, Image],
        state_files: Capture,
        *,
        save: str,
        ran: bool,
        freeze: Freeze | None = None,
    ) -> None:
        self._driver, self._guard, self._overlays, self._state_files = driver, guard, overlays, state_files
        self._save, self._ran, self._freeze = save, ran, freeze
        self._began = 0.0
        self.milliseconds: float | None = None
        self.captured: bool | None = None  # None: no memory was asked for
        self.why = ""

    async def run(self) -> None:
        """Stop, switch, capture, resume; frozen before, thawed after. Whatever happens, a VM that ran runs again."""
        if self._freeze is None:
            await self._stand_still()
            return
        try:
            await self._freeze.verify()
            await self._stand_still()
        finally:
            await self._freeze.end()

    async def _stand_still(self) -> None:
        if self._save != "never":  # it may have gone to sleep since we looked
            await refuse_sleeping(self._driver, "try again when it is awake")
        if self._save == "background":
            self._guard.watch_save()
        self._began = time.perf_counter()
        if self._ran:
            self._guard.arm()
        try:
            if self._ran:
                await self._driver.pause()
            point("create.paused")
            self._state_files.copy()  # before the switch: a snapshot whose disks are frozen has its NVRAM and TPM
            await self._driver.switch_disks(self._overlays)
            point("create.disks-switched")
            if self._save != "never":
                await self._capture()
            point("create.captured")
        finally:
            if self._ran:
                await self._driver.resume()
        self.milliseconds = round((time.perf_counter() - self._began) * 1000, 3) if self._ran else None
        point("create.resumed")
        if self._ran:
            self._guard.disarm()

    async def _capture(self) -> None:
        background = self._save == "background"
        try:
            await self._driver.start_memory_save(background=background)
            while not background and (await self._driver.save_progress()).status == "running":
                await asyncio.sleep(0.01)
        except MemoryNotSaved as error:
            self.captured, self.why = False, error.message
            return
        self.captured = not self._resumed_behind_our_back()
        if not self.captured:
            self.why = "the watchdog resumed the VM before its memory was captured"

    def _resumed_behind_our_back(self) -> bool:
        """The watchdog says so, or must be about to say so (we may have stood still ourselves)."""
        late = self._save == "background" and time.perf_counter() - self._began > LIMIT - 0.5
        return self._ran and (late or self._guard.fired())
