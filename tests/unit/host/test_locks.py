"""The image guard against real QEMU tools, and the VM lock."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diskchain.errors import Busy
from diskchain.host.locks import (
    Far,
    announced,
    announcer,
    guard_images,
    holder_far,
    holder_operation,
    image_in_use,
    note_far,
    open_by,
    vm_lock,
)


def img(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["qemu-img", *args], capture_output=True, text=True)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    """base <- overlay <- child."""
    paths = tuple(tmp_path / f"{n}.qcow2" for n in ("base", "overlay", "child"))
    img("create", "-f", "qcow2", str(paths[0]), "8M")
    for below, above in itertools.pairwise(paths):
        assert img("create", "-f", "qcow2", "-b", str(below), "-F", "qcow2", str(above)).returncode == 0
    return paths[0], paths[1], paths[2]


def test_guard_keeps_readers_and_writers_off_and_lets_them_in_again(pair: tuple[Path, Path, Path]) -> None:
    base, overlay, child = pair
    with guard_images([base, overlay], wait=0, users=open_by):
        for path in pair:
            done = subprocess.run(
                ["qemu-io", "-f", "qcow2", "-c", "write 0 4k", str(path)], capture_output=True, text=True
            )
            assert "lock" in done.stderr + done.stdout, path
        assert img("check", str(overlay)).returncode != 0
        assert img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", str(overlay), str(child)).returncode == 0
        assert image_in_use(base)
    assert img("check", str(overlay)).returncode == 0 and not image_in_use(base)


def test_guard_waits_for_a_user_and_names_it(pair: tuple[Path, Path, Path]) -> None:
    base, overlay, _ = pair
    user = subprocess.Popen(["qemu-io", "-f", "qcow2", str(overlay)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert user.stdin and user.stdout
    user.stdin.write(b"read 0 512\n")
    user.stdin.flush()
    user.stdout.readline()
    with pytest.raises(Busy, match=r"qemu-io \(pid"), guard_images([base, overlay], wait=0.2, users=open_by):
        pass
    user.kill()
    user.wait()
    with guard_images([base, overlay], wait=5, users=open_by):
        pass


def test_guard_lives_on_in_the_engine_that_inherited_it(pair: tuple[Path, Path, Path]) -> None:
    base, overlay, _ = pair
    with guard_images([base, overlay], wait=0, users=open_by) as guard:
        engine = subprocess.Popen(["sleep", "30"], pass_fds=guard.fds)
    with pytest.raises(Busy), guard_images([base], wait=0.1, users=open_by):
        pass
    engine.kill()
    engine.wait()
    with guard_images([base], wait=5, users=open_by):
        pass


def test_vm_lock_names_its_holder_and_frees_itself_when_that_dies(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = f"""
import sys, time
from pathlib import Path
from diskchain.host.locks import vm_lock
with vm_lock(Path({str(lock)!r}), "create web1", wait=0):
    print("held", flush=True); time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert other.stdout and other.stdout.readline() == b"held\n"
    assert holder_operation(lock) == "create web1"
    began = time.monotonic()
    with pytest.raises(Busy, match=rf"create web1 \(pid {other.pid}"), vm_lock(lock, "delete web1", wait=0.3):
        pass
    assert time.monotonic() - began >= 0.3
    other.kill()
    other.wait()
    with vm_lock(lock, "delete web1", wait=5):
        assert holder_operation(lock) == "delete web1"


def test_vm_lock_that_is_free_names_nobody_though_its_holder_lives_on(tmp_path: Path) -> None:
    """A merge of many VMs goes from lock to lock."""
    lock = tmp_path / "lock"
    with vm_lock(lock, "merge web1", wait=0):
        note_far(lock, Far("merging vda", 1, 4))
        assert (holder_operation(lock), holder_far(lock)) == ("merge web1", Far("merging vda", 1, 4))
    assert (holder_operation(lock), holder_far(lock)) == (None, None)


def test_announced_is_told_as_long_as_the_block_runs_and_never_hinders(tmp_path: Path) -> None:
    """A second one goes on quietly, and so does one where no file can be made; what a kill left says nothing."""
    path = tmp_path / "waits"
    path.write_text("left by a kill")
    assert announcer(path) is None
    with announced(path, "start web1"):
        assert announcer(path) == os.getpid()
        with announced(path, "start web1"):
            assert announcer(path) == os.getpid()
        assert announcer(path) == os.getpid()
    assert announcer(path) is None and not path.exists()
    with announced(tmp_path / "not/there", "start web1"):
        pass
