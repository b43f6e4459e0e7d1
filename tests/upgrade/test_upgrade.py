"""The host is upgraded, and with it QEMU: what the old one saved is reverted to by the new one, and the other way round.

The old system (Debian 12) is a directory in the new one (Debian 13, where the tests run); both run the same diskchain on
the same files, each with its own QEMU and Python.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.console import Console
from tests.support.refusals import refused
from tests.support.rig import Rig
from tests.support.states import TPM, UEFI, Parts

OLD_ROOT, OLD_PYTHON = os.environ["DISKCHAIN_OLD_ROOT"], os.environ["DISKCHAIN_OLD_PYTHON"]
COUNT = r"^C (\d+) bad=(\d+)"


@dataclass
class OldRig(Rig):
    """Its diskchain, and what that starts, is the old system's."""

    forked: bool = False

    def popen(self, *args: str, fault: str = "", prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Start the old system's diskchain."""
        return subprocess.Popen(
            ["chroot", OLD_ROOT, *prefix, OLD_PYTHON, "-m", "diskchain", *args],
            env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip


@pytest.fixture(params=["q35", "pc"])
def old(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[OldRig]:
    """A machine with two CPUs that was defined under the old QEMU."""
    rig = OldRig(tmp_path / "vm", cpus=2, parts=[f'machine = "{request.param}"'])
    rig.build(guest=True)
    yield rig
    rig.destroy()


def after_the_upgrade(old: Rig) -> Rig:
    """The same machine, seen from the new system."""
    new = Rig(old.dir)
    new.run_dir.rmdir()
    new.run_dir = old.run_dir
    return new


def counted(console: Console, mark: int) -> int:
    """Wait for the guest to count on; return the first number after the mark. None may say that something is wrong."""
    first = console.wait(COUNT, after=mark, timeout=60)
    console.wait(COUNT, after=console.mark(), timeout=60)
    lines = [line for _, line in console.lines(mark)]
    assert not [line for line in lines if line.startswith("GUEST UP")], "the guest was booted"
    assert all(found[2] == "0" for line in lines if (found := re.match(COUNT, line))), lines
    return int(first[1])


def reverted(rig: Rig, name: str, console: Console) -> int:
    """Revert a running guest; return the first number it says then. Paused before, so that it is not one of before."""
    rig.ok("pause", "vm")
    mark = console.mark()
    rig.ok("revert", "vm", name, "-y")
    return counted(console, mark)


def runs_old_qemu(rig: Rig) -> bool:
    """Which of the two systems the machine's QEMU comes from."""
    return os.readlink(f"/proc/{rig.pid()}/exe").startswith(f"{OLD_ROOT}/")


@pytest.mark.timeout(300)
def test_revert_to_memory_that_the_old_qemu_saved_goes_on_under_the_new_one(old: OldRig) -> None:
    """Saved by either diskchain, memory and disks of one instant; then the old QEMU takes what the new one saved."""
    new = after_the_upgrade(old)
    old.ok("start", "vm")
    with Console(old.console()) as console:
        console.wait(r"^C [1-9]\d bad=", timeout=60)
        old.ok("create", "vm", "by-old", "--memory")
        at_old = counted(console, console.mark())
        console.wait(COUNT, after=console.mark())
        new.ok("create", "vm", "by-new-of-old", "--memory")  # upgraded while the VM runs
        assert runs_old_qemu(new)

        assert reverted(new, "by-old", console) <= at_old and not runs_old_qemu(new)
        assert reverted(new, "by-new-of-old", console) > at_old and not runs_old_qemu(new)

        before = counted(console, console.mark())
        new.ok("create", "vm", "by-new", "--memory")
        assert reverted(old, "by-new", console) > before and runs_old_qemu(new)  # the upgrade is taken back
    assert new.ok("check", "vm").code == 0


@pytest.mark.timeout(300)
def test_uefi_and_tpm_of_the_old_system_go_on_under_the_new_one_and_boot_there(tmp_path: Path) -> None:
    """Live with the firmware's code from the saved memory; then cold with the new firmware on the old variables."""
    old = OldRig(tmp_path / "vm", memory="256 MiB", modes="cnt,efi,tpm", parts=(UEFI, TPM), targets=("vda",))
    new = after_the_upgrade(old)
    try:
        old.build(guest=True)
        old.ok("start", "vm")
        parts = Parts(new)
        parts.console.wait(r"^GUEST UP", timeout=120)
        first = parts.resets()
        old.ok("create", "vm", "one", "--memory")
        new.ok("pause", "vm")
        mark = parts.console.mark()
        new.ok("revert", "vm", "one", "-y")
        assert (parts.boots(mark), parts.resets(mark)) == (1, first) and not runs_old_qemu(new)
        assert parts.rounds(mark) == []
        mark = parts.restart()
        assert (parts.boots(mark), parts.resets(mark)) == (2, first + 1)
        assert parts.rounds(mark) == []
        parts.console.close()
    finally:
        new.destroy()


@pytest.mark.timeout(120)
def test_start_after_the_upgrade_keeps_the_machine_type(old: OldRig) -> None:
    """Also when the same machine file is defined again: the guest's hardware does not change behind its back."""
    new = after_the_upgrade(old)
    old.ok("create", "vm", "off")
    before = old.ok("show", "vm", "off", "--json").json
    new.ok("machine", "define", str(new.dir / "vm.toml"))
    new.ok("start", "vm")
    with Console(new.console()) as console:
        console.wait(r"^C [1-9]\d bad=0", timeout=60)
        assert not runs_old_qemu(new)
        new.ok("create", "vm", "on", "--memory")
    after = new.ok("show", "vm", "on", "--json").json
    assert machine_type(before) == machine_type(after) != machine_type_of_new()


@pytest.mark.timeout(120)
def test_revert_to_a_machine_type_that_qemu_lacks_is_refused_while_the_guest_runs(tmp_path: Path) -> None:
    """A machine defined under the new QEMU, the old one installed again: exit 6, the guest counts on; its disks are there."""
    new = Rig(tmp_path / "vm", parts=['machine = "q35"'])
    new.build(guest=True)
    old = OldRig(new.dir)
    old.run_dir.rmdir()
    old.run_dir = new.run_dir
    try:
        new.ok("start", "vm")
        with Console(new.console()) as console:
            console.wait(r"^C [1-9]\d bad=", timeout=60)
            new.ok("create", "vm", "a", "--memory")
            mark, qemu = console.mark(), new.pid()
            for args in (["vm", "a"], ["--cold", "vm", "a"]):
                refused(old, "revert", "-y", *args, code=6, says="no machine type")
            counted(console, mark)
            assert new.pid() == qemu and not new.journal()

            file = new.dir / "vm.toml"
            file.write_text(file.read_text().replace('machine = "q35"', f'machine = "{machine_type_of_old()}"'))
            old.ok("machine", "define", str(file))
            error = refused(old, "revert", "-y", "vm", "a", code=6, says="no machine type")
            assert error["hint"] == "back to its disks only: diskchain revert --cold --config keep vm a"
            mark = console.mark()
            old.ok("revert", "--cold", "--config", "keep", "-y", "vm", "a")
            console.wait(r"^GUEST UP", after=mark, timeout=60)
            console.wait(r"^C [1-9]\d* bad=0", after=mark, timeout=60)
            assert runs_old_qemu(new)
    finally:
        new.destroy()


def machine_type(shown: dict[str, object]) -> str:
    """The machine type in what `show --json` says."""
    found = re.search(r"pc-(q35|i440fx)-[0-9.]+", str(shown))
    assert found, shown
    return found[0]


def newest_type(*before: str) -> str:
    """What q35 stands for."""
    done = subprocess.run(
        [*before, "qemu-system-x86_64", "-machine", "help"], capture_output=True, text=True, check=True
    )
    found = re.search(r"alias of (pc-q35-\S+)\)", done.stdout)
    assert found, done.stdout
    return found[1]


def machine_type_of_old() -> str:
    """The old QEMU's newest."""
    return newest_type("chroot", OLD_ROOT)


def machine_type_of_new() -> str:
    """The new QEMU's newest."""
    return newest_type()
