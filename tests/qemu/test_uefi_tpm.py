"""UEFI variables and TPM: every snapshot has its own, a revert brings them back, live and cold; what breaks is refused.

The guest counts its boots in an EFI variable and reads it again and again; it extends a PCR (the TPM's volatile state)
and knows what it left; the TPM itself counts its resets (permanent state).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from diskchain.drivers.firmware import find
from diskchain.drivers.machines import _digest
from diskchain.store import record
from tests.support import states
from tests.support.refusals import refused, unchanged
from tests.support.rig import MiB, Rig
from tests.support.states import TPM, UEFI, Parts, describe


@pytest.mark.timeout(400)
def test_revert_live_and_cold_brings_nvram_and_tpm_of_the_snapshot(tmp_path: Path) -> None:
    """Two branches, each with its own boot counter, PCR and reset counter."""
    with states.running(tmp_path, "cnt,efi,tpm") as parts:
        rig = parts.rig
        assert parts.boots() == 1
        first = parts.resets()
        _snapshot_of_a_running_machine_holds_all(parts)
        mark = parts.restart()
        assert (parts.boots(mark), parts.resets(mark)) == (2, first + 1)
        rig.ok("create", "vm", "two", "--memory")

        rig.ok("revert", "vm", "one", "-y")  # live: the guest goes on where it was
        mark = parts.console.mark()
        assert (parts.boots(mark), parts.resets(mark)) == (1, first)
        assert parts.rounds(mark) == []
        assert states.present(rig)["nvram"] == states.copies(rig)["one"]["nvram"]
        assert states.copies(rig)["before-revert-1"] == states.copies(rig)["two"]

        mark = parts.restart()  # cold, from what the live revert left: the second boot of that branch, not the third
        assert (parts.boots(mark), parts.resets(mark)) == (2, first + 1)

        rig.ok("revert", "vm", "two", "--cold", "--start", "-y")
        mark = parts.console.mark()
        assert (parts.boots(mark), parts.resets(mark)) == (3, first + 2)
        assert states.leftovers(rig) == [] and rig.file_verdict() == []
        rig.ok("stop", "vm", "--force", "-y")
        assert states.swtpms(rig) == []


def _snapshot_of_a_running_machine_holds_all(parts: Parts) -> None:
    rig = parts.rig
    mark = parts.console.mark()
    rig.ok("create", "vm", "one", "--memory")
    assert parts.rounds(mark) == []
    shown = rig.ok("show", "vm", "one", "--json").json["snapshot"]
    assert shown["captured"] == ["disks", "configuration", "nvram", "tpm", "memory"]
    assert "disks, configuration, nvram, tpm, memory" in rig.ok("show", "vm", "one").out
    assert states.copies(rig)["one"]["nvram"] == states.present(rig)["nvram"]
    refused(rig, "create", "vm", "--disk-only", code=6, says="TPM")
    assert found(rig) == set()


@pytest.mark.timeout(200)
def test_create_while_the_guest_writes_its_nvram_gives_the_memory_up_not_the_snapshot(tmp_path: Path) -> None:
    """QEMU saves flash late in a background save: such a memory would not fit the NVRAM. A paused save does."""
    with states.running(tmp_path, "cnt,efiwrite,tpm") as parts:
        rig = parts.rig
        parts.boots()
        answer = rig.run("create", "vm", "late", "--memory", "--json")
        assert answer.code == 12, answer
        memory = answer.json["snapshot"]["memory"]
        assert memory["status"] == "failed" and "NVRAM" in memory["reason"]
        assert sorted(states.copies(rig)["late"]) == ["nvram", "tpm/tpm2-00.permall"]
        mark = parts.console.mark()
        rig.ok("create", "vm", "still", "--memory=paused")
        assert parts.rounds(mark) == []
        rig.ok("revert", "vm", "still", "--discard", "-y")
        mark = parts.console.mark()
        assert parts.rounds(mark) == []


def found(rig: Rig) -> set[str]:
    """The codes of what check finds wrong."""
    findings = rig.run("check", "vm", "--json").json["findings"]
    return {f["code"] for f in findings if f["severity"] != "info"}


# -- a machine whose guest never runs ----------------------------------------------------------------------------------


@pytest.fixture
def firmware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of Debian's firmware with a descriptor of its own; return the code."""
    place = tmp_path / "firmware"
    place.mkdir()
    code, template = place / "code.fd", place / "vars.fd"
    installed = find("pc-q35-7.2")
    shutil.copy(installed.code, code)
    shutil.copy(installed.template, template)
    describe(place, "60-edk2.json", code, template)
    monkeypatch.setenv("DISKCHAIN_FIRMWARE_PATH", str(place))
    return code


@pytest.fixture
def rig(tmp_path: Path, firmware: Path) -> Iterator[Rig]:
    """A defined machine with UEFI and TPM that is off, with the snapshot `s1`."""
    found = Rig(tmp_path / "vm", memory="64 MiB", size=8 * MiB, targets=("vda",), parts=(UEFI, TPM))
    found.build(guest=False)
    found.ok("create", "vm", "s1")
    yield found
    found.destroy()


def test_define_without_firmware_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left behind."""
    rig = Rig(tmp_path / "vm", parts=(UEFI, TPM), targets=("vda",), size=8 * MiB)
    try:
        monkeypatch.setenv("DISKCHAIN_FIRMWARE_PATH", str(tmp_path))
        with pytest.raises(AssertionError, match="apt install ovmf"):
            rig.build(guest=False)
        assert not list(rig.dir.glob(".diskchain"))
    finally:
        rig.destroy()


def test_start_without_the_nvram_is_refused_and_a_revert_brings_it_back(rig: Rig) -> None:
    """Never a fresh one where there was one: the boot entries would be gone."""
    nvram, before = states.home(rig) / "nvram.fd", states.present(rig)
    nvram.unlink()
    with unchanged(rig):
        refused(rig, "start", "vm", code=8, says=str(nvram))
        refused(rig, "create", "vm", "s2", code=8, says=str(nvram))
        refused(rig, "revert", "vm", "s1", "-y", code=8, says="--discard")
        refused(rig, "machine", "define", str(rig.dir / "vm.toml"), code=8, says=str(nvram))
    assert "state-missing" in found(rig)
    rig.ok("revert", "vm", "s1", "--discard", "-y")
    assert states.present(rig) == before
    rig.ok("start", "vm", "--paused")


def test_define_killed_while_the_tpm_is_made_leaves_nothing_that_stands_in_the_way(tmp_path: Path) -> None:
    """The half-made TPM goes with the next command; one without a process."""
    other = Rig(tmp_path / "other", memory="64 MiB", size=8 * MiB, targets=("vda",), parts=(TPM,))
    try:
        with pytest.raises(AssertionError):
            other.build(guest=False, fault="kill:tpm.made")
        other.ok("machine", "define", str(other.dir / "vm.toml"))
        other.ok("start", "vm", "--paused")
        assert states.leftovers(other) == [] and len(states.swtpms(other)) == 1
    finally:
        other.destroy()


def test_delete_takes_the_copies_of_that_snapshot_and_no_others(rig: Rig) -> None:
    """The merge changes files, not states: what stands on the deleted one keeps its own."""
    states.write_present(rig, b"second")
    plan = rig.ok("create", "vm", "s2", "-n", "--json").json["plan"]["steps"]
    assert {"copy the NVRAM", "copy the TPM state"} <= set(plan)
    rig.ok("create", "vm", "s2")
    states.write_present(rig, b"now")
    before, present = states.copies(rig), states.present(rig)
    rig.ok("delete", "vm", "s1", "-y")
    assert states.copies(rig) == {"s2": before["s2"]} and states.present(rig) == present
    assert len(list((states.home(rig) / "snapshots").iterdir())) == 1
    rig.ok("revert", "vm", "s2", "-y")
    assert states.present(rig) == before["s2"]
    rig.ok("undo", "vm", "-y")
    assert states.present(rig) == present


def test_revert_of_one_disk_leaves_nvram_and_tpm(rig: Rig) -> None:
    """`--only` is about that disk."""
    states.write_present(rig, b"now")
    present = states.present(rig)
    rig.ok("revert", "vm", "s1", "--only", "vda", "-y")
    assert states.present(rig) == present


def test_start_with_a_tpm_that_lost_its_state_is_refused(rig: Rig) -> None:
    """swtpm would make a new chip, and disks that were sealed to the old one would not open."""
    (states.home(rig) / "tpm" / "tpm2-00.permall").unlink()
    with unchanged(rig):
        refused(rig, "start", "vm", code=8, says="permall")


@pytest.mark.parametrize("damage", ["altered", "missing", "a symlink"])
@pytest.mark.parametrize("place", ["nvram", "tpm/tpm2-00.permall"])
def test_revert_with_a_damaged_copy_changes_nothing_and_names_the_file(rig: Rig, place: str, damage: str) -> None:
    """And check finds it."""
    (directory,) = (states.home(rig) / "snapshots").iterdir()
    path = directory / place
    data = path.read_bytes()
    path.unlink()
    if damage == "altered":
        path.write_bytes(data[:100] + b"?" + data[101:])
    elif damage == "a symlink":
        path.symlink_to("/etc/hostname")
    with unchanged(rig):
        refused(rig, "revert", "vm", "s1", "-y", code=8, says=str(path))
    assert "state-copy-damaged" in found(rig)


def test_revert_with_memory_on_other_firmware_is_refused_or_told(rig: Rig, firmware: Path) -> None:
    """Another size: refused, the memory would not load. Another version of that size: the plan says so."""
    rig.ok("start", "vm", "--paused")
    rig.ok("create", "vm", "live", "--memory")
    rig.ok("stop", "vm", "--force", "-y")
    data = firmware.read_bytes()
    firmware.write_bytes(data[:-1] + b"?")
    plan = rig.ok("revert", "vm", "live", "-n", "--json").json["plan"]
    assert any("another version" in w for w in plan["warnings"])
    firmware.write_bytes(data[:4096])
    with unchanged(rig):
        refused(rig, "revert", "vm", "live", "-y", code=6, says="--cold")
    firmware.write_bytes(data)
    rig.ok("revert", "vm", "live", "-y")


def test_create_without_the_tpm_process_is_refused_and_the_vm_stays(rig: Rig) -> None:
    """swtpm was killed: found before anything changes."""
    rig.ok("start", "vm", "--paused")
    pid = rig.pid()
    states.kill_swtpm(rig)
    error = refused(rig, "create", "vm", "s2", "--memory", code=6, says="TPM")
    assert "stop" in error["hint"] and rig.pid() == pid and rig.journal() == []
    assert "helper-gone" in found(rig)
    rig.ok("stop", "vm", "--force", "-y")
    rig.ok("start", "vm", "--paused")


def test_start_ends_a_tpm_process_that_lost_its_vm(rig: Rig) -> None:
    """One that never had a connection does not end by itself."""
    rig.ok("start", "vm", "--paused")
    rig.ok("stop", "vm", "--force", "-y")
    home = states.home(rig)
    argv = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={home}/tpm,mode=0600", "--terminate",
            "--ctrl", f"type=unixio,path={rig.dir}/stale.sock"]  # fmt: skip
    stale = subprocess.Popen(argv)
    try:
        rig.ok("start", "vm", "--paused")
        assert stale.wait(timeout=30) and len(states.swtpms(rig)) == 1
    finally:
        stale.kill()


def test_machine_on_pc_gets_a_tis_tpm_and_no_uefi(tmp_path: Path) -> None:
    """The old chipset: a TPM works there, UEFI is refused."""
    rig = Rig(tmp_path / "vm", memory="64 MiB", size=8 * MiB, targets=("vda",), parts=(TPM, 'machine = "pc"'))
    try:
        rig.build(guest=False)
        rig.ok("start", "vm", "--paused")
        rig.ok("create", "vm", "s1", "--memory")
        rig.ok("revert", "vm", "s1", "-y")
        assert [*states.copies(rig)["s1"]] == ["tpm/tpm2-00.permall"]
    finally:
        rig.destroy()


def test_snapshots_of_before_uefi_was_known_are_read_and_reverted_to(tmp_path: Path) -> None:
    """Records without the new keys."""
    rig = Rig(tmp_path / "vm", size=8 * MiB, targets=("vda",))
    try:
        rig.build(guest=False)
        rig.ok("create", "vm", "s1")
        _make_old(rig)
        assert rig.ok("show", "vm", "s1", "--json").json["snapshot"]["captured"] == ["disks", "configuration"]
        rig.ok("revert", "vm", "s1", "-y")
        rig.ok("create", "vm", "s2")
    finally:
        rig.destroy()


def _make_old(rig: Rig) -> None:
    """Take out of the catalog and the definition what older versions did not write."""
    path = states.home(rig) / "catalog.json"
    body = json.loads(path.read_bytes())["body"]
    del body["state_files"]
    for snapshot in body["snapshots"].values():
        del snapshot["captured"]
    record.write(path, "catalog", body)
    definition = rig.dir / "state" / "machines" / "vm.json"
    data = json.loads(definition.read_bytes())
    del data["machine"]["tpm"]
    data["sha256"] = _digest(data["machine"])
    definition.write_text(json.dumps(data))
