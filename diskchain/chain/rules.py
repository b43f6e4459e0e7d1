"""Findings: what a look at the health of a VM or of the host says. Pure rules; who gathers is ops/{check,status,doctor}.

A code is one stable word for scripts; subject says what it is about, evidence what was seen, remedy what to type next.
"""

from __future__ import annotations

import enum
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diskchain.chain.model import Catalog, GiB
from diskchain.chain.text import counted, size

OLD_AFTER_DAYS = 14
DEEP_CHAIN = 50  # a 4 KiB read of a hole costs 6 us at depth 10, 37 at 50, 303 at 200 (facts.md)
LOW_SHARE, LOW_BYTES = 0.10, 2 * GiB


class Severity(enum.Enum):
    """How bad it is; the exit code that goes with it."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"

    @property
    def exit_code(self) -> int:
        """Return 0, 10 or 11."""
        return {"info": 0, "warning": 10, "error": 11}[self.value]


@dataclass(frozen=True)
class Finding:
    """One health result."""

    code: str
    severity: Severity
    subject: str
    evidence: str
    remedy: str | None = None

    def to_json(self) -> dict[str, str | None]:
        """Return the keys that scripts rely on."""
        return {"code": self.code, "severity": self.severity.value, "subject": self.subject,
                "evidence": self.evidence, "remedy": self.remedy}  # fmt: skip


def info(code: str, subject: str, evidence: str, remedy: str | None = None) -> Finding:
    """Something to know; nothing to do."""
    return Finding(code, Severity.INFO, subject, evidence, remedy)


def warning(code: str, subject: str, evidence: str, remedy: str | None = None) -> Finding:
    """It works, and may not tomorrow."""
    return Finding(code, Severity.WARNING, subject, evidence, remedy)


def error(code: str, subject: str, evidence: str, remedy: str | None = None) -> Finding:
    """Something is broken: a state of the VM is damaged, or a command will refuse."""
    return Finding(code, Severity.ERROR, subject, evidence, remedy)


def exit_code(findings: Iterable[Finding]) -> int:
    """Return the exit code of the worst."""
    return max((f.severity.exit_code for f in findings), default=0)


# -- the catalog against itself ----------------------------------------------------------------------------------------


def dangling(catalog: Catalog) -> Iterator[Finding]:
    """Names in the catalog that lead nowhere, or in a circle. Whoever walks its chains must ask this first."""
    known, remedy = catalog.images, "bring catalog.json back from a backup; RECOVER.txt beside it lists the chain"
    wrong = [f"{i.id} stands on {i.backing}" for i in known.values() if i.backing and i.backing not in known]
    wrong += [f"{t} writes to {i}" for t, i in catalog.active.items() if i not in known]
    wrong += [f"a detached disk ends in {i}" for i in catalog.detached if i not in known]
    for s in catalog.snapshots.values():
        wrong += [f"snapshot {s.name!r} froze {i}" for i in s.disks.values() if i not in known]
        wrong += [f"snapshot {s.name!r} follows {s.parent}"] if s.parent and s.parent not in catalog.snapshots else []
    if catalog.current is not None and catalog.current not in catalog.snapshots:
        wrong.append(f"the present follows {catalog.current}")
    if wrong:
        yield error("catalog-inconsistent", catalog.name, f"unknown to it: {'; '.join(wrong)}", remedy)
    backings = {i.id: i.backing for i in known.values()}
    parents = {s.id: s.parent for s in catalog.snapshots.values()}
    if _has_circle(backings) or _has_circle(parents):
        yield error("catalog-inconsistent", catalog.name, "images or snapshots follow each other in a circle", remedy)


def detached(catalog: Catalog) -> Iterator[Finding]:
    """The last layers of disks that the VM had once."""
    for image in (catalog.images[i] for i in catalog.detached):
        yield info("disk-detached", f"{image.target} {image.path}",
                   f"{catalog.name} has no {image.target} any more; its last layer is kept",
                   f'to have it again: target = "{image.target}" in the machine file, then machine define')  # fmt: skip


def _has_circle(above: Mapping[str, str | None]) -> bool:
    sound: set[str] = set()
    for start in above:
        at, walk = above[start], {start}
        while at is not None and at not in sound:
            if at in walk:
                return True
            walk.add(at)
            at = above.get(at)
        sound |= walk
    return False


def deep_chains(vm: str, depth: int) -> Iterator[Finding]:
    """A chain so long that reads get slow."""
    if depth > DEEP_CHAIN:
        yield warning("chain-deep", vm, f"{depth} layers; reads of old data get slow, QEMU starts slower",
                      f"diskchain delete {vm} NAME")  # fmt: skip


# -- age and space -----------------------------------------------------------------------------------------------------


def old_snapshots(vm: str, ages: Sequence[tuple[str, float]]) -> Iterator[Finding]:
    """Snapshots (name, age in seconds) that somebody may have forgotten."""
    old = [name for name, age in ages if age > OLD_AFTER_DAYS * 86400]
    if old:
        more = f" and {len(old) - 3} more" if len(old) > 3 else ""
        yield warning("old-snapshots", vm, f"{counted(len(old), 'snapshot')} older than "
                      f"{OLD_AFTER_DAYS}d: {', '.join(old[:3])}{more}", f"diskchain delete {vm} {old[0]}")  # fmt: skip


def expired_snapshots(vm: str, names: Sequence[str]) -> Iterator[Finding]:
    """Snapshots that were to be kept only until a day that is past. Nobody but an admin deletes them."""
    if names:
        yield warning("expired-snapshots", vm, f"expired: {', '.join(names)}",
                      f"diskchain delete {vm} {' '.join(map(shlex.quote, names))}")  # fmt: skip


def full_volume(subject: str, path: Path, free: int, total: int) -> Iterator[Finding]:
    """A volume with less than a tenth, or less than 2 GiB, of it free."""
    if free < LOW_SHARE * total or free < LOW_BYTES:
        share = 100 * free // total if total else 0
        yield warning("volume-nearly-full", subject, f"{size(free)} of {size(total)} ({share} %) free on {path}",
                      "make room there, or delete snapshots: diskchain list shows what each frees")  # fmt: skip


def memory_fits(vm: str, path: Path, free: int, needed: int) -> Iterator[Finding]:
    """Whether the next snapshot of a VM that is on finds room for its memory."""
    if free < needed:
        yield warning("memory-would-not-fit", vm,
                      f"a snapshot with memory takes up to {size(needed)}, {size(free)} are free on {path}",
                      f"make room there, or diskchain create {vm} --disk-only")  # fmt: skip


def stopped_itself(vm: str, failed: Mapping[str, str], volumes: Mapping[str, tuple[Path, int]]) -> Finding:
    """Why a VM stands still that nobody paused. `failed`: per disk `nospace` or `failed`; `volumes`: where, and free."""
    words = []
    for target, why in failed.items():
        path, free = volumes.get(target, (Path("its volume"), 0))
        words.append(f"{target}: {'no space' if why == 'nospace' else 'an I/O error'} ({size(free)} free on {path})")
    evidence = "it stopped itself, " + ("; ".join(words) or "QEMU does not say for which disk")
    places = ", ".join(sorted({str(volumes[t][0]) for t in failed if t in volumes}))
    remedy = f"free or add space on {places}" if "nospace" in failed.values() else "look at dmesg and the storage"
    return error("paused-critical", vm, evidence, f"{remedy}, then: diskchain resume {vm}")


def left_by_save(vm: str) -> Finding:
    """A VM that a save of its memory stopped."""
    return error("left-by-save", vm, "it is paused: a save of its memory stopped it, and nobody let it go on; nothing keeps "
                 "others off its disks", f"diskchain recover {vm}")  # fmt: skip


# -- the host ----------------------------------------------------------------------------------------------------------


def qemu_traps(version: str, rescue: str | None) -> Iterator[Finding]:
    """What is known of this QEMU. `rescue`: None when a guest that hangs on a failed save can be freed, else why not."""
    number = tuple(int(part) for part in version.split(".")[:2])
    if number < (6, 0):
        yield warning("qemu-no-background-save", f"QEMU {version}", "memory can't be saved while a guest runs",
                      "use QEMU 6.0 or newer; until then --disk-only or --memory=paused")  # fmt: skip
    elif number < (10, 0) and rescue is not None:
        yield warning("qemu-save-may-hang", f"QEMU {version}", "a background save of memory that fails hangs its guest, "
                      f"and it could not be freed here: {rescue}",
                      "run diskchain as root, or sysctl kernel.yama.ptrace_scope=0; or use QEMU 10")  # fmt: skip
    elif number < (10, 0):
        yield info("qemu-save-may-hang", f"QEMU {version}", "a background save of memory that fails hangs its guest; "
                   "diskchain reserves the space, never cancels, and can free such a guest here")  # fmt: skip
