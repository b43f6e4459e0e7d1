"""The power goes while a running VM is snapshotted with its memory, or reverted: QEMU's own writes are lost, too.

The log is that of the command and of the QEMU in it (power.py has the rest). After `recover` every state reads as it was
written, and each memory that is said to be saved loads; what the command had said is done must be there. A case is a
number, or tail:N: `create` with all but its last N changes, all names are there, and of unsynced data any sector or none.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from scripts.torture_cases import sim
from scripts.torture_cases.campaign import Campaign, Result, Worker
from scripts.torture_cases.intruders import Write, by_monitor
from scripts.torture_cases.power import Cut, LoggedWorker, cut, instant
from scripts.torture_cases.shim import Record
from scripts.torture_cases.tree import SIZE, TreeRig
from tests.support.rig import Answer, process_state, wait_for
from tests.support.tree_cases import Case, judge, not_done

CREATE = Case(("create", "vm", "s", "--memory"), ("now",), 0, done=("s",))
REVERT = Case(("revert", "vm", "m", "-y"), ("now", "m"), 0, done=("before-revert-1",))


class PowerLive(Campaign):
    """Power loss in a snapshot of a running VM."""

    name: ClassVar[str] = "power-live"
    unit: ClassVar[str] = "power cuts"
    counts: ClassVar[tuple[int, int, int]] = (10, 200, 1000)

    def worker(self, place: Path) -> Worker:
        return PowerLiveWorker(self.seed, place, ('firmware = "uefi"',))


class PowerLiveWorker(LoggedWorker[TreeRig]):
    """A bare VM (no more than its firmware runs) with a snapshot with memory, which is started for each case."""

    def __init__(self, seed: int, place: Path, parts: Sequence[str] = ()) -> None:
        memory = "128 MiB" if parts else "64 MiB"
        super().__init__(seed, place, TreeRig(place / "vm", size=SIZE, raw=("vdb",), memory=memory, parts=parts))
        self._rig.build(guest=False)
        self._rig.write(1, 0, SIZE // 2)
        self._rig.remember("m")
        self._rig.ok("start", "vm")
        self._rig.ok("create", "vm", "m", "--memory")
        self._rig.ok("stop", "vm", "--force", "-y")
        self._template = self._rig.save_template()

    def run(self, case: str) -> Result:
        rng = random.Random(f"power-live {self._seed} {case}")
        rig = self._rig
        self._power_off()
        rig.restore_template(self._template)
        rig.ok("start", "vm")
        self._guest_writes(rng)
        command = CREATE if case.startswith("tail:") or rng.random() < 0.6 else REVERT
        answer, note = self._cut(case, command, rng)
        recovered = rig.run("recover", "vm")
        wrong = [] if recovered.code == 0 else [f"recover ended with {recovered.code}: {recovered.err.strip()}"]
        seen = self._seen(command, answer.code)
        lost = rig.lost(command) if any("content" in w for w in seen) else 0
        loads = self._loads() if not seen else []
        wrong = [*wrong, *seen, *loads]
        return Result(
            case, True, wrong, lost, bool(seen or loads) and recovered.code == 0, recovered.code != 0, 1, note
        )

    def _guest_writes(self, rng: random.Random) -> None:
        """So that the active layer holds something when it is frozen; flushed."""
        flat = bytearray((self._rig.flat / self._rig.expected["m"]["vda"]).read_bytes())
        writes = [Write(rng.randrange(2, 255), rng.randrange(SIZE // 65536) * 65536, 65536, 0) for _ in range(3)]
        assert by_monitor(self._rig, writes) == 3
        for write in writes:
            flat[write.offset : write.offset + write.length] = bytes([write.pattern]) * write.length
        now = {**self._rig.expected["m"], "vda": self._rig.known(bytes(flat))}
        self._rig.expected.update({"now": now, "s": now, "before-revert-1": now})

    def _cut(self, case: str, command: Case, rng: random.Random) -> tuple[Answer, str]:
        def choose(log: Sequence[Record], rng: random.Random) -> Cut:
            if last := case.partition("tail:")[2]:
                return len(log) - int(last), "512", "all"
            return beside_memory(log, rng), rng.choice(sim.DATA), rng.choice(sim.NAMES)

        before = self._rig.save_template("before")
        answer, note = cut(self._rig, self._shim, command.args, before, rng, choose=choose, end=self._power_off)
        return answer, f"{command.args[0]} -> {note}"

    def _power_off(self) -> None:
        """QEMU is gone, and what stood in the memory of the host (/run)."""
        pid = self._rig.pid()
        if pid:
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: process_state(pid) in ("", "Z", "X"), "QEMU is gone")
        for path in self._rig.run_dir.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _seen(self, command: Case, code: int) -> list[str]:
        """What is wrong with contents and files, and with what the command had said."""
        try:
            wrong = judge(self._rig, command) + (not_done(self._rig, command) if code == 0 else [])
            saved = self._saved()
        except (AssertionError, OSError, ValueError, KeyError) as error:
            return [f"can't be read: content, {type(error).__name__}: {error}"]
        wanted = {"m", *(command.done if code == 0 and command is CREATE else ())}
        return wrong + [f"the memory of {name} is gone" for name in wanted - saved]

    def _saved(self) -> set[str]:
        snapshots = self._rig.catalog()["snapshots"].values()
        return {s["name"] for s in snapshots if s["memory"]["status"] == "saved"}

    def _loads(self) -> list[str]:
        """Each memory that is said to be saved is loaded; the machine is not needed any more."""
        wrong = []
        for name in sorted(self._saved()):
            answer = self._rig.run("revert", "vm", name, "--discard", "-y")
            if answer.code != 0 or not self._rig.pid():
                wrong.append(f"the memory of {name} does not load: {answer.code}, {answer.err.strip()}")
        return wrong


def beside_memory(log: Sequence[Record], rng: random.Random) -> int:
    """Choose how many changes were made; not always amid the thousands that are the writing of the memory."""
    busiest = Counter(record.inode for record in log).most_common(1)
    others = [n for n, record in enumerate(log, 1) if record.inode != busiest[0][0]] if busiest else []
    return rng.choice(others) if others and rng.random() < 0.6 else instant(log, rng)
