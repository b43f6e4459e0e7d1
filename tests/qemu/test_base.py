"""base seal, verify, users: a shared base is protected, a change of it is noticed, everybody who uses it is found."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.refusals import refused, unchanged
from tests.support.rig import MiB, Rig

BASE = "template.qcow2"


def io(path: Path, command: str) -> None:
    """Write into an image as a guest or a careless hand would."""
    done = subprocess.run(["qemu-io", "-f", Rig.fmt(path), "-c", command, str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and "wrote" in done.stdout, done.stdout + done.stderr


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Rig]:
    """A machine whose vda stands on a template in another directory, one snapshot; what both states hold."""
    rig = Rig(tmp_path / "vm", size=8 * MiB, targets=("vda",))
    place = tmp_path / "base"
    place.mkdir()
    rig.configure(f'image_roots = ["{place}"]\n')
    Rig.qemu_img("create", "-q", "-f", "qcow2", str(place / BASE), str(8 * MiB))
    io(place / BASE, "write -P 7 0 2M")
    Rig.qemu_img("create", "-q", "-f", "qcow2", "-b", str(place / BASE), "-F", "qcow2", str(rig.dir / "vda.qcow2"))
    text = 'name = "vm"\nmemory = "64 MiB"\naccel = "tcg"\n[[disk]]\ntarget = "vda"\nimage = "vda.qcow2"\n'
    (rig.dir / "vm.toml").write_text(text)
    rig.ok("machine", "define", str(rig.dir / "vm.toml"))
    rig.write(1, MiB, 64 * 1024)
    rig.remember("s1")
    rig.ok("create", "vm", "s1")
    rig.write(2, 3 * MiB, 64 * 1024)
    rig.remember("now")
    yield rig
    rig.destroy()


def base_of(rig: Rig) -> Path:
    """The template."""
    return rig.dir.parent / "base" / BASE


def test_seal_and_verify_find_what_was_written_in_place_replaced_and_moved(shared: Rig) -> None:
    """What the tables do not show, the digest does; the time alone is told from the content."""
    base = base_of(shared)
    refused(shared, "base", "verify", str(base), code=4, says="not sealed")
    assert "0644 -> 0444" in shared.ok("base", "seal", str(base), "-n").out and base.stat().st_mode & 0o222
    sealed = shared.ok("--json", "base", "seal", str(base), "--digest").json
    assert len(sealed["sha256"]) == 64 and base.stat().st_mode & 0o777 == 0o444
    assert "every byte" in shared.ok("base", "verify", "--deep", str(base)).out
    whole = base.read_bytes()
    times = base.stat()

    os.utime(base)  # only touched
    refused(shared, "base", "verify", str(base), code=8, says="--deep")
    shared.ok("base", "verify", "--deep", str(base))
    refused(shared, "start", "vm", "--paused", code=8, says="written to since it was sealed")
    os.utime(base, ns=(times.st_atime_ns, times.st_mtime_ns))
    shared.ok("base", "verify", str(base))

    io(base, "write -P 8 0 64k")  # in place: no table changes
    refused(shared, "start", "vm", "--paused", code=8, says="written to since it was sealed")
    refused(shared, "delete", "vm", "s1", "-y", code=8, says="written to since it was sealed")
    refused(shared, "base", "verify", "--deep", str(base), code=8, says="content differs")
    base.chmod(0o644)
    base.write_bytes(whole)
    os.utime(base, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "it can be written" in shared.ok("base", "verify", "--deep", str(base)).err

    base.rename(base.with_name("renamed.qcow2"))
    refused(shared, "base", "verify", str(base), code=8, says="renamed.qcow2")
    assert "was called" in shared.ok("base", "verify", str(base.with_name("renamed.qcow2"))).err


def test_users_finds_every_vm_overlay_and_name(shared: Rig, tmp_path: Path) -> None:
    """The machine, an overlay that no VM has and one on it, a hard link, a symlink, a bind mount."""
    base = base_of(shared)
    overlay = base.parent / "unknown.qcow2"
    Rig.qemu_img("create", "-q", "-f", "qcow2", "-b", BASE, "-F", "qcow2", str(overlay))
    Rig.qemu_img("create", "-q", "-f", "qcow2", "-b", str(overlay), "-F", "qcow2", str(shared.dir / "upper.qcow2"))
    (base.parent / "link.qcow2").symlink_to(BASE)
    os.link(base, tmp_path / "hard.qcow2")
    bound = tmp_path / "bound"
    bound.mkdir()
    elsewhere = {
        u["who"] for u in shared.ok("--json", "base", "users", str(base)).json["users"] if u["how"] == "bind mount"
    }
    subprocess.run(["mount", "--bind", str(base.parent), str(bound)], check=True)
    try:
        found = shared.ok("--json", "base", "users", str(base)).json["users"]
    finally:
        subprocess.run(["umount", str(bound)], check=True)
    said = {(user["who"], user["how"]) for user in found if user["who"] not in elsewhere}  # mounts of the system's own
    assert said == {
        ("the machine vm", "stands on it"), (f"the file {overlay}", "stands on it"),
        (f"the file {shared.dir}/upper.qcow2", "stands on it"), (f"the name {base.parent}/link.qcow2", "symlink"),
        (f"the name {bound}/{BASE}", "bind mount"),
        ("1 more name (hard links), no known directory has them", "hard link"),
    }  # fmt: skip
    (tmp_path / "hard.qcow2").unlink()
    (base.parent / "link.qcow2").unlink()
    shared.ok("base", "seal", str(base))
    with unchanged(shared):
        refused(shared, "base", "seal", str(shared.active()["vda"]), code=6, says="the machine vm writes to")


def test_base_that_a_snapshot_froze_is_not_merged_into_once_it_is_sealed(shared: Rig) -> None:
    """Its own lowest layer, given to others."""
    layer = shared.snapshots()["s1"]["vda"]
    shared.ok("base", "seal", str(layer))
    with unchanged(shared):
        error = refused(shared, "delete", "vm", "s1", "-y", code=6, says="sealed")
        assert error["kind"] == "HasSharers" and "detach" in error["hint"]


def test_layer_that_another_vm_stands_on_is_let_go_of_by_a_copy(shared: Rig) -> None:
    """Refused by name until then; afterwards the VM is on its own, and the other one sees what it saw."""
    layer, place = shared.snapshots()["s1"]["vda"], shared.dir / "other"
    place.mkdir()
    shared.configure(f'image_roots = ["{shared.dir}", "{base_of(shared).parent}"]\n')
    overlay = place / "other.qcow2"
    Rig.qemu_img("create", "-q", "-f", "qcow2", "-b", str(layer), "-F", "qcow2", str(overlay))
    text = 'name = "other"\nmemory = "64 MiB"\naccel = "tcg"\n[[disk]]\ntarget = "vda"\nimage = "other.qcow2"\n'
    (place / "other.toml").write_text(text)
    shared.ok("machine", "define", str(place / "other.toml"))
    before = shared.digest(overlay)
    assert (
        "diskchain detach vm" in refused(shared, "delete", "vm", "s1", "-y", code=6, says="the machine other")["hint"]
    )
    told = shared.ok("--json", "detach", "vm").json
    assert set(told["let_go"]) == {str(base_of(shared)), str(layer)}
    states = {**shared.snapshots(), "now": shared.active()}
    assert {n: shared.digest(d["vda"]) for n, d in states.items()} == {n: shared.expected[n]["vda"] for n in states}
    assert layer not in {p["vda"] for p in states.values()}
    shared.ok("delete", "vm", "s1", "-y")
    assert shared.digest(shared.active()["vda"]) == shared.expected["now"]["vda"]
    assert shared.digest(overlay) == before
    findings = shared.run("--json", "check", "other").json["findings"]
    assert [f for f in findings if f["severity"] == "error"] == []
