"""What QEMU calls the files of a domain's disks, and which of libvirt's devices they belong to."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from diskchain.drivers.libvirt_blocks import drop_unused, file_of, written_files
from diskchain.errors import DriverFailed


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("/vm/a.qcow2", "/vm/a.qcow2"),
        (
            'json:{"backing": {"driver": "qcow2"}, "driver": "qcow2", "file": {"driver": "file", "filename": "/vm/a:b"}}',
            "/vm/a:b",
        ),
        ('json:{"driver": "copy-on-read", "file": {"driver": "raw", "file": {"filename": "/vm/b.img"}}}', "/vm/b.img"),
    ],
)
def test_file_is_found_in_what_qemu_calls_it(name: str, path: str) -> None:
    """A path, or the options that the image was opened with."""
    assert file_of(name) == Path(path)


@pytest.mark.parametrize("name", ["", "nbd://host/x", "json:", "json:[1]", 'json:{"file": "node"}', "json:{}"])
def test_file_that_qemu_does_not_tell_is_none(name: str) -> None:
    """Network disks, nodes by name, nonsense."""
    assert file_of(name) is None


class Monitor:
    """Answers with what it was given; refuses to close what is in use."""

    def __init__(self, answers: dict[str, Any], in_use: tuple[str, ...] = ()) -> None:
        self.answers, self.in_use, self.closed = answers, in_use, list[str]()

    async def execute(self, command: str, **arguments: Any) -> Any:
        if command != "blockdev-del":
            return self.answers[command]
        if arguments["node_name"] in self.in_use:
            raise DriverFailed("in use")
        self.closed.append(arguments["node_name"])
        return {}

    def send_fd(self, fd: int) -> None:
        raise AssertionError


def test_written_files_by_alias_whatever_the_device() -> None:
    """virtio by its path, SCSI and IDE by their id; a disk that libvirt does not name is nobody's."""
    blocks = [
        {"qdev": "/machine/peripheral/virtio-disk0/virtio-backend", "inserted": {"file": "/vm/a.qcow2"}},
        {"qdev": "scsi0-0-0-0", "inserted": {"file": 'json:{"file": {"filename": "/vm/b.qcow2"}}'}},
        {"qdev": "/machine/peripheral/virtio-disk01/virtio-backend", "inserted": {"file": "/vm/other"}},
        {"qdev": "ide0-1-0"},
    ]
    aliases = {"vda": "virtio-disk0", "sda": "scsi0-0-0-0", "sdb": "ide0-1-0"}
    found = asyncio.run(written_files(Monitor({"query-block": blocks}), aliases))
    assert found == {"vda": Path("/vm/a.qcow2"), "sda": Path("/vm/b.qcow2")}


def test_drop_unused_closes_the_format_first_and_passes_over_what_is_in_use() -> None:
    """Nothing but what was asked for."""
    nodes = [
        {"node-name": "s1", "drv": "file", "file": "/vm/o.qcow2"},
        {"node-name": "f1", "drv": "qcow2", "file": "/vm/o.qcow2"},
        {"node-name": "f0", "drv": "qcow2", "file": "/vm/a.qcow2"},
        {"node-name": "f2", "drv": "qcow2", "file": "/vm/p.qcow2"},
    ]
    monitor = Monitor({"query-named-block-nodes": nodes}, in_use=("f2",))
    asyncio.run(drop_unused(monitor, [Path("/vm/o.qcow2"), Path("/vm/p.qcow2")]))
    assert monitor.closed == ["f1", "s1"]
