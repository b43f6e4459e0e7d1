"""The packed copy: what was packed comes back; whatever did not come over whole is seen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskchain.store import state_copy

CONTENTS = {"nvram": {"nvram": b"\n{variables}\0" * 5000}, "tpm": {"tpm/a": b"permanent", "tpm/b": b""}}


def test_unpack_gives_what_was_packed_and_passes_over_what_stands_behind() -> None:
    packed = state_copy.pack(CONTENTS)
    assert state_copy.unpack(packed) == CONTENTS
    assert state_copy.unpack(packed + bytes(4096)) == CONTENTS


PACKED = state_copy.pack(CONTENTS)


@given(st.integers(0, len(PACKED) - 1))
def test_unpack_of_a_cut_off_copy_gives_nothing(at: int) -> None:
    """The power went before everything had come over."""
    assert state_copy.unpack(PACKED[:at]) is None


@given(st.integers(PACKED.index(b"}}}\n") + 4, len(PACKED) - 1))
def test_unpack_of_a_changed_copy_gives_nothing(at: int) -> None:
    """One byte of the contents is another."""
    changed = bytearray(PACKED)
    changed[at] ^= 0x20
    assert state_copy.unpack(bytes(changed)) is None


WRONG_TABLES = [
    b'{"crc": 0, "sizes": %s}\n' % text
    for text in (b"[]", b"1", b'{"a": 1}', b'{"a": {"b": "c"}}', b'{"a": {"b": -1}}')
]


@pytest.mark.parametrize(
    "data", [b"", bytes(540672), b"[]\n", b'{"crc": 0}\n', b"{\n", b"[" * 100_000 + b"\n", *WRONG_TABLES]
)
def test_unpack_of_something_else_gives_nothing(data: bytes) -> None:
    """Space that was reserved and never written to, for one."""
    assert state_copy.unpack(data) is None
