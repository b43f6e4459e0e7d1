"""Chains to merge: written by qemu-io, kept as they were, put back before each measurement. File systems to do it on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.bench_cases.bench import Bench, MiB, say

ROOT = Path(__file__).resolve().parents[2]
KiB = 1024
PIECE = 64 * MiB
Side = dict[str, Any]


@dataclass(frozen=True)
class Figures:
    """What one side took. Seconds, those of them in which data was moved and synced (the rest: checks), seconds of processor,
    MiB written, MiB of memory.
    """

    seconds: float
    engine: float
    cpu: float
    written: float
    peak: float
    method: str


def run(*argv: object) -> None:
    """Run a program; it must succeed."""
    subprocess.run([str(a) for a in argv], check=True, stdout=subprocess.DEVNULL)


@dataclass
class Scene:
    """A chain, base first: `kept` as it was made, `used` where it is merged. Names in both are the same."""

    dir: Path
    names: tuple[str, ...]
    changed: set[str] = field(default_factory=set)

    @property
    def base(self) -> Path:
        """The image that is merged into."""
        return self.dir / "used" / self.names[0]

    @property
    def top(self) -> Path:
        """The uppermost layer."""
        return self.dir / "used" / self.names[-1]

    @property
    def used(self) -> list[Path]:
        """All layers, base first."""
        return [self.dir / "used" / name for name in self.names]

    def put_back(self, *, cold: bool) -> None:
        """Write what a merge changed over again, in place. Around the page cache where it is to be cold anyway:
        fresh pages cost more than the merge on some hosts (a balloon, free page reporting).
        """
        direct = ["iflag=direct", "oflag=direct"] if cold else []
        for name in sorted(self.changed):
            kept, used = self.dir / "kept" / name, self.dir / "used" / name
            run("dd", f"if={kept}", f"of={used}", "bs=4M", "conv=notrunc,fdatasync", "status=none", *direct)
            os.truncate(used, kept.stat().st_size)
        run("sync", "-f", self.dir)  # else the first fsync of the merge waits for what this left to be done
        self.changed.clear()

    def measure(self, side: Side, *, cold: bool) -> Figures:
        """Put everything back, then let one side work; what it needs `around` it is not timed.

        From the page cache everybody begins with all layers written anew: pages that lie there for a while are slower to
        read where the host takes memory back.
        """
        if not cold:
            self.changed = set(self.names)
        self.put_back(cold=cold)
        around = side.get("around", contextlib.nullcontext)
        told = {key: value for key, value in side.items() if key != "around"}
        job = {"layers": [str(p) for p in self.used], "cold": cold, "method": None, **told}
        self.changed = set(self.names) if side.get("changes_all") else {self.names[0]}
        with around():
            done = subprocess.run([sys.executable, "-m", "scripts.bench_cases.side", json.dumps(job)], check=True,
                                  env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)  # fmt: skip
        return Figures(**json.loads(done.stdout))

    def verify(self, side: Side) -> str:
        """Merge once more and compare every byte with what the chain showed; return how it was done."""
        method = self.measure(side, cold=False).method
        if method == "stream":
            self.changed = set(self.names)
        merged = self.top if method == "stream" else self.base
        run("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", merged, self.dir / "kept" / self.names[-1])
        run("qemu-img", "check", "-q", "-f", "qcow2", merged)
        return method

    def remove(self) -> None:
        """Give the room back."""
        run("rm", "-rf", self.dir)


def make(directory: Path, size: int, layers: Sequence[Sequence[str]]) -> Scene:
    """Make a chain of that many bytes; for each layer, base first, the commands of qemu-io that write it."""
    for part in ("kept", "used"):
        (directory / part).mkdir(parents=True)
    names = tuple(f"{number}.qcow2" for number in range(len(layers)))
    for number, commands in enumerate(layers):
        on = ["-b", names[number - 1], "-F", "qcow2"] if number else []
        path = directory / "kept" / names[number]
        run("qemu-img", "create", "-q", "-f", "qcow2", *on, path, size)
        write(path, commands)
        run("cp", "--reflink=never", path, directory / "used" / path.name)
    run("sync", "-f", directory)
    return Scene(directory, names)


def write(path: Path, commands: Sequence[str]) -> None:
    """Let qemu-io carry out some commands; none may fail."""
    done = subprocess.run(["qemu-io", "-t", "unsafe", "-f", "qcow2", str(path)], input="\n".join(commands) + "\n",
                          stdout=subprocess.PIPE, text=True, check=True)  # fmt: skip
    assert "failed" not in done.stdout and "rror" not in done.stdout, done.stdout[:300]


def random_file(directory: Path) -> Path:
    """Return a file of 64 MiB that can't be compressed."""
    path = directory / "random"
    if not path.exists():
        run("dd", "if=/dev/urandom", f"of={path}", "bs=4M", f"count={PIECE // (4 * MiB)}", "status=none")
    return path


def sequential(source: Path, start: int, length: int) -> list[str]:
    """Fill one stretch."""
    step = min(PIECE, length)
    return [f"write -q -s {source} {at} {step}" for at in range(start, start + length, step)]


def scattered(source: Path, size: int, clusters: int, seed: int) -> list[str]:
    """Half as many writes of 64 KiB as of `clusters`, half of 4 to 60 KiB, each in a cluster of its own."""
    rng = random.Random(seed)
    picked = rng.sample(range(size // (64 * KiB)), clusters)
    words = [f"write -q -s {source} {at * 64 * KiB} 64k" for at in picked[: clusters // 2]]
    for at in picked[clusters // 2 :]:
        length = 4 * rng.randrange(1, 16)
        words.append(f"write -q -s {source} {at * 64 * KiB + 4 * KiB * rng.randrange(0, 16 - length // 4)} {length}k")
    rng.shuffle(words)
    return words


def pieces(source: Path, size: int, piece: int, count: int, seed: int) -> list[str]:
    """Fill some pieces of a disk."""
    picked = random.Random(seed).sample(range(size // piece), count)
    return [f"write -q -s {source} {at * piece} {piece}" for at in picked]


def zeroes(size: int) -> list[str]:
    """What a guest's trim and a formatting leave."""
    at = size // 40 // (64 * KiB) * 64 * KiB
    return [
        f"write -q -z {at} 2M",
        f"write -q -z {3 * size // 4} 2M",
        f"discard -q {2 * at} 2M",
        f"write -q -z {3 * at} 4k",
    ]


# -- file systems ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def filesystem(bench: Bench, kind: str, room: int) -> Iterator[Path | None]:
    """A directory on a file system of that kind, with that many bytes; None where it can't be had, which is said.

    One of our own with the usual options: the host's may have others (mounted with `discard` and without a journal,
    ext4 gives each block of a removed file back to the device at once: 1.1 s for 2 GiB instead of 0.1 s).
    """
    place = bench.place()
    place.mkdir(parents=True)
    try:
        device = _mounted(place, kind, room)
    except (OSError, subprocess.CalledProcessError) as error:
        there = kind == "ext4" and _kind_of(place) == "ext2/ext3"
        say(f"{kind}: {'that of the host' if there else 'left out'}, none can be mounted (root, mkfs.{kind}?): {error}")
        yield place if there else None
        return
    try:
        yield place / "mounted"
    finally:
        run("umount", place / "mounted")
        run("losetup", "-d", device)
        (place / "disk").unlink()


def _kind_of(place: Path) -> str:
    return subprocess.run(["stat", "-f", "-c", "%T", place], capture_output=True, text=True, check=True).stdout.strip()


def _mounted(place: Path, kind: str, room: int) -> str:
    """Through a loop device that passes the page cache by: nothing is cached twice."""
    disk, mounted = place / "disk", place / "mounted"
    mounted.mkdir()
    with disk.open("wb") as file:
        file.truncate(room)
    options = {"xfs": ["-m", "reflink=1"], "ext4": ["-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"]}
    run(f"mkfs.{kind}", "-q", *options.get(kind, []), disk)
    device = subprocess.run(["losetup", "--find", "--show", "--direct-io=on", disk],
                            stdout=subprocess.PIPE, text=True, check=True).stdout.strip()  # fmt: skip
    try:
        run("mount", device, mounted)
    except subprocess.CalledProcessError:
        run("losetup", "-d", device)
        raise
    return device
