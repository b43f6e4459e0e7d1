"""What every campaign is: numbered cases that can each be repeated, results that outlive us, one line of the table."""

from __future__ import annotations

import itertools
import json
import platform
import re
import subprocess
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True)
class Result:
    """What came of one case.

    `hit`: the fault really happened, so the case counts. `wrong`: what should not be. `lost`: bytes that read otherwise
    than they were written. `silent`: something is wrong and the command had said that all is well. `stuck`: `recover`
    alone did not end it.
    """

    case: str
    hit: bool = True
    wrong: Sequence[str] = ()
    lost: int = 0
    silent: bool = False
    stuck: bool = False
    faults: int = 1
    note: str = ""
    seconds: float = 0.0


class Worker(ABC):
    """One of several that carry out cases side by side, in a directory of its own."""

    @abstractmethod
    def run(self, case: str) -> Result:
        """Carry out one case."""

    def keep(self, to: Path) -> None:  # noqa: B027 - not everybody has something
        """Copy what is left of the last case, for people to look at."""

    @abstractmethod
    def close(self) -> None:
        """Remove everything."""


class Campaign(ABC):
    """One kind of torture. `counts`: cases wanted by --quick, usually, and in the long run."""

    name: ClassVar[str]
    unit: ClassVar[str]
    counts: ClassVar[tuple[int, int, int]]
    programs: ClassVar[Sequence[str]] = ()  # Debian packages besides those that all need

    def __init__(self, seed: int, place: Path) -> None:
        self.seed, self.place = seed, place

    def cases(self) -> Iterator[str]:
        """Yield cases, the same for the same seed, more than anybody wants if there are so many: numbers."""
        return (str(n) for n in itertools.count())

    @abstractmethod
    def worker(self, place: Path) -> Worker:
        """Return a new worker in this directory."""


@dataclass
class State:
    """The results so far, one line of JSON each; a campaign that was interrupted goes on from them."""

    path: Path
    rows: dict[tuple[str, int], dict[str, Result]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def load(self) -> None:
        """Read what is there; a line that was cut off is a case that was not finished."""
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            self._put(row.pop("campaign"), row.pop("seed"), Result(**row))

    def of(self, campaign: Campaign) -> dict[str, Result]:
        """Return the results of a campaign with this seed by case."""
        return self.rows.setdefault((campaign.name, campaign.seed), {})

    def add(self, campaign: Campaign, result: Result) -> None:
        """Note a result."""
        with self._lock:
            self._put(campaign.name, campaign.seed, result)
            with self.path.open("a") as file:
                file.write(json.dumps({"campaign": campaign.name, "seed": campaign.seed, **asdict(result)}) + "\n")

    def _put(self, name: str, seed: int, result: Result) -> None:
        self.rows.setdefault((name, seed), {})[result.case] = result


@dataclass
class Run:
    """How to carry out a campaign: at most so many new cases that hit, until `deadline` (monotonic), by `jobs` workers."""

    state: State
    failures: Path
    jobs: int
    deadline: float
    talk: bool = False  # about cases that end well, too

    def carry_out(self, campaign: Campaign, wanted: int, *, only: Iterable[str] = ()) -> None:
        """Carry out cases until so many have hit, old ones included, or there are no more, or the time is over."""
        known = self.state.of(campaign)
        queue = _Queue(only or (case for case in campaign.cases() if case not in known))
        queue.hits = 0 if only else sum(r.hit for r in known.values())
        with ThreadPoolExecutor(self.jobs) as pool:
            for done in [pool.submit(self._work, campaign, queue, wanted, i) for i in range(self.jobs)]:
                done.result()

    def _work(self, campaign: Campaign, queue: _Queue, wanted: int, number: int) -> None:
        worker: Worker | None = None
        try:
            while time.monotonic() < self.deadline and (case := queue.next(wanted)) is not None:
                worker = worker or campaign.worker(campaign.place / f"{campaign.name}-{number}")
                began = time.monotonic()
                result = replace(_tried(worker, case), seconds=round(time.monotonic() - began, 3))
                queue.ended(result.hit)
                self.state.add(campaign, result)
                if result.wrong or result.stuck:
                    self._tell(campaign, worker, result)
                elif self.talk:
                    print(f"{campaign.name} {case}: {result.note or 'well'}", flush=True)
        finally:
            if worker:
                worker.close()

    def _tell(self, campaign: Campaign, worker: Worker, result: Result) -> None:
        kept = self.failures / f"{campaign.name}-{campaign.seed}-{re.sub(r'[^A-Za-z0-9.]+', '-', result.case)}"
        worker.keep(kept)
        again = f"scripts/torture --seed {campaign.seed} --only {campaign.name} --case '{result.case}'"
        print(
            f"{campaign.name} {result.case}: {'; '.join(result.wrong)}\n  {result.note}\n  kept: {kept}\n  again: {again}",
            flush=True,
        )


def _tried(worker: Worker, case: str) -> Result:
    try:
        return worker.run(case)
    except Exception:  # one case that can't be judged is a failure, and no reason to lose the others
        return Result(case, wrong=["could not be judged"], note=traceback.format_exc(limit=-6))


class _Queue:
    """Cases for several workers, which stop when enough have hit or are under way."""

    def __init__(self, cases: Iterable[str]) -> None:
        self._cases, self._lock, self._under_way, self.hits = iter(cases), threading.Lock(), 0, 0

    def next(self, wanted: int) -> str | None:
        """Return the next case, or None when there is nothing to do for whoever asks."""
        with self._lock:
            if self.hits + self._under_way >= wanted:
                return None
            case = next(self._cases, None)
            self._under_way += case is not None
            return case

    def ended(self, hit: bool) -> None:
        """One that was handed out has ended."""
        with self._lock:
            self._under_way -= 1
            self.hits += hit


def table(state: State, campaigns: Iterable[Campaign]) -> str:
    """Return the table of what was found, as docs/reliability.md has it."""
    lines = [
        "| campaign | seed | cases | bytes lost | silent | ended by `recover` alone | 95 % bound | QEMU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for campaign in campaigns:
        found = [r for r in state.of(campaign).values() if r.hit]
        if found:
            n, wrong = len(found), sum(bool(r.wrong) for r in found)
            faults = sum(r.faults for r in found)
            more = f" ({faults} {campaign.unit})" if faults != n else f" {campaign.unit}"
            bound = f"3/{n} = {300 / n:.2g} %" if not wrong else f"{wrong} wrong"
            lines.append(
                f"| {campaign.name} | {campaign.seed} | {n}{more} | {sum(r.lost for r in found)} | "
                f"{sum(r.silent for r in found)} | {n - sum(r.stuck for r in found)} of {n} | {bound} | {qemu_version()} |"
            )
    return "\n".join(lines)


def qemu_version() -> str:
    """Return the version of what is tested."""
    said = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=True).stdout
    return said.split("version ")[1].split()[0]


def machine() -> str:
    """Return what the figures depend on, in a line."""
    return f"QEMU {qemu_version()}, Linux {platform.release()}, Python {platform.python_version()}"
