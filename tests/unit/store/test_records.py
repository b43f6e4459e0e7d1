"""Records: whole or refused. Catalog and journal survive a round trip; damage of any kind is an error in words."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskchain.chain.model import Catalog, Image, Memory, Snapshot
from diskchain.errors import BadName, DiskchainError, MemoryDamaged, NotFound, RecordDamaged, Unfinished
from diskchain.store import catalog as catalog_store
from diskchain.store import journal, memory_file, record
from diskchain.store.catalog import Home


def sample(directory: Path) -> tuple[Home, Catalog]:
    home = Home(directory / ".diskchain" / "u")
    home.path.parent.mkdir()
    home.make()
    catalog = Catalog("u", "vm", active={"vda": "b"}, current="s", targets=("vda",))
    catalog = catalog.with_images([
        Image("a", directory / "a.qcow2", "qcow2", "vda", 5, fingerprint={"size": 1}),
        Image("b", Path("/elsewhere/b.qcow2"), "qcow2", "vda", 5, "a", ours=True),
    ])  # fmt: skip
    memory = Memory("saved", 5, "ab", 0.5)
    return home, catalog.with_snapshot(Snapshot("s", "ümlaut", "2026", None, {"vda": "a"}, memory=memory))


def test_catalog_comes_back_as_it_was_and_paths_move_with_the_directory(tmp_path: Path) -> None:
    home, catalog = sample(tmp_path)
    catalog_store.save(home, catalog)
    assert catalog_store.load(home) == catalog
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    again = catalog_store.load(Home(moved / ".diskchain" / "u"))
    assert again.images["a"].path == moved / "a.qcow2" and again.images["b"].path == Path("/elsewhere/b.qcow2")
    moved.rename(tmp_path)


def test_recover_txt_names_every_state_in_qemu_img_words(tmp_path: Path) -> None:
    home, catalog = sample(tmp_path)
    catalog_store.save(home, catalog)
    text = home.recover_txt.read_text()
    assert "qemu-img rebase -u -f qcow2 -F qcow2 -b" in text and "ümlaut" in text and str(tmp_path / "a.qcow2") in text


@pytest.mark.parametrize("way", ["backing", "active", "disk", "parent", "current", "detached", "circle"])
def test_a_catalog_with_a_name_that_leads_nowhere_is_not_written(tmp_path: Path, way: str) -> None:
    """Neither file changes: who reads them afterwards finds the last ones that were whole."""
    home, catalog = sample(tmp_path)
    catalog_store.save(home, catalog)
    before = home.catalog.read_bytes(), home.recover_txt.read_bytes()
    snapshot, image = catalog.snapshots["s"], catalog.images["a"]
    broken = {
        "backing": catalog.with_images([replace(image, backing="gone")]),
        "active": replace(catalog, active={"vda": "gone"}),
        "disk": catalog.with_snapshot(replace(snapshot, disks={"vda": "gone"})),
        "parent": catalog.with_snapshot(replace(snapshot, parent="gone")),
        "current": replace(catalog, current="gone"),
        "detached": replace(catalog, detached=("gone",)),
        "circle": catalog.with_images([replace(image, backing="b")]),
    }
    with pytest.raises(RecordDamaged, match="contradict"):
        catalog_store.save(home, broken[way])
    assert (home.catalog.read_bytes(), home.recover_txt.read_bytes()) == before


@pytest.mark.parametrize("cut", [0, 1, 50, -1])
def test_a_torn_catalog_is_refused(tmp_path: Path, cut: int) -> None:
    home, catalog = sample(tmp_path)
    catalog_store.save(home, catalog)
    data = home.catalog.read_bytes()
    home.catalog.write_bytes(data[:cut] if cut >= 0 else data.replace(b'"current": "s"', b'"current": "t"'))
    with pytest.raises(RecordDamaged) as caught:
        catalog_store.load(home)
    assert caught.value.exit_code == 8


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    data = record.dump("catalog", {}).replace(b'"version": 1', b'"version": 2')
    with pytest.raises(RecordDamaged, match="newer"):
        record.load("catalog", data, "x")


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_in_words(data: bytes) -> None:
    with pytest.raises(RecordDamaged):
        record.load("catalog", data, "x")


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=8
    )
)
def test_a_whole_record_with_any_body_is_no_crash(tmp_path_factory: pytest.TempPathFactory, body: object) -> None:
    home = Home(tmp_path_factory.mktemp("h"))
    home.catalog.write_bytes(record.dump("catalog", body))
    with pytest.raises((RecordDamaged, NotFound)):
        catalog_store.load(home)
    home.journal.mkdir()
    (home.journal / "1.json").write_bytes(record.dump("journal", body))
    with pytest.raises(RecordDamaged):
        journal.open_entry(home)


def test_journal_holds_one_entry_and_forgets_it(tmp_path: Path) -> None:
    home, _ = sample(tmp_path)
    entry = journal.begin(home, "create", "1", "now", {"x": 1})
    entry.advance("prepared", y=2)
    found = journal.open_entry(home)
    assert found and (found.op, found.state, found.data) == ("create", "prepared", {"x": 1, "y": 2})
    with pytest.raises(Unfinished):
        journal.begin(home, "delete", "2", "now", {})
    entry.close()
    assert journal.open_entry(home) is None


def memory(path: Path, stream: bytes = b"QEVM" + b"x" * 5000, *, sealed: bool = True) -> tuple[int, str]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    at = memory_file.write_header(fd, "<domain/>", was_running=True)
    os.write(fd, stream)
    if sealed:
        memory_file.seal(fd)
    digest = memory_file.stream_digest(fd, at)
    size = os.fstat(fd).st_size
    os.close(fd)
    return size, digest


def test_memory_file_opens_at_its_stream(tmp_path: Path) -> None:
    size, digest = memory(tmp_path / "m")
    fd = memory_file.open_verified(tmp_path / "m", size, digest)
    assert os.read(fd, 4) == b"QEVM" and memory_file.read_header(fd).xml == "<domain/>"
    assert memory_file.read_header(fd).stream % 4096 == 0
    os.close(fd)


def test_memory_header_is_libvirts(tmp_path: Path) -> None:
    """virsh reads 92 bytes: magic, version 2, length of XML and padding, running, raw, no cookie."""
    memory(tmp_path / "m")
    data = (tmp_path / "m").read_bytes()
    assert data[:16] == b"LibvirtQemudSave" and int.from_bytes(data[16:20], "little") == 2
    assert data[92 + int.from_bytes(data[20:24], "little") :][:4] == b"QEVM"
    assert data[92:101] == b"<domain/>" and data[101] == 0


@given(st.integers(min_value=0), st.integers(min_value=0, max_value=7))
def test_any_flipped_bit_of_the_stream_is_refused(
    tmp_path_factory: pytest.TempPathFactory, where: int, bit: int
) -> None:
    path = tmp_path_factory.mktemp("m") / "m"
    size, digest = memory(path)
    data = bytearray(path.read_bytes())
    at = size - 5004 + where % 5004
    data[at] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(MemoryDamaged):
        memory_file.open_verified(path, size, digest)


@pytest.mark.parametrize("change", ["cut", "grown", "empty", "unfinished", "missing", "garbage", "link"])
def test_a_memory_file_that_is_not_what_was_saved_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "m"
    size, digest = memory(path, sealed=change != "unfinished")
    data = path.read_bytes()
    changed = {"cut": data[:-1], "grown": data + b"x", "empty": b"", "garbage": os.urandom(size)}
    if change in changed:
        path.write_bytes(changed[change])
    elif change == "missing":
        path.unlink()
    elif change == "link":
        path.rename(tmp_path / "n")
        path.symlink_to(tmp_path / "n")
    with pytest.raises(MemoryDamaged) as caught:
        memory_file.open_verified(path, size, digest)
    assert caught.value.hint and isinstance(caught.value, DiskchainError)


@pytest.mark.parametrize("tail", [0, 300, (8 << 20) + 5, (4 << 20) - 20])
def test_memory_says_whether_the_guest_ran_at_its_instant(tmp_path: Path, tail: int) -> None:
    """The last section counts: the guest's own memory may hold the copy of another stream."""

    def section(state: bytes) -> bytes:
        head = b"\x04\x00\x00\x00\x02\x0bglobalstate\x00\x00\x00\x00\x00\x00\x00\x01"
        return head + (len(state) + 1).to_bytes(4, "big") + state.ljust(100, b"\0")

    for first, last, ran in ((b"running", b"paused", False), (b"paused", b"running", True)):
        path = tmp_path / last.decode()
        path.write_bytes(b"QEVM" + section(first) + bytes(5 << 20) + section(last) + bytes(tail))
        with path.open("rb") as file:
            assert memory_file.ran(file.fileno()) is ran
    path.write_bytes(bytes(100))
    with path.open("rb") as file:
        assert memory_file.ran(file.fileno()) is False


def test_a_record_nested_too_deeply_is_refused() -> None:
    """Whether reading it or its checksum gives up: an error in words."""
    for depth in (600, 900, 2000, 100_000):
        with pytest.raises(RecordDamaged):
            record.load("catalog", _nested(depth), "deep")


def _nested(depth: int) -> bytes:
    return b'{"diskchain": "catalog", "version": 1, "sha256": "x", "body": ' + b"[" * depth + b"]" * depth + b"}"


def test_a_path_that_is_no_text_is_refused_by_name_and_shown_by_recover_txt(tmp_path: Path) -> None:
    with pytest.raises(BadName) as caught:
        record.dump("journal", {"was": ["/a/b", "/srv/\udcff/\x1b"]})
    assert '"/srv/\\xff/' in caught.value.message and caught.value.message.isprintable() and caught.value.hint
    home, catalog = sample(tmp_path)
    catalog = catalog.with_images([Image("c", Path(os.fsdecode(b"/it's/\xff")), "qcow2", "vda", 5, "a")])
    assert b" '/it'\\''s/\xff'\n" in catalog_store.recover_text(home, catalog)
