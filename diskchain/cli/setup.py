"""setup."""

from __future__ import annotations

from pathlib import Path

import click

from diskchain.cli import context
from diskchain.cli.app import App, common
from diskchain.errors import UsageError
from diskchain.ops import setup as ops


@click.command(epilog="Example: diskchain setup --hook")
@click.option("--hook", is_flag=True, help="Install the libvirt hook that refuses to start a domain on a frozen layer.")
@click.option(
    "--hooks-dir", type=click.Path(path_type=Path), default=ops.HOOKS, show_default=True, help="libvirt's hooks."
)
@click.option("-n", "--dry-run", is_flag=True, help="Print the plan, change nothing.")
@common
def setup(hook: bool, hooks_dir: Path, dry_run: bool) -> None:
    """Install what is optional; each file is named, and nothing of diskchain depends on it."""
    app = context.current()
    if not hook:
        raise UsageError("setup needs to be told what to install", hint="diskchain setup --hook")
    if dry_run:
        context.show_plan(app, ops.plan_hook(hooks_dir))
        return
    context.run_async(_hook(app, hooks_dir))


async def _hook(app: App, directory: Path) -> None:
    done = await ops.install_hook(directory)
    word = "installed, and tried: it refuses a frozen layer" if done.changed else "there already"
    lines = [f"{done.path}: {word}", "to be rid of it: remove that file"]
    context.answer(app, {"hook": str(done.path), "changed": done.changed}, lines)
