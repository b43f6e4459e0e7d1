"""Options and arguments that several commands share; completion of names."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from diskchain.cli.app import App
from diskchain.config import parse_duration
from diskchain.ops import look

F = TypeVar("F", bound=Callable[..., Any])


class Duration(click.ParamType):  # type: ignore[type-arg]  # not generic in click 8.1
    """A duration, in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Given what was typed, return seconds."""
        if isinstance(value, (int, float)):
            return float(value)
        try:
            return parse_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


_RATE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT]?)(?:i?B)?(?:/s)?", re.ASCII | re.IGNORECASE)
_STEPS = " KMGT"
LEAST_RATE = 64 << 10


def parse_rate(text: str) -> int:
    """Given `200M`, `1.5G` or a number of bytes (binary units; `/s` may follow), return bytes a second. Raise ValueError."""
    match = _RATE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is no rate; write for example 200M or 1.5G (bytes a second)")
    rate = int(float(match[1]) * 1024 ** _STEPS.index(match[2].upper() or " "))
    if rate < LEAST_RATE:
        raise ValueError(f"{text!r} is less than 64K a second: nothing would ever end")
    return rate


class Rate(click.ParamType):  # type: ignore[type-arg]  # not generic in click 8.1
    """Bytes a second."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Given what was typed, return bytes a second."""
        if isinstance(value, int):
            return value
        try:
            return parse_rate(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class VMName(click.ParamType):  # type: ignore[type-arg]  # not generic in click 8.1
    """The name of a VM: `web1`, `qemu:web1` or `libvirt:web1`."""

    name = "vm"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Given what was typed, return it as it is."""
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer the names of all VMs."""
        return [CompletionItem(name) for name in look.names_quietly() if name.startswith(incomplete)]


class VMNames(VMName):
    """One VM or several: `web1`, `web1,web2`, `'web*'`, `@group`."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer the names of all VMs, after a comma too."""
        before, comma, last = incomplete.rpartition(",")
        return [CompletionItem(f"{before}{comma}{item.value}") for item in super().shell_complete(ctx, param, last)]


class SnapshotName(click.ParamType):  # type: ignore[type-arg]  # not generic in click 8.1
    """The name (or id) of a snapshot; `deleted`: of one that is deleted and not merged yet."""

    name = "snapshot"

    def __init__(self, *, deleted: bool = False) -> None:
        self.deleted = deleted

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Given what was typed, return it as it is."""
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer the snapshots of the VM that was named before."""
        names = look.snapshot_names_quietly(str(ctx.params.get("vm") or ""), deleted=self.deleted)
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def vm_argument(command: F) -> F:
    """The VM that the command is about."""
    return click.argument("vm", type=VMName())(command)


def vms_argument(command: F) -> F:
    """The VM, or the VMs, that the command is about."""
    return click.argument("vm", type=VMNames())(command)


def maybe_vms_argument(command: F) -> F:
    """Some VMs, or all of them."""
    return click.argument("vm", type=VMNames(), required=False)(command)


def snapshot_argument(command: F) -> F:
    """The snapshot that the command is about."""
    return click.argument("name", type=SnapshotName())(command)


def changing_options(command: F) -> F:
    """--wait and --dry-run, of every command that changes something."""
    wait = click.option("--wait", type=Duration(), metavar="TIME",
                        help="How long to wait for another operation on the VM (default 10s).")  # fmt: skip
    dry_run = click.option("-n", "--dry-run", is_flag=True, callback=_note_changes,
                           help="Print the plan, change nothing.")  # fmt: skip
    return dry_run(wait(command))


def _note_changes(ctx: click.Context, param: click.Parameter, dry_run: bool) -> bool:
    ctx.ensure_object(App).changes = not dry_run
    return dry_run


jobs_option = click.option("--jobs", type=click.IntRange(1), default=1, metavar="N",
                           help="With several VMs: work on N of them at once.")  # fmt: skip
rate_option = click.option("--rate", type=Rate(), metavar="RATE", help="Write at most RATE, like 200M, a second.")
yes_option = click.option("-y", "--yes", is_flag=True, help="Don't ask.")
