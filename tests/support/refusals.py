"""What a refusal must look like, and a picture of a directory that shows whether anything changed by it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.support.rig import Answer, MiB, Rig, wait_for

KiB = 1024
Picture = dict[str, str]
_PASSING = ("lock", "reserve", "console.log", "qemu.log")


def refused(rig: Rig, *args: str, code: int | Sequence[int], says: str = "") -> Any:
    """Run a command that must fail as documented; return its JSON error."""
    answer = rig.run("--json", *args)
    return check_error(answer, code=code, says=says, what=" ".join(args))


def check_error(answer: Answer, *, code: int | Sequence[int], says: str = "", what: str = "") -> Any:
    """One line with `diskchain:`, a hint to try, no traceback, the JSON object, the exit code; return the error."""
    said = f"{what}: {answer.code}\n{answer.out}\n{answer.err}"
    assert answer.code in ([code] if isinstance(code, int) else code), said
    assert "Traceback" not in answer.err and "this is a bug" not in answer.err, said
    lines = answer.err.splitlines()
    first = [n for n, line in enumerate(lines) if line.startswith("diskchain: ")]
    assert len(first) == 1, said
    assert lines[first[0] + 1].startswith("  try: "), said
    assert all(line.isprintable() for line in lines), said
    error = answer.json["error"]
    assert error["code"] == answer.code and error["message"] and error["hint"] and error["kind"], said
    assert says in error["message"] or says in error["hint"], said
    return error


def picture(directory: Path) -> Picture:
    """Every file below the directory with its kind, mode and content; what may change at any time is left out."""
    found = {}
    for root, names, files in os.walk(directory):
        names[:] = [name for name in names if name not in _PASSING]
        for name in [*names, *files]:
            path = Path(root) / name
            if name not in _PASSING:
                found[str(path.relative_to(directory))] = _described(path)
    return found


def _described(path: Path) -> str:
    mode = path.lstat().st_mode
    text = f"{mode:o} "
    if stat.S_ISLNK(mode):
        return text + os.readlink(path)
    if stat.S_ISREG(mode):
        with path.open("rb") as file:
            return text + hashlib.file_digest(file, "sha256").hexdigest()
    return text


@contextlib.contextmanager
def unchanged(rig: Rig) -> Iterator[None]:
    """Nothing below the rig's directory changes in this block, byte for byte; nothing runs afterwards."""
    before = picture(rig.dir)
    yield
    after = picture(rig.dir)
    assert {k: v for k, v in before.items() if after.get(k) != v} == {}
    assert sorted(after.keys() - before.keys()) == []
    assert rig.pid() is None


def grow_tree(rig: Rig) -> None:
    """s1 with the children s2 (with the child before-revert-1) and s3, whose child is the present; what each holds."""
    rig.build(guest=False)
    rig.write(1, 0, MiB)
    rig.remember("s1")
    rig.ok("create", "vm", "s1")
    rig.write(2, 512 * KiB, MiB)
    rig.remember("s2")
    rig.ok("create", "vm", "s2")
    rig.write(3, 2 * MiB, 64 * KiB)
    rig.remember("before-revert-1")
    rig.ok("revert", "vm", "s1", "-y")
    rig.write(4, 256 * KiB, MiB)
    rig.remember("s3")
    rig.ok("create", "vm", "s3")
    rig.write(5, 3 * MiB, 300 * KiB)
    rig.remember("now")


class SmallDisk:
    """A small ext4 of its own, mounted at the rig's directory's parent; the images lie on it, the state does not."""

    def __init__(self, place: Path, size: int) -> None:
        self.file, self.path = place / "disk.img", place / "mnt"
        self.path.mkdir(parents=True)
        with self.file.open("wb") as file:
            file.truncate(size)
        _do("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", str(self.file))
        self.mount()
        shutil.rmtree(self.path / "lost+found")

    def mount(self) -> None:
        """Mount it."""
        _do("mount", "-o", "loop", str(self.file), str(self.path))

    def fill(self) -> None:
        """Use up every block and the last byte."""
        with (self.path / "filler").open("ab", buffering=0) as file:
            for piece in (MiB, 64 * KiB, 4 * KiB, KiB, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(piece))
            os.fsync(file.fileno())
        assert os.statvfs(self.path).f_bavail == 0

    def free(self) -> None:
        """Give the room back."""
        (self.path / "filler").unlink()

    def remount(self, how: str) -> None:
        """Mount it `ro` or `rw`."""
        _do("mount", "-o", f"remount,{how}", str(self.path))

    def emergency(self) -> None:
        """Make it read-only under whoever is writing (sysrq-u for one filesystem: the ext4 shutdown ioctl)."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _EXT4_IOC_SHUTDOWN, struct.pack("I", 0))
        finally:
            os.close(fd)

    def close(self, *, keep: bool = False) -> None:
        """Unmount it, and remove it unless it is to be kept; somebody's last look may still hold it for a moment.

        Then no loop device has it any more. A daemon of another test that is just starting has a copy of the mount for
        a moment; mounted again now, it would be the same filesystem still, with what was done to it.
        """
        wait_for(lambda: not _run("umount", str(self.path)).returncode, "it can be unmounted", 10)
        wait_for(lambda: not _run("losetup", "-j", str(self.file)).stdout, "nobody has it mounted", 10)
        if not keep:
            self.file.unlink()


_EXT4_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32); 0 = flush everything first


def _run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def _do(*argv: str) -> None:
    done = _run(*argv)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
