"""The probe of an accelerator is judged by a stand-in for QEMU that fails as a nested host's did."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from diskchain.drivers import accel

QEMU = """#!/bin/sh
case "$*" in
*"-cpu host"*) echo "qemu: kvm_buf_set_msrs: Assertion failed" >&2; kill -ABRT $$ ;;
*) exit 33 ;;
esac
"""


def test_kvm_that_fails_with_the_machines_own_cpu_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU's default model came up there, and every machine died at its start."""
    program = tmp_path / "qemu-system-x86_64"
    program.write_text(QEMU)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert asyncio.run(accel.boots("tcg")) is not None
    assert asyncio.run(accel.boots("kvm")) is None


def test_the_probe_guest_is_what_its_source_says(tmp_path: Path) -> None:
    """Assembled anew, it is the same 512 bytes."""
    source = Path(accel.__file__).with_name("probe_guest.S")
    made, sector = tmp_path / "probe.o", tmp_path / "probe"
    subprocess.run(["as", "--32", "-o", made, source], check=True)
    subprocess.run(["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-o", sector, made], check=True)
    assert sector.read_bytes() == accel.BOOT_SECTOR


def test_the_probe_guest_gets_to_its_end_only_when_all_of_it_works() -> None:
    """Emulation can do it; without CMPXCHG16B, without a timer or in 32 bits it does not say that all is well."""
    assert asyncio.run(accel.boots("tcg")) is not None


@pytest.mark.parametrize("model", ["qemu64,-cx16", "qemu64,-lm"])
def test_the_probe_guest_does_not_get_to_its_end_where_a_kernel_would_not(
    monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """A processor without CMPXCHG16B or without 64 bits: emulation with all of it is the control."""
    assert asyncio.run(accel.boots("tcg")) is not None
    monkeypatch.setattr(accel, "cpu", lambda name: model)
    monkeypatch.setattr(accel, "_LIMIT", 2.0)
    assert asyncio.run(accel.boots("tcg")) is None
