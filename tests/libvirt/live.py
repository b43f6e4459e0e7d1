"""A domain whose guest counts in memory and on two disks: its own verdict is the oracle."""

from __future__ import annotations

from tests.support.console import Console
from tests.support.domain import DomainRig
from tests.support.rig import wait_for

COUNT = r"^C (\d+) bad="


class LiveDomain:
    """A started domain and its console."""

    def __init__(self, rig: DomainRig) -> None:
        self.rig = rig
        rig.virsh("start", rig.name)
        self.console = Console(rig.console())
        self.console.wait(r"^C 30 bad=", timeout=120)

    def counts(self, rounds: int = 5) -> int:
        """Wait until the guest has counted some more rounds; return the last."""
        mark = self.console.mark()
        first = int(self.console.wait(COUNT, after=mark)[1])
        wait_for(lambda: (self.console.counter() or 0) >= first + rounds, "the guest counts on")
        return self.console.counter() or 0

    def wrong(self, mark: int, *, may_boot: bool = False) -> list[str]:
        """Let the guest count on; return what it, the files, libvirt and the catalog have to complain of."""
        self.counts()
        booted = [line for _, line in self.console.lines(mark) if line.startswith("C START")]
        found = [*self.console.bad(after=mark), *([] if may_boot else booted)]
        return [*found, *self.rig.file_verdict(), *self.rig.agreement()]

    def states(self) -> dict[str, str]:
        """Names of the snapshots and whether they have memory."""
        return {s["name"]: s["state"] for s in self.rig.ok("list", self.rig.name, "--json").json["snapshots"]}

    def go_back_to(self, name: str) -> None:
        """Revert to a snapshot with memory: the guest counts on from there, and has nothing to say against it."""
        self.rig.ok("pause", self.rig.name)
        mark = self.console.mark()
        self.rig.ok("revert", self.rig.name, name, "--discard", "-y")
        assert self.wrong(mark) == [], name

    def go_back_to_all(self) -> int:
        """To each that was reported to have memory; return how many there were."""
        names = [name for name, state in self.states().items() if state == "memory"]
        for name in names:
            self.go_back_to(name)
        return len(names)
