"""adopt and forget."""

from __future__ import annotations

from pathlib import Path

import click

from diskchain.chain.plan import Plan
from diskchain.chain.text import counted
from diskchain.cli import context
from diskchain.cli.app import App, common
from diskchain.cli.options import changing_options, vm_argument, yes_option
from diskchain.errors import Refused
from diskchain.ops import records as ops
from diskchain.ops.vm import Host


@click.command(epilog="Example: diskchain adopt web1")
@vm_argument
@click.option("--from", "directory", type=click.Path(path_type=Path), metavar="DIR", help="Its records lie there.")
@changing_options
@common
def adopt(vm: str, directory: Path | None, wait: float | None, dry_run: bool) -> None:
    """Take up a libvirt domain as it is: chains made by virsh or by hand, and what was done to them since."""
    app = context.current()
    context.run_async(_adopt(app, context.open_host(app, wait), vm, directory, dry_run))


async def _adopt(app: App, host: Host, name: str, directory: Path | None, dry_run: bool) -> None:
    async with host.look(name) as vm:
        if vm.driver.kind != "libvirt":
            raise Refused(f"{vm.name} is a machine of diskchain's; there is nothing to adopt",
                          hint="diskchain machine import makes a machine around images")  # fmt: skip
        if dry_run:
            known = "look again at its chains" if vm.known else f"make records in {vm.home.path}"
            layers = [f"{i.target}: {i.path}" for chain in vm.catalog.active_chains().values() for i in chain]
            context.show_plan(app, Plan(f"{vm.name}: adopt", (known, *layers)))
            return
        home, known_before = vm.home, vm.known
    if directory is not None:
        ops.bring(ops.find_in(host, name, directory), home)
    async with host.change(name, "adopt", adopt=True) as vm:
        done = ops.adopt(vm)
        for remark in done.remarks:
            context.progress(app).warn(remark)
        count = len(vm.catalog.images)
        word = "is known already; its chains are" if known_before else "is adopted; its chains have"
        lines = [f"{vm.name} {word} {counted(count, 'layer')}; records in {vm.home.path}"]
        lines += [f"  new: {path}" for path in done.taken]
        body = {"vm": vm.name, "home": str(vm.home.path), "layers": count, "taken": [str(p) for p in done.taken]}
        context.answer(app, body, lines)


@click.command(epilog="Example: diskchain forget web1")
@vm_argument
@yes_option
@changing_options
@common
def forget(vm: str, yes: bool, wait: float | None, dry_run: bool) -> None:
    """Let go of a VM: its records, with saved memory, are removed; images and VM stay as they are."""
    app = context.current()
    context.run_async(_forget(app, context.open_host(app, wait), vm, yes, dry_run))


async def _forget(app: App, host: Host, name: str, yes: bool, dry_run: bool) -> None:
    async with host.look(name) as vm:
        if vm.driver.kind != "libvirt":
            raise Refused(f"{vm.name} is a machine of diskchain's", hint=f"diskchain machine undefine {vm.name}")
        plan = ops.plan_forget(vm)
        ids = [s.id for s in vm.catalog.visible()]
    if dry_run:
        context.show_plan(app, plan)
        return
    context.confirm(app, plan, "Forget it?", yes=yes, about=ids)
    async with host.change(name, "forget") as vm:
        left = ops.forget(vm)
    context.answer(
        app, {"vm": name, "recover": str(left)}, [f"{name} is forgotten; its layers are described in {left}"]
    )
