"""create."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from diskchain.chain.model import Snapshot, snapshot_name
from diskchain.chain.text import size
from diskchain.cli import context, many, render
from diskchain.cli.app import App, common, error_json
from diskchain.cli.options import Duration, changing_options, jobs_option, vms_argument
from diskchain.errors import Degraded, UsageError
from diskchain.ops import create as ops
from diskchain.ops import look, pending
from diskchain.ops.create import Request
from diskchain.ops.merge import Merged
from diskchain.ops.quiesce import STILL_FROZEN
from diskchain.ops.vm import VM, Host, refuse_unfinished


class CreateCommand(click.Command):
    """`--memory` alone means `--memory=background`; the word after it is never its value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give a bare --memory its value."""
        end = args.index("--") if "--" in args else len(args)
        words = ["--memory=background" if word == "--memory" else word for word in args[:end]]
        return super().parse_args(ctx, words + args[end:])


@click.command(
    cls=CreateCommand,
    epilog="Example: diskchain create web1 before-upgrade -d 'before PostgreSQL 17'",
)
@vms_argument
@click.argument("name", required=False)
@click.option("-d", "--description", default="", metavar="TEXT", help="What it is for.")
@click.option(
    "--memory",
    type=click.Choice(["background", "paused"]),
    metavar="[=paused]",
    help="With memory, saved while the VM runs; --memory=paused: the VM stands still until it is saved.",
)
@click.option("--disk-only", is_flag=True, help="Without memory; a revert boots from it as after a power cut.")
@click.option(
    "--skip-disk",
    "skip",
    multiple=True,
    metavar="TARGET",
    help="Leave a disk out (again for more). The snapshot is partial, and without memory.",
)
@click.option("--quiesce", is_flag=True, help="Let the guest agent freeze the file systems; refused without an agent.")
@click.option("--register", is_flag=True, help="List it in virsh snapshot-list too, where virsh could destroy it.")
@click.option("--max-pause", type=Duration(), metavar="TIME", help="Warn of a longer pause (default 500ms).")
@click.option("--expires", type=Duration(), metavar="TIME", help="Warn when it is older than TIME, like 14d.")
@click.option("--overlay-dir", type=click.Path(path_type=Path), metavar="DIR",
              help="Make the new layers there, not beside the images.")  # fmt: skip
@click.option("--no-merge", is_flag=True, help="Leave pending merges of a VM that is off for later.")
@jobs_option
@changing_options
@common
def create(
    vm: str,
    name: str | None,
    description: str,
    memory: str | None,
    disk_only: bool,
    skip: tuple[str, ...],
    quiesce: bool,
    register: bool,
    max_pause: float | None,
    expires: float | None,
    overlay_dir: Path | None,
    no_merge: bool,
    jobs: int,
    wait: float | None,
    dry_run: bool,
) -> None:
    """Take a snapshot of a VM; with its memory when it runs. Without NAME it gets one from the date."""
    app = context.current()
    if memory and disk_only:
        raise UsageError("--memory and --disk-only contradict each other", hint="give one of them")
    if memory and skip:
        raise UsageError("--memory and --skip-disk contradict each other: memory is of no use on other disks",
                         hint="leave --memory away")  # fmt: skip
    host = context.open_host(app, wait)
    settings = host.config.create
    save = "never" if disk_only else memory or settings.memory
    pause = settings.max_pause if max_pause is None else max_pause
    label = "" if name is None else snapshot_name(name)
    request = Request(label, description, save, pause, tuple(dict.fromkeys(skip)), quiesce, register, expires,
                      overlay_dir and overlay_dir.absolute())  # fmt: skip
    work = _plan if dry_run else _create
    many.on_each(app, host, vm, lambda app, name: work(app, host, name, request, not no_merge), jobs=jobs)


async def _plan(app: App, host: Host, name: str, request: Request, merge: bool) -> None:
    async with host.change(name, "create --dry-run") as vm:
        refuse_unfinished(vm)
        prepared = await ops.prepare(vm, request)
        first = pending.steps(vm) if merge and prepared.state.is_off else ()
        context.show_plan(app, replace(prepared.plan, steps=(*first, *prepared.plan.steps)))


async def _create(app: App, host: Host, name: str, request: Request, merge: bool) -> None:
    async with context.changing(app, host, name, "create", adopt=True) as vm:
        merged: list[Merged] = []
        if merge and vm.catalog.pending():
            await ops.prepare(vm, request)  # what can't be made is refused before, not after a merge
            merged = await pending.merge_if_off(vm, context.progress(app))
        try:
            snapshot = await ops.create(vm, request, context.progress(app))
        except asyncio.CancelledError:
            if look.saves_memory(vm):
                app.interrupted = (f"the memory goes on being saved in the background; "
                                   f"diskchain list {vm.name} shows when it is done")  # fmt: skip
            raise
        _tell(app, vm, snapshot, request, merged)


def _tell(app: App, vm: VM, snapshot: Snapshot, request: Request, merged: list[Merged]) -> None:
    view = look.view(vm.catalog, vm.home, snapshot, time.time())
    body: dict[str, Any] = {"vm": vm.name, "snapshot": look.snapshot_json(view), "pause_ms": snapshot.pause_ms}
    if merged:
        body["merged"] = [asdict(m) for m in merged]
    failed = _less_than_asked(vm, snapshot, request)
    if failed:
        body["error"] = error_json(failed.exit_code, failed.kind, failed.message, failed.hint)
    context.answer(app, body, [_line(vm, snapshot), *map(render.merged_line, merged)])
    if failed:
        raise failed


def _less_than_asked(vm: VM, snapshot: Snapshot, request: Request) -> Degraded | None:
    less = []
    if plugged := [target for target in snapshot.partial if target not in request.skip]:
        less.append(f"without {', '.join(plugged)}, attached meanwhile")
    if snapshot.memory.status == "failed":
        less.append(f"without memory: {snapshot.memory.reason}")
    if snapshot.unquiesced:
        less.append(f"not quiesced: {snapshot.unquiesced}")
    if not less:
        return None
    hint = f"diskchain delete {vm.name} {snapshot.name}, if it is of no use so"
    if STILL_FROZEN in snapshot.unquiesced:
        hint = f"look at qemu-guest-agent in the guest, then: diskchain recover {vm.name}"
    return Degraded(f"snapshot {snapshot.name!r} was made {', '.join(less)}", hint=hint)


def _line(vm: VM, snapshot: Snapshot) -> str:
    parts = [f"memory {size(snapshot.memory.bytes)}"] if snapshot.memory.saved else []
    parts += ["file systems frozen"] if snapshot.quiesced else []
    parts.append(f"{len(snapshot.disks)} disk{'' if len(snapshot.disks) == 1 else 's'}")
    if snapshot.partial:
        parts.append(f"partial: without {', '.join(snapshot.partial)} and without memory")
    if snapshot.pause_ms is not None:
        parts.append(f"the guest was paused {snapshot.pause_ms:.0f} ms")
    return f"created {snapshot.name!r} of {vm.name}: {', '.join(parts)}"
