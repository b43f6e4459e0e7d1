"""merge."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import click

from diskchain.chain.plan import Plan
from diskchain.chain.text import counted, size
from diskchain.cli import context, many, render
from diskchain.cli.app import App, common, error_lines
from diskchain.cli.options import changing_options, jobs_option, maybe_vms_argument, rate_option
from diskchain.errors import DiskchainError, VMRunning
from diskchain.ops import delete_plan, look, pending
from diskchain.ops.vm import VM, Host

NOTHING = "nothing is to be merged"


@click.command(epilog="Example: diskchain merge web1")
@maybe_vms_argument
@rate_option
@jobs_option
@changing_options
@common
def merge(vm: str | None, rate: int | None, jobs: int, wait: float | None, dry_run: bool) -> None:
    """Carry out the pending merges of a stopped VM; without VM those of all stopped VMs."""
    app = context.current()
    host = context.open_host(app, wait)
    if vm is not None:
        many.on_each(app, host, vm, lambda app, name: _merge_one(app, host, name, rate, dry_run), jobs=jobs)
    else:
        context.run_async(_merge_every(app, host, rate, dry_run))


async def _merge_one(app: App, host: Host, name: str, rate: int | None, dry_run: bool) -> None:
    if dry_run:
        context.show_plan(app, await _merge_plan(host, name))
        return
    body, lines = await _merge(app, host, name, rate)
    context.answer(app, body, lines)


async def _merge_every(app: App, host: Host, rate: int | None, dry_run: bool) -> None:
    results: list[dict[str, Any]] = []
    lines: list[str] = []
    for name in host.names():
        try:
            if dry_run:
                plan = await _merge_plan(host, name)
                results.append({"vm": name, "plan": plan.to_json()})
                lines += render.plan_lines(plan)
            elif found := await _merge_or_put_off(app, host, name, rate):
                results.append(found[0])
                lines += found[1]
        except DiskchainError as error:
            for line in error_lines(f"{name}: {error.message}", error.hint):
                click.echo(line, err=True)
            app.exit_code = max(app.exit_code, error.exit_code)
    context.answer(app, {"results": results}, lines or [NOTHING])


Merged = tuple[dict[str, Any], list[str]]  # the answer as JSON, and in lines


async def _merge_or_put_off(app: App, host: Host, name: str, rate: int | None) -> Merged | None:
    """Carry out the merges of one of all VMs; of one that is on, say that they are pending. None: there are none."""
    async with host.look(name) as vm:
        if not vm.catalog.pending():
            return None
        if not (await vm.driver.state()).is_off:
            return _put_off(vm) if pending.plan(vm).does_something else None
    return await _merge(app, host, name, rate)


def _put_off(vm: VM) -> Merged:
    body = {"vm": vm.name, "deferred": True, "merged": [], "pending": [s.name for s in vm.catalog.pending()]}
    count = size(look.to_merge(vm.catalog, vm.catalog.pending()))
    return body, [f"{vm.name} is on: {count} pending; merged at the next stop (diskchain stop {vm.name})"]


async def _merge(app: App, host: Host, name: str, rate: int | None) -> Merged:
    async with host.look(name) as vm:
        if vm.catalog.pending() and not (await vm.driver.state()).is_off:
            raise VMRunning(f"{vm.name} is on; a merge needs it to be off", hint=f"diskchain stop {vm.name}")
    async with context.changing(app, host, name, "merge") as vm:
        merged = await pending.merge_pending(vm, context.progress(app), rate=rate)
        body = {"vm": vm.name, "deferred": False, "merged": [asdict(m) for m in merged],
                "pending": [s.name for s in vm.catalog.pending()]}  # fmt: skip
        count = f"{counted(len(merged), 'layer')} merged" if merged else NOTHING
        return body, [f"{vm.name}: {count}", *map(render.merged_line, merged)]


async def _merge_plan(host: Host, name: str) -> Plan:
    """Return the plan of a VM's pending merges; those that can't be done yet are warned of."""
    async with host.look(name) as vm:
        deletion = pending.plan(vm)
        plan = delete_plan.to_plan(vm, [deletion], title=f"{vm.name}: merge")
        stay = [s for s in vm.catalog.pending() if s not in deletion.snapshots]
        warnings = [f"stays pending: several layers stand on the layer of {s.name}" for s in stay]
        if deletion.moves_data and not (await vm.driver.state()).is_off:
            warnings.append(f"{vm.name} is on, a merge needs it to be off: diskchain stop {vm.name}")
        steps = plan.steps if deletion.does_something else (NOTHING,)
        return replace(plan, steps=steps, warnings=tuple(warnings))
