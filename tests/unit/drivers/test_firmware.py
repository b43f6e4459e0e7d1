"""UEFI firmware by QEMU's descriptors: the first plain pair that fits; what fits nothing is said with the way out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diskchain.chain.machine import DiskSpec, Machine
from diskchain.chain.model import MiB
from diskchain.drivers import firmware
from diskchain.drivers.qemu_parts import check_installed, missing
from diskchain.errors import DriverFailed, NotFound, Refused
from tests.support.states import describe

Q35 = "pc-q35-7.2"


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Where an admin's and the distribution's descriptors are."""
    etc, usr = tmp_path / "etc", tmp_path / "usr"
    for directory in (etc, usr):
        directory.mkdir()
    monkeypatch.setenv("DISKCHAIN_FIRMWARE_PATH", f"{etc}:{usr}")
    return etc, usr


def pair(directory: Path, name: str) -> tuple[Path, Path]:
    """Make a code and a template."""
    code, template = directory / f"{name}.code", directory / f"{name}.vars"
    code.write_bytes(b"code" * 1024)
    template.write_bytes(b"vars" * 512)
    return code, template


def test_find_takes_the_first_plain_pair(places: tuple[Path, Path], tmp_path: Path) -> None:
    """Secure Boot, SMM, other formats, other machines and missing files are passed over."""
    _, usr = places
    other, plain = pair(tmp_path, "other"), pair(tmp_path, "plain")
    describe(usr, "10-secure.json", *other, features=["secure-boot"])
    describe(usr, "20-smm.json", *other, features=["requires-smm"])
    describe(usr, "30-qcow2.json", *other, format="qcow2")
    describe(usr, "40-arm.json", *other, machines=["virt-*"])
    describe(usr, "50-bios.json", *other, kind="bios")
    describe(usr, "55-memory.json", *other, device="memory")
    describe(usr, "58-gone.json", tmp_path / "gone", tmp_path / "gone.vars")
    (usr / "59-damaged.json").write_text("{")
    (usr / "59-list.json").write_text("[]")
    describe(usr, "60-plain.json", *plain)
    describe(usr, "70-later.json", *other)
    assert firmware.find(Q35) == firmware.Firmware(*plain)


def test_find_lets_etc_override_and_mask(places: tuple[Path, Path], tmp_path: Path) -> None:
    """The same name in /etc counts; an empty file there takes the one of the distribution away."""
    etc, usr = places
    theirs, mine = pair(tmp_path, "theirs"), pair(tmp_path, "mine")
    describe(usr, "60-edk2.json", *theirs)
    describe(etc, "60-edk2.json", *mine)
    assert firmware.find(Q35).code == mine[0]
    (etc / "60-edk2.json").write_text("")
    with pytest.raises(NotFound) as caught:
        firmware.find(Q35)
    assert caught.value.hint == "apt install ovmf"


def test_recorded_code_that_is_gone_or_has_another_size_is_refused(tmp_path: Path) -> None:
    """QEMU would not load the memory; another version of the same size is only told."""
    code, template = pair(tmp_path, "edk2")
    recorded = firmware.Firmware(code, template).recorded()
    assert firmware.other_code(recorded) is None
    code.write_bytes(b"c0de" * 1024)
    assert "another version" in str(firmware.other_code(recorded))
    code.write_bytes(b"c0de")
    with pytest.raises(DriverFailed, match="4 bytes"):
        firmware.recorded_code(recorded)
    code.unlink()
    with pytest.raises(DriverFailed, match="gone"):
        firmware.recorded_code(recorded)


def test_make_nvram_never_replaces(tmp_path: Path) -> None:
    """Mode 0600, the template's bytes; a file that is there stays as it is."""
    _, template = pair(tmp_path, "edk2")
    nvram = tmp_path / "nvram.fd"
    firmware.make_nvram(nvram, template)
    assert nvram.read_bytes() == template.read_bytes() and nvram.stat().st_mode & 0o777 == 0o600
    nvram.write_bytes(b"boot entries")
    with pytest.raises(Refused):
        firmware.make_nvram(nvram, template)
    assert nvram.read_bytes() == b"boot entries"


def test_check_installed_says_which_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the TPM, and for UEFI; a machine with neither needs neither."""
    plain = Machine("vm", 64 * MiB, (DiskSpec("vda", "a.qcow2"),), machine=Q35)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("DISKCHAIN_FIRMWARE_PATH", str(tmp_path))
    check_installed(plain)
    assert missing(plain) == []
    assert "apt install swtpm" in missing(replace(plain, tpm=True))[0]
    with pytest.raises(NotFound) as caught:
        check_installed(replace(plain, firmware="uefi"))
    assert caught.value.hint == "apt install ovmf"
