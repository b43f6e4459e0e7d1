"""The probe of an accelerator is judged by a stand-in for QEMU that fails as a nested host's did."""

from __future__ import annotations

import asyncio
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
