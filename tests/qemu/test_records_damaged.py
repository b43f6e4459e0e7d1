"""Damaged catalog, journal, definition; a second diskchain at the same time."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from diskchain.config import load_config
from diskchain.errors import Busy, ChainDamaged, NotFound
from diskchain.ops.approve import approve_chain
from diskchain.ops.vm import Host
from tests.support.refusals import check_error, refused, unchanged
from tests.support.rig import Answer, Rig, process_state, wait_for

CHANGING = [("start", "vm"), ("create", "vm", "x"), ("revert", "vm", "s2", "-y"), ("delete", "vm", "s3", "-y"),
            ("recover", "vm")]  # fmt: skip


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(3).randrange(len(data) // 4, len(data) // 2)] ^= 4
    path.write_bytes(data)


def _half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _newer(path: Path) -> None:
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps({**record, "version": 99}))


def _no_object(path: Path) -> None:
    path.write_text("[" * 100_000)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": _flip, "half": _half, "empty": lambda p: os.truncate(p, 0), "newer": _newer, "deep": _no_object,
    "binary": lambda p: p.write_bytes(bytes(range(256))),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_catalog_is_refused_by_everything(tree: Rig, kind: str) -> None:
    """Exit 8; nothing is guessed, nothing written; with the file back everything is as it was."""
    (path,) = tree.dir.glob(".diskchain/*/catalog.json")
    good = path.read_bytes()
    DAMAGES[kind](path)
    with unchanged(tree):
        for args in [*CHANGING, ("list", "vm"), ("machine", "define", str(tree.dir / "vm.toml"))]:
            refused(tree, *args, code=8, says="catalog.json")
        tree.ok("machine", "list")
    path.write_bytes(good)
    tree.ok("create", "vm", "x")


def test_missing_catalog_is_damage_and_never_a_new_machine(tree: Rig) -> None:
    """Exit 8 also for define: an empty catalog would start the base under its own overlays."""
    (path,) = tree.dir.glob(".diskchain/*/catalog.json")
    path.rename(tree.dir.parent / "catalog.json")
    with unchanged(tree):
        for args in [*CHANGING, ("machine", "define", str(tree.dir / "vm.toml"))]:
            refused(tree, *args, code=8)
    (tree.dir.parent / "catalog.json").rename(path)
    assert tree.verdict(present="now") == []


def test_catalog_of_another_vm_is_refused(tree: Rig) -> None:
    """A whole record, but not of this VM."""
    (path,) = tree.dir.glob(".diskchain/*/catalog.json")
    other = Rig(tree.dir.parent / "other", targets=("vda",))
    try:
        other.build(guest=False)
        (foreign,) = other.dir.glob(".diskchain/*/catalog.json")
        path.write_bytes(foreign.read_bytes())
    finally:
        other.destroy()
    with unchanged(tree):
        for args in CHANGING:
            refused(tree, *args, code=8, says="another VM")


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_journal_stops_everything_that_changes(tree: Rig, kind: str) -> None:
    """Exit 8 (or 3: an operation is open); with the entry back `recover` ends it."""
    assert tree.killed("delete", "vm", "s3", "-y", at="merge.committed#1")
    (path,) = tree.journal()
    good = path.read_bytes()
    DAMAGES[kind](path)
    with unchanged(tree):
        for args in CHANGING:
            refused(tree, *args, code=8, says="journal")
        tree.ok("list", "vm")
    path.write_bytes(good)
    tree.ok("recover", "vm")
    assert tree.verdict(present="now") == [] and "s3" not in tree.snapshots()


def test_damaged_definition_is_made_whole_by_defining_again(tree: Rig) -> None:
    """What the hint says works: same records, same layers."""
    path = tree.dir / "state/machines/vm.json"
    _flip(path)
    with unchanged(tree):
        refused(tree, "start", "vm", code=(1, 8), says="define it again")
    tree.ok("machine", "define", str(tree.dir / "vm.toml"))
    assert tree.verdict(present="now") == []
    tree.ok("create", "vm", "x")


# -- two at the same time ----------------------------------------------------------------------------------------------


def test_second_diskchain_is_told_who_is_at_work_and_can_wait(tree: Rig) -> None:
    """Exit 5 with pid and operation; with --wait it gets its turn; looking needs no lock."""
    first = tree.popen("create", "vm", "one", fault="stop:create.prepared.after")
    wait_for(lambda: process_state(first.pid) in ("T", "t"), "the first stands")
    for args in (("create", "vm", "two"), ("delete", "vm", "before-revert-1", "-y"), ("rename", "vm", "s1", "x"),
                 ("revert", "vm", "s2", "-y"), ("recover", "vm"), ("start", "vm"),
                 ("machine", "define", str(tree.dir / "vm.toml"))):  # fmt: skip
        error = refused(tree, *args, "--wait", "0.1s", code=5, says=f"pid {first.pid}")
        assert "create vm" in error["message"] and "--wait" in error["hint"]
    tree.ok("list", "vm")
    second = tree.popen("--json", "create", "vm", "two", "--wait", "30s")
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait(60) == 0
    out, err = second.communicate(timeout=60)
    assert Answer(second.returncode, out, err).code == 0, err
    tree.expected["one"] = tree.expected["two"] = tree.expected["now"]
    assert tree.verdict(present="now") == []
    assert {"one", "two"} <= tree.snapshots().keys()


def test_snapshot_that_another_delete_took_meanwhile_is_not_deleted_again(tree: Rig) -> None:
    """At a fork its layer waits, so it is still in the catalog: the second said that it had deleted it, too."""
    first = tree.popen("delete", "vm", "s1", "-y", fault="stop:delete.intent.before")
    wait_for(lambda: process_state(first.pid) in ("T", "t"), "the first stands")
    second = tree.popen("--json", "delete", "vm", "s1", "-y", "--wait", "30s")
    time.sleep(1)  # its plan is made, it waits for the lock; if it is not, it is told that there is no such snapshot
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait(60) == 0
    out, err = second.communicate(timeout=60)
    check_error(Answer(second.returncode, out, err), code=(4, 5))
    assert tree.verdict(present="now") == [] and "s1" not in tree.snapshots()


def test_creates_at_the_same_moment_all_succeed_and_one_name_only_once(tree: Rig) -> None:
    """Three with names of their own and two that want the same."""
    names = ["a", "b", "c", "same", "same"]
    running = [tree.popen("--json", "create", "vm", name, "--wait", "30s") for name in names]
    ends = [(p.communicate(timeout=100), p.returncode) for p in running]
    assert [code for _, code in ends[:3]] == [0, 0, 0]
    assert sorted(code for _, code in ends[3:]) == [0, 2]
    check_error(next(Answer(code, *said) for said, code in ends if code), code=2, says="already")
    for name in names:
        tree.expected[name] = tree.expected["now"]
    assert tree.verdict(present="now") == []


@pytest.mark.parametrize("meanwhile", [True, False])
def test_what_is_missing_because_another_command_removed_it_is_no_damage(
    tree: Rig, meanwhile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan is made without the lock: a revert --discard unlinks the layers that it looks at. Busy, not 4 or 8."""
    for name in ("DISKCHAIN_STATE_DIR", "DISKCHAIN_RUN_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, tree.env[name])

    async def look() -> None:
        async with Host(load_config(None)).look("vm") as vm:
            layer = vm.catalog.images[vm.catalog.active["vda"]]
            if meanwhile:
                tree.ok("revert", "vm", "s2", "--discard", "-y")
            else:
                layer.path.unlink()
            approve_chain(layer.path, layer.fmt, roots=[tree.dir])

    with pytest.raises(Busy if meanwhile else (NotFound, ChainDamaged)):
        asyncio.run(look())
