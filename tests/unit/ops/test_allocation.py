"""What a layer holds agrees with qemu-img map; what a commit adds is never more than foretold, and little less."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from diskchain.chain.allocation import RawExtents, held_bytes, hidden_bytes, new_bytes, runs
from diskchain.errors import ChainDamaged, HostileImage, NotFound
from diskchain.ops.allocation import allocated, raw_extents, replaced
from fixtures.hostile import header, write_image

KiB = 1024
MiB = 1024 * KiB

LAYOUTS = [
    "cluster_size=64k",
    "cluster_size=64k,compat=0.10",
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=2M",
    "cluster_size=64k,extended_l2=on",
    "cluster_size=64k,refcount_bits=1",
]
WRITES = ["write -P 1 0 64k", "write -P 2 10M 1M", "write -P 3 30M 512", "write -P 4 63M 1M", "write -c -P 5 20M 64k"]
ZEROS = ["write -z 40M 3M", "write -P 6 41M 4k"]


def run(*argv: str | Path) -> str:
    return subprocess.run([str(arg) for arg in argv], check=True, capture_output=True, text=True).stdout


def write(path: Path, *commands: str, fmt: str = "qcow2") -> Path:
    run("qemu-io", "-f", fmt, *(word for command in commands for word in ("-c", command)), path)
    return path


def create(path: Path, options: str, size: str = "64M", below: Path | None = None, fmt: str = "qcow2") -> Path:
    backing: list[str | Path] = [] if below is None else ["-b", below, "-F", fmt]
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *backing, path, size)
    return path


def mapped(path: Path) -> list[tuple[int, int]]:
    """The parts that qemu-img says the top layer answers for: `present` and at depth 0, with its backing file gone."""
    parts: list[tuple[int, int]] = []
    for part in json.loads(run("qemu-img", "map", "-U", "-f", "qcow2", "--output=json", path)):
        if part["depth"] or not part["present"]:
            continue
        start, end = part["start"], part["start"] + part["length"]
        parts[-1:] = [(parts[-1][0], end)] if parts and parts[-1][1] == start else [*parts[-1:], (start, end)]
    return parts


def outward(parts: list[tuple[int, int]], unit: int) -> set[int]:
    return {cluster for start, end in parts for cluster in range(start // unit, -(-end // unit))}


def commands_for(layout: str) -> list[str]:
    plain = [one for one in WRITES if not one.startswith("write -c") or "64k" in layout]
    return plain if "0.10" in layout else plain + ZEROS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_allocated_agrees_with_qemu_img_map(layout: str, tmp_path: Path) -> None:
    base = create(tmp_path / "base", layout)
    top = write(create(tmp_path / "top", layout, below=base), *commands_for(layout))
    ours = allocated(top)
    expected = outward(mapped(top), ours.cluster_size)
    assert outward(list(runs(ours)), ours.cluster_size) == expected
    assert held_bytes(ours) == len(expected) * ours.cluster_size


def places(path: Path, unit: int) -> dict[int, int]:
    """Where in the file each guest cluster lies that qemu-img names a place for; compressed ones have none."""
    parts = json.loads(run("qemu-img", "map", "-U", "-f", "qcow2", "--output=json", path))
    named = [p for p in parts if not p["depth"] and "offset" in p]
    return {
        at // unit: (p["offset"] + at - p["start"]) // unit * unit
        for p in named
        for at in range(p["start"], p["start"] + p["length"], unit)
    }


@pytest.mark.parametrize("upper_layout", ["cluster_size=64k", "cluster_size=4k"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_replaced_is_where_the_covered_clusters_lie(layout: str, upper_layout: str, tmp_path: Path) -> None:
    """Data only: what is zeros without a place has none; and no piece is beside what qemu-img says."""
    base = write(create(tmp_path / "base", layout), *commands_for(layout), "write -P 7 12M 8M", "write -P 8 33M 2M")
    top = write(
        create(tmp_path / "top", upper_layout, below=base),
        "write 10M 3M",
        "write 14M 128k",
        "write 20M 2M",
        "write 34M 9M",
    )
    below, above = allocated(base), allocated(top)
    unit = below.cluster_size
    over = {c for c in outward(mapped(top), unit) if any(s <= c * unit and (c + 1) * unit <= e for s, e in runs(above))}
    found = replaced(base, above)
    assert sum(end - start for start, end in found) == hidden_bytes(below, above)
    pieces = {at for start, end in found for at in range(start, end, unit)}
    assert pieces >= {place for cluster, place in places(base, unit).items() if cluster in over}
    assert len(pieces) == sum(end - start for start, end in found) // unit


def test_allocated_of_an_empty_layer_is_nothing(tmp_path: Path) -> None:
    empty = allocated(create(tmp_path / "a", "cluster_size=64k"))
    assert (held_bytes(empty), list(runs(empty)), new_bytes(empty, empty)) == (0, [], 0)


def test_allocated_with_a_snapshot_holds_but_does_not_own(tmp_path: Path) -> None:
    path = write(create(tmp_path / "a", "cluster_size=64k"), "write -P 1 0 1M")
    before = allocated(path)
    run("qemu-img", "snapshot", "-c", "one", path)
    after = allocated(path)
    assert held_bytes(before) == held_bytes(after) == MiB
    assert hidden_bytes(before, before) == MiB
    assert hidden_bytes(after, after) == 0
    assert new_bytes(before, before) < new_bytes(before, after)
    assert new_bytes(before, after) >= MiB + 64 * KiB


def test_allocated_of_hostile_images_is_refused(tmp_path: Path) -> None:
    wrong = write_image(tmp_path / "wrong", header(), clusters=8)
    with open(wrong, "r+b") as file:
        file.seek(3 * 65536)
        file.write((1 << 40).to_bytes(8, "big"))
    with pytest.raises(ChainDamaged, match="L2 table"):
        allocated(wrong)
    with pytest.raises(HostileImage):
        allocated(write_image(tmp_path / "unknown", header(incompatible=1 << 9)))
    with pytest.raises(NotFound):
        allocated(tmp_path / "none")


def test_raw_extents_are_where_data_is(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    with open(path, "wb") as file:
        file.truncate(8 * MiB)
        file.seek(MiB)
        file.write(b"x" * 65536)
    assert raw_extents(path).extents == ((MiB, MiB + 65536),)


# Growth


def growth(top: Path, into: Path) -> int:
    """What the commit really adds, after everything is on disk."""
    run("sync", "-d", into)
    before = into.stat().st_blocks
    run("qemu-img", "commit", "-q", "-d", "-f", "qcow2", top)
    run("sync", "-d", into)
    return (into.stat().st_blocks - before) * 512


def scattered(seed: int, size: int, count: int) -> list[str]:
    """Writes of 4 KiB to 1 MiB in random places."""
    dice = random.Random(seed)
    writes = []
    for _ in range(count):
        length = 4096 * dice.choice([1, 2, 16, 16, 64, 256])
        place = dice.randrange(0, size - length, 4096)
        writes.append(f"write -P {dice.randrange(1, 255)} {place} {length}")
    return writes


PAIRS = [(one, one) for one in LAYOUTS] + [(LAYOUTS[0], one) for one in LAYOUTS[1:]]
PAIRS += [(one, LAYOUTS[0]) for one in LAYOUTS[1:]] + [("cluster_size=2M", "cluster_size=512")]


@pytest.mark.parametrize(("top_layout", "into_layout"), PAIRS)
def test_new_bytes_is_never_less_than_a_commit_adds(top_layout: str, into_layout: str, tmp_path: Path) -> None:
    into = write(create(tmp_path / "into", into_layout), *scattered(1, 64 * MiB, 40))
    top = write(
        create(tmp_path / "top", top_layout, below=into), *scattered(2, 64 * MiB, 40), *commands_for(top_layout)
    )
    foretold = new_bytes(allocated(top), allocated(into))
    assert growth(top, into) <= foretold


@pytest.mark.parametrize("layout", ["cluster_size=64k", "cluster_size=64k,compat=0.10", "cluster_size=4k"])
@pytest.mark.parametrize("seed", range(4))
def test_new_bytes_with_equal_clusters_is_close(layout: str, seed: int, tmp_path: Path) -> None:
    into = write(create(tmp_path / "into", layout, "512M"), *scattered(seed, 512 * MiB, 150))
    top = write(create(tmp_path / "top", layout, "512M", into), *scattered(seed + 100, 512 * MiB, 150))
    foretold = new_bytes(allocated(top), allocated(into))
    real = growth(top, into)
    print(f"{layout} {seed}: real {real / MiB:.2f} MiB, foretold {foretold / MiB:.2f} MiB")
    assert real <= foretold <= real * 1.05 + 2 * MiB


def test_new_bytes_of_data_that_is_there_already_is_small(tmp_path: Path) -> None:
    into = write(create(tmp_path / "into", "cluster_size=64k"), "write -P 1 0 32M")
    top = write(create(tmp_path / "top", "cluster_size=64k", below=into), "write -P 2 4M 8M")
    upper, lower = allocated(top), allocated(into)
    assert new_bytes(upper, lower) < MiB
    assert hidden_bytes(lower, upper) == 8 * MiB
    assert growth(top, into) <= new_bytes(upper, lower)


@pytest.mark.parametrize("preallocation", ["metadata", "falloc"])
def test_new_bytes_counts_holes_in_a_preallocated_file(preallocation: str, tmp_path: Path) -> None:
    into = create(tmp_path / "into", f"preallocation={preallocation}")
    top = write(create(tmp_path / "top", "cluster_size=64k", below=into), "write -P 2 4M 32M")
    foretold = new_bytes(allocated(top), allocated(into))
    real = growth(top, into)
    assert real <= foretold <= real * 1.05 + 2 * MiB


def test_new_bytes_into_a_smaller_disk_counts_its_larger_l1_table(tmp_path: Path) -> None:
    into = create(tmp_path / "into", "cluster_size=4k", "8M")
    top = write(create(tmp_path / "top", "cluster_size=4k", "2G", into), "write -P 2 1G 8M")
    foretold = new_bytes(allocated(top), allocated(into))
    real = growth(top, into)
    assert real <= foretold <= real * 1.05 + 2 * MiB


@pytest.mark.parametrize("layout", LAYOUTS)
def test_new_bytes_into_raw_is_never_less_than_a_commit_adds(layout: str, tmp_path: Path) -> None:
    into = tmp_path / "raw"
    with open(into, "wb") as file:
        file.truncate(64 * MiB)
    write(into, *scattered(5, 64 * MiB, 40), fmt="raw")
    top = create(tmp_path / "top", layout, below=into, fmt="raw")
    write(top, *commands_for(layout), *scattered(6, 64 * MiB, 40))
    run("sync", "-d", into)
    foretold = new_bytes(allocated(top), raw_extents(into))
    real = growth(top, into)
    assert real <= foretold <= real * 1.05 + 6 * MiB


def test_hidden_bytes_of_raw_is_what_lies_under_held_clusters(tmp_path: Path) -> None:
    top = write(create(tmp_path / "top", "cluster_size=64k"), "write -P 2 4M 8M")
    lower = RawExtents(((0, 5 * MiB), (6 * MiB, 7 * MiB), (11 * MiB, 20 * MiB)))
    assert hidden_bytes(lower, allocated(top)) == 3 * MiB


@pytest.mark.parametrize("lower_size", ["4k", "64k", "2M"])
@pytest.mark.parametrize("upper_size", ["4k", "64k", "2M"])
def test_hidden_bytes_counts_only_whole_clusters(lower_size: str, upper_size: str, tmp_path: Path) -> None:
    lower = write(create(tmp_path / "lower", f"cluster_size={lower_size}"), "write -P 1 0 32M")
    upper = write(create(tmp_path / "upper", f"cluster_size={upper_size}"), "write -P 1 2M 5M")
    got = hidden_bytes(allocated(lower), allocated(upper))
    unit = {"4k": 4 * KiB, "64k": 64 * KiB, "2M": 2 * MiB}
    end = -(-7 * MiB // unit[upper_size]) * unit[upper_size]
    assert got == end // unit[lower_size] * unit[lower_size] - 2 * MiB


def test_allocated_of_a_huge_sparse_image_reads_only_what_is_there(tmp_path: Path) -> None:
    path = write(create(tmp_path / "a", "cluster_size=64k", "1T"), "write -P 1 0 64k", "write -P 1 1000G 64k")
    found = allocated(path)
    assert len(found.rows) == 2
    assert held_bytes(found) == 128 * KiB
