"""Who else uses a layer is asked before it is merged into or unlinked; overlays never land on somebody's file."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from diskchain.config import Config
from diskchain.errors import DiskchainError, Refused
from diskchain.ops import create, revert
from diskchain.ops.vm import Host
from tests.support.refusals import check_error, refused, unchanged
from tests.support.rig import MiB, Rig


def overlay_on(base: Path, place: Path) -> Path:
    """Make an overlay that diskchain does not know."""
    fmt = ["-F", Rig.fmt(base)]
    Rig.qemu_img("create", "-q", "-f", "qcow2", "-b", str(base), *fmt, str(place))
    return place


def test_unknown_overlay_on_a_layer_of_the_merge_is_named(tree: Rig) -> None:
    """On the base that is merged into, and on the layer that goes: either would be destroyed."""
    for layer in (tree.snapshots()["s3"]["vda"], tree.active()["vdb"]):
        stranger = overlay_on(layer, tree.dir / "stranger.qcow2")
        with unchanged(tree):
            error = refused(tree, "delete", "vm", "s3", "-y", code=6, says="stranger.qcow2")
            assert error["kind"] == "HasSharers"
        stranger.unlink()
    tree.ok("delete", "vm", "s3", "-y")
    assert tree.verdict(present="now") == []


def test_unknown_overlay_on_a_leaf_keeps_it_from_being_unlinked(tree: Rig) -> None:
    """RECOVER.txt tells people to make such overlays."""
    stranger = overlay_on(tree.snapshots()["before-revert-1"]["vda"], tree.dir / "image-without-suffix")
    with unchanged(tree):
        refused(tree, "delete", "vm", "before-revert-1", "-y", code=6, says="image-without-suffix")
    stranger.unlink()
    tree.ok("delete", "vm", "before-revert-1", "-y")
    assert tree.verdict(present="now") == []


def test_hard_link_to_a_layer_of_the_merge_is_refused(tree: Rig) -> None:
    """Who uses the other name is not known."""
    layer = tree.snapshots()["s3"]["vda"]
    os.link(layer, tree.dir.parent / "link")
    try:
        with unchanged(tree):
            refused(tree, "delete", "vm", "s3", "-y", code=6, says="hard links")
    finally:
        (tree.dir.parent / "link").unlink()


def test_other_machine_on_an_overlay_elsewhere_is_named(tree: Rig) -> None:
    """Its files lie in another directory; its catalog tells."""
    place = tree.dir / "elsewhere"
    place.mkdir()
    layer = tree.snapshots()["s3"]["vda"]
    overlay_on(layer, place / "other.qcow2")
    text = 'name = "other"\nmemory = "64 MiB"\naccel = "tcg"\n[[disk]]\ntarget = "vda"\nimage = "other.qcow2"\n'
    (place / "other.toml").write_text(text)
    config = tree.dir / "config.toml"
    config.write_text(f'image_roots = ["{tree.dir}"]\n')
    tree.ok("--config", str(config), "machine", "define", str(place / "other.toml"))
    with unchanged(tree):
        refused(tree, "delete", "vm", "s3", "-y", code=6, says="the machine other")


@pytest.mark.parametrize("kind", ["file", "symlink", "dangling", "directory", "fifo"])
@pytest.mark.parametrize("operation", ["create", "revert"])
def test_overlay_name_that_is_taken_the_file_there_is_not_touched(tree: Rig, operation: str, kind: str) -> None:
    """With an id that can be known beforehand: O_EXCL, O_NOFOLLOW, and the undo does not unlink it either."""
    victim = tree.dir.parent / "victim"
    victim.write_bytes(b"precious")
    path = tree.dir / "vda.vda.0123456789ab.qcow2"
    if kind == "file":
        path.write_bytes(b"precious")
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(victim if kind == "symlink" else tree.dir.parent / "nowhere")
    host = Host(replace(Config(), state_dir=tree.dir / "state", run_dir=tree.run_dir))
    with unchanged(tree), mock.patch("diskchain.ops.layers.new_id", return_value="0123456789ab"):
        with pytest.raises(DiskchainError) as caught:
            asyncio.run(_operate(host, operation))
        assert isinstance(caught.value, Refused) and "exists already" in caught.value.message
    assert victim.read_bytes() == b"precious" and not (tree.dir.parent / "nowhere").exists()
    assert not tree.journal()


@pytest.fixture
def bound(tree: Rig) -> Iterator[tuple[Rig, Path]]:
    """The tree, and the same directory by another name (mount --bind)."""
    place = tree.dir.parent / "bound"
    place.mkdir()
    subprocess.run(["mount", "--bind", str(tree.dir), str(place)], check=True)
    try:
        yield tree, place
    finally:
        subprocess.run(["umount", str(place)], check=True)
        place.rmdir()


def test_overlay_that_names_a_layer_through_a_bind_mount_is_named(bound: tuple[Rig, Path]) -> None:
    """Another path, the same device and inode."""
    tree, place = bound
    layer = tree.snapshots()["s3"]["vda"]
    stranger = overlay_on(place / layer.name, tree.dir.parent / "stranger.qcow2")
    config = tree.dir.parent / "bound.toml"
    config.write_text(f'image_roots = ["{tree.dir.parent}"]\n')
    try:
        with unchanged(tree):
            refused(tree, "--config", str(config), "delete", "vm", "s3", "-y", code=6, says="stranger.qcow2")
    finally:
        stranger.unlink()
        config.unlink()


def test_own_layers_seen_through_a_bind_mount_are_no_strangers(bound: tuple[Rig, Path]) -> None:
    """Where the image roots show the directory twice."""
    tree, place = bound
    config = tree.dir.parent / "bound.toml"
    config.write_text(f'image_roots = ["{place}"]\n')
    tree.ok("--config", str(config), "delete", "vm", "s3", "-y")
    config.unlink()
    assert tree.verdict(present="now") == []


def test_overlay_elsewhere_that_a_symlink_leads_to_is_named(tree: Rig) -> None:
    """By delete, by `base users`, by check; in the VM's directory, and where an image root leads to a directory."""
    layer, elsewhere = tree.snapshots()["s3"]["vda"], tree.dir.parent / "elsewhere"
    (elsewhere / "below").mkdir(parents=True)
    stranger, link = overlay_on(layer, elsewhere / "below/stranger.qcow2"), tree.dir / "link.qcow2"
    before = tree.digest(stranger)
    try:
        link.symlink_to(stranger)
        with unchanged(tree):
            error = refused(tree, "delete", "vm", "s3", "-y", code=6, says="link.qcow2")
            assert error["kind"] == "HasSharers"
            users = tree.ok("--json", "base", "users", str(layer)).json["users"]
            assert ("stands on it", str(link)) in {(user["how"], user["path"]) for user in users}
            found = tree.run("--json", "check", "vm").json["findings"]
            assert ("foreign-overlay", str(link)) in {(f["code"], f["subject"]) for f in found}
        link.unlink()
        roots = tree.dir / "roots"
        roots.mkdir()
        (roots / "more").symlink_to(elsewhere)
        tree.configure(f'image_roots = ["{roots}"]\n')
        with unchanged(tree):
            refused(tree, "delete", "vm", "s3", "-y", code=6, says="stranger.qcow2")
        assert tree.digest(stranger) == before
    finally:
        shutil.rmtree(elsewhere)
    tree.ok("delete", "vm", "s3", "-y")
    assert tree.verdict(present="now") == []


# root, without the right to read what is another user's
UNPRIVILEGED = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


def test_file_that_cannot_be_read_may_be_an_overlay(tree: Rig) -> None:
    """Another user's, mode 0600: nothing is merged, removed or defined beside it; who only looks is told."""
    layer = tree.snapshots()["s3"]["vda"]
    stranger = overlay_on(layer, tree.dir / "stranger.qcow2")
    key, place = tree.dir / "key.pem", tree.dir / "place"
    place.mkdir()
    key.write_bytes(bytes(511))
    for path in (stranger, key):
        path.chmod(0o600)
        os.chown(path, 65534, 65534)
    before = tree.digest(stranger)
    with unchanged(tree):
        for args in (
            ("delete", "vm", "s3", "-y"),
            ("detach", "vm"),
            ("move", "vm", "--to", str(place)),
        ):
            answer = tree.run("--json", *args, prefix=UNPRIVILEGED)
            assert "stranger.qcow2 can't be read" in check_error(answer, code=6, says="as root")["message"]
        users = tree.run("--json", "base", "users", str(layer), prefix=UNPRIVILEGED).json["users"]
        assert [u["how"][:16] for u in users if u["path"] == str(stranger)] == ["it can't be read"]
        found = tree.run("--json", "check", "vm", prefix=UNPRIVILEGED).json["findings"]
        assert [f["subject"] for f in found if f["code"] == "unreadable"] == [str(stranger)]
    assert tree.digest(stranger) == before
    stranger.unlink()
    answer = tree.run("delete", "vm", "s3", "-y", prefix=UNPRIVILEGED)
    assert answer.code == 0, answer.err
    assert tree.verdict(present="now") == []


async def _operate(host: Host, operation: str) -> None:
    async with host.change("vm", operation) as vm:
        if operation == "create":
            await create.create(vm, create.Request("x"))
        else:
            await revert.revert(vm, revert.Request("s2"))


def test_control_a_stranger_of_the_same_size_elsewhere_does_not_matter(tree: Rig) -> None:
    """An image beside it that stands on nothing of ours keeps nobody from anything."""
    Rig.qemu_img("create", "-q", "-f", "qcow2", str(tree.dir.parent / "alone.qcow2"), str(8 * MiB))
    tree.ok("delete", "vm", "s3", "-y")
    assert tree.verdict(present="now") == []
