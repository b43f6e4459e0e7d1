"""check --repair: what is beyond doubt is put right, after asking; what is not is only reported; killed, it is done again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.breakage import leak, orphan, tear
from tests.support.refusals import check_error, grow_tree, refused, unchanged
from tests.support.rig import MiB, Rig
from tests.support.sample import some


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, Path]]:
    """The usual tree, off, with everything wrong that can be put right; and a copy of it all."""
    rig = Rig(tmp_path_factory.mktemp("repair") / "vm", size=8 * MiB, raw=("vdb",))
    grow_tree(rig)
    elsewhere = rig.dir / "elsewhere"
    elsewhere.mkdir()
    rig.configure(f'image_roots = ["{elsewhere}"]\n')
    frozen = rig.snapshots()
    for target in ("vda", "vdb"):
        frozen["s1"][target].rename(elsewhere / f"moved-{target}{frozen['s1'][target].suffix}")
    tear(frozen["s2"]["vda"])
    Rig.qemu_img("rebase", "-u", "-f", "qcow2", "-b", "nowhere.raw", "-F", "raw", str(frozen["before-revert-1"]["vdb"]))
    leak(rig.active()["vda"])
    orphan(rig, "vda.vda.0123456789ab.qcow2")
    (rig.dir / ".vda.vda.0123456789ac.qcow2.trash").write_bytes(bytes(4096))
    template = rig.save_template()
    yield rig, template
    rig.destroy()
    shutil.rmtree(template)


def whole(rig: Rig) -> list[str]:
    """Every state against what was written; the moved bases count as they lie."""
    moved = {"orphan vda.qcow2", "missing moved-vda.qcow2", "missing moved-vdb.raw"}
    return [w for w in rig.verdict(present="now") if w not in moved]


def test_repair_asks_names_the_evidence_and_puts_it_right(broken: tuple[Rig, Path]) -> None:
    """Nothing without a yes; afterwards every state is whole, and check finds nothing to repair any more."""
    rig, template = broken
    rig.restore_template(template)
    with unchanged(rig):
        plan = rig.ok("--json", "check", "vm", "--repair", "-n").json["plan"]
        refused(rig, "check", "vm", "--repair", code=2, says="--yes")
        refused(rig, "start", "vm", code=8)
    said = "\n".join(plan["steps"])
    for word in ("moved-vda.qcow2 has its fingerprint", "moved-vdb.raw", "its header is not what was recorded",
                 "clusters that are reserved", "no cluster of it holds data", "put away"):  # fmt: skip
        assert word in said, said
    answer = rig.run("--json", "check", "vm", "--repair", "-y")
    assert answer.code == 0, answer.out + answer.err
    assert len(answer.json["repaired"]) == len(plan["steps"]) == 7
    assert whole(rig) == []
    assert "nothing is to be repaired" in rig.ok("check", "vm", "--repair", "-n").out
    rig.ok("delete", "vm", "s3", "-y")
    assert whole(rig) == []


@pytest.mark.timeout(300)
def test_kill_at_every_step_then_the_next_repair_puts_it_right(broken: tuple[Rig, Path]) -> None:
    """After `recover` nothing is open, whatever is left is found again."""
    rig, template = broken
    rig.restore_template(template)
    points, wrong = rig.points("check", "vm", "--repair", "-y"), []
    for point in some(points, 5):
        rig.restore_template(template)
        assert rig.killed("check", "vm", "--repair", "-y", at=point), point
        rig.ok("recover", "vm")
        answer = rig.run("check", "vm", "--repair", "-y")
        wrong += [] if answer.code == 0 else [f"{point}: {answer.out}{answer.err}"]
        wrong += [f"{point}: {w}" for w in whole(rig)]
    assert not wrong, "\n".join(wrong)
    assert len(points) >= 40


def test_what_is_unsure_is_only_reported(broken: tuple[Rig, Path]) -> None:
    """Two files with one fingerprint; an overlay of our name that holds data; a layer that really was written to."""
    rig, template = broken
    rig.restore_template(template)
    moved = rig.dir / "elsewhere/moved-vda.qcow2"
    shutil.copy2(moved, moved.with_name("twin.qcow2"))
    stray = rig.dir / "vda.vda.0123456789ab.qcow2"
    Rig.qemu_img("create", "-q", "-f", "qcow2", str(stray), str(8 * MiB))
    layer = rig.snapshots()["s3"]["vdb"]
    with layer.open("r+b") as file:
        file.seek(0x30000)
        file.write(bytes(8))
    answer = rig.run("--json", "check", "vm", "--repair", "-y")
    assert answer.code == 11
    said = {(f["code"], Path(f["subject"].split()[-1]).name) for f in answer.json["findings"]}
    assert {("layer-missing", "vda.qcow2"), ("orphan-overlay", stray.name), ("layer-changed", layer.name)} <= said
    assert stray.exists() and moved.exists()


@pytest.mark.parametrize("point", ["repair.relinked-one", "repair.header-half", "repair.leaks"])
def test_error_half_way_is_unfinished_and_recover_finishes_it(broken: tuple[Rig, Path], point: str) -> None:
    """Exit 3, because something was written; what had not begun stays for the next repair."""
    rig, template = broken
    rig.restore_template(template)
    answer = rig.run("--json", "check", "vm", "--repair", "-y", fault=f"fail:{point}")
    check_error(answer, code=3, says="diskchain recover vm")
    assert len(rig.journal()) == 1
    assert "put right" in rig.ok("recover", "vm").out
    assert rig.run("check", "vm", "--repair", "-y").code == 0
    assert whole(rig) == []


def test_error_half_way_that_stays_keeps_the_entry_until_it_is_let_go_of(broken: tuple[Rig, Path]) -> None:
    """The disk fails again: nothing is forgotten; with --undo it is, and the next repair finds it anew."""
    rig, template = broken
    rig.restore_template(template)
    fault = "fail:repair.relinked-one"
    assert rig.run("check", "vm", "--repair", "-y", fault=fault).code == 3
    assert rig.run("recover", "vm", fault=fault).code == 3 and len(rig.journal()) == 1
    assert "let go of" in rig.ok("recover", "vm", "--undo", "-y").out and not rig.journal()
    assert rig.run("check", "vm", "--repair", "-y").code == 0
    assert whole(rig) == []
