"""qemu-img into a new image: what `elsewhere` needs of it. Formats are given, errors are told to the last word (qemu_img.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from diskchain.errors import ToolFailed
from diskchain.host.process import run
from diskchain.host.qemu_img import METADATA


async def create_alone(fd: int, virtual_size: int) -> None:
    """Write an empty qcow2 image without a backing file into the open file `fd`."""
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", f"/proc/self/fd/{fd}", str(virtual_size)]
    await run(argv, limits=METADATA, pass_fds=[fd])


async def add(source: dict[str, Any], into: dict[str, Any], *, own_layer: bool, guard: Sequence[int],
              on_percent: Callable[[float], None]) -> None:  # fmt: skip
    """Write what `source` shows into an image that nobody uses; `own_layer`: only what its topmost file itself holds.

    Without `own_layer` the image is new and empty. As in qemu_img.convert_into: whatever it says on stderr is a failure.
    """
    how = ["-B", "below"] if own_layer else ["--target-is-zero"]
    argv = ["qemu-img", "convert", "-p", "-n", "-W", "-m", "16", "-t", "writeback", *how, "-O", str(into["driver"]),
            "json:" + json.dumps(source), "json:" + json.dumps(into)]  # fmt: skip

    def progress(text: str) -> None:
        found = re.findall(r"\(([\d.]+)/100%\)", text)
        if found:
            on_percent(float(found[-1]))

    result = await run(argv, timeout=None, pass_fds=guard, on_output=progress)
    if result.stderr.strip():
        raise ToolFailed(argv, result.returncode, result.stderr)
