"""qemu-img as it really is."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from diskchain.errors import ToolFailed
from diskchain.host import qemu_img


def full_when_tables_are_written(path: Path) -> dict[str, Any]:
    """An image whose L2 tables find no space (they are written when it is closed)."""
    file = {"driver": "file", "filename": str(path), "locking": "off"}
    errors = [{"event": "l2_update", "errno": 28, "once": False}]
    return {"driver": "qcow2", "file": {"driver": "blkdebug", "image": file, "inject-error": errors}}


def test_convert_that_loses_its_tables_at_the_end_has_failed(tmp_path: Path) -> None:
    """qemu-img says 0, and `check` finds the image clean: the data is not in it."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "64M"], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top], check=True)
    for command, image in (("write -P 1 0 1M", base), ("write -P 2 0 8M", top)):  # the base has its table already
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, image], check=True, stdout=subprocess.DEVNULL)
    overlay = qemu_img.unlocked(top, "qcow2", qemu_img.unlocked(base, "qcow2"))
    with pytest.raises(ToolFailed, match=r"exit code 0: .*flush"):
        asyncio.run(
            qemu_img.convert_into(
                overlay, full_when_tables_are_written(base), clone=False, guard=(), on_percent=lambda _: None
            )
        )
    assert subprocess.run(["qemu-img", "compare", "-q", base, top]).returncode == 1, "the loss is real"


def test_copy_up_copies_what_is_missing_and_tells_of_what_failed(tmp_path: Path) -> None:
    """The reference stays; without it the overlay shows what was copied, and what it held itself."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    node = qemu_img.unlocked(top, "qcow2", qemu_img.unlocked(base, "qcow2"))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "16M"], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top], check=True)
    for command, image in (("write -P 1 0 8M", base), ("write -P 2 1M 1M", top)):
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, image], check=True, stdout=subprocess.DEVNULL)
    copied: list[int] = []
    work = [(0, 1 << 20), (2 << 20, 8 << 20)]
    asyncio.run(qemu_img.copy_up(node, work, guard=(), on_bytes=copied.append))
    assert copied[-1] == 7 << 20
    before = subprocess.run(["qemu-img", "info", "--output=json", top], check=True, capture_output=True).stdout
    assert json.loads(before)["backing-filename"] == "base.qcow2"
    asyncio.run(qemu_img.rebase_node(qemu_img.unlocked(top, "qcow2"), "", ""))
    reads = ["read -P 1 0 1M", "read -P 2 1M 1M", "read -P 1 2M 6M", "read -P 0 8M 8M"]
    words = [word for read in reads for word in ("-c", read)]
    said = subprocess.run(
        ["qemu-io", "-r", "-f", "qcow2", *words, top], check=True, capture_output=True, text=True
    ).stdout
    assert "Pattern" not in said
    with pytest.raises(ToolFailed, match="readv failed: Input/output error"):
        asyncio.run(qemu_img.copy_up(node, [(15 << 20, 17 << 20)], guard=(), on_bytes=copied.append))
