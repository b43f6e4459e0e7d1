"""The part of the embedded driver that knows disks: what is open, and the switch to new overlays."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diskchain.chain.model import Image
from diskchain.drivers.qemu_argv import blockdev, node_name
from diskchain.drivers.ready_command import ReadyCommand
from diskchain.errors import DriverFailed, Unreachable


class QemuDisks:
    """To be mixed into QemuDriver."""

    run_dir: Path
    _switch: ReadyCommand | None = None

    async def _execute(self, command: str, **arguments: Any) -> Any:
        raise NotImplementedError

    async def active_files(self) -> dict[str, Path]:
        """Return for each disk the file of its topmost node, as QEMU says."""
        nodes = await self._execute("query-named-block-nodes", flat=True)
        file_of = {node["node-name"].removeprefix("file-"): Path(node["file"]) for node in nodes}
        found = {}
        for block in await self._execute("query-block"):
            target = _target_of(block)
            node = block.get("inserted", {}).get("node-name", "")
            if node.startswith("layer-"):
                found[target] = file_of[node.removeprefix("layer-")]
        return found

    async def written_files(self) -> dict[str, Path]:
        """There is no manager in between."""
        return await self.active_files()

    async def failed_disks(self) -> dict[str, str]:
        """The I/O status that QEMU keeps of each disk."""
        states = {_target_of(block): str(block.get("io-status", "ok")) for block in await self._execute("query-block")}
        return {target: state for target, state in states.items() if state != "ok"}

    async def prepare_disks(self, overlays: Mapping[str, Image]) -> None:
        """blockdev-add with `backing: null`: the overlay is open, its backing file is not opened a second time.

        The transaction is sent but for its last byte; a QEMU that an older diskchain started has no socket for that.
        """
        for image in overlays.values():
            await self._execute("blockdev-add", **blockdev(image, None, read_only=False))
        await self._forget_switch()
        with contextlib.suppress(Unreachable):
            self._switch = await ReadyCommand.open(self.run_dir / "switch.sock", "transaction",
                                                   actions=_snapshot_actions(overlays))  # fmt: skip

    async def forget_prepared(self, overlays: Mapping[str, Image]) -> None:
        """blockdev-del of what was added."""
        await self._forget_switch()
        for image in overlays.values():
            with contextlib.suppress(DriverFailed):
                await self._execute("blockdev-del", node_name=node_name(image))

    async def switch_disks(self, overlays: Mapping[str, Image]) -> None:
        """One transaction of blockdev-snapshot: all disks or none (1-4 ms)."""
        if self._switch:
            await self._switch.run()
        else:
            await self._execute("transaction", actions=_snapshot_actions(overlays))

    async def _forget_switch(self) -> None:
        if self._switch:
            await self._switch.close()
            self._switch = None


def _snapshot_actions(overlays: Mapping[str, Image]) -> list[dict[str, Any]]:
    return [
        {"type": "blockdev-snapshot", "data": {"node": f"layer-{image.backing}", "overlay": node_name(image)}}
        for image in overlays.values()
    ]


def _target_of(block: Mapping[str, Any]) -> str:
    return str(block.get("qdev", "")).removeprefix("/machine/peripheral/").split("/")[0]
