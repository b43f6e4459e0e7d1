"""A real Debian with systemd and qemu-guest-agent: what --quiesce is for, seen on its root file system."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.console import Console
from tests.support.guest import debian_disk, guest_files
from tests.support.rig import Rig, wait_for

WRITES = r"^F (\d+) (\d+)"


@pytest.fixture
def debian(tmp_path: Path) -> Iterator[tuple[Rig, Console]]:
    """It runs, its program writes files with fsync, its agent answers."""
    rig = Rig(tmp_path / "vm", targets=("vda",))
    shutil.copyfile(debian_disk(), rig.dir / "vda.qcow2")
    kernel, initrd = guest_files()
    (rig.dir / "vm.toml").write_text(
        'name = "vm"\nmemory = "384 MiB"\ncpus = 1\naccel = "tcg"\nagent = true\n'
        f'kernel = "{kernel}"\ninitrd = "{initrd}"\n'
        'append = "console=ttyS0 quiet no_timer_check root=/dev/vda systemd.show_status=0"\n'
        '[[disk]]\ntarget = "vda"\nimage = "vda.qcow2"\n'
    )
    rig.ok("machine", "define", str(rig.dir / "vm.toml"))
    rig.ok("start", "vm")
    console = Console(rig.console())
    try:
        console.wait(r"^F 5 ", timeout=180)
        wait_for(lambda: rig.run("create", "vm", "--quiesce", "-n").code == 0, "its agent answers", timeout=180)
        yield rig, console
    finally:
        console.close()
        rig.destroy()


def journal_is_empty(rig: Rig, name: str, scratch: Path) -> bool:
    """Whether the frozen layer's ext4 can be used as it is; then e2fsck must find nothing."""
    flat = scratch / "flat.raw"
    rig.qemu_img("convert", "-U", "-f", "qcow2", "-O", "raw", str(rig.snapshots()[name]["vda"]), str(flat))
    features = subprocess.run(["dumpe2fs", "-h", flat], capture_output=True, text=True, check=True).stdout
    empty = "needs_recovery" not in features
    if empty:
        done = subprocess.run(["e2fsck", "-fn", flat], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    flat.unlink()
    return empty


def clock(console: Console) -> int:
    """Wait until the guest writes; return its clock."""
    return int(console.wait(WRITES, after=console.mark(), timeout=60)[2])


@pytest.mark.timeout(600)
def test_quiesced_snapshot_of_a_real_debian_is_clean_comes_back_and_boots(
    debian: tuple[Rig, Console], tmp_path: Path
) -> None:
    """Clean on disk (not so without --quiesce); its memory goes on, thawed, at the right time; its disk boots."""
    rig, console = debian
    rig.ok("create", "vm", "control", "--disk-only")
    made = rig.ok("create", "vm", "q", "--quiesce", "--memory", "--json").json["snapshot"]
    assert (made["quiesced"], made["consistency"]) == (True, "memory")
    clock(console)
    assert not journal_is_empty(rig, "control", tmp_path) and journal_is_empty(rig, "q", tmp_path)

    answer = rig.ok("revert", "vm", "q", "-y", "--json").json
    assert "warnings" not in answer
    assert abs(clock(console) - time.time()) <= 3
    rig.ok("create", "vm", "--quiesce", "-n")  # the agent answers, and nothing is frozen

    mark = console.mark()
    rig.ok("revert", "vm", "q", "--cold", "--start", "--discard", "-y")
    assert console.wait(r"^GUEST JOURNAL (\w+)", after=mark, timeout=120)[1] == "CLEAN"
    console.wait(r"^F 5 ", after=mark, timeout=180)

    mark = console.mark()
    rig.ok("revert", "vm", "control", "--start", "--discard", "-y")
    assert console.wait(r"^GUEST JOURNAL (\w+)", after=mark, timeout=120)[1] == "RECOVERED"
