"""Snapshots split the guest's memory into small pages; diskchain puts it together again. Figures of the kernel, no times.

What is judged: AnonHugePages and Rss of QEMU's mapping of the guest's memory, and the guest, which counts meanwhile and
finds every byte that is not its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.console import Console
from tests.support.ram import Ram, guest_ram
from tests.support.rig import MiB, Rig

OFF = "[create]\nhuge_pages = false\n"


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A guest that counts in memory and on a disk, and holds 100 MiB."""
    rig = Rig(tmp_path / "vm", memory="256 MiB", modes="cnt,touch100", targets=("vda",))
    rig.build(guest=True)
    rig.ok("start", "vm")
    yield rig
    rig.destroy()


def ram(rig: Rig) -> Ram:
    """The guest's memory now."""
    pid = rig.pid()
    assert pid
    return guest_ram(pid)


def counts_on(console: Console) -> None:
    """The guest counts on from here and never found anything wrong."""
    now = console.counter() or 0
    console.wait(rf"^C {now + 100} bad=0")
    assert console.bad() == []


def with_memory(rig: Rig, name: str) -> None:
    """Take a snapshot; its memory must be saved."""
    answer = rig.ok("create", "vm", name, "--memory", "--json").json
    assert answer["snapshot"]["memory"]["status"] == "saved"


def collapsed_by_the_kernel() -> int:
    """How many ranges khugepaged has collapsed by itself, which it may do with half used ones; what we ask for is not in it."""
    return int(Path("/sys/kernel/mm/transparent_hugepage/khugepaged/pages_collapsed").read_text())


@pytest.mark.timeout(300)
def test_create_puts_full_ranges_into_huge_pages_and_leaves_partly_used_ones(rig: Rig) -> None:
    """Off: split. On: together again, after the save. Ranges half used stay so: resident memory grows less than 5 %."""
    with Console(rig.console()) as console:
        console.wait("^M touched")
        counts_on(console)
        fresh = ram(rig)
        assert fresh.huge > 0.9 * fresh.resident, "a fresh guest has huge pages"
        rig.configure(OFF)
        with_memory(rig, "split")
        assert ram(rig).huge < 0.2 * fresh.resident, "saving memory did not split them: this test proves nothing"

        half = [n for n, used in enumerate(ram(rig).used()) if used == 0][:15]
        assert len(half) == 15
        ram(rig).use(half, every=2)
        before, kernel = ram(rig), collapsed_by_the_kernel()
        assert [before.used()[n] for n in half] == [256] * 15

        rig.configure("")
        with_memory(rig, "together")
        after = ram(rig)
        assert after.huge >= 0.9 * fresh.resident
        assert after.resident <= 1.05 * before.resident
        grown = [n for n in half if after.used()[n] != 256]
        assert len(grown) <= collapsed_by_the_kernel() - kernel, (
            "half used ranges were collapsed, and not by khugepaged"
        )
        counts_on(console)

        mark = console.mark()
        rig.ok("revert", "vm", "together", "--discard", "-y")
        console.wait(r"^C \d+ bad=0", after=mark)
        counts_on(console)
        assert not [line for _, line in console.lines() if line.startswith("GUEST UP")][1:], "it was booted"


@pytest.mark.timeout(300)
def test_create_without_the_right_to_it_works_and_says_so_once(rig: Rig) -> None:
    """No CAP_SYS_NICE, as without root: the snapshot is made, with memory; one line tells; the memory stays split."""
    with Console(rig.console()) as console:
        console.wait("^M touched")
        prefix = ["setpriv", "--bounding-set=-sys_nice"]
        answer = rig.run("-v", "create", "vm", "s", "--memory", "--json", prefix=prefix)
        assert answer.code == 0 and answer.json["snapshot"]["memory"]["status"] == "saved"
        told = [line for line in answer.err.splitlines() if "huge pages" in line]
        assert len(told) == 1 and "CAP_SYS_NICE" in told[0], answer.err
        assert ram(rig).huge < 0.2 * ram(rig).resident
        counts_on(console)


@pytest.mark.timeout(300)
def test_recover_finishes_a_save_and_puts_the_memory_together(rig: Rig) -> None:
    """diskchain dies while memory is saved: whoever finishes it does this part, too. Killed in this part: nothing left."""
    with Console(rig.console()) as console:
        console.wait("^M touched")
        fresh = ram(rig)
        assert rig.killed("create", "vm", "s", "--memory", at="create.huge-pages#1")
        assert rig.journal() == [] and rig.snapshots() == {}
        assert rig.killed("create", "vm", "s", "--memory", at="create.saving.after")
        rig.ok("recover", "vm")
        assert rig.ok("list", "vm", "--json").json["snapshots"][0]["state"] == "memory"
        assert ram(rig).huge >= 0.9 * fresh.resident
        assert ram(rig).resident <= 1.05 * fresh.resident + 8 * MiB  # the guest may have used more meanwhile
        assert rig.killed("create", "vm", "t", "--memory", at="create.huge-pages#2")
        assert rig.journal() == [] and rig.ok("list", "vm", "--json").json["snapshots"][1]["state"] == "memory"
        counts_on(console)
