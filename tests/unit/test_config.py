"""The settings: mistakes are named in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from diskchain.config import load_config
from diskchain.errors import UsageError


@pytest.mark.parametrize("value", ["[" * 5000, "9" * 5000])
def test_load_nested_too_deeply_or_a_number_without_end_is_an_error_in_words(value: str, tmp_path: Path) -> None:
    """tomllib recurses, int() has a limit; found by scripts/torture (fuzz)."""
    path = tmp_path / "diskchain.toml"
    path.write_text("image_roots = " + value)
    with pytest.raises(UsageError):
        load_config(path, {})
