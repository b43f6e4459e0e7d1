"""A stopped machine with a branched tree that is put back in milliseconds, and a quick form of the oracle.

What qemu-img said about an image is remembered by the bytes of its whole chain: the same bytes are asked about once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.support.rig import Answer, MiB, Rig
from tests.support.tree_cases import ALSO, CASES, Case, grow, judge, not_done, not_undone
from tests.support.zygote import Zygote

_HASHED: dict[
    tuple[int, int, int, int], str
] = {}  # files are looked at when nobody writes, and not put back so quickly
EVERY = {**CASES, **ALSO}
SIZE = 8 * MiB
UNCHANGED = (1, 4, 5, 6, 7, 8)  # exit codes that say that nothing changed (docs/exit-codes.md)


class TreeRig(Rig):
    """A rig whose oracle remembers, and knows every byte that each state must show."""

    def prepare(self, place: Path, zygote: Zygote, env: Mapping[str, str] | None = None) -> None:
        """`place`: a directory outside the machine's. `env`: what every command finds in its environment."""
        self.zygote, self.flat, self.more_env = zygote, place / "flat", dict(env or {})
        self.flat.mkdir(parents=True, exist_ok=True)
        self.digests: dict[str, str] = {}
        self.checks: dict[str, list[str]] = {}

    @property
    def env(self) -> dict[str, str]:
        return {**super().env, **self.more_env}

    def digest(self, path: Path) -> str:
        """As Rig's; the flat content stays in `flat`, under its digest."""
        key = self._chain(path)
        if key not in self.digests:
            flat = self.flat / "new"
            self.qemu_img("convert", "-U", "-f", self.fmt(path), "-O", "raw", str(path), str(flat))
            self.digests[key] = _sha256(flat)
            flat.rename(self.flat / self.digests[key])
        return self.digests[key]

    def known(self, content: bytes) -> str:
        """Keep what a disk must show; return its digest."""
        digest = hashlib.sha256(content).hexdigest()
        (self.flat / digest).write_bytes(content)
        return digest

    def _check(self, path: Path) -> list[str]:
        key = _sha256(path)
        if key not in self.checks:
            self.checks[key] = super()._check(path)
        return [f"check {path.name}: {text.partition(': ')[2]}" for text in self.checks[key]]

    def _chain(self, path: Path) -> str:
        parts = []
        while True:
            parts += [_sha256(path), str(path)]
            if path.suffix == ".raw" or not (name := backing_name(path)):
                return "\n".join(parts)
            path = path.parent / name

    def lost(self, case: Case) -> int:
        """Count the bytes that no state allows, in the present and in every snapshot."""
        wanted = [(disks, [name]) for name, disks in self.snapshots().items()] + [(self.active(), list(case.presents))]
        return sum(min(self._differing(disks, name) for name in names) for disks, names in wanted)

    def _differing(self, disks: Mapping[str, Path], name: str) -> int:
        want, total = self.expected.get(name), 0
        for target, path in disks.items():
            try:
                found = (self.flat / self.digest(path)).read_bytes()
            except (AssertionError, OSError):
                total += SIZE
                continue
            total += differing(found, (self.flat / want[target]).read_bytes() if want else b"")
        return total


def differing(one: bytes, other: bytes) -> int:
    """Count the bytes that differ; what one lacks differs."""
    if one == other:
        return 0
    short = min(len(one), len(other))
    pieces = (slice(at, at + 4096) for at in range(0, short, 4096))
    unequal = (sum(a != b for a, b in zip(one[p], other[p], strict=False)) for p in pieces if one[p] != other[p])
    return abs(len(one) - len(other)) + sum(unequal)


def backing_name(path: Path) -> str:
    """Return what a qcow2 header names as its backing file: read here, not by what is tested."""
    with path.open("rb") as file:
        head = file.read(20)
        if head[:4] != b"QFI\xfb":
            return ""
        offset, length = int.from_bytes(head[8:16], "big"), int.from_bytes(head[16:20], "big")
        file.seek(offset)
        return file.read(length).decode("utf-8", "surrogateescape") if offset else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        key = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        if key not in _HASHED:
            _HASHED[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return _HASHED[key]


class Tree:
    """A rig with its tree, and a copy for each case's situation."""

    def __init__(self, place: Path, zygote: Zygote, env: Mapping[str, str] | None = None) -> None:
        shutil.rmtree(place, ignore_errors=True)
        self.place = place
        self.rig = TreeRig(place / "vm", size=SIZE, raw=("vdb",))
        self.rig.prepare(place, zygote, env)
        grow(self.rig)
        self._templates: dict[tuple[str, ...], Path] = {(): self.rig.save_template()}

    def restore(self, case: Case) -> None:
        """Put everything back as it is before the case's command."""
        if case.before not in self._templates:
            self.rig.restore_template(self._templates[()])
            self.rig.ok(*case.before)
            self._templates[case.before] = self.rig.save_template("template-" + "-".join(case.before))
        self.rig.restore_template(self._templates[case.before])

    def template(self, case: Case) -> Path:
        """Return the copy that `restore` puts back."""
        self.restore(case)
        return self._templates[case.before]

    def recovered(self, case: Case, answer: Answer) -> tuple[list[str], int, bool, bool]:
        """After a fault in a command that answered so: recover, and look; return (wrong, lost, silent, stuck)."""
        recovered = self.rig.run("recover", "vm")
        wrong = [] if recovered.code == 0 else [f"recover ended with {recovered.code}: {recovered.err.strip()}"]
        seen = self.seen(case, answer.code)
        lost = self.rig.lost(case) if any("content" in w or "qemu-img" in w for w in seen) else 0
        return [*wrong, *seen], lost, bool(seen) and not wrong, bool(wrong)

    def seen(self, case: Case, code: int) -> list[str]:
        """What is wrong with the contents and the files, and with what the command's exit code promised."""
        try:
            promised = (
                not_done(self.rig, case) if code == 0 else not_undone(self.rig, case) if code in UNCHANGED else []
            )
            return judge(self.rig, case) + promised
        except (AssertionError, OSError, ValueError, KeyError) as error:
            return [f"can't be read: content, {type(error).__name__}: {error}"]

    def keep(self, to: Path) -> None:
        """Copy the machine's directory."""
        shutil.rmtree(to, ignore_errors=True)
        to.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "--archive", "--sparse=always", str(self.rig.dir), str(to)], check=True)

    def close(self) -> None:
        """Remove everything."""
        self.rig.destroy()
        shutil.rmtree(self.place, ignore_errors=True)
