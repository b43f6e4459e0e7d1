"""Small file systems of their own that are full, or get full in the middle of a command; resumed when there is room again.

In half of the cases somebody else goes on taking every block that comes free. A case is FILESYSTEM:NUMBER. It counts when
the command met the full disk: not when that was refused beforehand (exit 7), and not when it went through all the same.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from scripts.torture_cases.campaign import Campaign, Result, Worker
from scripts.torture_cases.faults import undocumented
from scripts.torture_cases.tree import EVERY, PLACES, PlacesTree, Tree
from tests.support.rig import MiB
from tests.support.zygote import Zygote

MAKE = {
    "ext4": (192, ["mkfs.ext4", "-q", "-F", "-m", "0"]),
    "xfs": (320, ["mkfs.xfs", "-q", "-f"]),
    "btrfs": (256, ["mkfs.btrfs", "-q", "-f", "--mixed"]),
}


class Volume:
    """A file system in a file."""

    def __init__(self, kind: str, place: Path) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self._file, self.path = place / "volume", place / "mnt"
        self.path.mkdir(exist_ok=True)
        size, argv = MAKE[kind]
        with self._file.open("wb") as file:
            file.truncate(size * MiB)
        subprocess.run([*argv, str(self._file)], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", str(self._file), str(self.path)], check=True)

    def fill(self, leave: int) -> None:
        """Use up all space but so many bytes."""
        with (self.path / "filler").open("ab", buffering=0) as file:
            for piece in (64 * MiB, 8 * MiB, MiB, 64 << 10, 4 << 10):
                with contextlib.suppress(OSError):
                    while self._free() - leave >= piece:
                        at = os.fstat(file.fileno()).st_size
                        os.posix_fallocate(file.fileno(), at, piece)

    def free(self) -> None:
        """Give the room back."""
        (self.path / "filler").unlink(missing_ok=True)

    def _free(self) -> int:
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    def close(self) -> None:
        """Unmount it; somebody's last look may still hold it for a moment."""
        for _ in range(100):
            if subprocess.run(["umount", str(self.path)], capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.1)
        self._file.unlink()


class Enospc(Campaign):
    """A disk that gets full."""

    name: ClassVar[str] = "enospc"
    unit: ClassVar[str] = "full disks"
    counts: ClassVar[tuple[int, int, int]] = (6, 100, 300)

    def cases(self) -> Iterator[str]:
        return (f"{kind}:{n}" for n in itertools.count() for kind in MAKE)

    def worker(self, place: Path) -> Worker:
        return EnospcWorker(self.seed, place)


class EnospcWorker(Worker):
    """A tree of each kind on each file system."""

    def __init__(self, seed: int, place: Path) -> None:
        self._seed, self._place = seed, place
        self._on: dict[tuple[str, type[Tree]], tuple[Volume, Tree]] = {}
        self._last: Tree | None = None

    def run(self, case: str) -> Result:
        kind, rng = case.split(":")[0], random.Random(f"enospc {self._seed} {case}")
        name = rng.choice(sorted([*EVERY, *PLACES]))
        volume, tree = self._of(kind, PlacesTree if name in PLACES else Tree)
        self._last, command = tree, tree.cases[name]
        usual = tree.usual_time(name)
        tree.restore(command)
        after, leave = rng.random() * usual, rng.choice((0, 0, 4096, 65536, rng.randrange(4 * MiB)))
        over, hungry = threading.Event(), rng.random() < 0.5

        def fill() -> None:
            if not over.wait(after):
                volume.fill(leave)
            while hungry and not over.wait(0.0005):
                volume.fill(0)

        thread = threading.Thread(target=fill)
        thread.start()
        answer = tree.rig.run(*command.args)
        over.set()
        thread.join()
        full = tree.rig.run("recover", "vm") if rng.random() < 0.5 else answer
        volume.free()
        wrong, lost, silent, stuck = tree.recovered(command, answer)
        wrong = [*undocumented(answer, command.args), *(undocumented(full) if full is not answer else []), *wrong]
        taken = ", every free block taken" if hungry else ""
        note = (
            f"{name}: {leave} bytes left after {after:.3f} of {usual:.3f} s{taken} -> {answer.code}, then {full.code}"
        )
        return Result(case, answer.code not in (0, 7), wrong, lost, silent, stuck, 1, note)

    def _of(self, kind: str, of: type[Tree]) -> tuple[Volume, Tree]:
        if (kind, of) not in self._on:
            volume = Volume(kind, self._place / f"{kind}-{of.__name__.lower()}")
            self._on[kind, of] = volume, of(volume.path / "tree", Zygote())
        return self._on[kind, of]

    def keep(self, to: Path) -> None:
        if self._last:
            self._last.keep(to)

    def close(self) -> None:
        for volume, tree in self._on.values():
            tree.close()
            volume.close()
