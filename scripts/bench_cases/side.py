"""One side of a comparison of merges, in a process of its own: `python -m scripts.bench_cases.side JOB`.

A process of its own, so that what it and its children used is theirs alone: /proc/self/io and the resource usage hold
those of children that have ended, too. The work is timed from the first call to the last; starting Python is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diskchain.chain.deletion import Deletion, Fold
from diskchain.chain.model import Image, Snapshot
from diskchain.host import locks, qemu_img
from diskchain.host.locks import ImageGuard
from diskchain.host.qemu_img import Pace
from diskchain.ops import merge, methods
from diskchain.ops.progress import QUIET
from tests.support.page_cache import forgotten

MiB = 1 << 20


def main(words: Sequence[str]) -> int:
    """Do the job; print what it took."""
    job = json.loads(words[0])
    for path in map(Path, job["layers"]):
        forgotten(path) if job["cold"] else read(path)
    deletion = planned(job) if "argvs" not in job else None
    engine = Stopwatch()
    before = used()
    began = time.perf_counter()
    if deletion is None:
        for argv in job["argvs"]:
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    else:
        with engine.on_engines():
            asyncio.run(carry_out(deletion))
    seconds = time.perf_counter() - began
    cpu, written, peak = used()
    print(json.dumps({"seconds": seconds, "engine": engine.seconds or seconds, "cpu": cpu - before[0],
                      "written": (written - before[1]) / MiB, "peak": peak, "method": method_of(deletion)}))  # fmt: skip
    return 0


class Stopwatch:
    """Adds up the seconds that data is moved and synced; what is left of a merge are its checks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def on_engines(self) -> Iterator[None]:
        """Watch what moves data, and the sync."""
        movers = ("commit", "convert_into", "copy_up")
        real = {name: getattr(qemu_img, name) for name in movers}
        sync = locks.ImageGuard.sync
        for name, mover in real.items():
            setattr(qemu_img, name, self._timed(mover))
        locks.ImageGuard.sync = self._timed_sync(sync)  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            for name, mover in real.items():
                setattr(qemu_img, name, mover)
            locks.ImageGuard.sync = sync  # type: ignore[method-assign]

    def _timed(self, mover: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        async def timed(*args: Any, **more: Any) -> None:
            began = time.perf_counter()
            await mover(*args, **more)
            self.seconds += time.perf_counter() - began

        return timed

    def _timed_sync(self, sync: Callable[[ImageGuard, Path], None]) -> Callable[[ImageGuard, Path], None]:
        def timed(guard: ImageGuard, path: Path) -> None:
            began = time.perf_counter()
            sync(guard, path)
            self.seconds += time.perf_counter() - began

        return timed


def read(path: Path) -> None:
    """Have a file in the page cache, and none of it to be written."""
    buffer = bytearray(4 * MiB)
    with path.open("r+b", buffering=0) as file:
        os.fsync(file.fileno())
        while file.readinto(buffer):
            pass


def used() -> tuple[float, int, float]:
    """Return processor seconds, bytes written, and the largest memory of one process (MiB), of us and our children."""
    mine, theirs = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    cpu = mine.ru_utime + mine.ru_stime + theirs.ru_utime + theirs.ru_stime
    return cpu, int(lines["write_bytes"]), max(mine.ru_maxrss, theirs.ru_maxrss) / 1024


def planned(job: Mapping[str, Any]) -> Deletion:
    """The merge of all layers above the first, as `delete` plans it; or by the method that the job says."""
    paths = [Path(p) for p in job["layers"]]
    images = [Image(p.stem, p, "qcow2", "vda", 0, None, ours=True) for p in paths]
    into, *above = images
    fold = Fold("vda", above[-1], into, (), tuple(reversed(above[:-1])), ())
    if job["method"]:
        return Deletion((), (Fold("vda", fold.top, into, (), fold.through, (), job["method"]),))
    return methods.choose(Deletion((Snapshot("s", "s", "", None, {"vda": into.id}),), (fold,)))


async def carry_out(deletion: Deletion) -> None:
    """What `delete` does between its records: the guard, the checks, the data, the sync, the check."""
    for fold in deletion.folds:
        with locks.guard_images([i.path for i in (fold.into, *fold.gone)], wait=5, users=locks.open_by) as guard:
            await merge.fold(fold, guard, unclean=False, progress=QUIET, pace=Pace())
    for pull in deletion.pulls:
        readers = [i.path for i in pull.gone]
        with locks.guard_images([pull.overlays[0].path], wait=5, users=locks.open_by, readers=readers) as guard:
            await merge.pull(pull, pull.overlays[0], guard, unclean=False, progress=QUIET, pace=Pace())
            await merge.settle(pull, pull.overlays[0], guard)


def method_of(deletion: Deletion | None) -> str:
    """How it was done."""
    if deletion is None:
        return ""
    return [*(fold.method for fold in deletion.folds), *(pull.method for pull in deletion.pulls)][0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
