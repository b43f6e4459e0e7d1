"""rename, describe, protect, unprotect."""

from __future__ import annotations

import time
from collections.abc import Callable

import click

from diskchain.chain.model import Snapshot, snapshot_name
from diskchain.chain.plan import Plan
from diskchain.cli import context, many
from diskchain.cli.app import App, common
from diskchain.cli.options import changing_options, jobs_option, snapshot_argument, vm_argument, vms_argument
from diskchain.ops import edit, look
from diskchain.ops.vm import VM, Host


@click.command(epilog="Example: diskchain rename web1 2026-11-02-093000 before-upgrade")
@vm_argument
@snapshot_argument
@click.argument("new")
@changing_options
@common
def rename(vm: str, name: str, new: str, wait: float | None, dry_run: bool) -> None:
    """Give a snapshot another name."""
    new = snapshot_name(new)
    _edit(vm, name, "rename", f"renamed {name!r} to {new!r}", wait, dry_run, lambda v: edit.rename(v, name, new))


@click.command(epilog="Example: diskchain describe web1 before-upgrade 'before PostgreSQL 17'")
@vm_argument
@snapshot_argument
@click.argument("text")
@changing_options
@common
def describe(vm: str, name: str, text: str, wait: float | None, dry_run: bool) -> None:
    """Give a snapshot a description."""
    _edit(vm, name, "describe", f"described {name!r}", wait, dry_run, lambda v: edit.describe(v, name, text))


@click.command(epilog="Example: diskchain protect web1 installed")
@vms_argument
@snapshot_argument
@jobs_option
@changing_options
@common
def protect(vm: str, name: str, jobs: int, wait: float | None, dry_run: bool) -> None:
    """Protect a snapshot against deletion."""
    said = f"{name!r} is protected"
    _edit(vm, name, "protect", said, wait, dry_run, lambda v: edit.protect(v, name, True), jobs)


@click.command(epilog="Example: diskchain unprotect web1 installed")
@vms_argument
@snapshot_argument
@jobs_option
@changing_options
@common
def unprotect(vm: str, name: str, jobs: int, wait: float | None, dry_run: bool) -> None:
    """Take a snapshot's protection against deletion away."""
    said = f"{name!r} can be deleted"
    _edit(vm, name, "unprotect", said, wait, dry_run, lambda v: edit.protect(v, name, False), jobs)


def _edit(
    vm: str,
    name: str,
    word: str,
    said: str,
    wait: float | None,
    dry_run: bool,
    act: Callable[[VM], Snapshot],
    jobs: int | None = None,
) -> None:
    """Change what is written of a snapshot; without `jobs` of one VM only."""
    app = context.current()
    host = context.open_host(app, wait)

    async def work(app: App, vm: str) -> None:
        await (_plan(app, host, vm, name, word) if dry_run else _carry_out(app, host, vm, word, said, act))

    if jobs is None:
        context.run_async(work(app, vm))
    else:
        many.on_each(app, host, vm, work, jobs=jobs)


async def _plan(app: App, host: Host, name: str, snapshot: str, word: str) -> None:
    async with host.look(name) as vm:
        found = vm.catalog.find(snapshot)
        context.show_plan(app, Plan(f"{vm.name}: {word} {found.name!r}", ("only the catalog changes",)))


async def _carry_out(app: App, host: Host, name: str, word: str, said: str, act: Callable[[VM], Snapshot]) -> None:
    async with context.changing(app, host, name, word) as vm:
        view = look.view(vm.catalog, vm.home, act(vm), time.time())
        context.answer(app, {"vm": vm.name, "snapshot": look.snapshot_json(view)}, [f"{vm.name}: {said}"])
