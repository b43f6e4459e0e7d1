"""Files that we may not write, or not remove: said by name before anything changes, not when the snapshots are gone."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.refusals import picture

from .conftest import MACHINE, Run, Web1

NOBODY = 65534


@pytest.fixture
def theirs(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web1]:
    """The machine of somebody who is not root, and so are we: its template, and the snapshots one and (on it) two."""
    us = os.geteuid()
    with tempfile.TemporaryDirectory(prefix="dc-rights-") as name:
        directory = Path(name)
        for part in ("images", "state", "run", "config"):
            (directory / part).mkdir()
        monkeypatch.setenv("DISKCHAIN_STATE_DIR", str(directory / "state"))
        monkeypatch.setenv("DISKCHAIN_RUN_DIR", str(directory / "run"))
        monkeypatch.setenv("XDG_CONFIG_HOME", str(directory / "config"))
        if us == 0:
            for path in (directory, *directory.iterdir()):
                os.chown(path, NOBODY, -1)
            os.seteuid(NOBODY)
        try:
            images = directory / "images"
            for disk in ("web1.qcow2", "data.qcow2"):
                subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", images / disk, "16M"], check=True)
            (images / "web1.toml").write_text(MACHINE)
            run("machine", "define", str(images / "web1.toml"))
            web1 = Web1(run, images)
            for byte, snapshot in enumerate(("one", "two"), 1):
                run("create", "web1", snapshot)
                web1.write(byte, f"{byte}M")
            yield web1
        finally:
            os.seteuid(us)


@contextmanager
def not_ours(path: Path) -> Iterator[None]:
    """A file or a directory that belongs to root for a while; or, when we can't give it away, that nobody may write."""
    user, before = os.geteuid(), path.stat()
    if os.getuid() == 0:
        os.seteuid(0)
        os.chown(path, 0, -1)
        os.seteuid(user)
    else:
        path.chmod(before.st_mode & 0o555)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
            os.chown(path, before.st_uid, -1)
            os.seteuid(user)
        path.chmod(before.st_mode & 0o7777)


CASES: dict[str, tuple[Callable[[Web1], Path], tuple[str, ...], str]] = {
    "merged into": (lambda w: w.directory / "web1.qcow2", ("delete", "web1", "one"), "can't be written"),
    "relinked": (lambda w: Path(w.active()), ("delete", "web1", "one"), "can't be written"),
    "accept": (lambda w: w.directory / "data.qcow2", ("accept", "web1"), "can't be written"),
    "directory": (lambda w: w.directory, ("delete", "web1", "two"), "can't be removed"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_we_may_not_write_or_remove_is_refused_before_anything_changes(theirs: Web1, name: str) -> None:
    """By name, exit 6; afterwards every other command works, and so does this one when the rights are right."""
    find, words, says = CASES[name]
    path = find(theirs)
    with not_ours(path):
        before = picture(theirs.directory)
        error = theirs.run(*words, "-y", "--json", code=6).json["error"]
        assert says in error["message"] and str(path) in error["message"] and "owner" in error["message"]
        assert picture(theirs.directory) == before
    assert theirs.names() == ["one", "two"]
    theirs.run("recover", "web1")
    theirs.run(*words, "-y")
    assert theirs.reads(1, "1M") and theirs.reads(2, "2M")
