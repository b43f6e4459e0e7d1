"""revert and undo."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace

import click

from diskchain.chain.model import snapshot_name
from diskchain.cli import context, many, render
from diskchain.cli.app import App, common
from diskchain.cli.options import changing_options, jobs_option, snapshot_argument, vms_argument, yes_option
from diskchain.errors import Busy, DiskchainError, UsageError
from diskchain.ops import old_keeps
from diskchain.ops import revert as ops
from diskchain.ops.revert import Request, Reverted
from diskchain.ops.vm import VM, Host


@click.command(epilog="Example: diskchain revert web1 before-upgrade --keep-as tried-pg17")
@vms_argument
@snapshot_argument
@click.option("--keep-as", metavar="NAME", help="Name of the kept present (default: before-revert-N).")
@click.option("--discard", is_flag=True, help="Don't keep the present: what was written since is gone.")
@click.option("--keep-memory", is_flag=True, help="Keep the present with its memory.")
@click.option("--cold", is_flag=True, help="Boot from the disks, leave the snapshot's memory alone.")
@click.option(
    "--config",
    type=click.Choice(["restore", "keep"]),
    help="The snapshot's configuration (default), or keep the present one.",
)
@click.option(
    "--only", multiple=True, metavar="TARGET", help="Only this disk goes back (again for more); implies --cold."
)
@click.option("--start", is_flag=True, help="Let the VM run afterwards.")
@click.option("--paused", is_flag=True, help="Leave the VM paused afterwards.")
@click.option("--stopped", is_flag=True, help="Leave the VM off afterwards.")
@yes_option
@jobs_option
@changing_options
@common
def revert(
    vm: str,
    name: str,
    keep_as: str | None,
    discard: bool,
    keep_memory: bool,
    cold: bool,
    config: str | None,
    only: tuple[str, ...],
    start: bool,
    paused: bool,
    stopped: bool,
    yes: bool,
    jobs: int,
    wait: float | None,
    dry_run: bool,
) -> None:
    """Go back to a snapshot, with its memory if it has one. The present is kept as before-revert-N."""
    if start + paused + stopped > 1:
        raise UsageError("--start, --paused and --stopped contradict each other", hint="give one of them")
    keep = "" if keep_as is None else snapshot_name(keep_as)
    if discard and (keep or keep_memory):
        raise UsageError("--discard contradicts --keep-as and --keep-memory", hint="give one of them")
    if only and config == "restore":
        raise UsageError(
            "--only keeps the configuration of now; --config restore contradicts it", hint="give one of them"
        )
    power = "start" * start + "paused" * paused + "stopped" * stopped
    request = Request(name, keep, discard, keep_memory, cold, power, tuple(dict.fromkeys(only)), config or "restore")
    _revert_each(vm, request, yes, jobs, wait, dry_run)


@click.command(epilog="Example: diskchain undo web1")
@vms_argument
@yes_option
@jobs_option
@changing_options
@common
def undo(vm: str, yes: bool, jobs: int, wait: float | None, dry_run: bool) -> None:
    """Go back to where the last revert left from."""
    _revert_each(vm, None, yes, jobs, wait, dry_run)


def _revert_each(vm: str, request: Request | None, yes: bool, jobs: int, wait: float | None, dry_run: bool) -> None:
    app = context.current()
    host = context.open_host(app, wait)
    asks = not (yes or dry_run)
    many.on_each(app, host, vm, lambda app, name: _revert(app, host, name, request, yes, dry_run), jobs=jobs, asks=asks)


async def _revert(app: App, host: Host, name: str, request: Request | None, yes: bool, dry_run: bool) -> None:
    """Revert as requested; without a request undo the last revert."""
    await context.settle_before_plan(app, host, name, "revert", dry_run=dry_run)
    async with host.look(name) as vm:
        request = request or Request(ops.undo_target(vm))
        prepared = await ops.prepare(vm, request)
        keep, one_more = host.config.revert.keep, bool(prepared.keep and prepared.keep.automatic)
        due = old_keeps.due(vm.catalog, keep, stays=[prepared.snapshot.id], one_more=one_more)
    plan = prepared.plan
    if due:
        old = f"{_names(s.name for s in due)}, kept by reverts, older than {_limit(keep)}"
        plan = replace(plan, steps=(*plan.steps, f"delete {old}"), lost=(*plan.lost, old))
    if dry_run:
        context.show_plan(app, plan)
        return
    context.confirm(app, plan, "Revert?", yes=yes, about=[prepared.snapshot.id])
    async with context.changing(app, host, name, "revert") as vm:
        if vm.catalog.find(request.name).id != prepared.snapshot.id:
            raise Busy(f"the snapshots of {vm.name} were changed meanwhile", hint="look again, then try again")
        done = await ops.revert(vm, request, context.progress(app))
        _tell(app, vm, done, await _delete_old(app, vm, keep, done))


async def _delete_old(app: App, vm: VM, keep: float, done: Reverted) -> list[str]:
    """The revert is done; what can't be deleted now is tried again by the next one."""
    try:
        return await old_keeps.delete_due(vm, keep, [done.snapshot.id], context.progress(app))
    except DiskchainError as error:
        context.progress(app).warn(f"presents kept longer than {_limit(keep)} were not deleted: {error.message}")
        return []


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _limit(seconds: float) -> str:
    return f"{render.duration(seconds)} (revert.keep)"


def _tell(app: App, vm: VM, done: Reverted, deleted: list[str]) -> None:
    body = {**asdict(done), "vm": vm.name, "snapshot": done.snapshot.name, "deleted": deleted}
    back = f"{vm.name} is back at {done.snapshot.name!r}, {done.state}"
    if done.left_as_now:
        gone_back, left = ", ".join(done.disks) or "nothing", ", ".join(done.left_as_now)
        back = f"{gone_back} of {vm.name} is back at {done.snapshot.name!r}, {left} as before; {done.state}"
    lines = [back]
    if not done.kept_as:
        lines.append("the present of before is gone (--discard)")
    else:
        lines.append(f"the present of before is kept as {done.kept_as!r}; back to it: diskchain undo {vm.name}")
    lines += [f"configuration: {text}" for text in done.config_changes]
    if deleted:
        lines.append(f"deleted {_names(deleted)}, kept longer than {_limit(vm.host.config.revert.keep)}")
    context.answer(app, body, lines)
