"""The micro guest and its consistency oracle, without diskchain: every other test relies on them."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.console import Console
from tests.support.guest import boot_words, guest_files

DISKS = ("vda", "vdb")
STATE = "state"


class RawQemu:
    """A QEMU with two qcow2 disks, a console log and a QMP socket in one directory."""

    def __init__(self, directory: Path, modes: str, *, cpus: int = 1, restore: bool = False) -> None:
        self._socket = directory / "qmp"
        self._socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(make_argv(directory, modes, cpus, restore), cwd=directory)
        self._qmp = self._connect()
        self._replies = self._qmp.makefile("r")
        self._replies.readline()
        self.execute("qmp_capabilities")

    def _connect(self) -> socket.socket:
        qmp = socket.socket(socket.AF_UNIX)
        wait_until(lambda: qmp.connect_ex(str(self._socket)) == 0)
        return qmp

    def execute(self, command: str, **arguments: str) -> Any:
        self._qmp.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        for line in self._replies:
            reply = json.loads(line)
            if "event" not in reply:
                return reply["return"]
        raise EOFError(f"QEMU ended during {command}")

    def save_state(self) -> None:
        """Stop the guest and write memory and devices to the state file."""
        self.execute("stop")
        self.execute("migrate", uri=f"exec:cat >{STATE}")
        wait_until(lambda: self.execute("query-migrate").get("status") == "completed")

    def cont_restored(self) -> None:
        wait_until(lambda: self.execute("query-status")["status"] != "inmigrate")
        self.execute("cont")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._replies.close()
        self._qmp.close()


def make_argv(directory: Path, modes: str, cpus: int, restore: bool) -> list[str]:
    kernel, initrd = guest_files()
    # fmt: off
    argv = [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none",
        "-machine", "q35,accel=tcg", "-cpu", "max", "-m", "256", "-smp", str(cpus),
        "-kernel", str(kernel), "-initrd", str(initrd), "-append", boot_words(modes),
        "-qmp", "unix:qmp,server=on,wait=off",
        "-chardev", "file,id=serial,path=console,append=on", "-device", "isa-serial,chardev=serial",
    ]
    # fmt: on
    for disk in DISKS:
        argv += ["-blockdev", f"driver=qcow2,node-name={disk},file.driver=file,file.filename={directory / disk}"]
        argv += ["-device", f"virtio-blk-pci,drive={disk}"]
    return [*argv, "-incoming", f"exec:cat {STATE}"] if restore else argv


def wait_until(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def set_counter(disk: Path, low_byte: int) -> None:
    """Change the counter on a disk behind the guest's back."""
    command = f"write -P {low_byte} 8 1"
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, str(disk)], check=True, stdout=subprocess.DEVNULL)


def is_between_rounds(state: Path, counter: int) -> bool:
    """Whether the round that the saved guest began last is the one that wrote this counter (`begun` in counter.c)."""
    return b"round last begun" + (counter - 1).to_bytes(8, "little") in state.read_bytes()


def damage_memory(state: Path, counter: int) -> None:
    """Change one byte in each of the 50 pages of the memory area that were written last (see counter.c)."""
    data = bytearray(state.read_bytes())
    for n in range(counter - 50, counter):
        first_word = ((n + 1) * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "little")
        page = data.find(first_word)
        assert page > 0
        data[page + 800] ^= 1
    state.write_bytes(data)


class Bench:
    """A directory with two disks and a console, and the QEMUs that were started on it one after another."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.console = Console(directory / "console", each=0.001)  # to stop the guest when a round has just ended
        self._started: list[RawQemu] = []
        for disk in (d for d in DISKS if not (directory / d).exists()):
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(directory / disk), "32M"], check=True)

    def start(self, modes: str, *, cpus: int = 1, restore: bool = False) -> RawQemu:
        qemu = RawQemu(self.directory, modes, cpus=cpus, restore=restore)
        self._started.append(qemu)
        return qemu

    def count_to(self, n: int, after: int = 0) -> None:
        self.console.wait(rf"^C {n} bad=", after=after)

    def save_at_100(self, *, cpus: int = 1) -> int:
        """Boot, save the state at about 100, kill. Return the counter."""
        qemu = self.start("cnt", cpus=cpus)
        self.count_to(100)
        qemu.save_state()
        qemu.kill()
        counter = self.console.counter()
        assert counter is not None
        assert not self.console.bad()
        return counter

    def close(self) -> None:
        for qemu in self._started:
            qemu.kill()
        self.console.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The directory of a guest that was saved at about 100 and killed, and its counter.

    Not in the middle of a round, whose write may still be to come: it would write its next counter over one that a
    test changed, without a look at it.
    """
    for _ in range(15):
        directory = tmp_path_factory.mktemp("kept")
        bench = Bench(directory)
        counter = bench.save_at_100()
        bench.close()
        if is_between_rounds(directory / STATE, counter):
            return directory, counter
    raise AssertionError("the guest was never saved between two rounds")


@pytest.fixture
def saved(kept: tuple[Path, int], tmp_path: Path) -> Iterator[tuple[Bench, int]]:
    """A copy of it."""
    directory, counter = kept
    for name in (*DISKS, STATE, "console"):
        shutil.copyfile(directory / name, tmp_path / name)
    bench = Bench(tmp_path)
    yield bench, counter
    bench.close()


def test_count_killed_and_booted_again_continues(bench: Bench) -> None:
    qemu = bench.start("cnt")
    assert bench.console.wait(r"^C START (.*)")[1] == "0"
    bench.count_to(50)
    qemu.kill()
    mark = bench.console.mark()
    last = bench.console.counter()
    assert last is not None
    bench.start("cnt")
    start = int(bench.console.wait(r"^C START (\d+)$", after=mark)[1])
    assert last <= start <= last + 1
    bench.count_to(start + 50)
    assert bench.console.bad() == []


def test_count_with_two_cpus_finds_nothing_bad(bench: Bench) -> None:
    bench.start("cnt,tick", cpus=2)
    bench.count_to(300)
    assert bench.console.bad() == []


def test_count_rebooted_continues(bench: Bench) -> None:
    bench.start("cnt,reboot1")
    bench.console.wait("^GUEST REBOOT")
    mark = bench.console.mark()
    assert int(bench.console.wait(r"^C START (\d+)$", after=mark)[1]) > 0
    assert bench.console.bad() == []


def test_restore_unchanged_finds_nothing_bad(saved: tuple[Bench, int]) -> None:
    bench, counter = saved
    bench.start("cnt", restore=True).cont_restored()
    bench.count_to(counter + 100)
    assert bench.console.bad() == []


def test_restore_unchanged_with_two_cpus_finds_nothing_bad(bench: Bench) -> None:
    counter = bench.save_at_100(cpus=2)
    bench.start("cnt", cpus=2, restore=True).cont_restored()
    bench.count_to(counter + 100)
    assert bench.console.bad() == []


@pytest.mark.parametrize("disk", DISKS)
def test_restore_with_other_disk_content_is_caught(saved: tuple[Bench, int], disk: str) -> None:
    bench, counter = saved
    set_counter(bench.directory / disk, 7)
    bench.start("cnt", restore=True).cont_restored()
    found = bench.console.wait(rf"^C MISMATCH mem=(\d+) .*{disk}=7\b")
    assert counter <= int(found[1]) <= counter + 1
    assert bench.console.bad() == [found.string]


def test_restore_with_old_log_is_caught(saved: tuple[Bench, int]) -> None:
    bench, _ = saved
    zero_log = ["qemu-io", "-f", "qcow2", "-c", "write -z 1M 16M", str(bench.directory / "vdb")]
    subprocess.run(zero_log, check=True, stdout=subprocess.DEVNULL)
    bench.start("cnt", restore=True).cont_restored()
    bench.console.wait(r"^C BADLOG vdb want=\d+ have=0 ")


def test_restore_with_other_memory_is_caught(saved: tuple[Bench, int]) -> None:
    bench, counter = saved
    damage_memory(bench.directory / STATE, counter)
    bench.start("cnt", restore=True).cont_restored()
    bench.console.wait(r"^C BADMEM thread1 page=\d+ word=100 ")


@pytest.mark.parametrize("disk", DISKS)
def test_boot_with_torn_disks_is_reported(saved: tuple[Bench, int], disk: str) -> None:
    bench, _ = saved
    set_counter(bench.directory / disk, 7)
    mark = bench.console.mark()
    bench.start("cnt")
    bench.console.wait(rf"^C START TORN .*{disk}=7\b", after=mark)
    assert bench.console.bad(mark)


def test_write_fills_the_disk_with_the_pattern(bench: Bench) -> None:
    qemu = bench.start("write=vda:4:2:0xab;vdb:1:1:7")
    bench.console.wait("^W done")
    qemu.kill()
    for disk, command in (("vda", "read -P 0xab 4M 2M"), ("vdb", "read -P 7 1M 1M"), ("vdb", "read -P 0 2M 30M")):
        argv = ["qemu-io", "-f", "qcow2", "-c", command, str(bench.directory / disk)]
        output = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
        assert "Pattern verification failed" not in output


def test_dirty_and_touch_report_their_work(bench: Bench) -> None:
    bench.start("touch16,dirty8")
    bench.console.wait("^M touched 16")
    bench.console.wait("^D round 3")


def test_power_button_powers_off(bench: Bench) -> None:
    qemu = bench.start("cnt")
    bench.console.wait("^GUEST UP")
    qemu.execute("system_powerdown")
    bench.console.wait("^GUEST POWEROFF")
    assert qemu.process.wait(30) == 0
    assert bench.console.bad() == []


def test_power_button_with_nopower_is_ignored(bench: Bench) -> None:
    qemu = bench.start("nopower,tick")
    bench.console.wait("^T ")
    qemu.execute("system_powerdown")
    with pytest.raises(subprocess.TimeoutExpired):
        qemu.process.wait(5)
    bench.console.wait("^T ", after=bench.console.mark())
    assert not any(re.search("POWEROFF", line) for _, line in bench.console.lines())


def test_stopped_guest_shows_as_gap(bench: Bench) -> None:
    qemu = bench.start("tick")
    bench.console.wait("^T 100 ")
    begin = time.monotonic()
    qemu.execute("stop")
    time.sleep(1)
    qemu.execute("cont")
    bench.console.wait("^T ", after=bench.console.mark())
    assert 1 <= bench.console.longest_gap(begin, time.monotonic()) < 5
