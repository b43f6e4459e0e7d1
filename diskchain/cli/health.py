"""status, check, doctor: look only. Exit 0, 10 (warnings) or 11 (errors)."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Sequence
from typing import Any

import click

from diskchain.chain import rules
from diskchain.chain.rules import Finding, Severity
from diskchain.chain.text import size
from diskchain.cli import context, many, render
from diskchain.cli import repair as cli_repair
from diskchain.cli.app import App, common
from diskchain.cli.options import changing_options, maybe_vms_argument, yes_option
from diskchain.ops import check as ops
from diskchain.ops import doctor as ops_doctor
from diskchain.ops import status as ops_status
from diskchain.ops.status import Status
from diskchain.ops.vm import Host

STATUS_COLUMNS = ["VM", "STATE", "SNAPS", "OLDEST", "DEPTH", "USED", "GROWTH", "FULL IN", "PENDING", "NOTES"]
STATUS_KNOWN = [*STATUS_COLUMNS, "ROLES"]


def _names(host: Host, vm: str | None) -> list[str]:
    """Return the VMs that were typed; all of them without any."""
    if vm is None:
        return ops.all_names(host)
    several = many.select(host, vm)
    return [vm] if several is None else several


@click.command(epilog="Example: diskchain status web1")
@maybe_vms_argument
@click.option("-o", "--output", "columns", metavar="COLS", help=f"Columns: {','.join(STATUS_KNOWN)}.")
@click.option("-H", "--no-headers", is_flag=True, help="Tabs, exact bytes, no header: for scripts.")
@common
def status(vm: str | None, columns: str | None, no_headers: bool) -> None:
    """One line a VM: state, snapshots, space, and what to look at. Exit 10: warnings, 11: errors."""
    app = context.current()
    host = context.open_host(app)
    names = render.columns(columns, STATUS_KNOWN, STATUS_COLUMNS)
    found = context.run_async(_each([ops_status.status(host, name) for name in _names(host, vm)]))
    rows = [_row(one, exact=no_headers) for one in found]
    lines = render.table(rows, names, headers=not no_headers)
    if not no_headers:
        lines += [line for one in found for line in _below(one)]
        lines = lines if found else [render.NO_VMS]
    context.answer(app, {"vms": [one.to_json() for one in found]}, lines)
    app.exit_code = max(app.exit_code, rules.exit_code(f for one in found for f in one.findings))


async def _each(work: Sequence[Coroutine[Any, Any, Status]]) -> list[Status]:
    found = []
    try:
        for one in work:
            found.append(await one)
    finally:
        for one in work:
            one.close()
    return found


def _row(one: Status, *, exact: bool) -> dict[str, str]:
    def shown(count: int | None) -> str:
        return "-" if count is None else str(count) if exact else size(count)

    oldest = one.oldest_seconds
    return {
        "VM": one.name, "STATE": one.state.upper() if one.state == "paused-critical" else one.state,
        "SNAPS": "-" if one.snapshots is None else str(one.snapshots),
        "OLDEST": "-" if oldest is None else str(int(oldest)) if exact else render.duration(oldest),
        "DEPTH": "-" if one.depth is None else str(one.depth), "USED": shown(one.used), "GROWTH": "-", "FULL IN": "-",
        "PENDING": shown(one.pending or None), "NOTES": "; ".join(_note(one.name, f) for f in one.findings),
        "ROLES": ",".join(f"{target}={role}" for target, role in one.roles.items()) or "-",
    }  # fmt: skip


def _note(vm: str, finding: Finding) -> str:
    mark = "" if finding.severity is Severity.INFO else "! "
    return mark + (finding.evidence if finding.subject == vm else f"{finding.subject}: {finding.evidence}")


def _below(one: Status) -> list[str]:
    """What to do, one line for each thing."""
    return [f"{one.name}: {f.code}: {f.remedy}" for f in one.findings if f.remedy and f.severity is not Severity.INFO]


@click.command(epilog="Example: diskchain check --deep web1")
@maybe_vms_argument
@click.option("--deep", is_flag=True, help="Read everything: checksums of saved memory, qemu-img check of stopped VMs.")
@click.option("--repair", is_flag=True, help="Put right what is beyond doubt, of VMs that are off; asks first.")
@yes_option
@changing_options
@common
def check(vm: str | None, deep: bool, repair: bool, yes: bool, wait: float | None, dry_run: bool) -> None:
    """Hold records, files and hypervisor against each other. Exit 10: warnings, 11: errors. Without --repair nothing changes."""
    app = context.current()
    host = context.open_host(app, wait)
    names = _names(host, vm)
    app.changes = repair and not dry_run
    if repair:
        context.run_async(cli_repair.repair(app, host, names, yes=yes, dry_run=dry_run))
        if dry_run:
            return
    found = context.run_async(_check(host, names, deep))
    title = f"{len(names)} VM{'' if len(names) == 1 else 's'}"
    _answer(app, found, f"{title} checked")


async def _check(host: Host, names: Iterable[str], deep: bool) -> list[Finding]:
    found: list[Finding] = []
    for name in names:
        found += await ops.check(host, name, deep=deep)
    return found


@click.command(epilog="Example: diskchain doctor")
@common
def doctor() -> None:
    """Look at the host: QEMU, KVM tried for real, memory saving, locks, places. Exit 10: warnings, 11: errors."""
    app = context.current()
    host = context.open_host(app)
    _answer(app, context.run_async(ops_doctor.doctor(host)), "host looked at")


def _answer(app: App, found: list[Finding], done: str) -> None:
    context.answer(app, {"findings": [f.to_json() for f in found]}, finding_lines(found, done))
    app.exit_code = max(app.exit_code, rules.exit_code(found))


def finding_lines(found: Sequence[Finding], done: str) -> list[str]:
    """Return findings as people read them, the worst first, and a summary."""
    lines = []
    for severity in (Severity.ERROR, Severity.WARNING, Severity.INFO):
        for f in found:
            if f.severity is severity:
                lines.append(f"{severity.value:<7}  {f.subject}: {f.evidence}")
                lines += [f"  do: {f.remedy}"] if f.remedy else []
    errors, warnings = (sum(f.severity is s for f in found) for s in (Severity.ERROR, Severity.WARNING))
    return [
        *lines,
        f"{done}: {errors} error{'' if errors == 1 else 's'}, {warnings} warning{'' if warnings == 1 else 's'}",
    ]
