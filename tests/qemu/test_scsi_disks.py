"""Disks on the SCSI controller beside a virtio-blk one: the same snapshots, with memory, and the same undamaged chains."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from diskchain.chain.machine import parse_machine_file
from diskchain.chain.model import Image
from diskchain.drivers.qemu_argv import command_line
from tests.qemu.test_lifecycle import Guest
from tests.support.rig import Rig


def devices(*targets: str) -> list[dict[str, object]]:
    """The disk devices on the command line of a machine with these disks."""
    tables = "".join(f'[[disk]]\ntarget = "{t}"\nimage = "/d/{t}.qcow2"\n' for t in targets)
    machine = parse_machine_file(f'name = "vm"\nmemory = "64 MiB"\naccel = "tcg"\n{tables}', "vm.toml")
    chains = {t: (Image(f"{t}1", Path(f"/d/{t}.qcow2"), "qcow2", t, 0),) for t in targets}
    words = command_line(
        machine, chains, run_dir=Path("/r"), console=Path("/c"), sockets=(), stopped=True, incoming=False
    )
    assert sum(word.startswith("virtio-scsi-pci,") for word in words) == any(t.startswith("sd") for t in targets)
    return [json.loads(word) for word in words if word.startswith('{"driver": "scsi-hd"')]


def test_a_unit_is_told_by_the_target_not_by_the_place_in_the_file() -> None:
    """Else a disk that goes would move the others, and saved memory would find them at other addresses."""
    assert [d["lun"] for d in devices("sda", "sdb", "sdz", "sdaa", "sdab")] == [0, 1, 25, 26, 27]
    assert [(d["id"], d["lun"]) for d in devices("vda", "sdc")] == [("sdc", 2)]
    assert devices("vda", "vdb") == []


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    """A running guest that counts on a virtio-blk disk and two SCSI ones."""
    rig = Rig(tmp_path / "vm", targets=("vda", "sda", "sdc"))
    rig.build(guest=True)
    guest = Guest(rig)
    yield guest
    guest.console.close()
    rig.destroy()


def test_snapshots_with_memory_go_back_and_are_merged(guest: Guest) -> None:
    """The guest counts on all three disks and complains of any that is not as its memory says."""
    rig = guest.rig
    rig.ok("create", "vm", "one", "--memory")
    frozen = {guest.frozen_at("one", target) for target in ("vda", "sda", "sdc")}
    assert min(frozen) >= 30 and max(frozen) - min(frozen) <= 1
    guest.count()
    rig.ok("create", "vm", "two", "--memory")
    guest.count()
    guest.back_to("one", "--discard")
    guest.back_to("two", "--discard")
    rig.ok("stop", "vm", "--force", "-y")
    rig.ok("delete", "vm", "one", "-y")
    guest.back_to("two", "--discard")
    rig.ok("stop", "vm", "--force", "-y")
    assert rig.file_verdict() == []
    mark = guest.console.mark()
    rig.ok("start", "vm")
    guest.console.wait(r"^C START \d+$", after=mark)
    guest.count()
    assert guest.console.bad(after=mark) == []
    rig.ok("check", "vm")
