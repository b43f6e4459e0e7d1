"""How things look: sizes, ages, tables, the tree, plans. Text in, text out; nothing is printed here."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence

from diskchain.chain.plan import Plan
from diskchain.chain.text import counted, printable, size
from diskchain.errors import UsageError
from diskchain.ops.look import Listing, SnapshotView
from diskchain.ops.merge import Merged


def duration(seconds: float | None) -> str:
    """Given seconds, return them short, in one unit: `82d`, `3h`, `5m`, `7s`."""
    if seconds is None:
        return "?"
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return f"{max(0, int(seconds))}s"


def width(text: str) -> int:
    """Return how many columns a text takes on a terminal."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def ljust(text: str, columns: int) -> str:
    """Pad a text to the right."""
    return text + " " * max(0, columns - width(text))


def rjust(text: str, columns: int) -> str:
    """Pad a text to the left."""
    return " " * max(0, columns - width(text)) + text


def named(vm: str, text: str) -> str:
    """Return a text that names the VM: as it is if it does so already (a path or a longer word does not count)."""
    if not vm or re.search(rf"(?<![\w./-]){re.escape(vm)}(?![\w./-])", text):
        return text
    return f"{vm}: {text}"


# -- tables ------------------------------------------------------------------------------------------------------------

Row = Mapping[str, str]
RIGHT = {"AGE", "DISK", "MEMORY", "FREES", "CPUS", "SNAPS", "OLDEST", "DEPTH", "USED", "GROWTH", "FULL IN", "PENDING"}


def columns(asked: str | None, known: Sequence[str], usual: Sequence[str]) -> list[str]:
    """Given what -o said, return the columns. Raise UsageError for one that there is not."""
    names = [n.strip().upper() for n in asked.split(",")] if asked else list(usual)
    for name in names:
        if name not in known:
            raise UsageError(f"there is no column {name!r}", hint=f"-o {','.join(known)}")
    return names


def table(rows: Sequence[Row], names: Sequence[str], *, headers: bool = True) -> list[str]:
    """Return rows as aligned lines with a header; without `headers` separated by tabs. Cells are made safe here."""
    cells = [[printable(row.get(name, "")) for name in names] for row in rows]
    if not headers:
        return ["\t".join(row) for row in cells]
    cells.insert(0, list(names))
    wide = [max(width(row[i]) for row in cells) for i in range(len(names))]
    return ["  ".join(_pad(n, c, w) for n, c, w in zip(names, row, wide, strict=True)).rstrip() for row in cells]


def _pad(name: str, cell: str, columns: int) -> str:
    return rjust(cell, columns) if name in RIGHT else ljust(cell, columns)


NO_VMS = "no VMs are defined"

# -- the list ----------------------------------------------------------------------------------------------------------

LIST_USUAL = ["NAME", "AGE", "TYPE", "DISK", "MEMORY", "FREES", "NOTES"]
LIST_KNOWN = [*LIST_USUAL, "ID", "CREATED", "PARENT", "CONSISTENCY", "VM"]


def snapshot_rows(listing: Listing, *, exact: bool) -> list[Row]:
    """Return one row for each snapshot; `exact`: bytes and seconds as they are."""
    show: Callable[[int | None], str] = (lambda n: "?" if n is None else str(n)) if exact else size
    return [{**_snapshot_row(view, show, exact), "VM": listing.vm} for view in listing.snapshots]


def _snapshot_row(view: SnapshotView, show: Callable[[int | None], str], exact: bool) -> Row:
    snapshot, age = view.snapshot, view.age_seconds
    return {
        "NAME": snapshot.name, "ID": snapshot.id, "CREATED": snapshot.created, "PARENT": view.parent or "-",
        "CONSISTENCY": snapshot.consistency, "TYPE": snapshot.state, "NOTES": "   ".join(_notes(view)),
        "AGE": (str(int(age)) if age is not None else "?") if exact else duration(age),
        "DISK": show(view.disk_bytes), "MEMORY": show(view.memory_bytes) if view.memory_bytes else "-",
        "FREES": "-" if view.frees is None else show(view.frees),
    }  # fmt: skip


def _notes(view: SnapshotView) -> list[str]:
    snapshot, memory = view.snapshot, view.snapshot.memory
    notes = [f"! {text}" for text in view.warnings]
    if memory.status == "saving":
        notes.append("saving memory")
    if memory.status == "failed":
        notes.append(f"memory not saved: {memory.reason}")
    if snapshot.partial:
        notes.append(f"partial: without {', '.join(snapshot.partial)}")
    if snapshot.unquiesced:
        notes.append(f"not quiesced: {snapshot.unquiesced}")
    if snapshot.protected:
        notes.append("protected")
    return [*notes, *([snapshot.description] if snapshot.description else [])]


def list_lines(listing: Listing, asked: str | None) -> list[str]:
    """Return a VM's snapshots as people see them: the table, the present, what is pending, a summary."""
    names = columns(asked, LIST_KNOWN, LIST_USUAL)
    rows = snapshot_rows(listing, exact=False)
    now: Row = {"NAME": "(now)", "DISK": size(listing.now_bytes), "VM": listing.vm}
    lines = table([*rows, *([now] if "NAME" in names else [])], names)
    if asked:
        return lines
    wide = max(width(printable(row["NAME"])) for row in [*rows, now, {"NAME": "NAME"}])
    ages = max(3, *(width(row["AGE"]) for row in rows)) if rows else 3
    for pending in listing.pending:
        when = f"merge it: diskchain merge {listing.vm}" if listing.state == "stopped" else "merges at the next stop"
        memory = f"; its memory, {size(pending.memory_bytes)}, goes then" if pending.memory_bytes else ""
        text = f"(deleted; {when}: {size(pending.bytes)}, about {pending.seconds} s{memory})"
        if pending.waits:
            text = f"(deleted; its layer, {size(pending.bytes)}, stays until one layer is left on it)"
        age = rjust(duration(pending.age_seconds), ages)
        lines.append(f"{ljust(printable(pending.snapshot.name), wide)}  {age}  {text}")
    return [*lines, summary(listing), *unfinished_lines(listing)]


def unfinished_lines(listing: Listing) -> list[str]:
    """Return a line about an operation that was interrupted, if there is one."""
    if listing.unfinished is None:
        return []
    op, name = listing.unfinished["op"], listing.unfinished["name"]
    return [f"! an operation ({op} {name!r}) was interrupted: diskchain recover {listing.vm}"]


def summary(listing: Listing) -> str:
    """Return the last line of a list."""
    count, memory = len(listing.snapshots), sum(v.memory_bytes for v in listing.snapshots)
    with_memory = f" and {size(memory)} of memory" if memory else ""
    warnings = sum(len(v.warnings) for v in listing.snapshots)
    text = (f"{counted(count, 'snapshot')}, {size(listing.all_bytes)} of disk{with_memory} "
            f"in {counted(listing.layers, 'layer')}.")  # fmt: skip
    return text + (f" {counted(warnings, 'warning')}." if warnings else "")


# -- the tree ----------------------------------------------------------------------------------------------------------

HERE = "* you are here"


def tree_lines(listing: Listing) -> list[str]:
    """Return the tree of a VM's snapshots, with "you are here"."""
    count = listing.disks
    drawn: list[tuple[str, SnapshotView | None]] = []
    _draw(listing, None, "", drawn)
    ages = max([width(duration(v.age_seconds)) for _, v in drawn if v] or [0])
    sizes = max(width(size(v.disk_bytes if v else listing.now_bytes)) for _, v in drawn)
    wide = max([width(label) for label, v in drawn if v] or [0])
    wide = max(wide, max(width(label) for label, v in drawn if v is None) - 3 - ages)
    head = f"{listing.vm} ({listing.state}, {counted(count, 'disk')})"
    lines = (_tree_line(label, v, listing, wide, ages, sizes) for label, v in drawn)
    return [head, *lines, *unfinished_lines(listing)]


def _draw(listing: Listing, parent: str | None, indent: str, drawn: list[tuple[str, SnapshotView | None]]) -> None:
    below: list[SnapshotView | None] = [v for v in listing.snapshots if v.parent == parent]
    if listing.current == parent:
        below.append(None)
    for number, view in enumerate(below, 1):
        last = number == len(below)
        label = printable(view.snapshot.name) if view else HERE
        drawn.append((f"{indent}{'└── ' if last else '├── '}{label}", view))
        if view:
            _draw(listing, view.snapshot.name, indent + ("    " if last else "│   "), drawn)


def _tree_line(label: str, view: SnapshotView | None, listing: Listing, wide: int, ages: int, sizes: int) -> str:
    if view is None:
        return f"{ljust(label, wide + 3 + ages)}   {rjust(size(listing.now_bytes), sizes)}"
    line = f"{ljust(label, wide)}   {rjust(duration(view.age_seconds), ages)}   {rjust(size(view.disk_bytes), sizes)}"
    if view.memory_bytes:
        line += f"  memory {size(view.memory_bytes)}"
    return line + ("  saving memory" if view.snapshot.memory.status == "saving" else "")


# -- plans -------------------------------------------------------------------------------------------------------------


def plan_lines(plan: Plan) -> list[str]:
    """Return a plan as people read it."""
    lines = [plan.title, *(f"  {step}" for step in plan.steps)]
    lines += [f"Lost: {text}" for text in plan.lost]
    lines += [f"Needed on {n.directory}: {size(n.bytes)} ({size(n.free)} free)" for n in plan.needs]
    if plan.time_estimate_s >= 1:
        lines.append(f"Takes: about {duration(plan.time_estimate_s)}")
    if plan.downtime_estimate_s:
        lines.append(f"Outage: about {plan.downtime_estimate_s:.0f} s")
    if plan.point_of_no_return:
        lines.append(f"No way back: {plan.point_of_no_return}")
    return lines + [f"Warning: {text}" for text in plan.warnings]


def merged_line(merged: Merged) -> str:
    """Return one carried out merge in a line."""
    top = merged.top.rpartition("/")[2]
    if merged.method == "unlink":
        return f"  {merged.disk}: {top} deleted"
    into = merged.into.rpartition("/")[2]
    word = "copied up into" if merged.method == "stream" else "folded into"
    return f"  {merged.disk}: {size(merged.bytes)} of {top} {word} {into}" + (
        f" in {merged.seconds:.1f} s" if merged.seconds >= 0.05 else ""
    )
