"""start, stop, pause, resume."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict

import click

from diskchain.chain.plan import Plan
from diskchain.cli import context, many, render
from diskchain.cli.app import App, common
from diskchain.cli.options import Duration, changing_options, jobs_option, vms_argument, yes_option
from diskchain.drivers.protocol import VMState
from diskchain.host import locks
from diskchain.ops import look, pending, power, right_of_way
from diskchain.ops.merge import Merged
from diskchain.ops.vm import VM, Host


@click.command(epilog="Example: diskchain start web1")
@vms_argument
@click.option("--paused", is_flag=True, help="Load it, but don't let it run yet.")
@jobs_option
@changing_options
@common
def start(vm: str, paused: bool, jobs: int, wait: float | None, dry_run: bool) -> None:
    """Start a VM on its active layers. A merge is stopped and put off for it."""
    app = context.current()
    host = context.open_host(app, wait)
    many.on_each(app, host, vm, lambda app, name: _start(app, host, name, paused, dry_run), jobs=jobs)


async def _start(app: App, host: Host, name: str, paused: bool, dry_run: bool) -> None:
    async with host.look(name) as vm:
        before = await vm.driver.state()
        if dry_run:
            context.show_plan(app, await _start_plan(vm, paused))
            return
        if before is VMState.RUNNING:
            _tell(app, vm.name, before.value, changed=False)
            return
    progress = context.progress(app)
    async with right_of_way.taken(host, name, progress, lambda text: context.note(app, text)) as vm:
        changed = await power.start(vm, progress, paused=paused)
        _tell(app, vm.name, (await vm.driver.state()).value, changed=changed)


async def _start_plan(vm: VM, paused: bool) -> Plan:
    steps = ["start it" + " paused" * paused]
    if operation := look.open_operation(vm):
        steps.insert(0, f"finish, undo or put off the {operation} that is at work or was interrupted")
    elif not await power.can_start(vm):
        steps = ["nothing: it runs already"]
    return Plan(f"{vm.name}: start", tuple(steps))


@click.command(epilog="Example: diskchain stop web1 --timeout 2m")
@vms_argument
@click.option("--timeout", type=Duration(), metavar="TIME", help="How long the guest may take (default 5m).")
@click.option("--force", is_flag=True, help="Like a power cut: what the guest has not written is lost.")
@click.option("--no-merge", is_flag=True, help="Leave pending merges for later.")
@yes_option
@jobs_option
@changing_options
@common
def stop(
    vm: str,
    timeout: float | None,
    force: bool,
    no_merge: bool,
    yes: bool,
    jobs: int,
    wait: float | None,
    dry_run: bool,
) -> None:
    """Stop a VM by its power button, then carry out its pending merges."""
    app = context.current()
    host = context.open_host(app, wait)
    limit = host.config.stop.timeout if timeout is None else timeout
    asks = force and not (yes or dry_run)
    many.on_each(
        app,
        host,
        vm,
        lambda app, name: _stop(app, host, name, limit, force, not no_merge, yes, dry_run),
        jobs=jobs,
        asks=asks,
    )


async def _stop(
    app: App, host: Host, name: str, timeout: float, force: bool, merge: bool, yes: bool, dry_run: bool
) -> None:
    async with host.look(name) as vm:
        off = (await vm.driver.state()).is_off
        plan = _stop_plan(vm, off, force, merge, timeout)
    if dry_run:
        context.show_plan(app, plan)
        return
    if force and not off:
        context.confirm(app, plan, "Stop it by force?", yes=yes)
        killed = await _kill_while_saving(host, name)
    else:
        killed = False
    async with host.change(name, "stop") as vm:
        done = await power.stop(vm, context.progress(app), timeout=timeout, force=force, merge=merge)
        _tell(app, vm.name, "stopped", changed=done.changed or killed, merged=done.merged)


def _stop_plan(vm: VM, off: bool, force: bool, merge: bool, timeout: float) -> Plan:
    how = "end it at once, like a power cut" if force else f"press the power button, wait up to {timeout:.0f} s"
    steps = ["nothing: it is off already"] if off else [how]
    if merge:
        steps += pending.steps(vm)
    lost = ("what the guest has in memory and has not written",) if force and not off else ()
    return Plan(f"{vm.name}: stop", tuple(steps), lost=lost)


async def _kill_while_saving(host: Host, name: str) -> bool:
    """A create holds the lock as long as memory is being saved: end QEMU without the lock, the create sees it."""
    async with host.look(name) as vm:
        if not (locks.holder_operation(vm.home.lock) or "").startswith("create"):
            return False
        await vm.driver.kill()
        return True


@click.command(epilog="Example: diskchain pause web1")
@vms_argument
@jobs_option
@changing_options
@common
def pause(vm: str, jobs: int, wait: float | None, dry_run: bool) -> None:
    """Let a VM stand still; it goes on with resume."""
    app = context.current()
    host = context.open_host(app, wait)
    many.on_each(app, host, vm, lambda app, name: _switch(app, host, name, "pause", power.pause, dry_run), jobs=jobs)


@click.command(epilog="Example: diskchain resume web1")
@vms_argument
@jobs_option
@changing_options
@common
def resume(vm: str, jobs: int, wait: float | None, dry_run: bool) -> None:
    """Let a paused VM go on."""
    app = context.current()
    host = context.open_host(app, wait)
    many.on_each(
        app,
        host,
        vm,
        lambda app, name: _switch(
            app, host, name, "resume", lambda vm: power.resume(vm, context.progress(app)), dry_run
        ),
        jobs=jobs,
    )


async def _switch(
    app: App, host: Host, name: str, word: str, act: Callable[[VM], Awaitable[bool]], dry_run: bool
) -> None:
    if dry_run:
        async with host.look(name) as vm:
            changes = await power.can_switch(vm, run=word == "resume")
            state = (await vm.driver.state()).value
            step = f"{word} it; it is {state} now" if changes else f"nothing: it is {state} already"
            context.show_plan(app, Plan(f"{vm.name}: {word}", (step,)))
        return
    async with host.change(name, word) as vm:
        if look.open_operation(vm) == "create":
            await context.settle(app, host, vm)
        changed = await act(vm)
        _tell(app, vm.name, (await vm.driver.state()).value, changed=changed)


def _tell(app: App, vm: str, state: str, *, changed: bool, merged: list[Merged] | None = None) -> None:
    lines = [f"{vm} is {state}" + ("" if changed else " already"), *map(render.merged_line, merged or [])]
    body = {"vm": vm, "state": state, "changed": changed, "merged": [asdict(m) for m in merged or []]}
    context.answer(app, body, lines)
