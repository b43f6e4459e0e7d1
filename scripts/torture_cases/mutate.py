"""Seeded damage: bytes, and values inside JSON, the way a bad disk, a bad editor or an enemy would do it."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

NUMBERS = (0, 1, 7, 8, 9, 16, 63, 64, 127, 128, 255, 256, 511, 512, 1023, 1024, 4095, 4096, 65535, 65536, 2**31 - 1, 2**31,
           2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**200, 1e308, float("inf"), float("nan"), "", " ", "a", "..", "../../etc/shadow",
    "/dev/zero", "/dev/stdin", "json:{}", "nbd://x", "a\0b", "\n\x1b[31m", "\udc80", "x" * 5000, [], {}, [[]], [None], {"": ""},
    {"path": "x"}, "vda", "qcow2", "raw",
)  # fmt: skip


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes with one to eight things done to them."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        _ACTIONS[rng.randrange(len(_ACTIONS))](found, rng)
    return bytes(found)


def _flip(data: bytearray, rng: random.Random) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set(data: bytearray, rng: random.Random) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.randrange(256)


def _number(data: bytearray, rng: random.Random) -> None:
    size = rng.choice((1, 2, 4, 8))
    at = rng.randrange(0, max(len(data) - size, 0) + 1, rng.choice((1, 4, 8)))
    data[at : at + size] = (rng.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, rng.choice(("big", "little")))


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _remove(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    del data[at : at + rng.choice((1, 2, 8, 100))]


def _repeat(data: bytearray, rng: random.Random) -> None:
    at, to = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    data[to:to] = data[at : at + rng.choice((1, 8, 64, 512))] * rng.choice((1, 1, 2, 50))


def _insert(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice(
        (
            b"\0",
            b"\xff",
            b'"',
            b"'",
            b"<",
            b">",
            b"&x;",
            b"{",
            b"[" * 3000,
            b"]",
            b"=",
            b"\n",
            b"#",
            b"\xc3",
            b"9" * 5000,
        )
    )


def _zero(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    length = min(rng.choice((4, 16, 512, 4096)), len(data) - at)
    data[at : at + length] = bytes(length)


_ACTIONS = (_flip, _flip, _set, _set, _number, _number, _cut, _remove, _repeat, _insert, _zero)


def changed(value: Any, rng: random.Random) -> Any:
    """Return a JSON value with one to three of its parts exchanged, removed or put elsewhere."""
    found = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(found))
        if not places:
            return rng.choice(VALUES)
        container, key = rng.choice(places)
        what = rng.random()
        if what < 0.15:
            del container[key]
        elif what < 0.3:
            other, place = rng.choice(places)
            container[key] = copy.deepcopy(other[place]) if _is_there(other, place) else None
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    return found


def _is_there(container: Any, key: Any) -> bool:
    return key in container if isinstance(container, dict) else key < len(container)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])
