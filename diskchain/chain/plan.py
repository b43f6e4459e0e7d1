"""Plans: what an operation is going to do, as a value that can be printed before anything happens. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diskchain.chain.model import Catalog, Snapshot
from diskchain.errors import NotFound, Refused


@dataclass(frozen=True)
class Need:
    """Room that is needed at most on a directory's filesystem, and what is free there."""

    directory: str
    bytes: int
    free: int


@dataclass(frozen=True)
class Plan:
    """Steps in words, bytes that are moved, bytes needed (and where), seconds of downtime and of work, what is lost."""

    title: str
    steps: tuple[str, ...]
    bytes: int = 0
    space_needed: int = 0
    downtime_estimate_s: float = 0.0
    time_estimate_s: float = 0.0
    lost: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    point_of_no_return: str = ""
    needs: tuple[Need, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the form that --json prints."""
        return {
            "title": self.title, "steps": list(self.steps), "bytes": self.bytes, "space_needed": self.space_needed,
            "downtime_estimate_s": self.downtime_estimate_s, "time_estimate_s": self.time_estimate_s,
            "lost": list(self.lost), "warnings": list(self.warnings), "point_of_no_return": self.point_of_no_return,
            "needs": [{"directory": n.directory, "bytes": n.bytes, "free": n.free} for n in self.needs],
        }  # fmt: skip


@dataclass(frozen=True)
class RevertDisks:
    """What a revert does with each disk. `on`: what its new overlay stands on; `stays`: layers that just go on."""

    on: Mapping[str, str]
    stays: Mapping[str, str]
    covered: tuple[str, ...]  # goes back to the snapshot
    detached: tuple[str, ...]  # the VM has it now and not afterwards; its file is kept
    current: str | None  # the snapshot that the VM is at afterwards (the kept present: None)

    @property
    def left_alone(self) -> list[str]:
        """The disks of the VM afterwards that do not go back."""
        return [t for t in {**self.on, **self.stays} if t not in self.covered]


def plan_revert_disks(catalog: Catalog, snapshot: Snapshot, wanted: Sequence[str], only: Sequence[str],
                      *, keeps: bool) -> RevertDisks:  # fmt: skip
    """Given the disks that the VM has afterwards (`wanted`) and those that may go back (`only`; none given: all).

    Disks that the snapshot does not cover (partial, added later and kept by the configuration) or that are not among
    `only` hold afterwards what they hold now: on an overlay of their own when the present is kept (it froze them), else
    as they are. A detached disk that the configuration has, and the snapshot has not, is attached again.
    Raise NotFound for an `only` that can't go back, Refused when a disk of the configuration has no layer to go on with.
    """
    for target in only:
        _require_only(catalog, snapshot, wanted, target)
    covered = tuple(t for t in wanted if t in snapshot.disks and (not only or t in only))
    on = {t: snapshot.disks[t] for t in covered}
    stays: dict[str, str] = {}
    for target in (t for t in wanted if t not in covered):
        if target not in catalog.active:
            stays[target] = _detached_layer(catalog, snapshot, target)
        elif keeps:
            on[target] = catalog.active[target]
        else:
            stays[target] = catalog.active[target]
    whole = all(t in covered for t in wanted if t in snapshot.disks)
    current = snapshot.id if whole else None if keeps else catalog.current
    return RevertDisks(on, stays, covered, tuple(t for t in catalog.active if t not in wanted), current)


def _require_only(catalog: Catalog, snapshot: Snapshot, wanted: Sequence[str], target: str) -> None:
    if target not in snapshot.disks:
        raise NotFound(f"snapshot {snapshot.name!r} has no disk {target}",
                       hint=f"its disks: {', '.join(snapshot.disks)}")  # fmt: skip
    if target not in wanted:
        raise NotFound(f"{catalog.name} has no disk {target} now", hint=f"its disks: {', '.join(wanted)}")


def _detached_layer(catalog: Catalog, snapshot: Snapshot, target: str) -> str:
    found = [i for i in catalog.detached if catalog.images[i].target == target]
    if len(found) != 1:
        raise Refused(f"the configuration of {snapshot.name!r} has a disk {target}, which the snapshot does not cover "
                      f"and {catalog.name} has no more", hint="keep the configuration of now: --config keep --cold")  # fmt: skip
    return found[0]
