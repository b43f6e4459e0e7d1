"""qemu-img into a new image: what `elsewhere` needs of it. Formats are given, errors are told to the last word (qemu_img.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diskchain.host import qemu_img
from diskchain.host.process import run
from diskchain.host.qemu_img import METADATA


async def create_alone(fd: int, virtual_size: int) -> None:
    """Write an empty qcow2 image without a backing file into the open file `fd`."""
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", f"/proc/self/fd/{fd}", str(virtual_size)]
    await run(argv, limits=METADATA, pass_fds=[fd])


async def add(source: dict[str, Any], into: dict[str, Any], *, own_layer: bool, guard: Sequence[int],
              on_percent: Callable[[float], None]) -> None:  # fmt: skip
    """Write what `source` shows into an image that nobody uses; `own_layer`: only what its topmost file itself holds.

    Without `own_layer` the image is new and empty. Raise ToolFailed.
    """
    if own_layer:
        await qemu_img.convert_into(source, into, clone=False, guard=guard, on_percent=on_percent)
    else:
        await qemu_img.convert_new(source, into, guard=guard, on_percent=on_percent)
