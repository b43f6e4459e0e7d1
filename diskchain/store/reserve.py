"""Room for records on a volume that is full: files with space of their own, one of which becomes the next record.

Giving room back to the volume and writing then would be a race, and a lost one: what fills a volume (another VM's guest,
QEMU saving memory) takes every block at once. Writing into space that was allocated with fallocate needs no new block
on ext4, XFS, btrfs and tmpfs (tried at 0 bytes free).
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from diskchain.errors import DiskchainError, NoSpace
from diskchain.host import files

PIECES = 16  # records that can be written; no operation needs as many
PIECE = 64 * 1024


class Reserve:
    """The files in one directory: PIECES, each with room for the VM's largest record. The VM's lock is held."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self, largest: int = 0) -> None:
        """Make sure of all pieces, with room for twice `largest` (bytes); as far as there is room, and quietly."""
        size = max(PIECE, -(-2 * largest // PIECE) * PIECE)
        with contextlib.suppress(OSError):
            if not stat.S_ISDIR(os.lstat(self.path).st_mode):
                self.path.unlink()  # versions up to 0.1 had one file of 1 MiB
        with contextlib.suppress(OSError, DiskchainError):
            self.path.mkdir(mode=0o700, exist_ok=True)
            for number in range(PIECES):
                _allocate(self.path / f"{number:02}", size)

    def write(self, path: Path, data: bytes) -> None:
        """Replace the file at `path` durably, as `files.write_durably`; on a full volume with a piece of the reserve.

        Raise NoSpace when that is used up, too.
        """
        try:
            files.write_durably(path, data)
            return
        except NoSpace:
            for piece in self._pieces(len(data)):
                with contextlib.suppress(NoSpace):
                    files.write_durably_into(piece, path, data)
                    return
        self.release()
        files.write_durably(path, data)

    def release(self) -> None:
        """Give all of it back to the volume."""
        with contextlib.suppress(OSError):
            for piece in self.path.iterdir():
                piece.unlink()
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def _pieces(self, size: int) -> Iterator[Path]:
        with contextlib.suppress(OSError):
            for piece in sorted(self.path.iterdir()):
                status = piece.lstat()
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_blocks * 512 >= size:
                    yield piece


def _allocate(path: Path, size: int) -> None:
    """Let the file have `size` bytes of its own; a new one that gets less is not kept. Raise OSError, DiskchainError.

    One that is there gets what it lacks: the catalog has grown, or a copy of the directory left out the zeroes.
    """
    with contextlib.suppress(FileNotFoundError):
        status = path.lstat()
        if status.st_size < size or status.st_blocks * 512 < size:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            with open(fd, "rb"):
                os.posix_fallocate(fd, 0, size)
        return
    fd = files.create_exclusive(path)
    with open(fd, "rb"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError:
            path.unlink()
            raise
