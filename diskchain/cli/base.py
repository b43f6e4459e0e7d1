"""base seal, verify, users."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from diskchain.cli import context
from diskchain.cli.app import App, common
from diskchain.cli.options import changing_options
from diskchain.errors import Busy
from diskchain.ops import base as ops
from diskchain.ops.vm import Host

image_argument = click.argument("image", type=click.Path(path_type=Path))
format_option = click.option(
    "--format", "fmt", type=click.Choice(["qcow2", "raw"]), help="Where its name does not say it."
)


@click.group(epilog="Example: diskchain base users /srv/base/debian12.qcow2")
@common
def base() -> None:
    """Protect an image that several VMs stand on, look whether it is what it was, and who uses it."""


@base.command(epilog="Example: diskchain base seal --digest /srv/base/debian12.qcow2")
@image_argument
@format_option
@click.option("--digest", is_flag=True, help="Read all of it, so that verify --deep can compare every byte.")
@changing_options
@common
def seal(image: Path, fmt: str | None, digest: bool, wait: float | None, dry_run: bool) -> None:
    """Note the fingerprint of a base, and make it read-only (0444). It is never merged into from then on."""
    app = context.current()
    host = context.open_host(app, wait)
    context.run_async(_seal(app, host, image.absolute(), fmt, digest, dry_run))


async def _seal(app: App, host: Host, image: Path, fmt: str | None, digest: bool, dry_run: bool) -> None:
    known = ops.format_of(host, image, fmt)
    if dry_run:
        context.show_plan(app, ops.plan_seal(host, image, known, digest=digest))
        return
    _wait_for_writers(host, image)
    found = ops.seal(host, image, known, digest=digest, progress=context.progress(app))
    body = {"image": str(image), "format": found.fmt, "created": found.created, "sha256": found.sha256 or None}
    said = f"{image} is sealed" + (f", sha256 {found.sha256}" if found.sha256 else "")
    context.answer(app, {**body, "fingerprint": dict(found.fingerprint)}, [said])


def _wait_for_writers(host: Host, image: Path) -> None:
    end = time.monotonic() + host.config.wait
    while time.monotonic() < end:
        try:
            ops.refuse_writer(image)
            return
        except Busy:
            time.sleep(0.1)


@base.command(epilog="Example: diskchain base verify --deep /srv/base/debian12.qcow2")
@image_argument
@click.option("--deep", is_flag=True, help="Compare every byte with the digest.")
@common
def verify(image: Path, deep: bool) -> None:
    """Look whether a base is what was sealed. Exit 8: it was written, replaced or moved."""
    app = context.current()
    context.run_async(_verify(app, context.open_host(app), image.absolute(), deep))


async def _verify(app: App, host: Host, image: Path, deep: bool) -> None:
    found = ops.verify(host, image, deep=deep, progress=context.progress(app))
    for remark in found.remarks:
        context.progress(app).warn(f"{image}: {remark}")
    body = {"image": str(image), "sealed": found.seal.created, "by": found.seal.by, "deep": deep,
            "sha256": found.seal.sha256 or None}  # fmt: skip
    how = "every byte" if deep else "size and tables" if found.seal.fmt == "qcow2" else "size and time"
    context.answer(app, body, [f"{image} is what was sealed on {found.seal.created} ({how} compared)"])


@base.command(epilog="Example: diskchain base users /srv/base/debian12.qcow2")
@image_argument
@common
def users(image: Path) -> None:
    """Everybody who uses an image: VMs defined, running and saved, overlays of nobody's, other names."""
    app = context.current()
    context.run_async(_users(app, context.open_host(app), image.absolute()))


async def _users(app: App, host: Host, image: Path) -> None:
    found = ops.users(host, image)
    rows: list[dict[str, Any]] = [
        {**asdict(user), "path": str(user.path), "state": user.state or None} for user in found
    ]
    lines = [f"{u.who}: {u.how}" + (f" ({u.state}), by {u.path}" if u.state else "") for u in found]
    context.answer(app, {"image": str(image), "users": rows}, lines or [f"nobody that is known of uses {image}"])
