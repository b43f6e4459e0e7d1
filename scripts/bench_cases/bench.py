"""What every case gets: a directory, how thorough to be, pairs of guests, a way to tell how far it is."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.support.bare_qmp import BareGuest
from tests.support.console import Console
from tests.support.own_machine import Guest, OwnMachine, make_bases

MiB = 1 << 20
SETTLE = 0.3  # seconds between two samples: what the last one left behind is over


def say(text: str) -> None:
    """Tell the person who waits."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


@dataclass
class Bench:
    """`level`: quick, usual or full. `only_sizes`: measure guests of these sizes (MiB) only; empty: as the level says."""

    dir: Path
    level: str = "usual"
    only_sizes: tuple[int, ...] = ()
    made: int = 0

    @property
    def quick(self) -> bool:
        """Whether everything must be over within two minutes."""
        return self.level == "quick"

    def pairs(self, usual: int, quick: int) -> int:
        """How many pairs to measure."""
        return quick if self.quick else usual

    def sizes(self, *, quick: Sequence[int], usual: Sequence[int], full: Sequence[int]) -> list[int]:
        """Return the guests' sizes in MiB for this level, without those that were not asked for."""
        sizes = {"quick": quick, "usual": usual, "full": full}[self.level]
        return [mib for mib in sizes if not self.only_sizes or mib in self.only_sizes]

    def place(self) -> Path:
        """Return a fresh path for a guest."""
        self.made += 1
        return self.dir / str(self.made)

    @contextlib.contextmanager
    def own(self, guest: Guest, ready: str, *, huge_pages: bool = True) -> Iterator[OwnMachine]:
        """A guest of diskchain's that has said `ready`."""
        own = OwnMachine(guest, self.place(), huge_pages=huge_pages)
        try:
            own.start()
            wait_until(ready, own.console)
            yield own
        finally:
            own.destroy()

    @contextlib.contextmanager
    def both(self, guest: Guest, ready: str) -> Iterator[Both]:
        """Two guests of the same kind that have said `ready`: diskchain's and the one driven by hand."""
        with self.own(guest, ready) as own:
            bare = bare_twin(own, guest, self.place())
            try:
                bare.start()
                wait_until(ready, bare.console)
                yield Both(own, bare)
            finally:
                with contextlib.suppress(OSError, AttributeError):
                    bare.destroy()


@dataclass(frozen=True)
class Both:
    """Two guests of the same kind."""

    own: OwnMachine
    bare: BareGuest


def wait_until(ready: str, path: Path) -> None:
    """Wait until a guest has said `ready`."""
    with Console(path) as console:
        console.wait(ready, timeout=180)


def bare_twin(own: OwnMachine, guest: Guest, directory: Path) -> BareGuest:
    """Return a guest with the same command line on disks of its own."""
    directory.mkdir(parents=True)
    paths = make_bases(directory, guest.targets)
    disks = tuple(replace(d, image=str(path)) for d, path in zip(own.machine.disks, paths, strict=True))
    assert [d.target for d in disks] == list(guest.targets)
    machine = replace(own.machine, name="bare", uuid="00000000-0000-4000-8000-000000000000", disks=disks)
    return BareGuest(machine, directory, own.run_dir / "bare")


def in_turns(
    count: int, first: Callable[[], float], second: Callable[[], float], *, settle: float = SETTLE
) -> tuple[list[float], list[float]]:
    """Measure `count` pairs, every other one in reverse; return the samples of both."""
    samples: tuple[list[float], list[float]] = ([], [])
    for number in range(count):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        for which in order:
            samples[which].append((first, second)[which]())
            time.sleep(settle)
    return samples


def timed(work: Callable[[], object]) -> float:
    """Return how long it took, in milliseconds."""
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000


def silence(console: Path, work: Callable[[], object]) -> float:
    """Return the longest time between two lines of a guest that says one each 10 ms, while the work is done, in ms."""
    with Console(console, each=0.001) as follower:
        follower.wait("^T ", after=follower.mark())
        time.sleep(0.5)
        began = time.monotonic()
        work()
        time.sleep(0.3)
        return follower.longest_gap(began, follower.lines()[-1][0]) * 1000


def machine_facts() -> dict[str, str]:
    """Return what the figures depend on; no names and no paths."""
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
    model = [s for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name")]
    total = next(s for s in Path("/proc/meminfo").read_text().splitlines() if s.startswith("MemTotal"))
    return {
        "processor": model[0].split(":")[1].strip() if model else platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{int(total.split()[1]) / MiB:.0f} GiB",
        "kernel": platform.release(),
        "QEMU": qemu.split("version ")[1].split()[0],
        "accelerator": "tcg",
        "python": platform.python_version(),
        "load at the start": f"{os.getloadavg()[0]:.1f}",
    }
