"""Marks: what was made here is known from what merely has its name, in every order of events."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diskchain.errors import ChainDamaged, Refused
from diskchain.ops import marks

KEY = "0123456789ab"


def make(path: Path) -> Path:
    os.close(marks.create(path, KEY))
    marks.mark_of(path, KEY).write_bytes(b"ours")
    return path


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_what_was_made_is_removed_and_then_nothing_else(tmp_path: Path) -> None:
    """A file that comes afterwards may even get the inode of ours."""
    path = make(tmp_path / "vda.qcow2")
    marks.verify(path, KEY)
    marks.unmake(path, KEY)
    assert not names(tmp_path)
    path.write_bytes(b"foreign")
    marks.unmake(path, KEY)
    assert path.read_bytes() == b"foreign"


def test_undo_that_was_cut_off_between_name_and_mark_goes_on(tmp_path: Path) -> None:
    path = make(tmp_path / "vda.qcow2")
    path.unlink()
    path.write_bytes(b"foreign")
    marks.unmake(path, KEY)
    assert names(tmp_path) == {"vda.qcow2"} and path.read_bytes() == b"foreign"


def test_a_name_that_is_taken_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "vda.qcow2"
    path.write_bytes(b"foreign")
    with pytest.raises(Refused, match="exists already"):
        marks.create(path, KEY)
    marks.unmake(path, KEY)
    assert names(tmp_path) == {"vda.qcow2"} and path.read_bytes() == b"foreign"


def test_a_link_to_what_was_made_is_not_its_name(tmp_path: Path) -> None:
    path = make(tmp_path / "vda.qcow2")
    path.unlink()
    path.symlink_to(marks.mark_of(path, KEY))
    with pytest.raises(Refused):
        marks.verify(path, KEY)


def test_another_file_is_not_taken_for_what_was_made_and_the_name_is_given_again(tmp_path: Path) -> None:
    path = make(tmp_path / "vda.qcow2")
    path.unlink()
    path.write_bytes(b"foreign")
    with pytest.raises(Refused, match="is not the file"):
        marks.verify(path, KEY)
    path.rename(tmp_path / "away")
    marks.verify(path, KEY)
    assert path.read_bytes() == b"ours"
    marks.forget(path, KEY)
    with pytest.raises(ChainDamaged, match="can't be told"):
        marks.verify(path, KEY)
    assert path.stat().st_nlink == 1


def test_entry_of_an_earlier_version_knows_nothing_to_be_its_own(tmp_path: Path) -> None:
    path = tmp_path / "vda.qcow2"
    path.write_bytes(b"whose?")
    marks.verify(path, "")
    marks.unmake(path, "")
    marks.forget(path, "")
    assert path.read_bytes() == b"whose?"


def test_records_that_were_made_go_and_others_stay(tmp_path: Path) -> None:
    records = tmp_path / ".diskchain/uuid"
    marks.make_directory(records, KEY)
    marks.verify_directory(records, KEY)
    (records / "snapshots/1").mkdir(parents=True)
    (records / "catalog.json").write_bytes(b"x")
    with pytest.raises(Refused):
        marks.make_directory(records, "other")
    marks.unmake_records(records, "other")
    assert (records / "catalog.json").exists()
    marks.unmake_records(records, KEY)
    assert not names(tmp_path)
    records.mkdir(parents=True)  # ours, killed before it had its mark
    marks.unmake_records(records, KEY)
    assert not names(tmp_path)
    (records / "memory").mkdir(parents=True)
    marks.unmake_records(records, KEY)
    assert (records / "memory").is_dir()
    with pytest.raises(ChainDamaged):
        marks.verify_directory(records, KEY)
