"""qemu-img check -r leaks: the one repair that can't lose anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from diskchain.host.process import run


async def repair_leaks(node: dict[str, Any], guard: Sequence[int]) -> None:
    """Let clusters go that are reserved and that nothing uses. `guard`: as in qemu_img. Raise ToolFailed."""
    argv = ["qemu-img", "check", "-q", "-r", "leaks", "json:" + json.dumps(node)]
    await run(argv, timeout=None, ok=(0, 3), pass_fds=guard)
