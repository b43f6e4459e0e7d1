"""The flat pause: a snapshot pauses the guest no longer because there were others before it.

A background save leaves the guest's memory split into small pages. It is put back into huge pages after the save (the
guest is quicker on them), and looked at again before the next pause. Neither belongs to an operation: nothing is
written down, a kill leaves nothing, and no failure of it matters to the snapshot.
"""

from __future__ import annotations

import asyncio
import logging

from diskchain.chain.model import GiB
from diskchain.drivers.protocol import VMState
from diskchain.errors import DiskchainError
from diskchain.host.fault import point
from diskchain.ops.vm import VM

log = logging.getLogger(__name__)
_LEAST, _PER_GIB = 2.0, 2.0  # seconds it may take; saving takes about 3 a GiB


async def before(vm: VM, save: str) -> None:
    """Before the pause of a create that saves memory in the background; nothing is journalled yet."""
    if save == "background":
        await _restore(vm, logging.DEBUG)  # `after` says it again


async def after(vm: VM, save: str) -> None:
    """After a background save, whatever became of it. Ctrl-C ends this, not the command: the snapshot is made."""
    if save != "background":
        return
    try:
        await _restore(vm, logging.INFO)
    except asyncio.CancelledError:
        log.info("%s: not all of its memory is in huge pages again; the next create goes on", vm.name)


async def _restore(vm: VM, level: int) -> None:
    if not vm.config.create.huge_pages:
        return
    try:
        if await vm.driver.state() is VMState.RUNNING:
            point("create.huge-pages")
            why = await vm.driver.restore_huge_pages(_LEAST + _PER_GIB * vm.driver.memory_bytes() / GiB)
            if why:
                log.log(level, "%s: its memory is not all in huge pages, later pauses are longer: %s", vm.name, why)
    except DiskchainError as error:
        log.log(level, "%s: its memory was not put into huge pages: %s", vm.name, error.message)
