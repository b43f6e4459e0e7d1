"""A VM that is on (paused, without a guest): a delete is recorded; what is said of it, and what is done later."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.support.rig import MiB, Rig


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("on") / "vm", size=8 * MiB, targets=("vda",))
    rig.build(guest=False)
    yield rig
    rig.destroy()


@pytest.fixture
def on(rig: Rig) -> Iterator[Rig]:
    """The machine is on; it has a snapshot `one`, with memory, and 2 MiB written since."""
    rig.ok("create", "vm", "base")
    rig.ok("start", "vm", "--paused")
    rig.ok("create", "vm", "one")
    rig.ok("stop", "vm", "--force", "-y")
    rig.write(7, 0, 2 * MiB)
    rig.ok("start", "vm", "--paused")
    yield rig
    rig.ok("stop", "vm", "--force", "-y")
    rig.ok("accept", "vm", "--drop-branches", "-y")


def test_merge_of_all_says_what_is_pending_of_a_vm_that_is_on(on: Rig) -> None:
    assert on.ok("merge").out == "nothing is to be merged\n"
    on.ok("delete", "vm", "one", "-y")
    (result,) = on.ok("merge", "--json").json["results"]
    assert (result["vm"], result["deferred"], result["merged"], result["pending"]) == ("vm", True, [], ["one"])
    said = on.ok("merge").out
    assert re.fullmatch(r"vm is on: 2\.\dM pending; merged at the next stop \(diskchain stop vm\)\n", said)
    on.ok("stop", "vm", "--force", "-y")
    assert on.ok("merge", "vm").out == "vm: nothing is to be merged\n"


def test_recorded_delete_says_what_it_will_do_and_how_to_have_that_now(on: Rig) -> None:
    now = "merged at the next stop of vm (diskchain stop vm); now, with a restart of about 20 s: diskchain delete --restart vm one"
    answer = on.ok("delete", "vm", "one", "-n", "--json").json["plan"]
    assert answer["bytes"] > 2 * MiB and answer["space_needed"] > 0 and answer["needs"][0]["free"] > 0
    plan = on.ok("delete", "vm", "one", "-n").out
    assert re.search(r"when vm is off: vda: fold 2\.\dM of ", plan) and now in plan
    assert re.search(r"^Lost: the memory of 'one' \([\d.]+[KM]\), when it is merged$", plan, re.MULTILINE)
    assert re.search(r"^Needed on \S+: [\d.]+[KM] ", plan, re.MULTILINE)
    said = on.ok("delete", "vm", "one", "-y").out
    assert now in said and re.search(r"recorded: 2\.\dM of 'one', merged", said)
    assert re.search(r"the memory of 'one' \([\d.]+[KM]\) stays until then", said)
    assert re.search(
        r"\(deleted; merges at the next stop: 2\.\dM, .*its memory, [\d.]+[KM], goes then\)", on.ok("list", "vm").out
    )
    again = on.ok("delete", "--restart", "vm", "one", "-n").out
    assert again.startswith("vm: merge 'one' (deleted before)\n") and "stop the VM" in again


def test_revert_plan_says_what_becomes_of_memory_and_of_the_outage(on: Rig) -> None:
    def plan(*words: str) -> tuple[str, float]:
        answer = on.ok("revert", "vm", "one", *words, "-n", "--json").json["plan"]
        return "\n".join(answer["steps"]), answer["downtime_estimate_s"]

    aside = "the memory of 'one' is left aside; it stays in the snapshot"
    steps, outage = plan("--stopped")
    assert "paused -> stopped (not shut down), and stays so\n" in steps and aside in steps and outage == 0
    steps, outage = plan("--cold", "--paused")
    assert "-> paused from its disks\n" in steps and aside in steps and outage == 0
    assert aside not in plan()[0] and "from memory of" in plan()[0]
    on.ok("resume", "vm")
    assert plan("--start")[1] == 2.0 and plan("--paused")[1] == plan("--stopped")[1] == 0


def test_delete_when_in_the_configuration_is_what_no_option_says(on: Rig) -> None:
    """A restart needs a guest that heeds its power button; the plan tells as well."""
    on.configure('[delete]\nwhen = "restart"\n')
    try:
        assert "stop the VM by its power button" in on.ok("delete", "vm", "one", "-n").out
        assert "stop the VM by its power button" in on.ok("accept", "vm", "-n").out
        assert "'one': recorded" in on.ok("delete", "vm", "one", "--when-stopped", "-n").out
    finally:
        on.configure("")


def test_restart_leaves_the_vm_on_when_nothing_is_merged(on: Rig) -> None:
    on.ok("revert", "vm", "one", "--keep-as", "leaf", "-y")
    pid = on.pid()
    assert "stop the VM" not in on.ok("delete", "vm", "leaf", "--restart", "-n").out
    body = on.ok("delete", "vm", "leaf", "--restart", "-y", "--json").json
    assert body["deleted"] == ["leaf"] and not body["restarted"] and on.pid() == pid
