"""Names of image files that QEMU, a header or a file system could take for something else."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from diskchain.config import Config
from diskchain.ops import create, layers
from diskchain.ops.vm import Host
from tests.support.refusals import refused, unchanged
from tests.support.rig import MiB, Rig

ODD = ("web:1", "json:{}", "file:x,y=z", "-x", 'it\'s "ü" %s\\')


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A small machine with one disk, not defined yet."""
    rig = Rig(tmp_path / "vm", size=8 * MiB, targets=("vda",))
    yield rig
    rig.destroy()


def define(rig: Rig, name: str) -> None:
    """Make the image of that name, and the machine on it."""
    rig.qemu_img("create", "-q", "-f", "qcow2", str(rig.dir / name), str(rig.size))
    lines = ['name = "vm"', 'memory = "64 MiB"', 'accel = "tcg"', "[[disk]]", 'target = "vda"']
    (rig.dir / "vm.toml").write_text("\n".join([*lines, f"image = {json.dumps(name)}", 'format = "qcow2"', ""]))
    rig.ok("machine", "define", str(rig.dir / "vm.toml"))


def backing_names(rig: Rig) -> list[str]:
    """What the headers of the active chain name, as qemu-img follows them."""
    chain = json.loads(rig.qemu_img("info", "--backing-chain", "--output=json", str(rig.active()["vda"])))
    return [image["backing-filename"] for image in chain[:-1]]


@pytest.mark.parametrize("name", ODD)
def test_image_of_any_name_is_snapshotted_started_reverted_merged(rig: Rig, name: str) -> None:
    """QEMU takes `web:` for a protocol: the VM ran on, and nothing could be done with it any more once it was off."""
    define(rig, f"{name}.qcow2")
    for number, state in enumerate(("one", "two", "three"), 1):
        rig.write(number, number * MiB, MiB)
        rig.remember(state)
        rig.ok("create", "vm", state)
    rig.ok("start", "vm", "--paused")
    rig.remember("four")
    rig.ok("create", "vm", "four", "--disk-only")
    rig.ok("stop", "vm", "--force", "-y")
    rig.write(5, 5 * MiB, MiB)
    rig.remember("now")
    names = backing_names(rig)
    assert len(names) == 4 and all(found.startswith("./") == (":" in name) for found in names)
    rig.ok("start", "vm", "--paused")
    rig.ok("stop", "vm", "--force", "-y")
    assert rig.verdict(present="now") == []
    rig.ok("delete", "vm", "two", "three", "-y")
    rig.expected["before-revert-1"] = rig.expected["now"]
    rig.ok("revert", "vm", "one", "-y")
    assert rig.verdict(present="one") == [] and rig.ok("check", "vm").code == 0
    rig.ok("accept", "vm", "--drop-branches", "-y")
    assert rig.verdict(present="one") == [] and not rig.snapshots()


def test_image_with_a_colon_goes_to_a_directory_with_one_and_is_told_in_recover_txt(rig: Rig) -> None:
    """create --overlay-dir, delete --to, move; then the commands of RECOVER.txt, all of them."""
    define(rig, "it's:1.qcow2")
    there, further = rig.dir.parent / "the:re, 1", rig.dir.parent / "further:"
    there.mkdir()
    further.mkdir()
    for number, state in enumerate(("one", "two", "three"), 1):
        rig.write(number, number * MiB, MiB)
        rig.remember(state)
        rig.ok("create", "vm", state, *(["--overlay-dir", str(there)] if state == "one" else []))
    rig.remember("now")
    rig.ok("delete", "vm", "two", "--to", str(further), "-y")
    rig.ok("move", "vm", "--to", str(there))
    moved = Rig(there, expected=rig.expected)
    moved.run_dir.rmdir()
    assert moved.verdict(present="now") == [] and rig.ok("check", "vm").code == 0
    (text,) = there.glob(".diskchain/*/RECOVER.txt")
    commands = [line.strip() for line in text.read_text().splitlines() if "qemu-img" in line and line[0] == " "]
    assert len(commands) == 4
    for command in commands:
        subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)
    assert moved.digest(moved.active()["vda"]) == rig.expected["now"]["vda"]


def without_the_dot(overlay: Path, backing: Path) -> str:
    """How overlays named their backing files once."""
    return backing.name if overlay.parent == backing.parent else str(backing)


@pytest.mark.parametrize("killed", ["", "repair.named#1", "repair.named#2"])
def test_layers_that_named_a_protocol_are_repaired(rig: Rig, killed: str) -> None:
    """Made without the `./`: nothing but `check --repair` can be done with them."""
    define(rig, "web:1.qcow2")
    host = Host(replace(Config(), state_dir=rig.dir / "state", run_dir=rig.run_dir))

    async def snapshot(name: str) -> None:
        async with host.change("vm", "create") as vm:
            await create.create(vm, create.Request(name, memory="never"))

    with mock.patch("diskchain.host.qemu_img.backing_name_for", without_the_dot):
        asyncio.run(snapshot("one"))
    with (
        mock.patch("diskchain.host.qemu_img.backing_name_for", without_the_dot),
        mock.patch("diskchain.chain.qcow2.has_protocol", return_value=False),
    ):
        asyncio.run(snapshot("two"))
    refused(rig, "start", "vm", code=6, says="not a plain path")
    if killed:
        assert rig.killed("check", "vm", "--repair", "-y", at=killed)
        rig.ok("recover", "vm")
    rig.ok("check", "vm", "--repair", "-y")
    assert backing_names(rig)[1] == "./web:1.qcow2"
    rig.write(1, MiB, MiB)
    rig.remember("now")
    rig.ok("start", "vm", "--paused")
    rig.ok("stop", "vm", "--force", "-y")
    rig.ok("delete", "vm", "one", "two", "-y")
    assert rig.verdict(present="now") == []


LONG = ("€" * 75 + "x.qcow2", "€" * 83 + ".qcow2", "x" * 249 + ".qcow2")


@pytest.mark.parametrize("name", LONG, ids=["232", "255", "255-ascii"])
def test_image_with_a_long_name_is_snapshotted_merged_sealed_and_let_go(rig: Rig, name: str) -> None:
    """255 bytes are a name's limit, however few characters they are: nothing of ours beside it is longer."""
    define(rig, name)
    for number, state in enumerate(("one", "two", "three"), 1):
        rig.write(number, number * MiB, MiB)
        rig.remember(state)
        rig.ok("create", "vm", state)
    rig.remember("now")
    rig.ok("delete", "vm", "two", "-y")
    rig.expected["before-revert-1"] = rig.expected["now"]
    rig.ok("revert", "vm", "one", "-y")
    rig.ok("delete", "vm", "before-revert-1", "three", "-y")
    assert rig.verdict(present="one") == []
    rig.ok("base", "seal", str(rig.dir / name))
    refused(rig, "delete", "vm", "one", "-y", code=6, says="sealed")
    assert "is what was sealed" in rig.ok("base", "verify", str(rig.dir / name)).out
    rig.ok("detach", "vm", "--to", str(rig.dir))
    assert [wrong for wrong in rig.verdict(present="one") if wrong != f"orphan {name}"] == []
    (text,) = rig.dir.glob(".diskchain/*/RECOVER.txt")
    (command,) = (line for line in text.read_text().splitlines() if "qemu-img create" in line)
    subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)


def longer_name(base: Path, target: str, image_id: str) -> str:
    """How layers were named once: 100 characters, not bytes."""
    return f"{base.stem[:100]}.{target}.{image_id}.qcow2"


@pytest.mark.parametrize("count", [75, 77])
def test_layers_with_longer_names_are_merged_and_their_journal_is_finished(rig: Rig, count: int) -> None:
    """Names of 249 and 255 bytes, to which a trash name, or a seal's, can't be added: what is begun ends all the same."""
    define(rig, "€" * count + "x.qcow2")
    host = Host(replace(Config(), state_dir=rig.dir / "state", run_dir=rig.run_dir))

    async def snapshot(name: str) -> None:
        async with host.change("vm", "create") as vm:
            await create.create(vm, create.Request(name, memory="never"))

    with mock.patch("diskchain.ops.layers.layer_name", longer_name):
        for number, state in enumerate(("one", "two", "three"), 1):
            rig.write(number, number * MiB, MiB)
            rig.remember(state)
            asyncio.run(snapshot(state))
    rig.remember("now")
    (layer,) = rig.snapshots()["two"].values()
    assert len(layer.name.encode()) == 3 * count + 24
    points = [f"delete.{name}" for name in ("relinked.after", "trashed")]
    for state, point in zip(("two", "three"), points, strict=True):
        assert rig.killed("delete", "vm", state, "-y", at=point)
        rig.ok("recover", "vm")
        assert rig.verdict(present="now") == [] and state not in rig.snapshots()
    put_away = layers.trash_of(layer.with_name(longer_name(rig.dir / ("€" * count + "x.qcow2"), "vda", "0123456789ab")))
    put_away.write_bytes(bytes(4096))
    assert len(put_away.name.encode()) <= 255
    rig.ok("check", "vm", "--repair", "-y")
    assert not put_away.exists() and rig.verdict(present="now") == []


@pytest.mark.parametrize("name", ["a\tb", "a\x7fb", "a\x9bb", "a\nb", b"a\xffb"])
def test_image_whose_name_no_header_may_hold_is_refused_when_it_is_defined(rig: Rig, name: str | bytes) -> None:
    """Under another name, too: a link's target counts."""
    real = rig.dir / os.fsdecode(name)
    rig.qemu_img("create", "-q", "-f", "qcow2", str(real), str(rig.size))
    (rig.dir / "vda.qcow2").symlink_to(real)
    text = 'name = "vm"\nmemory = "64 MiB"\naccel = "tcg"\n[[disk]]\ntarget = "vda"\nimage = "vda.qcow2"\n'
    (rig.dir / "vm.toml").write_text(text)
    with unchanged(rig):
        refused(rig, "machine", "define", str(rig.dir / "vm.toml"), code=2, says="rename the file")
        refused(rig, "machine", "import", "other", "--disk", f"{rig.dir}/vda.qcow2,format=qcow2", code=2, says="rename")


@pytest.mark.parametrize("name", [b"a\xffb", b"a\nb"])
def test_directory_that_no_record_can_hold_is_refused_by_name(rig: Rig, name: bytes) -> None:
    """Whatever it is for, and through a link to it; before anything is journalled."""
    bad, link = rig.dir / os.fsdecode(name), rig.dir / "link"
    bad.mkdir()
    link.symlink_to(bad)
    define(rig, "vda.qcow2")
    rig.ok("create", "vm", "one")
    rig.qemu_img("create", "-q", "-f", "qcow2", str(bad / "base.qcow2"), "8M")
    text = 'name = "other"\nmemory = "64 MiB"\naccel = "tcg"\n[[disk]]\ntarget = "vda"\nimage = "base.qcow2"\n'
    (bad / "other.toml").write_text(text)
    shown = "a\\xffb" if name == b"a\xffb" else "a\\nb"
    with unchanged(rig):
        for directory in (str(bad), str(link)):
            refused(rig, "create", "vm", "two", "--overlay-dir", directory, code=2, says=shown)
            refused(rig, "delete", "vm", "one", "--to", directory, "-y", code=2, says=shown)
            refused(rig, "move", "vm", "--to", directory, code=2, says=shown)
            refused(rig, "machine", "define", f"{directory}/other.toml", code=2, says=shown)
        refused(rig, "detach", "vm", "--to", str(bad), code=2, says=shown)
        refused(rig, "base", "seal", str(bad / "base.qcow2"), code=2, says=shown)
