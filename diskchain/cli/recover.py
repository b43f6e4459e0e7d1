"""recover."""

from __future__ import annotations

from typing import Any

import click

from diskchain.chain.plan import Plan
from diskchain.cli import context, many, render
from diskchain.cli.app import App, common, error_json, error_lines
from diskchain.cli.options import changing_options, jobs_option, maybe_vms_argument, yes_option
from diskchain.errors import DiskchainError, UsageError
from diskchain.ops import look, quiesce, save_memory
from diskchain.ops import recover as ops
from diskchain.ops.vm import Host


@click.command(epilog="Example: diskchain recover web1")
@maybe_vms_argument
@click.option("--finish", is_flag=True, help="Only forward; refuse where that can't be.")
@click.option("--undo", is_flag=True, help="Only back; refuse where that can't be.")
@yes_option
@jobs_option
@changing_options
@common
def recover(vm: str | None, finish: bool, undo: bool, yes: bool, jobs: int, wait: float | None, dry_run: bool) -> None:
    """Finish or undo what was interrupted on a VM; without VM on all."""
    if finish and undo:
        raise UsageError("--finish and --undo contradict each other", hint="give one of them, or none")
    app = context.current()
    host = context.open_host(app, wait)
    asks = undo and not (yes or dry_run)
    if vm and dry_run:
        many.on_each(app, host, vm, lambda app, name: _plan(app, host, [name]), jobs=jobs)
    elif vm:
        many.on_each(
            app, host, vm, lambda app, name: _recover_one(app, host, name, finish, undo, yes), jobs=jobs, asks=asks
        )
    elif dry_run:
        context.run_async(_plan(app, host, host.names()))
    else:
        context.run_async(_recover_all(app, host, finish, undo, yes))


async def _plan(app: App, host: Host, names: list[str]) -> None:
    plans = [await _plan_of(host, name) for name in names]
    if len(plans) == 1:
        context.show_plan(app, plans[0])
        return
    lines = [line for plan in plans for line in render.plan_lines(plan)]
    context.answer(app, {"results": [{"plan": plan.to_json()} for plan in plans]}, lines)


async def _plan_of(host: Host, name: str, how: str = "finish or undo") -> Plan:
    async with host.look(name) as vm:
        operation = look.open_operation(vm)
        step = f"{how} the open {operation}" if operation else "nothing was interrupted"
        return Plan(f"{vm.name}: recover", (step,))


async def _recover_one(app: App, host: Host, name: str, finish: bool, undo: bool, yes: bool) -> None:
    if undo:
        context.confirm(app, await _plan_of(host, name, "undo"), "Undo it?", yes=yes)
    body, line = await _recover(app, host, name, finish, undo)
    context.answer(app, body, [line])


async def _recover_all(app: App, host: Host, finish: bool, undo: bool, yes: bool) -> None:
    results, lines = [], []
    if undo:
        plan = Plan("all VMs: recover", ("undo whatever was interrupted",))
        context.confirm(app, plan, "Undo it?", yes=yes)
    for name in host.names():
        try:
            if not await _is_open(host, name):
                continue
            body, line = await _recover(app, host, name, finish, undo)
            results.append(body)
            lines.append(line)
        except DiskchainError as error:
            results.append({"vm": name, "error": error_json(error.exit_code, error.kind, error.message, error.hint)})
            for text in error_lines(f"{name}: {error.message}", error.hint):
                click.echo(text, err=True)
            app.exit_code = max(app.exit_code, error.exit_code)
    context.answer(app, {"results": results}, lines if results else ["nothing was interrupted"])


async def _is_open(host: Host, name: str) -> bool:
    async with host.look(name) as vm:
        return look.is_unfinished(vm) or await save_memory.is_left(vm)


async def _recover(app: App, host: Host, name: str, finish: bool, undo: bool) -> tuple[dict[str, Any], str]:
    async with host.change(name, "recover") as vm:
        done = await ops.recover(vm, context.progress(app), undo=undo, finish=finish)
        if done is None and await save_memory.let_go_on_if_left(vm):
            return {
                "vm": vm.name,
                "outcome": "resumed",
            }, f"{vm.name}: a save of its memory had left it paused; it runs again"
        if done is None and await quiesce.thaw_if_frozen(vm):
            return {"vm": vm.name, "outcome": "thawed"}, f"{vm.name}: its file systems were frozen; they are thawed"
        if done is None:
            return {"vm": vm.name, "outcome": "nothing"}, f"{vm.name}: nothing was interrupted"
        body = {"vm": vm.name, "op": done.op, "snapshot": done.name, "state": done.state, "outcome": done.outcome,
                "note": done.note}  # fmt: skip
        return body, f"{vm.name}: the interrupted {done.op} of {done.name!r} was {done.outcome} ({done.note})"
