"""Random trees on real images: whatever is created, gone back to and deleted, every state that is left keeps its content.

The planner alone is tried with many more (tests/unit/chain/test_deletion.py); here the engine does the work.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.support.rig import MiB, Rig
from tests.support.sample import FULL

SEED = int(os.environ.get("DISKCHAIN_SEED", "7"))
STEPS = 60 if FULL else 14
WAYS = ((), (), ("--children",), ("--copy",), ("--when-stopped",))


class Tree:
    """A stopped machine and what each of its states holds."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.rig = Rig(directory / "vm", size=8 * MiB, raw=("vdb",))
        self.rig.build(guest=False)
        self.rig.remember("now")
        self.number = 0

    def step(self) -> str:
        """Do something; return it in words."""
        names = sorted(self.rig.snapshots())
        kinds = ["create"] * 3 + (["revert"] * 3 + ["delete"] * 3 if len(names) > 2 else [])
        return {"create": self.create, "revert": self.revert, "delete": self.delete}[self.rng.choice(kinds)](names)

    def create(self, names: list[str]) -> str:
        """Write and take a snapshot."""
        self.number += 1
        for _ in range(3):
            self.rig.write(self.number, self.rng.randrange(0, 14000) * 512, self.rng.randrange(1, 600) * 512)
        self.rig.remember("now")
        self.rig.expected[f"s{self.number}"] = self.rig.expected["now"]
        self.rig.ok("create", "vm", f"s{self.number}")
        return f"create s{self.number}"

    def revert(self, names: list[str]) -> str:
        """Go back; the present is kept, or dropped."""
        name, discard = self.rng.choice(names), self.rng.random() < 0.3
        self.rig.ok("revert", "vm", name, "-y", *(["--discard"] if discard else []))
        for kept in set(self.rig.snapshots()) - set(names):
            self.rig.expected[kept] = self.rig.expected["now"]
        self.rig.expected["now"] = self.rig.expected[name]
        return f"revert {name} discard={discard}"

    def delete(self, names: list[str]) -> str:
        """Delete some, somehow."""
        some, way = self.rng.sample(names, self.rng.randrange(1, min(len(names), 5))), self.rng.choice(WAYS)
        self.rig.ok("delete", "vm", *some, *way, "-y")
        assert not set(some) & set(self.rig.snapshots())
        return f"delete {some} {way}"

    def wrong(self) -> list[str]:
        """What is not as it should be; a base that is let go of stays as a file."""
        let_go = {"orphan vda.qcow2", "orphan vdb.raw"}
        return [w for w in self.rig.verdict(present="now") if w not in let_go]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(SEED, SEED + (8 if FULL else 2)))
def test_random_operations_keep_every_state_that_is_left(tmp_path: Path, seed: int) -> None:
    """At the end the line is accepted: one layer for each disk."""
    tree, done = Tree(tmp_path, seed), []
    try:
        done += [tree.create([]) for _ in range(5)]
        for _ in range(STEPS):
            done.append(tree.step())
            assert tree.wrong() == [], "\n".join(done)
        tree.rig.ok("accept", "vm", "--drop-branches", "-y")
        assert tree.wrong() == [], "\n".join(done)
        assert tree.rig.catalog()["snapshots"] == {} and len(tree.rig.catalog()["images"]) == 2, "\n".join(done)
    finally:
        tree.rig.destroy()
