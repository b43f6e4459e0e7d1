"""merge, merge-shared, merge-many: diskchain's step of a delete against qemu-img by hand and virsh, and dd as the limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from scripts.bench_cases import merge_domain
from scripts.bench_cases.bench import SETTLE, Bench, MiB, say
from scripts.bench_cases.figures import Goal, Row, median
from scripts.bench_cases.merge_command import planning, whole_command
from scripts.bench_cases.merge_data import (
    Figures,
    KiB,
    Scene,
    Side,
    filesystem,
    make,
    pieces,
    random_file,
    scattered,
    sequential,
    zeroes,
)
from tests.support.libvirtd import Libvirtd

GiB = 1024 * MiB
OURS = "diskchain"
COMMIT, DIRECT, NO_DROP, REBASE, DD = "commit -d", "commit -d -t none", "commit", "rebase", "dd"
QEMU_IMG = (COMMIT, DIRECT, NO_DROP, REBASE)
NEVER_BELOW = Goal(1 / 0.9)
NEAR_BEST = Goal(1.3)
Samples = dict[str, list[Figures]]
Goals = Mapping[str, Goal]


def share(bench: Bench) -> int:
    """By what the sizes are divided: 1 with --full."""
    return {"quick": 32, "usual": 8, "full": 1}[bench.level]


def sides(scene: Scene) -> dict[str, Side]:
    """What everybody can do to a chain. `-d`: the overlay is not emptied."""
    top, base = str(scene.top), str(scene.base)
    through = ["-b", base] if len(scene.names) > 2 else []
    return {
        OURS: {},
        COMMIT: {"argvs": [["qemu-img", "commit", "-q", "-f", "qcow2", "-d", *through, top]]},
        DIRECT: {"argvs": [["qemu-img", "commit", "-q", "-f", "qcow2", "-d", "-t", "none", *through, top]]},
        NO_DROP: {"argvs": [["qemu-img", "commit", "-q", "-f", "qcow2", top]], "changes_all": True},
        REBASE: {"argvs": [["qemu-img", "rebase", "-q", "-f", "qcow2", "-b", "", top]], "changes_all": True},
        DD: {"argvs": [["dd", f"if={top}", f"of={base}", "bs=4M", "conv=notrunc,fdatasync", "status=none"]]},
        "one by one": {"argvs": one_by_one(scene), "changes_all": True},
        **{f"by {method}": {"method": method} for method in ("commit", "convert", "clone")},
    }


def with_virsh(scene: Scene, daemon: Libvirtd) -> dict[str, Side]:
    """What libvirt can do to a chain on which a domain runs."""
    side: Side = {"argvs": [merge_domain.argv(daemon)], "around": lambda: merge_domain.running(daemon, scene.top)}
    return {merge_domain.NAME: side}


def one_by_one(scene: Scene) -> list[list[str]]:
    """So many merges, the lowest first, each followed by the relinking of the next layer."""
    argvs: list[list[str]] = []
    for layer in map(str, scene.used[1:]):
        if argvs:
            argvs.append(["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", str(scene.base), layer])
        argvs.append(["qemu-img", "commit", "-q", "-f", "qcow2", "-d", layer])
    return argvs


def in_rounds(
    scene: Scene, names: Sequence[str], count: int, *, cold: bool, more: Mapping[str, Side] | None = None
) -> Samples:
    """Measure every side once a round, every other round in reverse. `more`: sides besides the usual ones."""
    known = {**sides(scene), **(more or {})}
    samples: Samples = {name: [] for name in names}
    for number in range(count):
        for name in names if number % 2 == 0 else tuple(reversed(names)):
            samples[name].append(scene.measure(known[name], cold=cold))
            time.sleep(SETTLE / 3)
    return samples


def rows(what: str, samples: Samples, goals: Goals) -> Iterator[Row]:
    """Wall time against every other side; the best of qemu-img; the planner against the other methods."""
    ours = seconds(samples, OURS)
    what = f"{what} ({samples[OURS][0].method})"
    for name in samples:
        if name != OURS and not name.startswith("by "):
            yield Row(what, ours, seconds(samples, name), _named(name), "s", goals.get(name))
    plain = [name for name in samples if name in QEMU_IMG]
    if plain:
        best = min(plain, key=lambda name: median(seconds(samples, name)))
        yield Row(what, ours, seconds(samples, best), f"qemu-img's best: {best}", "s")
        engine = [f.engine for f in samples[OURS]]
        yield Row(
            f"{what}, without the checks", engine, seconds(samples, best), f"qemu-img's best: {best}", "s", NEVER_BELOW
        )
    forced = [name for name in samples if name.startswith("by ")]
    if forced:
        best = min(forced, key=lambda name: median(seconds(samples, name)))
        yield Row(what, ours, seconds(samples, best), f"the other ways: {best}", "s", NEAR_BEST)


def used(what: str, samples: Samples, against: str, goals: Goals) -> Iterator[Row]:
    """Processor time, bytes written, memory."""
    ours, theirs = samples[OURS], samples[against]
    yield Row(f"{what}, processor", [f.cpu for f in ours], [f.cpu for f in theirs], _named(against), "s")
    yield Row(f"{what}, written", [f.written for f in ours], [f.written for f in theirs], _named(against), "MiB",
              goals.get("written"))  # fmt: skip
    yield Row(f"{what}, memory", [f.peak for f in ours], [100.0] * len(ours), "the most", "MiB", Goal(1.0))


def seconds(samples: Samples, name: str) -> list[float]:
    """The wall times of one side."""
    return [f.seconds for f in samples[name]]


def _named(name: str) -> str:
    if name == merge_domain.NAME:
        return f"virsh {name}"
    return name if name in (DD, "one by one") else f"qemu-img {name}"


# -- one layer ---------------------------------------------------------------------------------------------------------


def one_layer(place: Path, letter: str, part: int) -> Scene:
    """8 GiB with 4 GiB of data, below (a) 2 GiB in one piece, half of it over data; (b) 1 GiB scattered; (c) 20 MiB."""
    source, size = random_file(place), 8 * GiB // part
    above = {
        "a": lambda: sequential(source, 3 * size // 8, size // 4),
        "b": lambda: scattered(source, size, GiB // part // (64 * KiB), 7),
        "c": lambda: scattered(source, size, max(8, 20 * MiB // part // (64 * KiB)), 8),
    }[letter]()  # type: list[str]
    return make(place / letter, size, [sequential(source, 0, size // 2), [*above, *zeroes(size)]])


def _title(letter: str, kind: str, part: int) -> str:
    what = {"a": ("GiB", 2, "in one piece"), "b": ("GiB", 1, "in 4-64 KiB"), "c": ("MiB", 20, "scattered")}[letter]
    unit, count, how = what
    mib = count * (1024 if unit == "GiB" else 1) / part
    size = f"{mib / 1024:g} GiB" if mib >= 1024 else f"{mib:g} MiB"
    return f"{kind} ({letter}) {size} {how}" + (f", 1/{part} of the size" if part > 1 else "")


def merge(bench: Bench) -> Iterator[Row]:
    """One layer on ext4: large, scattered and small overlays against qemu-img commit (-d, -t none), rebase and dd."""
    part, count = share(bench), bench.pairs(2, 1)
    goals: dict[tuple[str, bool], Goals] = {
        ("a", True): {NO_DROP: Goal(1 / 1.4), DD: Goal(1.25)},
        ("a", False): {NO_DROP: Goal(1 / 1.15), DD: Goal(1.25)},
        ("b", True): {NO_DROP: Goal(1 / 1.1)},
    }
    with filesystem(bench, "ext4", 24 * GiB // part + GiB) as place, merge_domain.libvirt() as daemon:
        for letter in "abc" if place else "":
            assert place
            more = (DIRECT, REBASE, DD) if letter == "a" else ()
            names = (OURS, NO_DROP, COMMIT, *more, "by commit")
            yield from _both_states(place, "ext4", letter, part, count, names, goals, NO_DROP, daemon)


def shared(bench: Bench) -> Iterator[Row]:
    """One layer, and several, on XFS and btrfs, which share blocks: the same overlays against qemu-img commit -d."""
    part, count = share(bench), bench.pairs(2, 1)
    counts = (8,) if bench.quick else (2, 8, 32)
    fewer = {"written": Goal(0.01)}
    goals: dict[tuple[str, bool], Goals] = {
        ("a", True): {COMMIT: Goal(1 / 25), **fewer},
        ("a", False): {COMMIT: Goal(1 / 12), **fewer},
    }
    for kind in ("xfs", "btrfs"):
        with filesystem(bench, kind, 24 * GiB // part + GiB) as place:
            for letter in "abc" if place else "":
                assert place
                names = (OURS, COMMIT, "by clone" if letter != "a" else "by convert")
                yield from _both_states(place, kind, letter, part, count, names, goals, COMMIT)
            for layers in counts if place else ():
                assert place
                yield from _layers(place, kind, part, layers, count, ("by commit",))


def _both_states(place: Path, kind: str, letter: str, part: int, count: int, names: Sequence[str],
                 goals: Mapping[tuple[str, bool], Goals], against: str,
                 daemon: Libvirtd | None = None) -> Iterator[Row]:  # fmt: skip
    title = _title(letter, kind, part)
    say(f"{title}: making it; then {count} rounds of {', '.join(names)}, cold and warm")
    scene = one_layer(place, letter, part)
    scene.verify(sides(scene)[OURS])
    more = with_virsh(scene, daemon) if daemon else {}
    for cold in (True, False):
        samples = in_rounds(scene, (*names, *more), count, cold=cold, more=more)
        what, wanted = f"{title}, {'cold' if cold else 'warm'}", goals.get((letter, cold), {})
        yield from rows(what, samples, wanted)
        if letter != "c" and cold:
            yield from used(what, samples, against, wanted)
    scene.remove()


# -- several layers, direction, the command ----------------------------------------------------------------------------


def many(bench: Bench) -> Iterator[Row]:
    """2, 8 and 32 layers at once against so many merges; up instead of down; the whole command; planning 500 images."""
    part, count = share(bench), bench.pairs(2, 1)
    with filesystem(bench, "ext4", 24 * GiB // part + GiB) as place:
        if place is None:
            return
        for layers in (2, 8) if bench.quick else (2, 8, 32):
            yield from _layers(place, "ext4", part, layers, count, ("by commit", "by convert"))
        yield from _up(place, part, count)
        yield from whole_command(bench, place, 8 * GiB // part, count)
        yield from planning(bench, place)


def _layers(place: Path, kind: str, part: int, layers: int, count: int, other: Sequence[str]) -> Iterator[Row]:
    """Each layer 128 MiB in 16 pieces of a 2 GiB disk, so that they overlap."""
    source, size = random_file(place), 2 * GiB // part
    title = f"{kind} {layers} layers of {128 / part:g} MiB at once"
    say(f"{title}: {count} rounds")
    above = [pieces(source, size, size // 256, 16, number) for number in range(layers)]
    scene = make(place / f"layers{layers}", size, [sequential(source, 0, size // 2), *above])
    scene.verify(sides(scene)[OURS])
    samples = in_rounds(scene, (OURS, "one by one", *other), count, cold=False)
    goals = {"one by one": Goal(1 / 1.5), "written": Goal(1 / 2.2)} if layers == 32 else {}
    yield from rows(f"{title}, warm", samples, goals)
    yield from used(f"{title}, warm", samples, "one by one", goals)
    scene.remove()


def _up(place: Path, part: int, count: int) -> Iterator[Row]:
    """1 GiB of data below 1 GiB, which leaves 256 MiB of it to be seen."""
    source, size = random_file(place), 2 * GiB // part
    title = f"ext4 {1024 // part} MiB over all but {256 // part} MiB of its base"
    say(f"{title}: {count} rounds")
    layers = [sequential(source, 0, size // 2), sequential(source, size // 8, size // 2)]
    scene = make(place / "up", size, layers)
    scene.verify(sides(scene)[OURS])
    known = sides(scene)
    scene_sides = (OURS, COMMIT, REBASE, "by convert")
    samples = _with_changes(scene, known, scene_sides, count)
    yield from rows(f"{title}, warm", samples, {COMMIT: Goal(1 / 3)})
    yield from used(f"{title}, warm", samples, COMMIT, {"written": Goal(1 / 3)})
    scene.remove()


def _with_changes(scene: Scene, known: dict[str, Side], names: Sequence[str], count: int) -> Samples:
    """As `in_rounds`, warm, where our side may change the upper layer."""
    samples: Samples = {name: [] for name in names}
    for _ in range(count):
        for name in names:
            samples[name].append(scene.measure({**known[name], "changes_all": True}, cold=False))
            time.sleep(SETTLE / 3)
    return samples


CASES: dict[str, Callable[[Bench], Iterator[Row]]] = {"merge": merge, "merge-shared": shared, "merge-many": many}
