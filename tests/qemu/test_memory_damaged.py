"""Memory files that are not what was saved: exit 8 before any QEMU sees them; the running guest counts on."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from diskchain.store.memory_file import read_header
from tests.support.console import Console
from tests.support.refusals import refused
from tests.support.rig import MiB, Rig, wait_for

COUNT = r"^C (\d+) bad="


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, Console]]:
    """A guest that counts, with two snapshots with memory."""
    rig = Rig(tmp_path_factory.mktemp("memory") / "vm", size=16 * MiB)
    rig.build(guest=True)
    rig.ok("start", "vm")
    with Console(rig.console()) as console:
        console.wait(r"^C 20 bad=")
        rig.ok("create", "vm", "one", "--memory")
        rig.ok("create", "vm", "two", "--memory")
        yield rig, console
    rig.destroy()


def memory_of(rig: Rig, name: str) -> Path:
    """The memory file of a snapshot."""
    (snapshot,) = (s for s in rig.catalog()["snapshots"].values() if s["name"] == name)
    (path,) = rig.dir.glob(f".diskchain/*/snapshots/{snapshot['id']}/memory")
    return path


def counts_on(console: Console) -> None:
    """The guest counts five more rounds and has nothing to complain about."""
    mark = console.mark()
    first = int(console.wait(COUNT, after=mark)[1])
    wait_for(lambda: (console.counter() or 0) >= first + 5, "the guest counts on")
    assert console.bad() == []


def refused_untouched(rig: Rig, console: Console, name: str = "one") -> None:
    """The revert is refused; the same QEMU goes on with the same catalog."""
    pid, catalog, mark = rig.pid(), rig.catalog(), console.mark()
    error = refused(rig, "revert", "vm", name, "-y", code=8, says="memory")
    assert error["kind"] == "MemoryDamaged" and "--cold" in error["hint"]
    assert rig.pid() == pid and rig.catalog() == catalog and not rig.journal()
    assert not [line for _, line in console.lines(mark) if line.startswith("C START")]


def flip(path: Path, bit: int) -> None:
    """Flip one bit; a second time puts it back."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


@pytest.mark.timeout(120)
def test_one_flipped_bit_anywhere_in_the_stream_is_found(live: tuple[Rig, Console]) -> None:
    """Twenty seeded places, the first and the last bit among them, and four in the header."""
    rig, console = live
    path = memory_of(rig, "one")
    fd = os.open(path, os.O_RDONLY)
    stream, end = read_header(fd).stream, os.fstat(fd).st_size
    os.close(fd)
    chosen = random.Random(20)
    bits = [stream * 8, end * 8 - 1, *(chosen.randrange(stream * 8, end * 8) for _ in range(18))]
    header = [3, 16 * 8, 20 * 8 + 14, 28 * 8]  # magic, version, length, compression
    for bit in [*bits, *header]:
        flip(path, bit)
        refused_untouched(rig, console)
        flip(path, bit)
    counts_on(console)


def test_memory_file_cut_exchanged_unfinished_or_no_file_is_refused(live: tuple[Rig, Console]) -> None:
    """Each time the file is put back; at the end the snapshot is as good as before."""
    rig, console = live
    path, other = memory_of(rig, "one"), memory_of(rig, "two")
    aside = rig.dir.parent / "aside"
    for length in (0, 1, 91, 4096, path.stat().st_size // 2, path.stat().st_size - 1):
        shutil.copyfile(path, aside)
        os.truncate(path, length)
        refused_untouched(rig, console)
        shutil.copyfile(aside, path)
    with path.open("r+b") as file:
        file.write(b"LibvirtQemudPart")
    refused_untouched(rig, console)
    with path.open("r+b") as file:
        file.write(b"LibvirtQemudSave")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)
    refused_untouched(rig, console, "one")
    refused_untouched(rig, console, "two")
    path.rename(aside)
    other.rename(path)
    refused_untouched(rig, console, "two")  # it is missing now
    for make in (os.mkfifo, os.mkdir, lambda p: os.symlink(aside, p)):
        make(other)
        refused_untouched(rig, console, "two")
        other.rmdir() if other.is_dir() and not other.is_symlink() else other.unlink()
    aside.rename(other)
    counts_on(console)


def test_cold_revert_works_with_a_bad_memory_file_and_a_good_one_is_loaded(live: tuple[Rig, Console]) -> None:
    """--cold boots from the disks; afterwards the whole file of the other snapshot is loaded as ever."""
    rig, console = live
    flip(memory_of(rig, "one"), 80_000_000)
    mark = console.mark()
    rig.ok("revert", "vm", "one", "--cold", "-y")
    console.wait(r"^C START", after=mark)
    console.wait(COUNT, after=mark)
    mark = console.mark()
    rig.ok("revert", "vm", "two", "-y")
    console.wait(COUNT, after=mark)
    counts_on(console)
    assert not [line for _, line in console.lines(mark) if line.startswith("C START")]
    assert rig.file_verdict() == []


def test_killed_qemu_is_seen_as_stopped_starts_again_and_can_be_snapshotted(live: tuple[Rig, Console]) -> None:
    """SIGKILL is a power cut; nothing that was on disk is lost."""
    rig, console = live
    counts_on(console)
    pid, counted = rig.pid(), console.counter() or 0
    assert pid
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: rig.pid() is None, "QEMU is gone")
    (machine,) = rig.ok("machine", "list", "--json").json["machines"]
    assert machine["state"] == "stopped"
    assert rig.file_verdict() == []
    rig.ok("create", "vm", "after-the-kill")
    mark = console.mark()
    rig.ok("start", "vm")
    assert int(console.wait(r"^C START (\d+)", after=mark)[1]) >= counted - 5
    counts_on(console)
    rig.ok("create", "vm", "with-memory", "--memory")
    mark = console.mark()
    rig.ok("revert", "vm", "with-memory", "--discard", "-y")
    console.wait(COUNT, after=mark)
    counts_on(console)
    assert rig.file_verdict() == []
