"""A guest that sleeps (ACPI S3): what can't work is refused before anything changes, what is done leaves it asleep."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.console import Console
from tests.support.refusals import picture
from tests.support.rig import MiB, Rig, process_state, wait_for

COUNT = r"^C (\d+) bad="  # `C START` may follow the shell's prompt on its line


class Sleeper:
    """A guest that counts, and goes to sleep when it is told to on its console."""

    def __init__(self, directory: Path) -> None:
        self.rig = Rig(directory, size=16 * MiB, modes="cnt,shell")
        self.rig.build(guest=True)
        machine = (
            self.rig.dir / "vm.toml"
        )  # an unpacked kernel QEMU loads anew at the reset that a wake-up is, over the guest
        machine.write_text(machine.read_text().replace('/vmlinux"', '/vmlinuz"'))
        self.rig.ok("machine", "define", str(machine))
        self.rig.ok("start", "vm")
        self.console = Console(self.rig.console())
        self.console.wait(r"^C 30 bad=")

    def state(self) -> str:
        """What diskchain says of it."""
        return str(self.rig.ok("list", "vm", "--json").json["state"])

    def sleep(self) -> None:
        """Suspend to RAM, from inside."""
        argv = [sys.executable, "-m", "diskchain", "console", "vm", "--linger", "0"]
        subprocess.run(argv, env=self.rig.env, input=b"\necho mem >/sys/power/state\n", check=True, capture_output=True)
        wait_for(lambda: self.state() == "suspended", "it sleeps")

    def counts(self, after: int) -> None:
        """It counts on, without a boot, and its memory and disks agree."""
        self.console.wait(COUNT, after=after)
        now = self.console.counter() or 0
        wait_for(lambda: (self.console.counter() or 0) > now + 20, "it counts on")
        lines = [line for _, line in self.console.lines(after)]
        assert not [line for line in lines if "C START" in line] and self.console.bad(after=after) == []

    def wake(self) -> None:
        """By `resume`; it goes on where it was."""
        mark = self.console.mark()
        self.rig.ok("resume", "vm")
        self.counts(mark)


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[Sleeper]:
    """One guest, awake."""
    found = Sleeper(tmp_path / "vm")
    yield found
    found.console.close()
    found.rig.destroy()


@pytest.mark.timeout(300)
def test_suspended_guest_keeps_its_memory_to_itself_and_wakes_after_everything(sleeper: Sleeper) -> None:
    """Saving it is refused by name (exit 6), and nothing is changed; the disks alone work, and it sleeps on."""
    rig = sleeper.rig
    sleeper.sleep()
    before = picture(rig.dir)
    for words in (("create", "vm", "t"), ("create", "vm", "t", "--memory"), ("create", "vm", "t", "--memory=paused"),
                  ("create", "vm", "t", "--disk-only", "--quiesce"), ("pause", "vm"), ("stop", "vm")):  # fmt: skip
        answer = rig.run(*words)
        assert answer.code == 6 and ("sleeps" in answer.err or "suspended" in answer.err), (words, answer)
        assert "diskchain resume vm" in answer.err, answer.err
        assert sleeper.state() == "suspended" and picture(rig.dir) == before, words
    assert rig.ok("create", "vm", "s", "--disk-only", "--json").json["snapshot"]["was"] == "suspended"
    assert rig.run("revert", "vm", "s", "--keep-memory", "-y").code == 6
    assert sleeper.state() == "suspended" and rig.file_verdict() == []
    sleeper.wake()
    rig.ok("create", "vm", "m", "--memory")
    sleeper.counts(sleeper.console.mark())
    mark = sleeper.console.mark()
    rig.ok("revert", "vm", "m", "--discard", "-y")
    sleeper.counts(mark)


@pytest.mark.timeout(300)
def test_revert_of_a_suspended_guest_boots_and_undo_leads_back(sleeper: Sleeper) -> None:
    """Its sleep is lost with its memory, as a power cut would: it starts from the disks, both ways."""
    rig = sleeper.rig
    rig.ok("create", "vm", "s", "--disk-only")
    for words in (("revert", "vm", "s", "-y"), ("undo", "vm", "-y")):
        sleeper.sleep()
        mark = sleeper.console.mark()
        assert rig.ok(*words, "--json").json["state"] == "running"
        sleeper.console.wait(r"C START ", after=mark)
        sleeper.console.wait(COUNT, after=mark)
        assert sleeper.console.bad(after=mark) == [] and rig.file_verdict() == []
    sleeper.sleep()
    rig.ok("stop", "vm", "--force", "-y")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("memory", ["--memory=paused", "--memory"])
def test_guest_that_falls_asleep_during_create_is_not_saved(sleeper: Sleeper, memory: str) -> None:
    """After the look, before the pause: undone, and it wakes."""
    process = sleeper.rig.popen("create", "vm", "t", memory, fault="stop:create.prepared.after")
    wait_for(lambda: process_state(process.pid) in ("T", "t") or process.poll() is not None, "create has begun")
    sleeper.sleep()
    os.kill(process.pid, signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 6 and "sleeps" in err, (process.returncode, err)
    assert sleeper.state() == "suspended" and sleeper.rig.file_verdict() == []
    assert "t" not in sleeper.rig.snapshots()
    sleeper.wake()
