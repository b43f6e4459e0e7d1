"""machine define, import, undefine, list."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from diskchain.chain.machine import TARGET, parse_size
from diskchain.chain.model import vm_name
from diskchain.chain.plan import Plan
from diskchain.chain.text import counted, size
from diskchain.cli import context, render
from diskchain.cli.app import App, common
from diskchain.cli.options import VMName, changing_options, yes_option
from diskchain.ops import import_disks, look
from diskchain.ops import machine as ops
from diskchain.ops.import_disks import Wanted
from diskchain.ops.vm import Host, plain

KNOWN = ["NAME", "STATE", "MEMORY", "CPUS", "DISKS", "SNAPS", "UUID", "HOME", "CONSOLE", "FIRMWARE", "TPM"]
DISK_WORDS = {"format": "qcow2|raw", "target": TARGET, "role": "os|data"}


@click.group(epilog="Example: diskchain machine define web1.toml")
@common
def machine() -> None:
    """Define, import, undefine and list the machines that diskchain runs itself."""


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
    body, line = _defined(defined)
    for text in defined.missing:
        context.progress(app).warn(f"{text}; {defined.machine.name} can't start without it")
    context.answer(app, {"vm": defined.machine.name, "machine": body}, [line])


def _defined(defined: ops.Defined) -> tuple[dict[str, Any], str]:
    """What is said of a machine that was defined: as JSON, and in a line."""
    made = defined.machine
    body = {"name": made.name, "uuid": made.uuid, "home": str(defined.home), "again": defined.again,
            "macs": [net.mac for net in made.nets], "disks": [asdict(disk) for disk in made.disks]}  # fmt: skip
    word = "defined again" if defined.again else "defined"
    count = counted(len(made.disks), "disk")
    line = f"{made.name} is {word}: {size(made.memory)} of memory, {count}; records in {defined.home}"
    return body, line


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
        "FIRMWARE": one["firmware"] or "?", "TPM": {True: "yes", False: "no"}.get(one["tpm"], "?"),
        "SNAPS": "?" if snapshots is None else str(snapshots),
    }  # fmt: skip


class DiskOption(click.ParamType):  # type: ignore[type-arg]  # not generic in click 8.1
    """`FILE[,format=qcow2|raw][,target=vdb][,role=os|data]`; commas in the file's name may stay as they are."""

    name = "disk"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Wanted:
        """Given what was typed, return it; a word that begins like an option and is none is refused."""
        if isinstance(value, Wanted):
            return value
        name, given = str(value), {}
        while match := re.fullmatch(r"(.+),([a-z]+)=([^,/]*)", name, re.DOTALL):
            name, key, word = match.groups()
            if key not in DISK_WORDS or key in given:
                self.fail(f"{key}={word}: after the file come format=, target= and role=, each once", param, ctx)
            if not re.fullmatch(DISK_WORDS[key], word):
                self.fail(f"{key}={word}: must be {DISK_WORDS[key].replace('|', ' or ')}", param, ctx)
            given[key] = word
        return Wanted(Path(name), given.get("format", ""), given.get("target", ""), given.get("role", ""))


class Size(click.ParamType):  # type: ignore[type-arg]  # not generic in click 8.1
    """`512M`, `1 GiB`: bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Given what was typed, return bytes."""
        try:
            return value if isinstance(value, int) else parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@machine.command("import", epilog="Example: diskchain machine import web1 --disk web1.img,format=raw")
@click.argument("name", type=VMName())
@click.option("--disk", "disks", multiple=True, required=True, type=DiskOption(), metavar="FILE[,format=qcow2|raw]"
              "[,target=vdb][,role=os|data]", help="The topmost image of a disk; once for each disk, in order.")  # fmt: skip
@click.option("--memory", type=Size(), default="1G", show_default=True, metavar="SIZE", help="RAM.")
@click.option("--cpus", type=click.IntRange(1, 1024), default=1, show_default=True, help="Virtual CPUs.")
@click.option("--firmware", type=click.Choice(["bios", "uefi"]), default="bios", show_default=True, help="Boots with.")
@click.option("--file", type=click.Path(path_type=Path), metavar="PATH.toml",
              help="Write the machine file there, not beside the first disk.")  # fmt: skip
@changing_options
@common
def import_(name: str, disks: tuple[Wanted, ...], memory: int, cpus: int, firmware: str, file: Path | None,
            wait: float | None, dry_run: bool) -> None:  # fmt: skip
    """Write a machine file around images that are there, and define the machine. The images stay as they are."""
    app = context.current()
    request = import_disks.Request(vm_name(name.removeprefix("qemu:")), disks, memory, cpus, firmware, file)
    context.run_async(_import(app, context.open_host(app, wait), request, dry_run))


async def _import(app: App, host: Host, request: import_disks.Request, dry_run: bool) -> None:
    prepared = await import_disks.prepare(host, request)
    if dry_run:
        context.show_plan(app, import_disks.plan(prepared))
        return
    defined = await import_disks.import_machine(host, prepared)
    body, line = _defined(defined)
    lines = [f"wrote {prepared.file}", line, *(f"note: {text}" for text in prepared.notes)]
    made = {**body, "file": str(prepared.file), "notes": prepared.notes}
    context.answer(app, {"vm": defined.machine.name, "machine": made}, lines)
