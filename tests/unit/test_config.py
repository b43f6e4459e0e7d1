"""The settings: mistakes are named in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from diskchain.config import load_config
from diskchain.errors import UsageError


def test_load_nested_too_deeply_is_an_error_in_words(tmp_path: Path) -> None:
    """tomllib recurses; found by scripts/torture (fuzz)."""
    path = tmp_path / "diskchain.toml"
    path.write_text("image_roots = " + "[" * 5000)
    with pytest.raises(UsageError):
        load_config(path, {})
