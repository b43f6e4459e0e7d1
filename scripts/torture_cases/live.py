"""A bare VM (no more than its firmware runs) with a snapshot with memory: it is started for each case, and snapshotted."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path

from scripts.torture_cases.intruders import Write, by_monitor
from scripts.torture_cases.tree import SIZE, Tree, TreeRig
from tests.support.bare_qmp import Qmp
from tests.support.rig import Answer, has_ended, wait_for
from tests.support.tree_cases import Case, judge, not_done

CREATE = Case(("create", "vm", "s", "--memory"), ("now",), 0, done=("s",))
REVERT = Case(("revert", "vm", "m", "-y"), ("now", "m"), 0, done=("before-revert-1",))
LIVE = {"create-memory": CREATE}


class LiveRig(TreeRig):
    """The oracle that looks at saved memories, too."""

    def grow(self) -> None:
        """Make the snapshot `m`; the VM is off afterwards."""
        self.build(guest=False)
        self.write(1, 0, SIZE // 2)
        self.remember("m")
        self.ok("start", "vm")
        self.ok("create", "vm", "m", "--memory")
        self.ok("stop", "vm", "--force", "-y")

    def begin(self, template: Path, rng: random.Random) -> None:
        """Put everything back, start the VM, and write."""
        self.power_off()
        self.restore_template(template)
        self.ok("start", "vm")
        self._guest_writes(rng)

    def _guest_writes(self, rng: random.Random) -> None:
        """So that the active layer holds something when it is frozen; flushed."""
        flat = bytearray((self.flat / self.expected["m"]["vda"]).read_bytes())
        writes = [Write(rng.randrange(2, 255), rng.randrange(SIZE // 65536) * 65536, 65536, 0) for _ in range(3)]
        assert by_monitor(self, writes) == 3
        for write in writes:
            flat[write.offset : write.offset + write.length] = bytes([write.pattern]) * write.length
        now = {**self.expected["m"], "vda": self.known(bytes(flat))}
        self.expected.update({"now": now, "s": now, "before-revert-1": now})

    def power_off(self) -> None:
        """QEMU is gone, and what stood in the memory of the host (/run)."""
        pid = self.pid()
        if pid:
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: has_ended(pid), "QEMU is gone")
        for path in self.run_dir.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def status(self) -> str:
        """What QEMU says of its guest."""
        (socket,) = self.run_dir.glob("*/info.sock")
        with contextlib.closing(Qmp(socket)) as qmp:
            return str(qmp("query-status")["status"])

    def seen(self, command: Case, code: int) -> list[str]:
        """What is wrong with contents and files, and with what the command had said."""
        try:
            wrong = judge(self, command) + (not_done(self, command) if code == 0 else [])
            saved = self.saved()
        except (AssertionError, OSError, ValueError, KeyError) as error:
            return [f"can't be read: content, {type(error).__name__}: {error}"]
        wanted = {"m", *(command.done if code == 0 and command is CREATE else ())}
        return wrong + [f"the memory of {name} is gone" for name in wanted - saved]

    def saved(self) -> set[str]:
        """The snapshots whose memory is said to be saved."""
        snapshots = self.catalog()["snapshots"].values()
        return {s["name"] for s in snapshots if s["memory"]["status"] == "saved"}

    def loads(self) -> list[str]:
        """Each memory that is said to be saved is loaded; the machine is not needed any more."""
        wrong = []
        for name in sorted(self.saved()):
            answer = self.run("revert", "vm", name, "--discard", "-y")
            if answer.code != 0 or not self.pid():
                wrong.append(f"the memory of {name} does not load: {answer.code}, {answer.err.strip()}")
        return wrong


class LiveTree(Tree):
    """That VM in place of a stopped one: after `recover` it runs on, in the QEMU that it was started in."""

    rig: LiveRig

    def make_rig(self, place: Path) -> TreeRig:
        return LiveRig(place, size=SIZE, raw=("vdb",), memory="64 MiB")

    @property
    def cases(self) -> Mapping[str, Case]:
        return LIVE

    def grow(self) -> None:
        self.rig.grow()
        self._rng = random.Random("what the guest writes")

    def restore(self, case: Case) -> None:
        self.rig.begin(self._templates[()], self._rng)
        self._pid = self.rig.pid()

    def seen(self, case: Case, code: int) -> list[str]:
        return [*self._at_work(), *self.rig.seen(case, code)]

    def _at_work(self) -> list[str]:
        if self.rig.pid() != self._pid:
            return ["the VM is not in the QEMU that it was started in"]
        status = self.rig.status()
        return [] if status == "running" else [f"the VM is {status}"]

    def recovered(self, case: Case, answer: Answer) -> tuple[list[str], int, bool, bool]:
        """As Tree's; each saved memory loads."""
        wrong, lost, silent, stuck = super().recovered(case, answer)
        loads = self.rig.loads() if not wrong else []
        return [*wrong, *loads], lost, silent or bool(loads), stuck

    def close(self) -> None:
        self.rig.power_off()
        super().close()
