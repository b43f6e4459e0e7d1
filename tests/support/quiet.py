"""A running machine with the real guest agent and a program that writes to an ext4 on vdb all the time."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.support.console import Console
from tests.support.fake_agent import FakeAgent
from tests.support.rig import Rig

WRITES = r"^F (\d+) (\d+)"


class Quiet:
    """The rig, its console, and questions about its writer."""

    def __init__(self, directory: Path, modes: str = "cnt,tick,fsvdb,agent", make: Callable[..., Rig] = Rig) -> None:
        self.rig = make(directory, modes=modes, raw=("vdb",), ext4=("vdb",), agent=True)
        self.rig.build(guest=True)
        try:
            self.rig.ok("start", "vm")
            self.console = Console(self.rig.console())
            self.console.wait(r"^F 5 ")
            self.console.wait(r"^GUEST UP")
        except BaseException:  # nobody has us yet to destroy it
            self.rig.destroy()
            raise

    process: subprocess.Popen[str]  # what a test has started last

    def destroy(self) -> None:
        """Remove everything."""
        self.console.close()
        self.rig.destroy()

    def writes(self, *, after: int | None = None, timeout: float = 30) -> tuple[int, int]:
        """Wait until the guest's program writes; return its number and the guest's clock."""
        found = self.console.wait(WRITES, after=self.console.mark() if after is None else after, timeout=timeout)
        return int(found[1]), int(found[2])

    def stands(self, ticks: int = 40) -> bool:
        """Whether the program does not write while the guest's clock ticks on (a frozen file system looks so)."""
        self.console.wait(r"^T ", after=self.console.mark())
        time.sleep(0.1)  # a write that was under way
        mark = self.console.mark()
        first = int(self.console.wait(r"^T (\d+)", after=mark)[1])
        self.console.wait(rf"^T {first + ticks} ", after=mark)
        return not any(line.startswith("F ") for _, line in self.console.lines(mark))

    def configure(self, text: str) -> None:
        """Write diskchain's configuration."""
        self.rig.configure(text)

    def snapshot(self, name: str) -> Any:
        """One snapshot as `list --json` shows it."""
        return {s["name"]: s for s in self.rig.ok("list", "vm", "--json").json["snapshots"]}[name]

    def needs_recovery(self, name: str, target: str = "vdb") -> bool:
        """Whether the journal of a snapshot's file system is not empty. Whatever it says, e2fsck is asked too."""
        with flat(self.rig, self.rig.snapshots()[name][target]) as image:
            features = subprocess.run(["dumpe2fs", "-h", image], capture_output=True, text=True, check=True).stdout
            dirty = "needs_recovery" in features
            if not dirty:
                done = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True)
                assert done.returncode == 0, done.stdout + done.stderr
            return dirty

    @contextlib.contextmanager
    def fake_agent(self, answers: Mapping[str, Any] | None = None, *, flood: bytes = b"") -> Iterator[FakeAgent]:
        """Put a fake agent in the real one's place."""
        (channel,) = self.rig.run_dir.glob("*/agent.sock")
        channel.rename(channel.with_suffix(".real"))
        try:
            with FakeAgent(channel, answers, flood=flood) as agent:
                yield agent
        finally:
            channel.unlink()
            channel.with_suffix(".real").rename(channel)

    def watchdogs(self) -> list[int]:
        """The pids of the watchdogs of this machine."""
        return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and self._is_watchdog(p)]

    def _is_watchdog(self, process: Path) -> bool:
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes()
            return b"diskchain.drivers.watchdog" in words and os.fsencode(self.rig.run_dir) in words
        return False


@contextlib.contextmanager
def flat(rig: Rig, image: Path) -> Iterator[Path]:
    """A raw copy of what a layer holds."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="dc-flat-") as file:
        rig.qemu_img("convert", "-U", "-f", rig.fmt(image), "-O", "raw", str(image), file.name)
        yield Path(file.name)
