"""Two kinds of lock: flock on a VM's lock file (one diskchain at a time), and the image guard (QEMU kept off)."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diskchain.errors import Busy, DiskchainError
from diskchain.host.files import os_errors
from diskchain.host.process import process_id
from diskchain.host.writeback import writing_back

# QEMU >= 2.10 takes OFD locks on single bytes of every image: 100+bit for a permission it uses, 200+bit for one it
# does not share (block/file-posix.c RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE; bit 1 = BLK_PERM_WRITE).
# Whoever holds both 101 and 201 looks to QEMU like a writer that tolerates no other: no VM starts on the image or
# on an overlay of it, no reader without -U gets in. Measured on QEMU 7.2 (facts.md).
_WRITES, _SHARES_NO_WRITES = 101, 201
_ANNOUNCE_WITHIN = 1.0  # seconds
GUARD_WAIT = 10.0  # seconds that an orphaned engine has to go away, before an image guard is given up
_NOTE = 512  # bytes of a lock file: the note of its holder, padded; it is taken back when the lock is free
_FAR = 256  # bytes after it: how far its holder is, padded


@contextlib.contextmanager
def vm_lock(path: Path, operation: str, *, wait: float) -> Iterator[None]:
    """Hold the VM's lock while the block runs. Wait at most `wait` seconds, then raise Busy naming the holder."""
    fd = _open_lock(path)
    try:
        _flock_within(fd, path, wait)
        _note_holder(fd, operation)
        try:
            yield
        finally:
            _write_note(fd, "")  # we may live on, at work on another VM
    finally:
        os.close(fd)


def _note_holder(fd: int, operation: str) -> None:
    """Write down who holds the lock, over the last note: a file that is cut first can't be written at 0 bytes free.

    For messages only, so a full disk does not keep anybody from the lock.
    """
    me = process_id(os.getpid())
    note = {"pid": os.getpid(), "start": me.start if me else 0, "operation": operation,
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}  # fmt: skip
    _write_note(fd, json.dumps(note))


def _write_note(fd: int, text: str) -> None:
    with contextlib.suppress(OSError):
        os.pwrite(fd, text.ljust(_NOTE).encode().ljust(_NOTE + _FAR), 0)


def _open_lock(path: Path) -> int:
    with os_errors(path, "lock"):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _flock_within(fd: int, path: Path, wait: float) -> None:
    end = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _require_there(fd, path)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                raise Busy(f"another operation is at work on this VM: {holder(path)}",
                           hint="wait for it, or use --wait 10m") from None  # fmt: skip
            time.sleep(0.05)


def _require_there(fd: int, path: Path) -> None:
    """The records may have gone while we waited (move, forget): then this lock locks nothing. Raise Busy."""
    try:
        there = path.stat().st_ino == os.fstat(fd).st_ino
    except OSError:
        there = False
    if not there:
        raise Busy("the records of this VM were moved or removed meanwhile", hint="look again, then try again")


def _read_note(path: Path) -> dict[str, Any]:
    """Return the note of a lock's holder. Raise OSError, ValueError where there is none."""
    note = json.loads(path.read_bytes()[:_NOTE])
    if not isinstance(note, dict):
        raise ValueError("no note")
    return note


def holder(path: Path) -> str:
    """Given a lock file, return who holds it in words; for messages only."""
    try:
        note = _read_note(path)
        return f"{note['operation']} (pid {note['pid']}, since {note['since']})"
    except (OSError, ValueError, KeyError):
        return "unknown"


def holder_operation(path: Path) -> str | None:
    """Given a lock file, return the operation of its living holder, or None."""
    try:
        note = _read_note(path)
        who = process_id(int(note["pid"]))
        return str(note["operation"]) if who and who.start == note["start"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# -- how far the holder is, and who waits for it -----------------------------------------------------------------------


@dataclass(frozen=True)
class Far:
    """How far the holder of a lock is with a long piece of work, in bytes."""

    what: str
    done: int
    total: int


def note_far(path: Path, far: Far) -> None:
    """Write down how far we, who hold the lock, are; for those who wait, so quietly nothing when it can't be written."""
    text = json.dumps(asdict(far)).encode()
    if len(text) <= _FAR:
        with (
            contextlib.suppress(OSError),
            open(os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "wb") as file,
        ):
            os.pwrite(file.fileno(), text.ljust(_FAR), _NOTE)


def holder_far(path: Path) -> Far | None:
    """Given a lock file, return how far its holder said to be."""
    try:
        return Far(**json.loads(path.read_bytes()[_NOTE:]))
    except (OSError, ValueError, TypeError):
        return None


@contextlib.contextmanager
def announced(path: Path, operation: str) -> Iterator[None]:
    """Let `announcer` tell, while the block runs and only as long as we live, that we wait for somebody.

    A lock on a file of its own: a signal could hit a process that is at something else by then, and a note would outlive
    us. Quietly nothing where the file can't be made, or another announces himself there already.
    """
    fd = _announce(path)
    if fd is None:
        yield
        return
    try:
        _note_holder(fd, operation)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(fd)


def _announce(path: Path) -> int | None:
    """Return a descriptor that holds the lock of a file which is still there by then."""
    end = time.monotonic() + _ANNOUNCE_WITHIN
    while time.monotonic() < end:  # whoever looks holds it for a moment
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _require_there(fd, path)
            return fd
        except (OSError, Busy):
            os.close(fd)
        time.sleep(0.01)
    return None


def announcer(path: Path) -> int | None:
    """Return the pid of the living process that announces itself there (0: not known), or None."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _announced_pid(path)
    except OSError:
        return None
    finally:
        os.close(fd)


def _announced_pid(path: Path) -> int:
    try:
        return int(_read_note(path)["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


class ImageGuard:
    """Keeps every other user off some images. Its descriptors can be passed to an engine, and outlive us there."""

    def __init__(self, fds: Sequence[int], paths: Sequence[Path], *, alone: int) -> None:
        """`alone`: how many of the paths, from the first, no other may even read; the rest is kept from writers only."""
        self.fds = tuple(fds)
        self._at = dict(zip(paths, fds, strict=True))
        self._alone = frozenset(paths[:alone])

    def is_alone_on(self, path: Path) -> bool:
        """Whether nobody else may open the image, an engine of ours with QEMU's own locks included."""
        return path in self._alone

    def sync(self, path: Path) -> None:
        """fsync an image of ours through the descriptor that was open before the work began.

        The kernel reports a failed writeback once to each descriptor that was open then; one opened later
        never hears of it. Raise OSError.
        """
        os.fsync(self._at[path])

    def writing_back(self, path: Path) -> AbstractAsyncContextManager[None]:
        """While the block runs, let the kernel begin to write what is dirty of an image of ours (`host.writeback`)."""
        return writing_back(self._at[path])

    def drop_cache(self, path: Path, start: int = 0, end: int = 0) -> None:
        """Ask the kernel to forget its cached pages of the image, so that the next read comes from the disk.

        All of them, or those of a part, (start, end) in bytes; what is still to be written stays.
        """
        os.posix_fadvise(self._at[path], start, max(0, end - start), os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Let go."""
        for fd in self.fds:
            os.close(fd)


@contextlib.contextmanager
def guard_images(paths: Sequence[Path], *, wait: float, users: Callable[[Path], str],
                 readers: Sequence[Path] = ()) -> Iterator[ImageGuard]:  # fmt: skip
    """Hold the images against every QEMU and every qemu-img while the block runs; `readers` only against writers.

    First taken exclusively (so nobody else holds them, an orphaned engine included), then turned into the shared
    form that QEMU respects. `users` names who uses a path, for the message. Raise Busy after `wait` seconds.
    """
    with contextlib.ExitStack() as stack:
        fds = []
        for path in (*paths, *readers):
            with os_errors(path, "open" if path in readers else "open for writing"):
                how = os.O_RDONLY if path in readers else os.O_RDWR
                fd = os.open(path, how | os.O_CLOEXEC | os.O_NOFOLLOW)
            stack.callback(os.close, fd)
            fds.append(fd)
            _lock_within(fd, path, wait, users, _keep_writers_off if path in readers else _keep_all_off)
        for fd in fds[: len(paths)]:
            _set_locks(fd, fcntl.F_RDLCK)
        yield ImageGuard(fds, (*paths, *readers), alone=len(paths))


def _keep_all_off(fd: int) -> None:
    _set_locks(fd, fcntl.F_WRLCK)


def _keep_writers_off(fd: int) -> None:
    """QEMU may read it, and so may we; our lock is there before we look whether somebody writes."""
    _set_locks(fd, fcntl.F_RDLCK, only=(_SHARES_NO_WRITES,))
    if _held(fd, _WRITES, 1):
        raise BlockingIOError


def _lock_within(fd: int, path: Path, wait: float, users: Callable[[Path], str], lock: Callable[[int], None]) -> None:
    end = time.monotonic() + wait
    while True:
        try:
            lock(fd)
            return
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= end:
                raise Busy(f"{path} is in use by {users(path)}", hint="stop what uses it, then try again") from None
            time.sleep(0.05)
        except OSError as error:
            raise DiskchainError(f"can't take QEMU's image locks on {path}: {error.strerror}",
                                 hint="the filesystem must support OFD locks") from error  # fmt: skip


def _set_locks(fd: int, kind: int, *, only: Sequence[int] = (_WRITES, _SHARES_NO_WRITES)) -> None:
    for byte in only:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0))


def has_writer(path: Path) -> bool:
    """Whether some QEMU (or a tool of its) has the image open for writing."""
    return _locked(path, 101, 1)


def image_in_use(path: Path) -> bool:
    """Whether some QEMU (or a tool of its) has the image open, as active layer or as a backing file, or reads it."""
    return _locked(path, 100, 64) or _locked(path, 200, 64)


def _locked(path: Path, first: int, count: int) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return _held(fd, first, count)
    finally:
        os.close(fd)


def _held(fd: int, first: int, count: int) -> bool:
    probe = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, first, count, 0)
    return bool(struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_OFD_GETLK, probe))[0] != fcntl.F_UNLCK)


def is_open(path: Path) -> bool:
    """Whether another process has the file open (as far as /proc lets us see)."""
    try:
        wanted = path.stat()
    except OSError:
        return False
    return any(
        p.name.isdigit() and int(p.name) != os.getpid() and _has_open(p, wanted) for p in Path("/proc").iterdir()
    )


def open_by(path: Path) -> str:
    """Given a file, return who has it open, in words (as far as /proc lets us see); for messages only."""
    wanted = path.stat()
    found = []
    for proc in Path("/proc").iterdir():
        if proc.name.isdigit() and int(proc.name) != os.getpid() and _has_open(proc, wanted):
            with contextlib.suppress(OSError):
                found.append(f"{(proc / 'comm').read_text().strip()} (pid {proc.name})")
    return ", ".join(sorted(found)) or "a process we can't see (another user's, or another host's)"


def _has_open(proc: Path, wanted: os.stat_result) -> bool:
    with contextlib.suppress(OSError):
        for fd in (proc / "fd").iterdir():
            with contextlib.suppress(OSError):
                there = fd.stat()
                if (there.st_dev, there.st_ino) == (wanted.st_dev, wanted.st_ino):
                    return True
    return False
