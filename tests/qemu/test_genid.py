"""The generation id (vmgenid) tells a guest that it went back in time: new at each revert, kept by all else."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.bare_qmp import Qmp
from tests.support.console import Console
from tests.support.rig import MiB, Rig


def defined(rig: Rig) -> str:
    """The id in the definition."""
    return str(json.loads((rig.dir / "state/machines/vm.json").read_bytes())["machine"]["genid"])


def seen(rig: Rig) -> str:
    """The id that the running QEMU shows its guest."""
    with contextlib.closing(Qmp(next(rig.run_dir.glob("*/info.sock")))) as qmp:
        return str(qmp("query-vm-generation-id")["guid"])


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Rig]:
    """A machine that is off, with a guest that counts."""
    rig = Rig(tmp_path / "vm", size=16 * MiB, targets=("vda",))
    rig.build(guest=True)
    yield rig
    rig.destroy()


def counts_on(rig: Rig, mark: int, console: Console) -> None:
    """The guest says more, and nothing bad."""
    console.wait(r"^C \d+ bad=0", after=mark)
    assert console.bad(mark) == []


def test_revert_renews_it_and_create_stop_start_and_define_keep_it(live: Rig) -> None:
    """With memory the running guest gets a new one; without, too; nothing else changes it."""
    with Console(live.console()) as console:
        live.ok("start", "vm")
        console.wait(r"^C 5 bad=0")
        first = seen(live)
        live.ok("create", "vm", "one", "--memory")
        live.ok("machine", "define", str(live.dir / "vm.toml"))
        assert seen(live) == defined(live) == first
        mark = console.mark()
        answer = live.ok("revert", "vm", "one", "-y", "--json")
        assert answer.json["config_changes"] == []
        counts_on(live, mark, console)
        second = seen(live)
        assert second == defined(live) != first
        live.ok("revert", "vm", "one", "--cold", "--discard", "-y")
        third = seen(live)
        assert third == defined(live) and third not in (first, second)
        live.ok("stop", "vm", "--force", "-y")
        live.ok("start", "vm")
        assert seen(live) == defined(live) == third


def test_memory_from_before_there_was_one_loads_without_it(live: Rig) -> None:
    """A definition without an id has no such device, and its memory loads into a machine without one."""
    path = live.dir / "state/machines/vm.json"
    record: dict[str, Any] = json.loads(path.read_bytes())
    del record["machine"]["genid"]
    record["sha256"] = hashlib.sha256(json.dumps(record["machine"], sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(record))
    with Console(live.console()) as console:
        live.ok("start", "vm")
        console.wait(r"^C 5 bad=0")
        live.ok("create", "vm", "one", "--memory")
        live.ok("machine", "define", str(live.dir / "vm.toml"))
        assert defined(live) != ""
        mark = console.mark()
        live.ok("revert", "vm", "one", "-y")
        counts_on(live, mark, console)
        with pytest.raises(RuntimeError, match=r"not found|VM Generation ID"):
            seen(live)
        assert defined(live) == ""


def test_revert_that_is_taken_back_puts_the_old_one_back(tree: Rig) -> None:
    """Killed after the switch: the new one is defined; `recover --undo` brings back what was."""
    before = defined(tree)
    assert tree.killed("revert", "vm", "s2", "-y", at="revert.definition")
    assert defined(tree) != before
    tree.ok("recover", "vm", "--undo", "-y")
    assert defined(tree) == before


def test_machine_file_that_brings_its_own_gets_no_second_one(tree: Rig) -> None:
    """QEMU takes one such device; the one of `extra` stays alone."""
    file = tree.dir / "vm.toml"
    file.write_text('extra = ["-device", "vmgenid,guid=auto"]\n' + file.read_text())
    tree.ok("machine", "define", str(file))
    assert defined(tree) == ""
