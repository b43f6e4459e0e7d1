"""Files: open what can't be trusted, write what must not be lost.

Every function takes paths and bytes and raises only DiskchainError (NotFound, Refused, NoSpace, ...), see `os_errors`.
Paths in messages are shown with repr(), which escapes control characters.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from diskchain.errors import DiskchainError, HostileImage, NoSpace, NotFound, Refused, UnsupportedDisk

MiB = 1024 * 1024
READ_SIZE = 1 * MiB
TEMPORARY = ".diskchain-tmp-"
"""Names of unfinished `write_durably` files begin with this; what a crash left behind may be unlinked."""

# Who may use the file. Not copied: trusted.libvirt.* (libvirt's own reference counts), security.ima (the content).
_ACCESS_XATTRS = ("security.selinux", "security.SMACK64", "system.posix_acl_access", "system.nfs4_acl")
_NO_XATTR = (errno.ENODATA, errno.ENOTSUP)


class Opened(NamedTuple):
    """An open regular file: its descriptor (the caller closes it), the real directory (ending in a slash), its name
    there, its fstat.
    """

    fd: int
    directory: str
    name: str
    status: os.stat_result

    @property
    def path(self) -> str:
        """Absolute; the directory has no symlinks left and the file is none."""
        return self.directory + self.name


def translated(error: OSError, path: Path | str, action: str) -> DiskchainError:
    """Given what the kernel said while we tried to `action` (an infinitive: "open"), return it as one of ours."""
    message = f"can't {action} {str(path)!r}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(message, hint="make room on that filesystem (df -h), or raise the quota")
    if error.errno == errno.EROFS:
        return Refused(message, hint="the filesystem is mounted read-only: see dmesg and findmnt")
    if error.errno in (errno.EACCES, errno.EPERM):
        return Refused(message, hint="run as root or as the owner of the file; check its mode and SELinux label")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFound(message)
    return DiskchainError(message, hint="look at dmesg and at the filesystem, then try again")


@contextlib.contextmanager
def os_errors(path: Path | str, action: str) -> Iterator[None]:
    """Within it, every OSError becomes NoSpace, Refused, NotFound or DiskchainError, naming path and action."""
    try:
        yield
    except OSError as error:
        raise translated(error, path, action) from error


def require_access(path: Path, mode: int, action: str) -> None:
    """Raise as `translated` does when we have no right to read, write or search (os.R_OK, ...) what is there."""
    if not os.access(path, mode, effective_ids=True):
        number = errno.EACCES if path.exists() else errno.ENOENT
        if number == errno.EACCES and os.statvfs(path).f_flag & os.ST_RDONLY:
            number = errno.EROFS
        raise translated(OSError(number, os.strerror(number)), path, action)


# Reading what others made


def open_untrusted(path: Path, *, roots: Sequence[Path] | None = None) -> int:
    """Given a path from anywhere, return a read-only descriptor of a regular file; the caller closes it.

    Raise as `UntrustedFiles.open` does.
    """
    with UntrustedFiles(roots) as opener:
        return opener.open(path).fd


class UntrustedFiles:
    """Opens files that somebody else named, one after the other, inside `roots` (None: anywhere).

    The directory is pinned (O_PATH) and judged by where it really is; then the file is looked at, opened and compared
    relative to it. So nothing is opened that isn't a regular file: opening /dev/watchdog reboots a host, a FIFO hangs.
    What is swapped in between must be in the same directory, and is refused, too.
    """

    def __init__(self, roots: Sequence[Path] | None = None) -> None:
        self._roots = None if roots is None else tuple(_with_slash(os.path.realpath(root)) for root in roots)
        self._named = ""
        self._directory = ""  # the real one, ending in a slash
        self._handle = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._unpin()

    def open(self, path: Path | str) -> Opened:
        """Return the open file. Raise HostileImage for a symlink (last component), FIFO, character device, socket or
        directory, and for a file that really lies outside all roots; UnsupportedDisk for a block device; NotFound;
        Refused without permission.
        """
        text = str(path)
        cut = text.rfind("/") + 1
        directory, name = text[:cut] or ".", text[cut:]
        try:
            if directory != self._named or self._handle < 0:
                self._pin(directory, text)
            seen = os.stat(name, dir_fd=self._handle, follow_symlinks=False)
            _require_regular(seen, text)
            fd = os.open(name, _UNTRUSTED, dir_fd=self._handle)
        except OSError as error:
            raise _cannot_open(error, text) from error
        except ValueError as error:
            raise HostileImage(f"not a file name: {text!r}") from error
        status = os.fstat(fd)
        # The mode, too: a freed inode number is given to the next file at once (seen on ext4).
        if status.st_ino != seen.st_ino or status.st_dev != seen.st_dev or status.st_mode != seen.st_mode:
            os.close(fd)
            raise HostileImage(f"{text!r} was replaced while it was opened")
        return Opened(fd, self._directory, name, status)

    def _pin(self, directory: str, path: str) -> None:
        """Hold that directory, in place of the one held so far."""
        self._unpin()
        self._handle = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._named = directory
        real = os.readlink(f"/proc/self/fd/{self._handle}")  # noqa: PTH115 - bytes as the kernel has them
        self._directory = _with_slash(real)
        self._require_inside(path)

    def _unpin(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _require_inside(self, path: str) -> None:
        where = self._directory
        if not where.startswith("/"):  # "(unreachable)/..." after a detached mount
            self._unpin()
            raise Refused(f"{path!r} lies on no path that can be reached")
        if self._roots is not None and not where.startswith(self._roots):
            self._unpin()
            allowed = ", ".join(repr(root) for root in self._roots) or "none"
            raise HostileImage(f"{path!r} lies outside the allowed directories", hint=f"allowed: {allowed}")


_UNTRUSTED = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def _with_slash(directory: str) -> str:
    return directory.rstrip("/") + "/"


def _cannot_open(error: OSError, path: str) -> DiskchainError:
    if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
        return HostileImage(f"can't open {path!r}: {error.strerror}")
    return translated(error, path, "open")


def _require_regular(status: os.stat_result, path: str) -> None:
    mode = status.st_mode
    if stat.S_ISREG(mode):
        return
    if stat.S_ISBLK(mode):
        raise UnsupportedDisk(f"{path!r} is a block device; diskchain handles image files only")
    if stat.S_ISLNK(mode):
        raise HostileImage(f"{path!r} is a symlink", hint="name the file itself: readlink -f")
    raise HostileImage(f"{path!r} is not a regular file")


def read_span(fd: int, offset: int, length: int) -> bytes:
    """Return `length` bytes at `offset`, fewer only where the file ends. Raise DiskchainError if it can't be read."""
    pieces: list[bytes] = []
    try:
        while length > 0 and (piece := os.pread(fd, length, offset)):
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
    except OSError as error:
        raise translated(error, f"descriptor {fd}", "read") from error
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


# Writing what must survive a power cut


def create_exclusive(path: Path, mode: int = 0o600) -> int:
    """Create a file that did not exist, with exactly that mode; return its read-write descriptor (caller closes)."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os_errors(path, "create"):
        fd = os.open(path, flags, mode)
        os.fchmod(fd, mode)  # the umask doesn't decide
        return fd


def write_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace the file by `data`: after a crash it holds the old bytes or the new ones. On return it is on disk.

    Raise NoSpace, Refused or DiskchainError; then the old file is untouched.
    """
    temporary = path.with_name(TEMPORARY + secrets.token_hex(8))
    _write_and_rename(create_exclusive(temporary, mode), temporary, path, data)


def write_durably_into(spare: Path, path: Path, data: bytes) -> None:
    """As `write_durably`, with the space of a file that has enough already, on the same volume; it is used up in any case.

    It leaves its own name durably before anything else: with two names after a power cut, what is written into a spare
    file next time would go into the record.
    """
    temporary = path.with_name(TEMPORARY + secrets.token_hex(8))
    with os_errors(path, "write"):
        spare.rename(temporary)
        fsync_dir(path.parent)
        fsync_dir(spare.parent)
        fd = os.open(temporary, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    _write_and_rename(fd, temporary, path, data)


def _write_and_rename(fd: int, temporary: Path, path: Path, data: bytes) -> None:
    try:
        with os_errors(path, "write"):
            _write_and_close(fd, data)
            temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_dir(path.parent)


def write_new_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Make the file with `data`; after a crash it is whole or not there. On return it is on disk.

    Raise Refused when there is one already, it is not touched (the caller holds a lock on the place); NoSpace.
    """
    if os.path.lexists(path):
        raise Refused(f"{str(path)!r} exists already", hint="move it away, then try again")
    write_durably(path, data, mode)


def _write_and_close(fd: int, data: bytes) -> None:
    with open(fd, "wb", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        file.truncate()  # a spare file was longer
        os.fsync(fd)


def fsync_file(path: Path) -> None:
    """On return, the file's data and metadata are on disk (its name: `fsync_dir`)."""
    _fsync(path, os.O_NOFOLLOW)


@contextlib.contextmanager
def synced(path: Path) -> Iterator[None]:
    """What another program writes to the file in the block is on disk when it is left without an error.

    The kernel tells of a failed write once, to the descriptors that were open then: ours is, one opened later hears
    nothing. (`qemu-img rebase -u` can end with 0 after its only failed fdatasync.) Raise OSError.
    """
    with os_errors(path, "sync"):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        yield
        with os_errors(path, "sync"):
            os.fsync(fd)
    finally:
        os.close(fd)


def fsync_dir(path: Path) -> None:
    """On return, the names in this directory are on disk."""
    _fsync(path, os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    with os_errors(path, "sync"):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def make_dirs_durably(path: Path, mode: int = 0o700) -> None:
    """Make a directory, and those above it that are not there. On return their names are on disk: what is synced in a
    directory whose own name is not is gone with it when the power goes. Raise Refused, NoSpace, DiskchainError.
    """
    if path.is_dir():
        return
    make_dirs_durably(path.parent, mode)
    with os_errors(path, "create"):
        path.mkdir(mode=mode, exist_ok=True)
    fsync_dir(path.parent)


def rename_durably(src: Path, dst: Path) -> None:
    """Rename within one filesystem, replacing `dst`; on return it is on disk. The content: `fsync_file` before."""
    with os_errors(src, "rename"):
        src.rename(dst)
    fsync_dir(dst.parent)
    if src.parent != dst.parent:
        fsync_dir(src.parent)


def link_new(file: Path, name: Path) -> None:
    """Give a file a second name; fine when it has that already. Raise Refused when another file has it, and where files
    can't have two.
    """
    try:
        os.link(file, name)
    except FileExistsError:
        if not are_one(file, name):
            raise Refused(f"{str(name)!r} exists already", hint="move it away, or choose another directory") from None
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise Refused(f"can't give {str(file)!r} a second name: {error.strerror}",
                          hint="choose a directory on a filesystem with hard links") from error  # fmt: skip
        raise translated(error, name, "create") from error


def unlink_durably(path: Path) -> None:
    """Unlink it, if it is there; on return the name is gone from the disk, too."""
    with os_errors(path, "unlink"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(NotFound):  # no directory, so no name in it
        fsync_dir(path.parent)


# Asking


def free_bytes(path: Path) -> int:
    """Bytes that an unprivileged writer can still use on the filesystem of `path`, which must exist."""
    with os_errors(path, "measure the space at"):
        status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the parts, (start, end) in bytes, of a file of this size that are no holes."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def allocated_bytes(path: Path) -> int:
    """Bytes that the file occupies (holes don't count)."""
    with os_errors(path, "look at"):
        return path.stat().st_blocks * 512


def identity(file: Path | int) -> tuple[int, int]:
    """(device, inode) of a path (symlinks followed) or of a descriptor; the same file within one boot."""
    with os_errors(str(file), "look at"):
        status = os.fstat(file) if isinstance(file, int) else file.stat()
    return status.st_dev, status.st_ino


def same_file(one: Path, other: Path) -> bool:
    """Whether two names lead to one file (symlinks followed); False when either can't be looked at."""
    try:
        return one.samefile(other)
    except OSError:
        return False


def is_same(one: Path, other: Path) -> bool:
    """Whether two names are one, or lead to one file: a gone file has its name still."""
    return one == other or same_file(one, other)


def are_one(one: Path, other: Path) -> bool:
    """Whether two names are names of one file (symlinks are files of their own); False when either can't be looked at."""
    try:
        return os.path.samestat(one.lstat(), other.lstat())
    except OSError:
        return False


def copy_owner(src: Path, dst: Path) -> None:
    """Give `dst` the owner, group, mode, ACL and security label of `src`, so that the same users can open it.

    Raise Refused if that isn't permitted. A filesystem without ACLs or labels is no error.
    """
    with os_errors(dst, "set owner and mode of"):
        fd = os.open(dst, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            wanted, status = src.stat(), os.fstat(fd)
            if (wanted.st_uid, wanted.st_gid) != (status.st_uid, status.st_gid):
                os.fchown(fd, wanted.st_uid, wanted.st_gid)
            os.fchmod(fd, stat.S_IMODE(wanted.st_mode))
            for name in _ACCESS_XATTRS:
                _copy_xattr(src, fd, name)
        finally:
            os.close(fd)


def _copy_xattr(src: Path, fd: int, name: str) -> None:
    wanted, present = _xattr(src, name), _xattr(fd, name)
    if wanted == present:
        return
    if wanted is not None:
        with _unsupported_is_fine():
            os.setxattr(fd, name, wanted)
    elif name.startswith("system."):  # an ACL inherited from the directory lets others in; a label must stay
        with _unsupported_is_fine():
            os.removexattr(fd, name)


def _xattr(file: Path | int, name: str) -> bytes | None:
    with _unsupported_is_fine():
        return os.getxattr(file, name)
    return None


@contextlib.contextmanager
def _unsupported_is_fine() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_XATTR:
            raise


# Digests


def sha256_file(path: Path, offset: int = 0) -> str:
    """Hex sha256 of the file's bytes from `offset` (bytes) to its end."""
    with os_errors(path, "read"), open(path, "rb", buffering=0) as file:
        file.seek(offset)
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digest_progress(path: Path, offset: int, on_bytes: Callable[[int], None]) -> str:
    """`sha256_file`, calling `on_bytes` with the number of bytes of each piece (about 1 MiB) after it was read."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(READ_SIZE))
    with os_errors(path, "read"), open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            on_bytes(count)
    return digest.hexdigest()
