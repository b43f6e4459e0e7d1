"""Records on a full volume on which somebody else takes every block that comes free."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from diskchain.errors import NoSpace
from diskchain.store.catalog import Home
from diskchain.store.reserve import PIECE, PIECES
from tests.support.refusals import SmallDisk, grow_tree
from tests.support.rig import MiB, Rig


@pytest.fixture
def full(tmp_path: Path) -> Iterator[tuple[Home, SmallDisk]]:
    """Records on an ext4 of 16 MiB that is full to the last byte."""
    disk = SmallDisk(tmp_path, 16 * MiB)
    home = Home(disk.path / "records")
    home.make()
    home.catalog.write_bytes(b"old")
    disk.fill()
    yield home, disk
    disk.close()


def test_sixteen_records_are_written_while_every_free_block_is_taken(full: tuple[Home, SmallDisk]) -> None:
    """Each one whole, in one of two directories; the seventeenth is refused and leaves the old one."""
    home, disk = full
    for number in range(PIECES):
        path, data = (home.catalog, home.journal / "e.json")[number % 2], f"{number:05}".encode() * 10_000
        home.reserve.write(path, data)
        assert path.read_bytes() == data
        assert path.stat().st_mode & 0o777 == 0o600
        disk.fill()
    old = home.catalog.read_bytes()
    with pytest.raises(NoSpace):
        home.reserve.write(home.catalog, b"x" * 60_000)
    assert home.catalog.read_bytes() == old
    assert sorted(p.name for p in home.path.iterdir()) == ["catalog.json", "journal", "snapshots"]


def test_a_record_larger_than_a_piece_gets_all_that_there_is(full: tuple[Home, SmallDisk]) -> None:
    """Then the reserve is given back to the volume, for want of a better way."""
    home, _ = full
    data = os.urandom(5 * PIECE)
    home.reserve.write(home.catalog, data)
    assert home.catalog.read_bytes() == data


def test_the_reserve_grows_with_the_catalog_and_is_made_whole_again(full: tuple[Home, SmallDisk]) -> None:
    """With room: pieces that were used, are short, lost their blocks in a copy, or are an older version's one file."""
    home, disk = full
    home.reserve.write(home.catalog, b"x" * 1000)
    disk.free()
    pieces = sorted(home.reserve.path.iterdir())
    assert len(pieces) == PIECES - 1
    os.truncate(pieces[0], 100)
    os.truncate(pieces[1], 0)
    os.truncate(pieces[1], PIECE)
    home.fill_reserve()
    assert [p.stat().st_blocks * 512 for p in sorted(home.reserve.path.iterdir())] == [PIECE] * PIECES
    home.catalog.write_bytes(b"x" * (PIECE + 1))
    home.fill_reserve()
    assert [p.stat().st_blocks * 512 for p in sorted(home.reserve.path.iterdir())] == [3 * PIECE] * PIECES
    home.reserve.release()
    home.reserve.path.write_bytes(bytes(MiB))
    home.fill_reserve()
    assert len(list(home.reserve.path.iterdir())) == PIECES


def test_a_file_with_a_second_name_is_never_written_into(full: tuple[Home, SmallDisk]) -> None:
    """A piece whose old name came back after a power cut is a record by now."""
    home, _ = full
    first = min(home.reserve.path.iterdir())
    (home.path / "a-record").hardlink_to(first)
    before = first.read_bytes()
    home.reserve.write(home.catalog, b"y" * 5000)
    assert (home.path / "a-record").read_bytes() == before
    assert home.catalog.read_bytes() == b"y" * 5000


@pytest.fixture
def crowded(tmp_path: Path) -> Iterator[Rig]:
    """The usual tree on a full volume, and a neighbour that writes whenever a block comes free."""
    disk = SmallDisk(tmp_path, 48 * MiB)
    rig = Rig(disk.path / "vm", size=8 * MiB, raw=("vdb",))
    end = threading.Event()

    def neighbour() -> None:
        with (disk.path / "filler").open("ab", buffering=0) as file:
            while not end.is_set():
                with contextlib.suppress(OSError):
                    file.write(bytes(4096))

    thread = threading.Thread(target=neighbour)
    try:
        grow_tree(rig)
        disk.fill()
        thread.start()
        yield rig
    finally:
        end.set()
        thread.join()
        rig.destroy()
        disk.close()


def test_leaves_are_deleted_beside_a_neighbour_that_takes_every_block(crowded: Rig) -> None:
    """Two, one after the other, each to its end."""
    for name in ("before-revert-1", "s2"):
        crowded.ok("delete", "vm", name, "-y")
        assert name not in crowded.snapshots()
    assert crowded.verdict(present="now") == []
