"""What stands on an image, by whatever name and in whatever format QEMU would find it; what can't be read is said."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from diskchain.chain import backing
from diskchain.chain.model import Catalog, Image
from diskchain.config import Config
from diskchain.errors import HasSharers, Refused
from diskchain.ops import sharers
from diskchain.ops.directories import DEPTH, below, identity, look_through


def make(place: Path, name: str, *, fmt: str = "qcow2", opened: bool = True) -> Path:
    """An overlay that names its backing file like that; QEMU opens it when it is made."""
    unchecked = [] if opened else ["-u"]
    words = ["qemu-img", "create", "-q", *unchecked, "-f", fmt, "-b", name, "-F", "qcow2", str(place)]
    done = subprocess.run([*words, *([] if opened else ["1M"])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An image to stand on."""
    path = tmp_path / "vm" / "base.qcow2"
    path.parent.mkdir()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"], check=True)
    return path


def standing_on(base: Path, directory: Path | None = None) -> list[Path]:
    """Every name in a directory of what stands on the base."""
    target = identity(base)
    return [path for path, found in look_through(directory or base.parent).overlays.items() if target in found]


NAMES = {
    "path": "{base}",
    "file protocol": "file:{base}",
    "json": 'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{base}"}}}}',
    "json flat": 'json:{{"driver":"qcow2","file.driver":"file","file.filename":"{base}"}}',
    "json flat twice": 'json:{{"driver":"qcow2","file.driver":"raw","file.file.filename":"{base}"}}',
    "json in QEMU's quotes": "json:{{'driver':'qcow2','file':{{'driver':'file','filename':'{base}'}}}}",
    "json blkdebug": 'json:{{"driver":"qcow2","file":{{"driver":"blkdebug","image":{{"driver":"file","filename":"{base}"}}}}}}',
    "json blkdebug flat": 'json:{{"driver":"qcow2","file.driver":"blkdebug","file.image.filename":"{base}"}}',
    "blkdebug protocol": "blkdebug::{base}",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))
def test_backing_name_of_every_form_that_qemu_opens_is_found(base: Path, name: str) -> None:
    overlay = make(base.with_name("overlay"), name.format(base=base))
    assert standing_on(base) == [overlay]


@pytest.mark.parametrize("fmt", ["qcow2", "qcow", "qed"])
def test_overlay_of_every_format_is_found(base: Path, fmt: str) -> None:
    overlay = make(base.with_name("overlay"), base.name, fmt=fmt)
    assert overlay.stat().st_size >= 512
    assert standing_on(base) == [overlay]


def test_damaged_overlay_is_found_too(base: Path) -> None:
    overlay = make(base.with_name("overlay"), base.name)
    os.truncate(overlay, 4096)  # its tables are gone
    assert standing_on(base) == [overlay]


def test_control_what_stands_on_something_else_or_nothing_is_not_found(base: Path) -> None:
    make(base.with_name("a"), "other.qcow2", opened=False)
    make(base.with_name("b"), 'json:{"driver":"qcow2","file":{"filename":"other.qcow2"}}', opened=False)
    base.with_name("c").write_bytes(b"QED\0" + bytes(4096))
    base.with_name("d").write_bytes(b"QFI\xfb" + b"\xff" * 4096)
    base.with_name("e").write_bytes(b"json:{" * 1000)
    assert standing_on(base) == [] and look_through(base.parent).unread == []


@pytest.mark.parametrize("garbage", [b"", b"QFI\xfb", b"QED\0" + b"\xff" * 60, b"QFI\xfb" + b"\xff" * 60])
def test_first_bytes_that_are_garbage_raise_nothing(garbage: bytes) -> None:
    place = backing.name_place(garbage)
    assert place is None or place[1] <= backing.LONGEST_NAME


@pytest.mark.parametrize("name", [b"json:", b"json:{'", b'json:{"\\ud800"}', b"\xff\xfe", b":::::::::::::::", b"\0"])
def test_names_that_are_garbage_raise_nothing(name: bytes) -> None:
    assert len(backing.files_named(name)) < 20


@pytest.mark.parametrize("relative", [False, True])
def test_symlink_counts_for_the_overlay_elsewhere_that_it_leads_to(base: Path, tmp_path: Path, relative: bool) -> None:
    """Relative, QEMU counts from the name that it was given."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    overlay = make(elsewhere / "overlay", base.name if relative else str(base), opened=not relative)
    link = base.with_name("link")
    link.symlink_to(overlay)
    base.with_name("again").symlink_to(link)
    assert standing_on(base) == [base.with_name("again"), link]


def test_what_is_no_file_is_passed_over_and_never_opened(base: Path, tmp_path: Path) -> None:
    here = base.parent
    os.mkfifo(here / "fifo")
    (here / "to-fifo").symlink_to(here / "fifo")
    (here / "nowhere").symlink_to(here / "missing")
    (here / "loop").symlink_to(here / "loop")
    (here / "device").symlink_to("/dev/null")
    (here / "directory").mkdir()
    with mock.patch("diskchain.host.files.os.open", wraps=os.open) as opened:
        found = look_through(here)
    assert [path for path, _ in found.names] == [base] and found.unread == []
    assert [Path(call.args[0]).name for call in opened.call_args_list if "dir_fd" in call.kwargs] == [base.name]


def test_symlinks_to_directories_are_followed_without_end(tmp_path: Path) -> None:
    for name in ("root/a/b/c/d", "root/.hidden", "elsewhere/x/y/z"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "root/a/up").symlink_to(tmp_path / "root")
    (tmp_path / "root/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/kernel").symlink_to("/proc")
    found = {str(path.relative_to(tmp_path)) for path in below(tmp_path / "root", DEPTH)}
    assert found == {"root", "root/a", "root/a/b", "root/a/b/c", "elsewhere", "elsewhere/x", "elsewhere/x/y"}


Deny = Callable[[Path, int], None]


@pytest.fixture
def deny(monkeypatch: pytest.MonkeyPatch) -> Deny:
    """Let a path fail to be listed or opened: root may read everything."""
    wrong: dict[str, int] = {}
    real_open, real_scan = os.open, os.scandir

    def failing(path: Any) -> None:
        number = wrong.get(os.path.basename(path))
        if number:
            raise OSError(number, os.strerror(number), str(path))

    def opening(path: Any, *args: Any, **options: Any) -> int:
        failing(path)
        return real_open(path, *args, **options)

    def scanning(path: Any) -> Any:
        failing(path)
        return real_scan(path)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "scandir", scanning)
    return lambda path, number: wrong.update({path.name: number})


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_file_that_cannot_be_read_is_said_unless_it_is_too_small(base: Path, deny: Deny, number: int) -> None:
    for name, size in (("overlay", 512), ("key", 511), (".x.qcow2.trash", 4096), (".base.qcow2.seal", 600)):
        base.with_name(name).write_bytes(bytes(size))
        deny(base.with_name(name), number)
    (unread,) = look_through(base.parent).unread
    assert unread.path.name == "overlay" and unread.denied == (number == errno.EACCES)
    assert os.strerror(number) in unread.why and "owner root, mode 0644, 512" in unread.why


def test_directory_that_cannot_be_read_is_said_and_a_missing_one_is_empty(tmp_path: Path, deny: Deny) -> None:
    for name in ("images", "lost+found"):
        (tmp_path / name).mkdir()
        deny(tmp_path / name, errno.EACCES)
    assert [one.path for one in look_through(tmp_path / "images").unread] == [tmp_path / "images"]
    assert look_through(tmp_path / "lost+found").unread == [] and look_through(tmp_path / "missing").unread == []


def vm_on(base: Path, config: Config) -> Any:
    """A VM with one image, alone on its host."""
    image = Image("i", base, "qcow2", "vda", 1 << 20)
    host = SimpleNamespace(neighbours=lambda: iter(()))
    return SimpleNamespace(name="vm", catalog=Catalog("u", "vm", {"i": image}, {"vda": "i"}), host=host, config=config)


def test_image_root_that_was_chosen_must_be_readable_and_the_built_in_ones_need_not(
    base: Path, tmp_path: Path, deny: Deny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/var/lib/libvirt/images can be listed by root only: that keeps nobody from his own VMs in his own directory."""
    root = tmp_path / "images"
    (root / "below").mkdir(parents=True)
    deny(root / "below", errno.EACCES)
    chosen = vm_on(base, Config(image_roots=(root,)))
    with pytest.raises(Refused, match="below can't be read") as caught:
        sharers.refuse_overlays(chosen, chosen.catalog.images["i"], [])
    assert not isinstance(caught.value, HasSharers) and "as root" in str(caught.value.hint)
    monkeypatch.setattr(Config, "image_roots", (root,))
    sharers.refuse_overlays(chosen, chosen.catalog.images["i"], [])
    deny(base.parent, errno.EACCES)
    with pytest.raises(Refused, match="vm can't be read"):
        sharers.refuse_overlays(chosen, chosen.catalog.images["i"], [])


def test_disk_of_a_new_machine_is_refused_when_its_directory_holds_what_cannot_be_read(base: Path, deny: Deny) -> None:
    base.with_name("other").write_bytes(bytes(4096))
    assert sharers.overlays_beside(base) == []
    deny(base.with_name("other"), errno.EACCES)
    with pytest.raises(Refused, match="other can't be read"):
        sharers.overlays_beside(base)
    overlay = make(base.with_name("overlay"), base.name)
    assert sharers.overlays_beside(base) == [overlay]
