"""Sizes, ages, tables, the tree."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest

from diskchain.chain.model import GiB, Image, KiB, Memory, MiB, Snapshot
from diskchain.chain.text import size
from diskchain.cli import render
from diskchain.cli.progress import LineProgress
from diskchain.errors import UsageError
from diskchain.ops.look import Listing, PendingView, SnapshotView

DAY = 86400.0


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (1023, "1023"), (KiB, "1K"), (1536 * KiB, "1.5M"), (340 * MiB, "340M"), (1023 * MiB, "1023M"),
     (GiB - 1, "1G"), (GiB, "1G"), (1288490189, "1.2G"), (15 * GiB, "15G"), (2048 * GiB, "2T"), (None, "?")],
)  # fmt: skip
def test_size_is_short(count: int | None, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.9, "59s"), (60, "1m"), (3 * 3600 + 5, "3h"), (82 * DAY, "82d"), (-5, "0s"), (None, "?")],
)
def test_duration_is_short(seconds: float | None, text: str) -> None:
    assert render.duration(seconds) == text


def seen(name: str, parent: str | None, days: float, disk: int, memory: int = 0, **more: object) -> SnapshotView:
    saved = Memory("saved", memory) if memory else Memory()
    snapshot = Snapshot(name, name, "2026-11-02T09:30:00Z", parent, {"vda": name}, memory=saved,
                        description=str(more.get("description", "")))  # fmt: skip
    warnings = ["older than 14d"] if days > 14 else []
    frees = more.get("frees")
    assert frees is None or isinstance(frees, int)
    return SnapshotView(snapshot, parent, [], disk, memory, frees, days * DAY, False, warnings)


def web1() -> Listing:
    snapshots = [
        seen("installed", None, 82, 340 * MiB, description="fresh install"),
        seen("before-upgrade", "installed", 20, 140 * MiB, 512 * MiB, description="before PostgreSQL 17"),
        seen("try-pg17", "installed", 2, 61 * MiB, frees=61 * MiB),
    ]
    old = PendingView(seen("old", None, 60, 0).snapshot, 44 * MiB, 60 * DAY)
    return Listing("web1", "running", 2, "before-upgrade", snapshots, [old], 44 * MiB, 585 * MiB, 4)


def test_tree_is_drawn_as_the_contract_says() -> None:
    assert render.tree_lines(web1()) == [
        "web1 (running, 2 disks)",
        "└── installed            82d   340M",
        "    ├── before-upgrade   20d   140M  memory 512M",
        "    │   └── * you are here      44M",
        "    └── try-pg17          2d    61M",
    ]


def test_tree_without_snapshots_shows_the_present() -> None:
    assert render.tree_lines(Listing("a", "stopped", 1, None, [], [], MiB, MiB, 1)) == [
        "a (stopped, 1 disk)",
        "└── * you are here   1M",
    ]


def test_tree_shows_each_branch_once() -> None:
    names = {None: "a", "a": "b", "b": "c"}
    snapshots = [seen(name, parent, 1, MiB) for parent, name in names.items()] + [seen("d", "a", 1, MiB)]
    lines = render.tree_lines(Listing("x", "stopped", 1, "d", snapshots, [], MiB, MiB, 5))
    labels = [line.replace("* you are here", "*").split("   1d")[0].rstrip(" 1M") for line in lines[1:]]
    assert labels == ["└── a", "    ├── b", "    │   └── c", "    └── d", "        └── *"]


def test_list_is_drawn_as_the_contract_says() -> None:
    assert render.list_lines(web1(), None) == [
        "NAME            AGE  TYPE    DISK  MEMORY  FREES  NOTES",
        "installed       82d  disk    340M       -      -  ! older than 14d   fresh install",
        "before-upgrade  20d  memory  140M    512M      -  ! older than 14d   before PostgreSQL 17",
        "try-pg17         2d  disk     61M       -    61M",
        "(now)                         44M",
        "old             60d  (deleted; merges at the next stop: 44M, about 1 s)",
        "3 snapshots, 585M of disk and 512M of memory in 4 layers. 2 warnings.",
    ]


def test_list_without_headers_has_tabs_and_exact_bytes() -> None:
    rows = render.snapshot_rows(web1(), exact=True)
    lines = render.table(rows, ["NAME", "AGE", "DISK", "FREES"], headers=False)
    assert lines[2] == f"try-pg17\t172800\t{61 * MiB}\t{61 * MiB}"


def test_table_escapes_and_aligns_wide_names() -> None:
    rows = [{"NAME": "日本", "AGE": "1d"}, {"NAME": "a\tb\x1b", "AGE": "10d"}]
    assert render.table(rows, ["NAME", "AGE"]) == ["NAME      AGE", "日本       1d", "a\\tb\\x1b  10d"]


def test_unknown_column_is_refused() -> None:
    with pytest.raises(UsageError, match="FOO"):
        render.columns("name,foo", render.LIST_KNOWN, render.LIST_USUAL)
    assert render.columns("name, id", render.LIST_KNOWN, render.LIST_USUAL) == ["NAME", "ID"]


def test_progress_without_terminal_says_at_most_a_line_per_10_percent() -> None:
    stream, warnings = io.StringIO(), list[str]()
    progress = LineProgress(stream, quiet=False, warnings=warnings, patience=0)
    progress.begin("merging vda", 1000, note="safe to interrupt")
    for done in range(1001):
        progress.update(done)
    progress.end()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[-1] == "merging vda  1000/1000  100 %  (safe to interrupt)"
    progress.warn("look\x1b out")
    assert stream.getvalue().endswith("warning: look\\x1b out\n")
    assert warnings == ["look\x1b out"]


def test_progress_in_json_is_in_bytes_and_seconds() -> None:
    stream = io.StringIO()
    progress = LineProgress(stream, quiet=False, warnings=[], patience=0, vm="web1", as_json=True)
    progress.begin("merging vda", 1000, note="safe to interrupt")
    progress.update(100)
    time.sleep(0.6)
    progress.update(500)
    progress.end()
    first, second, third = (json.loads(line)["progress"] for line in stream.getvalue().splitlines())
    assert first == {
        "vm": "web1", "what": "merging vda", "done": 0, "total": 1000, "percent": 0, "rate": None, "eta": None,
        "note": "safe to interrupt",
    }  # fmt: skip
    assert (second["done"], third["done"], third["percent"]) == (100, 500, 50)
    assert 0 < third["rate"] <= 834 and third["eta"] >= 0.6


def test_progress_quiet_says_only_warnings() -> None:
    stream = io.StringIO()
    progress = LineProgress(stream, quiet=True, warnings=[])
    progress.begin("merging vda", 0)
    progress.update(5)
    progress.end()
    assert stream.getvalue() == ""


def test_image_of_unknown_size_shows_a_question_mark(tmp_path: Path) -> None:
    from diskchain.chain.model import Catalog
    from diskchain.ops import look
    from diskchain.store.catalog import Home

    image = Image("i", tmp_path / "gone.qcow2", "qcow2", "vda", MiB, ours=True)
    snapshot = Snapshot("s", "s", "2026-11-02T09:30:00Z", None, {"vda": "i"})
    catalog = Catalog("u", "x", {"i": image}, {}, {"s": snapshot})
    view = look.view(catalog, Home(tmp_path), snapshot, 0)
    assert (view.disk_bytes, view.frees, view.warnings) == (None, None, ["a layer is missing"])
