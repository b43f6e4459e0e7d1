"""Names that fit into a directory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskchain.chain.text import NAME_MAX, cut, name_with

LONG = ("x" * 255, "€" * 85, "😀" * 63 + "abc", "€" * 80 + "\udcff" * 15)


def test_a_name_that_fits_is_left_as_it_is() -> None:
    assert name_with(".", "web1.qcow2", ".seal") == ".web1.qcow2.seal"
    assert name_with(".", "€" * 83, ".seal") == "." + "€" * 83 + ".seal"


@pytest.mark.parametrize("name", LONG)
def test_a_name_with_something_around_it_fits_and_tells_files_apart(name: str) -> None:
    """It ends as the name did; another beginning gives another name."""
    made = name_with(".revert-0123456789ab.", name, ".trash")
    assert NAME_MAX - 4 < len(made.encode("utf-8", "surrogateescape")) <= NAME_MAX
    assert made.endswith(name[-20:] + ".trash") and made != name_with(".revert-0123456789ab.", "y" + name[1:], ".trash")


@given(st.text(), st.integers(0, 60))
def test_cut_takes_whole_characters_and_as_many_as_fit(text: str, limit: int) -> None:
    found = cut(text, limit)
    assert text.startswith(found) and len(found.encode("utf-8", "surrogatepass")) <= limit
    rest = text[len(found) : len(found) + 1]
    assert not rest or len((found + rest).encode("utf-8", "surrogatepass")) > limit
