"""disk-role."""

from __future__ import annotations

import click

from diskchain.chain.plan import Plan
from diskchain.cli import context
from diskchain.cli.app import App, common
from diskchain.cli.options import changing_options, vm_argument
from diskchain.ops import roles
from diskchain.ops.vm import Host


@click.command("disk-role", epilog="Example: diskchain disk-role web1 vdb data")
@vm_argument
@click.argument("target", metavar="TARGET")
@click.argument("role", type=click.Choice(roles.ROLES))
@changing_options
@common
def disk_role(vm: str, target: str, role: str, wait: float | None, dry_run: bool) -> None:
    """Say what a domain's disk is for: os or data. What replaces an operating system leaves data disks alone."""
    app = context.current()
    host = context.open_host(app, wait)
    context.run_async(_plan(app, host, vm, target, role) if dry_run else _set(app, host, vm, target, role))


async def _plan(app: App, host: Host, name: str, target: str, role: str) -> None:
    async with host.look(name) as vm:
        roles.refuse_other(vm, target, role)
        context.show_plan(app, Plan(f"{vm.name}: {target} is {role}", ("only the catalog changes",)))


async def _set(app: App, host: Host, name: str, target: str, role: str) -> None:
    async with context.changing(app, host, name, "disk-role", adopt=True) as vm:
        changed = roles.set_role(vm, target, role)
        body = {"vm": vm.name, "target": target, "role": role, "changed": changed}
        context.answer(app, body, [f"{vm.name}: {target} is {role}{'' if changed else ' already'}"])
