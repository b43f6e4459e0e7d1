"""Saved memory that is not what was saved: refused (exit 8) before any QEMU is started, nothing changed.

What is damaged: QEMU's stream and the fields of the header in front of it (not the XML, which may be edited); or memory of
another machine type or of other devices is in its place, or their configuration beside it.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

from scripts.torture_cases.campaign import Campaign, Result, Worker
from scripts.torture_cases.tree import RigWorker
from tests.support.rig import MiB, Rig
from tests.support.zygote import Zygote

OTHERS = {
    "pc": 'machine = "pc"',
    "rng": 'extra = ["-device", "virtio-rng-pci"]',
}  # by snapshot: another type, a device more
HEADER_BITS = (*range(16 * 8), *range(16 * 8, 24 * 8), *range(28 * 8, 32 * 8))  # magic, version, length, compression


class MemoryRig(Rig):
    """A rig that notes each start of a QEMU."""

    def prepare(self, place: Path) -> None:
        """Put a program in front of QEMU that leaves a mark."""
        self.started, self._programs = place / "started", place / "bin"
        self._programs.mkdir(parents=True)
        real = shutil.which("qemu-system-x86_64")
        mark = f'case "$*" in *guest=vm*) : >"{self.started}" ;; esac'  # not when it is only asked what it can
        (self._programs / "qemu-system-x86_64").write_text(f'#!/bin/sh\n{mark}\nexec {real} "$@"\n')
        (self._programs / "qemu-system-x86_64").chmod(0o755)

    @property
    def env(self) -> dict[str, str]:
        return {**super().env, "PATH": f"{self._programs}:{os.environ['PATH']}"}


class Memory(Campaign):
    """Damaged memory files."""

    name: ClassVar[str] = "memory"
    unit: ClassVar[str] = "damaged files"
    counts: ClassVar[tuple[int, int, int]] = (60, 2000, 10000)

    def cases(self) -> Iterator[str]:
        return (f"{name}:{n}" for n in itertools.count() for name in KINDS)

    def worker(self, place: Path) -> Worker:
        return MemoryWorker(self.seed, place)


class MemoryWorker(RigWorker[MemoryRig]):
    """A machine that is off, with four snapshots with memory, the last two of them of other machines."""

    def __init__(self, seed: int, place: Path) -> None:
        rig = MemoryRig(place / "vm", size=MiB, targets=("vda",), memory="64 MiB", zygote=Zygote())
        super().__init__(seed, place, rig)
        self._rig.prepare(place)
        self._rig.build(guest=False)
        self._snapshots("one", "two")
        assert self._rig.started.exists()
        for name, line in OTHERS.items():
            self._define(line)
            self._snapshots(name)
        self._define("")
        self._good = {name: self._file_of(name, "memory").read_bytes() for name in ("one", "two", *OTHERS)}
        self._configurations = {name: self._file_of(name, "machine.json").read_bytes() for name in ("one", *OTHERS)}
        assert len({*self._good.values()}) == 4 and len({*self._configurations.values()}) == 3

    def _snapshots(self, *names: str) -> None:
        self._rig.ok("start", "vm")
        for name in names:
            self._rig.ok("create", "vm", name, "--memory")
        self._rig.ok("stop", "vm", "--force", "-y")

    def _define(self, line: str) -> None:
        """Define the machine as it was built, with one line more."""
        file = self._rig.dir / "other.toml"
        file.write_text(f"{line}\n{(self._rig.dir / 'vm.toml').read_text()}")
        self._rig.ok("machine", "define", str(file))

    def run(self, case: str) -> Result:
        rng = random.Random(f"memory {self._seed} {case}")
        kind = case.split(":")[0]
        path, good, bad = self._damaged(kind, rng)
        if bad == good:
            return Result(case, hit=False)
        path.write_bytes(bad)
        self._rig.started.unlink(missing_ok=True)
        before = self._rig.catalog()
        answer = self._rig.run("revert", "vm", "one", "--discard", "-y")
        wrong = [] if answer.code == 8 else [f"ended with {answer.code}: {answer.err.strip()}"]
        wrong += ["a QEMU was started"] if self._rig.started.exists() else []
        wrong += ["the catalog changed"] if self._rig.catalog() != before else []
        if wrong:
            self._rig.run("stop", "vm", "--force", "-y")
        path.write_bytes(good)
        return Result(case, wrong=wrong, silent=answer.code == 0, note=answer.err.strip()[:200])

    def _damaged(self, kind: str, rng: random.Random) -> tuple[Path, bytes, bytes]:
        """The file that is damaged, what it holds, and what it is to hold."""
        what, _, other = kind.partition("-of-")
        if what == "configuration":
            return self._file_of("one", "machine.json"), self._configurations["one"], self._configurations[other]
        good = self._good["one"]
        return self._file_of("one", "memory"), good, DAMAGES[kind](good, self._good[other or "two"], rng)

    def _file_of(self, name: str, what: str) -> Path:
        (snapshot,) = (s for s in self._rig.catalog()["snapshots"].values() if s["name"] == name)
        (path,) = self._rig.dir.glob(f".diskchain/*/snapshots/{snapshot['id']}/{what}")
        return path


def _stream(data: bytes) -> int:
    return 92 + int.from_bytes(data[20:24], "little")


def _flip(data: bytes, bit: int) -> bytes:
    found = bytearray(data)
    found[bit // 8] ^= 1 << bit % 8
    return bytes(found)


def _flip_stream(data: bytes, _other: bytes, rng: random.Random) -> bytes:
    return _flip(data, rng.randrange(_stream(data) * 8, len(data) * 8))


def _flip_header(data: bytes, _other: bytes, rng: random.Random) -> bytes:
    return _flip(data, rng.choice(HEADER_BITS))


def _cut(data: bytes, _other: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((0, 1, len(data) - 1, len(data) - 8, len(data) - 4096, rng.randrange(len(data))))]


def _longer(data: bytes, _other: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice((1, 8, 700, 4096)))


def _zeroed(data: bytes, _other: bytes, rng: random.Random) -> bytes:
    length = rng.choice((1, 512, 4096, 65536))
    at = rng.randrange(_stream(data), len(data))
    return data[:at] + bytes(min(length, len(data) - at)) + data[at + length :]


def _garbage(data: bytes, _other: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(_stream(data), len(data))
    piece = rng.randbytes(min(rng.choice((8, 512, 4096)), len(data) - at))
    return data[:at] + piece + data[at + len(piece) :]


def _other_file(_data: bytes, other: bytes, _rng: random.Random) -> bytes:
    return other


def _of_another(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """The whole file, or the stream behind the header that was there."""
    return other if rng.random() < 0.5 else data[: _stream(data)] + other[_stream(other) :]


def _other_stream(data: bytes, other: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(_stream(data), min(len(data), len(other)))
    return (data[:at] + other[at:]).ljust(len(data), b"\0")[: len(data)]


def _moved(data: bytes, _other: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(_stream(data), len(data) - 8192)
    return data[:at] + data[at + 4096 : at + 8192] + data[at : at + 4096] + data[at + 8192 :]


Damage = Callable[[bytes, bytes, random.Random], bytes]
DAMAGES: dict[str, Damage] = {
    "flip": _flip_stream, "flip-header": _flip_header, "cut": _cut, "longer": _longer, "zeroed": _zeroed, "garbage": _garbage,
    "other-file": _other_file, "other-stream": _other_stream, "moved": _moved,
    "memory-of-pc": _of_another, "memory-of-rng": _of_another,
}  # fmt: skip
KINDS = (*DAMAGES, "configuration-of-pc", "configuration-of-rng")
