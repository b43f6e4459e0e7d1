"""list, tree, show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from diskchain.chain.model import Snapshot
from diskchain.chain.text import size
from diskchain.cli import context, many, render
from diskchain.cli.app import App, common, error_lines
from diskchain.cli.options import maybe_vms_argument, snapshot_argument, vm_argument
from diskchain.errors import DiskchainError
from diskchain.ops import look
from diskchain.ops.look import Listing, Shown, captured
from diskchain.ops.vm import Host


@click.command("list", epilog="Example: diskchain list web1 -H -o NAME,DISK")
@maybe_vms_argument
@click.option("-o", "--output", "columns", metavar="COLS", help=f"Columns: {','.join(render.LIST_KNOWN)}.")
@click.option("-H", "--no-headers", is_flag=True, help="Tabs, exact bytes, no header: for scripts.")
@common
def list_(vm: str | None, columns: str | None, no_headers: bool) -> None:
    """List a VM's snapshots, oldest first; without VM those of all."""
    render.columns(columns, render.LIST_KNOWN, render.LIST_USUAL)

    def draw(listing: Listing, several: bool) -> list[str]:
        if no_headers:
            usual = ["VM"] * several + render.LIST_USUAL
            rows = render.snapshot_rows(listing, exact=True)
            return render.table(rows, render.columns(columns, render.LIST_KNOWN, usual), headers=False)
        return [f"{listing.vm} ({listing.state})"] * several + render.list_lines(listing, columns)

    _show_listings(vm, draw, look.listing_json, for_scripts=no_headers)


@click.command(epilog="Example: diskchain tree web1")
@maybe_vms_argument
@common
def tree(vm: str | None) -> None:
    """Show a VM's snapshots as a tree, with "you are here"; without VM those of all."""
    _show_listings(vm, lambda listing, several: render.tree_lines(listing), look.tree_json)


def _show_listings(
    vm: str | None,
    draw: Callable[[Listing, bool], list[str]],
    as_json: Callable[[Listing], dict[str, Any]],
    *,
    for_scripts: bool = False,
) -> None:
    """Show one VM, or several: `draw` is told which. `for_scripts`: nothing but rows."""
    app = context.current()
    host = context.open_host(app)
    if vm is not None:

        async def work(app: App, name: str) -> None:
            listing = await _listing(host, name)
            context.answer(app, as_json(listing), draw(listing, app.part is not None))

        many.on_each(app, host, vm, work, table=True, gap=not for_scripts)
        return
    found = context.run_async(_all_listings(app, host))
    lines = _joined([draw(one, True) for one in found], apart=not for_scripts)
    if not lines and not for_scripts and not host.names():
        lines = [render.NO_VMS]
    context.answer(app, {"vms": [as_json(one) for one in found]}, lines)


def _joined(blocks: list[list[str]], *, apart: bool) -> list[str]:
    lines: list[str] = []
    for block in blocks:
        lines += [""] if lines and apart else []
        lines += block
    return lines


async def _listing(host: Host, name: str) -> Listing:
    async with host.look(name) as vm:
        return await look.listing(vm)


async def _all_listings(app: App, host: Host) -> list[Listing]:
    """List every VM; one that can't be read is told of, and is the exit code."""
    found = []
    for name in host.names():
        try:
            found.append(await _listing(host, name))
        except DiskchainError as error:
            for line in error_lines(f"{name}: {error.message}", error.hint):
                click.echo(line, err=True)
            app.exit_code = max(app.exit_code, error.exit_code)
    return found


@click.command(epilog="Example: diskchain show web1 before-upgrade")
@vm_argument
@snapshot_argument
@common
def show(vm: str, name: str) -> None:
    """Show everything about one snapshot: layers, configuration, memory file, who and why."""
    app = context.current()
    context.run_async(_show(app, context.open_host(app), vm, name))


async def _show(app: App, host: Host, name: str, snapshot: str) -> None:
    async with host.look(name) as vm:
        shown = look.show(vm, snapshot)
        context.answer(app, look.show_json(vm, shown), _shown_lines(shown))


def _shown_lines(shown: Shown) -> list[str]:
    view, snapshot = shown.view, shown.view.snapshot
    fields = [
        ("name", snapshot.name), ("id", snapshot.id), ("created", snapshot.created), ("by", snapshot.by),
        ("description", snapshot.description or "-"), ("parent", view.parent or "-"), ("state", snapshot.state),
        ("consistency", _consistency(snapshot)), ("skipped", ", ".join(snapshot.partial) or "-"), ("the VM was", snapshot.was),
        ("paused", "-" if snapshot.pause_ms is None else f"{snapshot.pause_ms:.0f} ms"),
        ("protected", "yes" if snapshot.protected else "no"),
        ("expires", snapshot.expires or "-"), ("captured", ", ".join(captured(snapshot))),
        ("memory", snapshot.memory.status), *_memory(shown),
    ]  # fmt: skip
    lines = [f"{label + ':':<14} {text}" for label, text in fields]
    lines += ["layers, topmost first:", *map(_layer_line, shown.layers)]
    return [*lines, "configuration:", *_configuration(shown.configuration)]


def _consistency(snapshot: Snapshot) -> str:
    """Memory that holds frozen file systems says so; without memory `quiesced` is the word."""
    return snapshot.consistency + (", file systems frozen" if snapshot.quiesced and snapshot.memory.saved else "")


def _memory(shown: Shown) -> list[tuple[str, str]]:
    memory = shown.view.snapshot.memory
    if memory.status == "failed":
        return [("  reason", memory.reason)]
    if not shown.memory_file:
        return []
    return [("  file", shown.memory_file), ("  size", size(memory.bytes)), ("  sha256", memory.sha256)]


def _layer_line(layer: dict[str, Any]) -> str:
    return f"  {layer['target']}  {layer['role']:<4}  {layer['format']:<5}  {size(layer['bytes']):>5}  {layer['path']}"


def _configuration(machine: dict[str, Any]) -> list[str]:
    if not machine:
        return ["  can't be read"]
    shown = {key: value for key, value in machine.items() if isinstance(value, (str, int)) and value != ""}
    shown["memory"] = size(int(machine.get("memory", 0)))
    nets = ", ".join(str(net.get("mac", "")) for net in machine.get("nets", []))
    words: dict[object, str] = {True: "yes", False: "no"}
    return [f"  {key}: {words[v] if isinstance(v, bool) else v}" for key, v in {**shown, "macs": nets or "-"}.items()]
