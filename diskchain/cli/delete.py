"""delete and merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import click

from diskchain.chain.plan import Plan, plan_delete
from diskchain.cli import context, many, render
from diskchain.cli.app import App, common, error_lines
from diskchain.cli.options import (
    SnapshotName,
    changing_options,
    jobs_option,
    maybe_vms_argument,
    vms_argument,
    yes_option,
)
from diskchain.errors import Busy, DiskchainError, HasChildren, VMRunning
from diskchain.ops import delete as ops
from diskchain.ops import power
from diskchain.ops.merge import Merged
from diskchain.ops.vm import VM, Host


@click.command(epilog="Example: diskchain delete web1 before-upgrade")
@vms_argument
@click.argument("names", type=SnapshotName(), nargs=-1, required=True, metavar="NAME...")
@click.option("--restart", is_flag=True, help="Stop the VM by its power button, merge, start it again.")
@yes_option
@jobs_option
@changing_options
@common
def delete(
    vm: str, names: tuple[str, ...], restart: bool, yes: bool, jobs: int, wait: float | None, dry_run: bool
) -> None:
    """Delete snapshots. Their layers are merged; what the VM sees, and every other snapshot, stays as it is."""
    app = context.current()
    host = context.open_host(app, wait)
    asks = not (yes or dry_run)
    many.on_each(
        app, host, vm, lambda app, name: _delete(app, host, name, names, restart, yes, dry_run), jobs=jobs, asks=asks
    )


async def _delete(
    app: App, host: Host, name: str, names: Sequence[str], restart: bool, yes: bool, dry_run: bool
) -> None:
    if not restart:
        await context.settle_before_plan(app, host, name, "delete", dry_run=dry_run)
    async with host.look(name) as vm:
        deletions = ops.plan_all(vm.catalog, names)
        plan, is_on = ops.to_plan(vm, deletions), not (await vm.driver.state()).is_off
        if dry_run:
            context.show_plan(app, _with_power(vm, plan, is_on, restart))
            return
        if is_on and restart:
            await vm.driver.refuse("restart")
        else:
            await ops.check(vm, deletions)
        plan = _with_power(vm, plan, is_on, restart)
    ids = [deletion.snapshot.id for deletion in deletions]
    context.confirm(app, plan, "Delete?", yes=yes, about=ids)
    async with host.change(name, "delete") as vm:
        merged = await _restarting(app, host, vm, ids) if restart else await _delete_all(app, host, vm, ids)
        _tell(app, vm, [d.snapshot.name for d in deletions], merged)


def _with_power(vm: VM, plan: Plan, is_on: bool, restart: bool) -> Plan:
    if not is_on:
        return plan
    if restart:
        steps = ("stop the VM by its power button", *plan.steps, "start the VM")
        return replace(plan, steps=steps, downtime_estimate_s=20.0 + plan.bytes // (200 << 20))
    text = f"{vm.name} is on, a merge needs it to be off: diskchain stop {vm.name}, or add --restart"
    return replace(plan, warnings=(*plan.warnings, text))


async def _restarting(app: App, host: Host, vm: VM, ids: Sequence[str]) -> list[Merged]:
    """Stop, delete, start again; it is started whatever becomes of the delete."""
    progress = context.progress(app)
    stopped = await power.stop(vm, progress, timeout=host.config.stop.timeout, merge=False)
    try:
        return await _delete_all(app, host, vm, ids)
    finally:
        if stopped.changed:
            await power.start(vm, progress)


async def _delete_all(app: App, host: Host, vm: VM, ids: Sequence[str]) -> list[Merged]:
    """Delete one after the other, each planned on what the one before it left. The lock is held."""
    await context.settle(app, host, vm)
    merged: list[Merged] = []
    for snapshot_id in ids:
        if snapshot_id not in vm.catalog.snapshots:
            raise Busy(f"the snapshots of {vm.name} were changed meanwhile", hint="look again, then try again")
        deletion = plan_delete(vm.catalog, vm.catalog.find(snapshot_id))
        await ops.check(vm, [deletion])
        merged += await ops.delete(vm, deletion, context.progress(app))
    return merged


def _tell(app: App, vm: VM, names: list[str], merged: list[Merged]) -> None:
    body = {"vm": vm.name, "deferred": False, "deleted": names, "merged": [asdict(m) for m in merged]}
    lines = [f"deleted {', '.join(map(repr, names))} of {vm.name}", *map(render.merged_line, merged)]
    context.answer(app, body, lines)


# -- merge -------------------------------------------------------------------------------------------------------------


@click.command(epilog="Example: diskchain merge web1")
@maybe_vms_argument
@jobs_option
@changing_options
@common
def merge(vm: str | None, jobs: int, wait: float | None, dry_run: bool) -> None:
    """Carry out the pending merges of a stopped VM; without VM those of all stopped VMs."""
    app = context.current()
    host = context.open_host(app, wait)
    if vm is not None:
        many.on_each(app, host, vm, lambda app, name: _merge_one(app, host, name, dry_run), jobs=jobs)
    else:
        context.run_async(_merge_every(app, host, dry_run))


async def _merge_one(app: App, host: Host, name: str, dry_run: bool) -> None:
    if dry_run:
        context.show_plan(app, await _merge_plan(host, name))
        return
    body, lines = await _merge(app, host, name)
    context.answer(app, body, lines)


async def _merge_every(app: App, host: Host, dry_run: bool) -> None:
    results: list[dict[str, Any]] = []
    lines: list[str] = []
    for name in host.names():
        try:
            if dry_run:
                plan = await _merge_plan(host, name)
                results.append({"vm": name, "plan": plan.to_json()})
                lines += render.plan_lines(plan)
            elif await _is_ready(host, name):
                body, said = await _merge(app, host, name)
                results.append(body)
                lines += said
        except DiskchainError as error:
            for line in error_lines(f"{name}: {error.message}", error.hint):
                click.echo(line, err=True)
            app.exit_code = max(app.exit_code, error.exit_code)
    context.answer(app, {"results": results}, lines or ["nothing is to be merged"])


async def _is_ready(host: Host, name: str) -> bool:
    async with host.look(name) as vm:
        return bool(vm.catalog.pending()) and (await vm.driver.state()).is_off


async def _merge(app: App, host: Host, name: str) -> tuple[dict[str, Any], list[str]]:
    async with host.look(name) as vm:
        if vm.catalog.pending() and not (await vm.driver.state()).is_off:
            raise VMRunning(f"{vm.name} is on; a merge needs it to be off", hint=f"diskchain stop {vm.name}")
    async with context.changing(app, host, name, "merge") as vm:
        merged = await ops.merge_pending(vm, context.progress(app))
        body = {"vm": vm.name, "deferred": False, "merged": [asdict(m) for m in merged],
                "pending": [s.name for s in vm.catalog.pending()]}  # fmt: skip
        return body, [f"{vm.name}: {len(merged)} layers merged", *map(render.merged_line, merged)]


async def _merge_plan(host: Host, name: str) -> Plan:
    """Return the plan of a VM's pending merges; those that can't be done yet are warned of."""
    async with host.look(name) as vm:
        catalog, deletions, warnings = vm.catalog, [], []
        for snapshot in catalog.pending():
            try:
                deletions.append(plan_delete(catalog, replace(snapshot, protected=False)))
            except HasChildren as error:
                warnings.append(f"stays pending: {error.message}")
                continue
            catalog = ops.after(catalog, deletions[-1])
        plan = ops.to_plan(vm, deletions)
        if deletions and not (await vm.driver.state()).is_off:
            warnings.append(f"{vm.name} is on, a merge needs it to be off: diskchain stop {vm.name}")
        steps = plan.steps or ("nothing is pending",)
        return replace(plan, title=f"{vm.name}: merge", steps=steps, warnings=tuple(warnings))
