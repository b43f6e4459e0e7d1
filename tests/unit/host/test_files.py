"""Files: what can't be trusted is opened without harm, what is written survives, errors are ours."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diskchain.errors import DiskchainError, HostileImage, NoSpace, NotFound, Refused, UnsupportedDisk
from diskchain.host import files


@pytest.fixture
def as_nobody(tmp_path: Path) -> Iterator[None]:
    """Root may open everything: be somebody else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# Reading what others made


def test_open_untrusted_regular_file_gives_readable_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"0123456789")
    fd = files.open_untrusted(path, roots=[tmp_path])
    try:
        assert files.read_span(fd, 2, 3) == b"234"
        assert files.read_span(fd, 8, 100) == b"89"
        assert files.read_span(fd, 100, 5) == b""
        assert files.read_span(fd, 0, 0) == b""
        assert not os.get_inheritable(fd)
        with pytest.raises(OSError):
            os.write(fd, b"x")
    finally:
        os.close(fd)


def test_read_span_goes_on_after_a_short_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"0123456789")
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: real(fd, min(length, 3), offset))
    fd = files.open_untrusted(path)
    try:
        assert files.read_span(fd, 1, 8) == b"12345678"
    finally:
        os.close(fd)


def test_open_untrusted_never_really_opens_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    flags: list[int] = []
    real = os.open

    def watching(path: str, how: int, **rest: int) -> int:
        flags.append(how)
        return real(path, how, **rest)

    monkeypatch.setattr(os, "open", watching)
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(HostileImage, match="not a regular file"):
            files.open_untrusted(path)
    assert len(flags) == 3
    assert all(how & os.O_PATH for how in flags)


def test_open_untrusted_block_device_is_unsupported(tmp_path: Path) -> None:
    try:
        os.mknod(tmp_path / "disk", stat.S_IFBLK | 0o600, os.makedev(7, 200))
    except PermissionError:
        pytest.skip("needs mknod")
    with pytest.raises(UnsupportedDisk, match="block device"):
        files.open_untrusted(tmp_path / "disk")


def swap_file(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.write_bytes(b"evil")


def swap_symlink(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/shadow")


def swap_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("swap", [swap_file, swap_symlink, swap_fifo])
def test_open_untrusted_swapped_between_look_and_open_is_hostile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: Callable[[Path], None]
) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"good")
    before = len(os.listdir("/proc/self/fd"))
    real = os.stat

    def look_then_swap(name: str, **how: Any) -> os.stat_result:
        status = real(name, **how)
        monkeypatch.setattr(os, "stat", real)
        swap(path)
        return status

    monkeypatch.setattr(os, "stat", look_then_swap)
    with pytest.raises(HostileImage):
        files.open_untrusted(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_open_untrusted_directory_swapped_for_a_symlink_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "passwd").write_bytes(b"good")
    real = os.readlink

    def resolve_then_swap(link: str) -> str:
        where = real(link)
        (tmp_path / "images").rename(tmp_path / "moved")
        (tmp_path / "images").symlink_to("/etc")
        return where

    monkeypatch.setattr(os, "readlink", resolve_then_swap)
    fd = files.open_untrusted(tmp_path / "images" / "passwd", roots=[tmp_path])
    try:
        assert files.read_span(fd, 0, 10) == b"good"
    finally:
        os.close(fd)


def test_untrusted_files_changes_directory_and_back(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "image").write_bytes(name.encode())
    found = []
    with files.UntrustedFiles([tmp_path]) as opener:
        for name in ("a", "b", "b", "a"):
            opened = opener.open(tmp_path / name / "image")
            found.append(files.read_span(opened.fd, 0, 9).decode())
            assert opened.path == str(tmp_path / name / "image")
            os.close(opened.fd)
        with pytest.raises(HostileImage, match="outside"):
            opener.open("/etc/passwd")
        with pytest.raises(HostileImage, match="outside"):
            opener.open("/etc/passwd")
    assert found == ["a", "b", "b", "a"]


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\ud800"])
def test_open_untrusted_impossible_name_is_hostile(tmp_path: Path, name: str) -> None:
    with pytest.raises(HostileImage) as caught:
        files.open_untrusted(tmp_path / name)
    assert caught.value.message.isprintable()


def test_open_untrusted_without_permission_is_refused(tmp_path: Path, as_nobody: None) -> None:
    path = tmp_path / "secret"
    if os.getuid() == 0:
        os.seteuid(0)
        path.touch(0o600)
        os.seteuid(65534)
    else:
        path.touch(0)
    with pytest.raises(Refused) as caught:
        files.open_untrusted(path)
    assert caught.value.hint
    assert type(caught.value) is Refused


# Writing


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o660])
def test_write_durably_replaces_content_with_exact_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "record.json"
    mask = os.umask(0o077)
    try:
        files.write_durably(path, b"old")
        files.write_durably(path, b"new" * 100_000, mode)
    finally:
        os.umask(mask)
    assert path.read_bytes() == b"new" * 100_000
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert os.listdir(tmp_path) == ["record.json"]


def test_write_durably_syncs_file_before_and_directory_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(fd: int) -> None:
        seen.append("directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        real_sync(fd)

    def rename(self: Path, target: Path) -> Path:
        seen.append("rename")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    files.write_durably(tmp_path / "record", b"x")
    assert seen == ["file", "rename", "directory"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_write_durably_that_fails_leaves_the_old_file_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "record"
    files.write_durably(path, b"old")

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os if call == "fsync" else Path, call, full)
    with pytest.raises(NoSpace):
        files.write_durably(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["record"]


def test_create_exclusive_refuses_existing_files_and_dangling_symlinks(tmp_path: Path) -> None:
    os.close(files.create_exclusive(tmp_path / "new"))
    (tmp_path / "dangling").symlink_to("target")
    for name in ("new", "dangling"):
        with pytest.raises(DiskchainError, match="File exists"):
            files.create_exclusive(tmp_path / name)
    assert not (tmp_path / "target").exists()


def test_rename_and_unlink_durably(tmp_path: Path) -> None:
    (tmp_path / "trash").mkdir()
    (tmp_path / "a").write_bytes(b"a")
    files.rename_durably(tmp_path / "a", tmp_path / "trash" / "a")
    assert (tmp_path / "trash" / "a").read_bytes() == b"a"
    files.unlink_durably(tmp_path / "trash" / "a")
    files.unlink_durably(tmp_path / "trash" / "a")
    files.unlink_durably(tmp_path / "gone" / "a")
    assert not os.listdir(tmp_path / "trash")
    with pytest.raises(NotFound):
        files.rename_durably(tmp_path / "a", tmp_path / "b")


def test_fsync_of_file_and_directory_work_and_name_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    files.fsync_file(tmp_path / "a")
    files.fsync_dir(tmp_path)
    with pytest.raises(NotFound, match="gone"):
        files.fsync_file(tmp_path / "gone")


# Asking


def test_sizes_and_identity(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.write(b"x" * 4096)
        file.truncate(1 << 30)
    os.link(path, tmp_path / "hard")
    assert 4096 <= files.allocated_bytes(path) <= 65536
    assert files.free_bytes(tmp_path) > 0
    assert files.identity(path) == files.identity(tmp_path / "hard") == (path.stat().st_dev, path.stat().st_ino)
    with open(path, "rb") as file:
        assert files.identity(file.fileno()) == files.identity(path)
    for ask in (files.allocated_bytes, files.free_bytes, files.identity):
        with pytest.raises(NotFound):
            ask(tmp_path / "gone")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs chown")
def test_copy_owner_copies_owner_mode_and_access_list(tmp_path: Path) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    src.touch()
    dst.touch(0o600)
    os.chown(src, 1234, 4321)
    src.chmod(0o640)
    files.copy_owner(src, dst)
    status = dst.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1234, 4321, 0o640)


def acl(user: int) -> bytes:
    """u::rw-, u:USER:rw-, g::r--, m::rw-, o::--- as the kernel keeps it."""
    entries = [(1, 6, -1), (2, 6, user), (4, 4, -1), (16, 6, -1), (32, 0, -1)]
    packed = [tag.to_bytes(2, "little") + perm.to_bytes(2, "little") + (who & 0xFFFFFFFF).to_bytes(4, "little")
              for tag, perm, who in entries]  # fmt: skip
    return (2).to_bytes(4, "little") + b"".join(packed)


def test_copy_owner_copies_and_removes_access_lists_but_not_foreign_attributes(tmp_path: Path) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    src.touch()
    dst.touch()
    name = "system.posix_acl_access"
    try:
        os.setxattr(src, name, acl(1234))
        os.setxattr(src, "user.note", b"mine")
    except OSError:
        pytest.skip("no ACLs here")
    files.copy_owner(src, dst)
    assert os.getxattr(dst, name) == acl(1234)
    assert "user.note" not in os.listxattr(dst)
    os.removexattr(src, name)
    files.copy_owner(src, dst)
    assert name not in os.listxattr(dst)


def test_copy_owner_that_may_not_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    src.touch()
    dst.touch()

    def refuse(*_args: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fchmod", refuse)
    with pytest.raises(Refused):
        files.copy_owner(src, dst)


# Errors and digests


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, NoSpace),
        (errno.EDQUOT, NoSpace),
        (errno.EROFS, Refused),
        (errno.EACCES, Refused),
        (errno.EPERM, Refused),
        (errno.ENOENT, NotFound),
        (errno.ENOTDIR, NotFound),
        (errno.EIO, DiskchainError),
        (errno.EEXIST, DiskchainError),
    ],
)
def test_os_errors_translates_by_what_the_admin_can_do(number: int, expected: type[DiskchainError]) -> None:
    with pytest.raises(DiskchainError) as caught, files.os_errors("/x\n/y", "write"):
        raise OSError(number, os.strerror(number))
    assert type(caught.value) is expected
    assert caught.value.message == f"can't write '/x\\n/y': {os.strerror(number)}"
    assert isinstance(caught.value.__cause__, OSError)


def without_progress(path: Path, offset: int) -> str:
    return files.file_digest_progress(path, offset, lambda _count: None)


@pytest.mark.parametrize("digest", [files.sha256_file, without_progress])
@pytest.mark.parametrize("offset", [0, 1, 4096, 3_000_000, 9_000_000])
def test_digests_start_at_the_offset(tmp_path: Path, offset: int, digest: Callable[[Path, int], str]) -> None:
    path = tmp_path / "memory"
    content = os.urandom(3_000_000)
    path.write_bytes(content)
    assert digest(path, offset) == hashlib.sha256(content[offset:]).hexdigest()


def test_digest_progress_counts_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(2_500_000))
    pieces: list[int] = []
    files.file_digest_progress(path, 500_000, pieces.append)
    assert sum(pieces) == 2_000_000
    assert max(pieces) <= files.READ_SIZE
