"""machine define, undefine, list."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from diskchain.chain.plan import Plan
from diskchain.chain.text import size
from diskchain.cli import context, render
from diskchain.cli.app import App, common
from diskchain.cli.options import VMName, changing_options, yes_option
from diskchain.ops import look
from diskchain.ops import machine as ops
from diskchain.ops.vm import Host, plain

KNOWN = ["NAME", "STATE", "MEMORY", "CPUS", "DISKS", "SNAPS", "UUID", "HOME", "CONSOLE"]


@click.group(epilog="Example: diskchain machine define web1.toml")
@common
def machine() -> None:
    """Define, undefine and list the machines that diskchain runs itself."""


@machine.command(epilog="Example: diskchain machine define /srv/vm/web1.toml")
@click.argument("file", type=click.Path(path_type=Path))
@changing_options
@common
def define(file: Path, wait: float | None, dry_run: bool) -> None:
    """Define a machine from its file; again after a change of it."""
    app = context.current()
    context.run_async(_define(app, context.open_host(app, wait), file, dry_run))


async def _define(app: App, host: Host, file: Path, dry_run: bool) -> None:
    if dry_run:
        context.show_plan(app, look.plan_define(file))
        return
    defined = await ops.define(host, file)
    made = defined.machine
    body = {"name": made.name, "uuid": made.uuid, "home": str(defined.home), "again": defined.again,
            "macs": [net.mac for net in made.nets], "disks": [asdict(disk) for disk in made.disks]}  # fmt: skip
    word = "defined again" if defined.again else "defined"
    count = f"{len(made.disks)} disk{'' if len(made.disks) == 1 else 's'}"
    line = f"{made.name} is {word}: {size(made.memory)} of memory, {count}; records in {defined.home}"
    context.answer(app, {"vm": made.name, "machine": body}, [line])


@machine.command(epilog="Example: diskchain machine undefine web1")
@click.argument("name", type=VMName())
@yes_option
@changing_options
@common
def undefine(name: str, yes: bool, wait: float | None, dry_run: bool) -> None:
    """Forget a machine. Its images, snapshots and records stay where they are."""
    app = context.current()
    context.run_async(_undefine(app, context.open_host(app, wait), plain(name), yes, dry_run))


async def _undefine(app: App, host: Host, name: str, yes: bool, dry_run: bool) -> None:
    home = host.machines.get(name).home
    plan = Plan(f"{name}: undefine", (f"forget the definition; images, snapshots and records stay: {home}",))
    if dry_run:
        context.show_plan(app, plan)
        return
    context.confirm(app, plan, "Undefine?", yes=yes)
    await ops.undefine(host, name)
    context.answer(app, {"vm": name, "home": str(home)}, [f"{name} is not known any more; its records stay in {home}"])


@machine.command("list", epilog="Example: diskchain machine list -o NAME,STATE,CONSOLE")
@click.option("-o", "--output", "columns", metavar="COLS", help=f"Columns: {','.join(KNOWN)}.")
@click.option("-H", "--no-headers", is_flag=True, help="Tabs, exact bytes, no header: for scripts.")
@common
def list_(columns: str | None, no_headers: bool) -> None:
    """List the machines that diskchain runs."""
    app = context.current()
    names = render.columns(columns, KNOWN, KNOWN[:6])
    found = context.run_async(look.machines(context.open_host(app)))
    rows = [_row(one, exact=no_headers) for one in found]
    lines = render.table(rows, names, headers=not no_headers) if rows or no_headers else ["no machine is defined yet"]
    context.answer(app, {"machines": found}, lines)


def _row(one: dict[str, Any], *, exact: bool) -> render.Row:
    snapshots = one["snapshots"]
    return {
        "NAME": one["name"], "STATE": one["state"], "CPUS": str(one["cpus"]), "UUID": one["uuid"],
        "MEMORY": str(one["memory"]) if exact else size(one["memory"]),
        "DISKS": ",".join(disk["target"] for disk in one["disks"]), "HOME": one["home"], "CONSOLE": one["console"],
        "SNAPS": "?" if snapshots is None else str(snapshots),
    }  # fmt: skip
