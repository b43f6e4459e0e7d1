"""delete, accept and undelete."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from diskchain.chain.deletion import Deletion, line_to_accept, plan_all, subtree
from diskchain.chain.model import Catalog, named
from diskchain.chain.plan import Plan
from diskchain.chain.text import size
from diskchain.cli import context, many, render
from diskchain.cli.app import App, common
from diskchain.cli.options import (
    Duration,
    SnapshotName,
    changing_options,
    jobs_option,
    rate_option,
    vm_argument,
    vms_argument,
    yes_option,
)
from diskchain.errors import Busy, NoSpace, UsageError
from diskchain.ops import delete as ops
from diskchain.ops import delete_plan, delete_to, look, methods, pending, power, redefine
from diskchain.ops.merge import Merged
from diskchain.ops.vm import VM, Host

when_stopped_option = click.option(
    "--when-stopped", is_flag=True, help="Only record it; it is merged at the next stop."
)


def _refuse_live(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.fail("merging while the VM runs is not there yet; --restart merges now, with a short stop")


live_option = click.option("--live", is_flag=True, hidden=True, expose_value=False, callback=_refuse_live)
restart_option = click.option("--restart", is_flag=True, help="Stop the VM by its power button, merge, start it again.")


RESTART = 20.0  # seconds, roughly: a guest that goes down and comes up


@dataclass(frozen=True)
class Asked:
    """What was asked for. `pick`: given the catalog and the names that are deleted already, the ids of those that go.

    `waiting`: those of them that waited for their merge when the plan was made.
    """

    word: str
    pick: Callable[[Catalog, Collection[str]], list[str]]
    copy: bool
    when_stopped: bool
    restart: bool
    yes: bool
    dry_run: bool
    to: Path | None = None
    words: str = ""  # the names, as typed
    rate: int | None = None
    waiting: frozenset[str] = frozenset()


@click.command(epilog="Example: diskchain delete web1 before-upgrade")
@vms_argument
@click.argument("names", type=SnapshotName(), nargs=-1, metavar="[NAME]...")
@click.option(
    "--older-than", type=Duration(), metavar="TIME", help="Those older than TIME, like 14d; protected ones stay."
)
@click.option("--children", is_flag=True, help="And all snapshots that follow them.")
@click.option(
    "--copy", is_flag=True, help="Where several layers stand on one that goes: copy it into each of them now."
)
@click.option("--to", type=click.Path(path_type=Path), metavar="DIR",
              help="Write what is merged into new files there, and switch to them: where there is no room.")  # fmt: skip
@when_stopped_option
@restart_option
@live_option
@rate_option
@yes_option
@jobs_option
@changing_options
@common
def delete(
    vm: str,
    names: tuple[str, ...],
    older_than: float | None,
    children: bool,
    copy: bool,
    to: Path | None,
    when_stopped: bool,
    restart: bool,
    rate: int | None,
    yes: bool,
    jobs: int,
    wait: float | None,
    dry_run: bool,
) -> None:
    """Delete snapshots. Their layers are merged; what the VM sees, and every other snapshot, stays as it is."""
    if names and older_than is not None:
        raise UsageError("snapshots were named, and --older-than was said", hint="leave one of them out")
    if not names and older_than is None:
        raise UsageError("which snapshots?", hint=f"name them, or say --older-than; diskchain list {vm} shows them")
    if when_stopped and (restart or copy or to or rate):
        raise UsageError("--when-stopped only records; it goes with none of --restart, --copy, --to, --rate",
                         hint="diskchain delete --help")  # fmt: skip
    if copy and to:
        raise UsageError("--copy and --to contradict each other", hint="give one of them")
    if to and rate:
        raise UsageError("--rate is kept by a merge in place; it does not go with --to", hint="leave out one of them")

    def pick(catalog: Catalog, done: Collection[str]) -> list[str]:
        left = [n for n in names if n not in done or named(catalog.visible(), n)]
        found = _older(catalog, older_than) if older_than is not None else [_find(catalog, n, restart) for n in left]
        return subtree(catalog, found) if children else list(dict.fromkeys(found))

    words = " ".join(map(shlex.quote, names)) if names else f"--older-than {older_than:.0f}s"
    words += " --children" if children else ""
    asked = Asked("delete", pick, copy, when_stopped, restart, yes, dry_run, to and to.absolute(), words, rate)
    _on_each(vm, asked, jobs, wait)


def _older(catalog: Catalog, seconds: float) -> list[str]:
    ages = [(s, look.age(s.created, time.time())) for s in catalog.visible() if not s.protected]
    return [s.id for s, age in ages if age is not None and age > seconds]


def _find(catalog: Catalog, name: str, restart: bool) -> str:
    """Return a snapshot's id; with a restart also that of one which waits for its merge. Raise NotFound."""
    waiting = [] if named(catalog.visible(), name) or not restart else named(catalog.pending(), name)
    return waiting[-1].id if waiting else catalog.find(name).id


@click.command(epilog="Example: diskchain accept web1")
@vms_argument
@click.option("--drop-branches", is_flag=True, help="Snapshots that are not in the line of the present go too.")
@when_stopped_option
@restart_option
@live_option
@rate_option
@yes_option
@jobs_option
@changing_options
@common
def accept(
    vm: str,
    drop_branches: bool,
    when_stopped: bool,
    restart: bool,
    rate: int | None,
    yes: bool,
    jobs: int,
    wait: float | None,
    dry_run: bool,
) -> None:
    """Keep the present, delete every snapshot of its line: all layers are folded in one pass."""
    if when_stopped and (restart or rate):
        raise UsageError("--when-stopped only records; it goes with neither --restart nor --rate",
                         hint="diskchain accept --help")  # fmt: skip

    def pick(catalog: Catalog, done: Collection[str]) -> list[str]:
        return line_to_accept(catalog, drop_branches=drop_branches)

    _on_each(vm, Asked("accept", pick, False, when_stopped, restart, yes, dry_run, rate=rate), jobs, wait)


def _on_each(vm: str, asked: Asked, jobs: int, wait: float | None) -> None:
    app = context.current()
    host = context.open_host(app, wait)
    if host.config.delete.when == "restart" and not (asked.when_stopped or asked.copy or asked.to):
        asked = replace(asked, restart=True)
    asks = not (asked.yes or asked.dry_run)
    many.on_each(app, host, vm, lambda app, name: _delete(app, host, name, asked), jobs=jobs, asks=asks)


async def _delete(app: App, host: Host, name: str, asked: Asked) -> None:
    done: list[str] = []
    if not asked.restart:
        settled = await context.settle_before_plan(app, host, name, asked.word, dry_run=asked.dry_run)
        done = settled.name.split(", ") if settled and settled.op.startswith("delete") else []
    with context.planning(app, dry_run=asked.dry_run) as planned:
        async with host.look(name) as vm:
            is_on = not (await vm.driver.state()).is_off
            at_once = asked.restart or asked.copy or asked.to is not None
            ids, later = asked.pick(vm.catalog, done), asked.when_stopped or (is_on and not at_once)
            if not ids:
                _tell_nothing(app, vm, asked, done)
                return
            asked = replace(asked, waiting=frozenset(s.id for s in vm.catalog.pending() if s.id in ids))
            deletions = _chosen(vm, asked, plan_all(vm.catalog, ids, data=not later, copy=asked.copy))
            if not any(d.moves_data for d in deletions):
                asked = replace(asked, restart=False)  # nothing that the VM would have to be off for
            plan = _with_power(vm, _plan(vm, asked, deletions), deletions, is_on, asked)
            planned(plan)
            if is_on and asked.restart:
                await vm.driver.refuse("restart")
            elif not (asked.dry_run and look.is_unfinished(vm)):  # that comes first, and changes what there is to check
                await _check(vm, asked, deletions)
            if asked.rate and is_on and later:
                context.progress(app).warn(
                    f"{name} is on: it is only recorded; the rate is not (diskchain merge has --rate)"
                )
    if asked.dry_run:
        return
    context.confirm(app, plan, f"{asked.word.capitalize()}?", yes=asked.yes, about=ids)
    async with host.change(name, asked.word) as vm:
        names, restarted = [s.name for s in vm.catalog.snapshots.values() if s.id in ids], False
        before = [s for s in vm.catalog.pending() if s.id not in ids]
        if asked.restart:
            merged, restarted = await _restarting(app, host, vm, asked, ids)
        else:
            merged = await _delete_all(app, host, vm, asked, ids, data=not later)
        also = [s.name for s in before if s.id not in vm.catalog.snapshots]
        _tell(app, vm, Told(names, merged, is_on, restarted, also), ids)


def _chosen(vm: VM, asked: Asked, planned: Sequence[Deletion]) -> list[Deletion]:
    """The deletions with their methods; what is written elsewhere has only one."""
    if asked.to is None:
        return methods.choose_all(vm.catalog, planned)
    for deletion in planned:
        delete_plan.verify(vm.catalog, deletion)
    return list(planned)


def _plan(vm: VM, asked: Asked, deletions: Sequence[Deletion]) -> Plan:
    title = f"{vm.name}: accept the present" if asked.word == "accept" else ""
    plan = delete_plan.to_plan(vm, deletions, title=title, rate=asked.rate)
    if asked.to is None:
        return plan
    return delete_to.to_plan(vm, delete_to.items(vm.catalog, deletions, asked.to), plan)


async def _check(vm: VM, asked: Asked, deletions: Sequence[Deletion]) -> None:
    """Raise what stands in the way; NoSpace with every way out that would fit."""
    if asked.to is not None:
        await delete_to.check(vm, deletions, delete_to.items(vm.catalog, deletions, asked.to))
        return
    try:
        await delete_plan.check(vm, deletions)
    except NoSpace as error:
        raise delete_to.ways_out(vm, error, deletions, asked.words) from error


def _with_power(vm: VM, plan: Plan, deletions: Sequence[Deletion], is_on: bool, asked: Asked) -> Plan:
    if later := [s.name for d in deletions for s in d.later]:
        return replace(plan, steps=(*plan.steps, _when(vm.name, later, is_on)))
    if is_on and asked.restart:
        steps = ("stop the VM by its power button", *plan.steps, "start the VM")
        return replace(plan, steps=steps, downtime_estimate_s=RESTART + plan.time_estimate_s)
    if is_on and any(d.moves_data for d in deletions):
        text = f"{vm.name} is on, a merge needs it to be off: diskchain stop {vm.name}, or add --restart"
        return replace(plan, warnings=(*plan.warnings, text))
    return plan


def _when(vm: str, names: Sequence[str], is_on: bool) -> str:
    """Say when what is recorded gets merged, and how to have that now."""
    if not is_on:
        return f"merged by: diskchain merge {vm}"
    words = " ".join(map(shlex.quote, names))
    return (f"merged at the next stop of {vm} (diskchain stop {vm}); now, with a restart of about {RESTART:.0f} s: "
            f"diskchain delete --restart {vm} {words}")  # fmt: skip


async def _restarting(app: App, host: Host, vm: VM, asked: Asked, ids: Sequence[str]) -> tuple[list[Merged], bool]:
    """Stop, delete, start again; it is started whatever becomes of the delete. Return the merges, and if it was on."""
    progress = context.progress(app)
    stopped = await power.stop(vm, progress, timeout=host.config.stop.timeout, merge=False)
    try:
        return await _delete_all(app, host, vm, asked, ids, data=True), stopped.changed
    finally:
        if stopped.changed:
            await power.start(vm, progress)


async def _delete_all(app: App, host: Host, vm: VM, asked: Asked, ids: Sequence[str], *, data: bool) -> list[Merged]:
    """Carry it out, planned anew on what is there now. The lock is held."""
    settled = await context.settle(app, host, vm)
    if settled:  # it may have been the same delete
        ids = [i for i in ids if i in vm.catalog.snapshots]
    waiting = {s.id for s in vm.catalog.pending() if settled or s.id in asked.waiting}
    there = {s.id for s in vm.catalog.visible()} | waiting
    if not set(ids) <= there:
        raise Busy(f"the snapshots of {vm.name} were changed meanwhile", hint="look again, then try again")
    merged: list[Merged] = []
    for planned in plan_all(vm.catalog, ids, data=data, copy=asked.copy):
        (deletion,) = _chosen(vm, asked, [planned])
        await _check(vm, asked, [deletion])
        if asked.to is None:
            merged += await ops.delete(vm, deletion, context.progress(app), rate=asked.rate)
        else:
            found, before = delete_to.items(vm.catalog, [deletion], asked.to), redefine.machine_of(vm)
            merged += await delete_to.delete_to(vm, deletion, found, context.progress(app))
            if warning := redefine.warning(vm, before):
                context.progress(app).warn(warning)
    return merged


@dataclass(frozen=True)
class Told:
    """What a delete or an accept did."""

    names: list[str]
    merged: list[Merged]
    was_on: bool = False
    restarted: bool = False
    also: Sequence[str] = ()  # deleted before, and merged with these


def _tell(app: App, vm: VM, told: Told, ids: Sequence[str]) -> None:
    waiting = [s for s in vm.catalog.pending() if s.id in ids]
    later = [s for s in waiting if pending.can_undelete(vm, s)]
    lines = [f"deleted {', '.join(map(repr, told.names))} of {vm.name}", *map(render.merged_line, told.merged)]
    lines += [f"  also merged: {', '.join(map(repr, told.also))} (deleted before)"] if told.also else []
    lines += [f"  {vm.name} was stopped and started again"] if told.restarted else []
    if later:
        names = [s.name for s in later]
        count = size(look.to_merge(vm.catalog, later))
        lines.append(f"  recorded: {count} of {', '.join(map(repr, names))}, {_when(vm.name, names, told.was_on)}")
    lines += [f"  the memory of {s.name!r} ({size(s.memory.bytes)}) stays until then" for s in later if s.memory.saved]
    lines += [f"  the layer of {s.name!r} stays until one layer is left on it" for s in waiting if s not in later]
    context.answer(app, {**_body(vm, told), "deferred": bool(waiting)}, lines)


def _body(vm: VM, told: Told) -> dict[str, Any]:
    return {"vm": vm.name, "deferred": False, "deleted": told.names, "merged": [asdict(m) for m in told.merged],
            "pending": [s.name for s in vm.catalog.pending()], "restarted": told.restarted}  # fmt: skip


def _tell_nothing(app: App, vm: VM, asked: Asked, done: list[str]) -> None:
    """Nothing is left to be deleted. `done`: what was, in finishing an interrupted delete just now."""
    nothing = f"{vm.name}: nothing is to be deleted"
    if asked.dry_run:
        context.show_plan(app, Plan(f"{vm.name}: {asked.word}", ("nothing is to be deleted",)))
    else:
        said = f"deleted {', '.join(map(repr, done))} of {vm.name}" if done else nothing
        context.answer(app, _body(vm, Told(done, [])), [said])


# -- undelete ----------------------------------------------------------------------------------------------------------


@click.command(epilog="Example: diskchain undelete web1 before-upgrade")
@vm_argument
@click.argument("name", type=SnapshotName(deleted=True))
@changing_options
@common
def undelete(vm: str, name: str, wait: float | None, dry_run: bool) -> None:
    """Take a delete back that was only recorded: until its merge begins."""
    app = context.current()
    context.run_async(_undelete(app, context.open_host(app, wait), vm, name, dry_run))


async def _undelete(app: App, host: Host, name: str, snapshot: str, dry_run: bool) -> None:
    if dry_run:
        async with host.look(name) as vm:
            found = pending.to_undelete(vm, snapshot)
            context.show_plan(app, Plan(f"{vm.name}: undelete {found.name!r}", ("only the catalog changes",)))
        return
    async with context.changing(app, host, name, "undelete") as vm:
        view = look.view(vm.catalog, vm.home, pending.undelete(vm, snapshot), time.time())
        said = f"{vm.name}: {view.snapshot.name!r} is back"
        context.answer(app, {"vm": vm.name, "snapshot": look.snapshot_json(view)}, [said])
