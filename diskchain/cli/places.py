"""detach and move: where the layers of a VM lie, and whose they are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

import click

from diskchain.chain.plan import Plan
from diskchain.chain.text import counted
from diskchain.cli import context, many, render
from diskchain.cli.app import App, common
from diskchain.cli.options import changing_options, jobs_option, vms_argument
from diskchain.ops import detach as ops_detach
from diskchain.ops import look, redefine
from diskchain.ops import move as ops_move
from diskchain.ops.vm import VM, Host

T = TypeVar("T")

_DIR = click.Path(path_type=Path)


@click.command(epilog="Example: diskchain detach web1")
@vms_argument
@click.option(
    "--to", type=_DIR, metavar="DIR", help="Write a copy of the base there, and let the layers stand on that."
)
@jobs_option
@changing_options
@common
def detach(vm: str, to: Path | None, jobs: int, wait: float | None, dry_run: bool) -> None:
    """Let a stopped VM no longer depend on a base that others use: what it needs of it is copied into its own layers."""
    app = context.current()
    host = context.open_host(app, wait)
    directory = to and to.absolute()
    many.on_each(app, host, vm, lambda app, name: _detach(app, host, name, directory, dry_run), jobs=jobs)


async def _detach(app: App, host: Host, name: str, directory: Path | None, dry_run: bool) -> None:
    if dry_run:
        plan = partial(ops_detach.plan, directory=directory)
        await _show(app, host, name, "detach", plan, ops_detach.to_plan, ops_detach.check)
        return
    async with context.changing(app, host, name, "detach", adopt=True) as vm:
        found = ops_detach.plan(vm, directory)
        await ops_detach.check(vm, found)
        before = redefine.machine_of(vm)
        merged = await ops_detach.detach(vm, found, context.progress(app))
        _warn(app, [redefine.warning(vm, before)])
        gone = [str(image.path) for image in found.let_go]
        lines = [f"{vm.name} does not stand on {', '.join(gone)} any more", *map(render.merged_line, merged)]
        body = {"vm": vm.name, "let_go": gone, "merged": [asdict(m) for m in merged]}
        context.answer(app, body, lines)


@click.command(epilog="Example: diskchain move web1 --to /srv/big/web1")
@vms_argument
@click.option("--to", required=True, type=_DIR, metavar="DIR", help="A directory; on any filesystem.")
@jobs_option
@changing_options
@common
def move(vm: str, to: Path, jobs: int, wait: float | None, dry_run: bool) -> None:
    """Move all layers of a stopped VM, with its records and saved memory, to another directory."""
    app = context.current()
    host = context.open_host(app, wait)
    directory = to.absolute()
    many.on_each(app, host, vm, lambda app, name: _move(app, host, name, directory, dry_run), jobs=jobs)


async def _move(app: App, host: Host, name: str, directory: Path, dry_run: bool) -> None:
    if dry_run:
        look_for = partial(ops_move.plan_move, directory=directory)
        await _show(app, host, name, "move", look_for, ops_move.to_plan, ops_move.check)
        return
    async with context.changing(app, host, name, "move", adopt=True) as vm:
        found = ops_move.plan_move(vm, directory)
        await ops_move.check(vm, found)
        plan = ops_move.to_plan(vm, found)
        machine = redefine.machine_of(vm)
        before = {item.id: vm.catalog.images[item.id].path for item in found.items}
        await ops_move.move(vm, found, context.progress(app))
        _warn(app, [*plan.warnings, redefine.warning(vm, machine)])
        moved = [{"from": str(before[i.id]), "to": str(i.path)} for i in found.items]
        body = {"vm": vm.name, "home": str(vm.home.path), "moved": moved, "stays": [str(i.path) for i in found.stays]}
        lines = [
            f"{vm.name} lies in {found.directory} now: {counted(len(moved), 'layer')}",
            *(f"  {m['to']}" for m in moved),
        ]
        context.answer(app, body, lines)


def _warn(app: App, texts: Iterable[str | None]) -> None:
    for text in filter(None, texts):
        context.progress(app).warn(text)


async def _show(
    app: App,
    host: Host,
    name: str,
    word: str,
    plan: Callable[[VM], T],
    to_plan: Callable[[VM, T], Plan],
    check: Callable[[VM, T], Awaitable[None]],
) -> None:
    """Answer a dry run: the plan, then whether anything stands in its way. What was interrupted comes first, and changes
    what there is to check.
    """
    await context.settle_before_plan(app, host, name, word, dry_run=True)
    with context.planning(app, dry_run=True) as planned:
        async with host.look(name) as vm:
            found = plan(vm)
            planned(to_plan(vm, found))
            if not look.is_unfinished(vm):
                await check(vm, found)
