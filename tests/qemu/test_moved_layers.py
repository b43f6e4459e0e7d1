"""A layer that is gone from its place: what is taken for it, and what only looks like it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diskchain.store import record
from tests.qemu.test_base import base_of, io, shared
from tests.support.refusals import unchanged
from tests.support.rig import MiB, Rig

__all__ = ["shared"]


def repaired(rig: Rig, vm: str = "vm") -> Any:
    """Let everything be repaired; return the answer."""
    answer = rig.run("--json", "check", vm, "--repair", "-y")
    assert answer.code in (0, 11), answer.out + answer.err
    return answer.json


def alike(answer: Any) -> list[str]:
    """What is said of files that look like the lost layer."""
    return [f"{f['evidence']}; {f['remedy']}" for f in answer["findings"] if f["code"] == "layer-alike"]


def test_modified_copy_of_a_lost_base_is_not_taken(shared: Rig) -> None:
    """Written in place: no table changed. The moved file itself is taken, though the copy lies beside it."""
    base = base_of(shared)
    copy, away = base.with_name("copy.qcow2"), shared.dir.parent / "away.qcow2"
    shutil.copyfile(base, copy)
    io(copy, "write -P 9 0 64k")
    base.rename(away)
    with unchanged(shared):
        answer = repaired(shared)
    assert answer["repaired"] == []
    (said,) = alike(answer)
    assert str(copy) in said and "another time" in said and f"mv '{copy}' '{base}'" in said
    away.rename(base.with_name("renamed.qcow2"))
    answer = repaired(shared)
    assert [r["code"] for r in answer["repaired"]] == ["relink"] and alike(answer) == []
    assert "renamed.qcow2 has its fingerprint and the time of its last write" in answer["repaired"][0]["evidence"]
    assert shared.digest(shared.active()["vda"]) == shared.expected["now"]["vda"]


@pytest.mark.parametrize("changed", [False, True])
def test_copy_of_a_sealed_base_is_taken_by_its_digest(shared: Rig, changed: bool) -> None:
    """Its time is another one; every byte was compared."""
    base = base_of(shared)
    shared.ok("base", "seal", "--digest", str(base))
    copy = base.with_name("copy.qcow2")
    shutil.copyfile(base, copy)
    if changed:
        io(copy, "write -P 9 0 64k")
    base.unlink()
    answer = repaired(shared)
    if changed:
        assert answer["repaired"] == [] and "another time" in alike(answer)[0]
    else:
        assert "the digest of its seal" in answer["repaired"][0]["evidence"]
        assert shared.digest(shared.active()["vda"]) == shared.expected["now"]["vda"]


def test_record_without_the_time_loads_and_proves_nothing(shared: Rig) -> None:
    """As an earlier version wrote it. A seal has a time, too."""
    base = base_of(shared)
    (path,) = shared.dir.glob(".diskchain/*/catalog.json")
    body = record.read(path, "catalog")
    for image in body["images"].values():
        (image["fingerprint"] or {}).pop("written_ns", None)
    record.write(path, "catalog", body)
    assert shared.run("check", "vm").code == 0
    moved = base.rename(base.with_name("renamed.qcow2"))
    answer = repaired(shared)
    assert answer["repaired"] == [] and "was not recorded" in alike(answer)[0]
    moved.rename(base)
    shared.ok("base", "seal", str(base))
    base.rename(moved)
    assert [r["code"] for r in repaired(shared)["repaired"]] == ["relink"]


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[tuple[Rig, Path]]:
    """A machine of which s2 froze a layer without data, and that layer."""
    rig = Rig(tmp_path / "vm", size=8 * MiB, targets=("vda",))
    rig.build(guest=False)
    rig.write(1, 0, MiB)
    rig.ok("create", "vm", "s1")
    rig.ok("create", "vm", "s2")
    yield rig, rig.snapshots()["s2"]["vda"]
    rig.destroy()


def test_layer_without_data_is_never_recognized(empty: tuple[Rig, Path]) -> None:
    """Any fresh overlay on that base is the same, byte for byte, whatever time it has."""
    rig, layer = empty
    stray = rig.dir / "stray.qcow2"
    Rig.qemu_img("create", "-q", "-f", "qcow2", "-b", "vda.qcow2", "-F", "qcow2", str(stray), str(8 * MiB))
    assert stray.read_bytes() == layer.read_bytes()
    times = layer.stat()
    os.utime(stray, ns=(times.st_atime_ns, times.st_mtime_ns))
    layer.unlink()
    with unchanged(rig):
        answer = repaired(rig)
    assert answer["repaired"] == [] and "holds no data" in alike(answer)[0]


def test_layer_of_another_machine_is_never_taken(empty: tuple[Rig, Path]) -> None:
    """Frozen there, with data, written at the same time: it is that VM's all the same."""
    rig, _ = empty
    layer, place = rig.snapshots()["s1"]["vda"], rig.dir / "other"
    place.mkdir()
    rig.configure(f'image_roots = ["{place}"]\n')
    shutil.copy2(layer, place / "other.qcow2")
    text = 'name = "other"\nmemory = "64 MiB"\naccel = "tcg"\n[[disk]]\ntarget = "vda"\nimage = "other.qcow2"\n'
    (place / "other.toml").write_text(text)
    rig.ok("machine", "define", str(place / "other.toml"))
    rig.ok("create", "other", "s1")
    layer.unlink()
    answer = repaired(rig)
    assert answer["repaired"] == [] and "the machine other uses it" in alike(answer)[0]
