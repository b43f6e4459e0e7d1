"""What every command needs: the host, a lock with recovery first, the event loop, output and questions."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import select
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO, TypeVar

import click

from diskchain.chain.plan import Plan
from diskchain.chain.text import printable
from diskchain.cli import render, streams
from diskchain.cli.app import App, Signalled, error_json, explained
from diskchain.cli.progress import LineProgress
from diskchain.config import load_config
from diskchain.drivers.domains import choose_uri
from diskchain.errors import Busy, DiskchainError, UsageError
from diskchain.ops import look, recover
from diskchain.ops.recover import Recovered
from diskchain.ops.vm import VM, Host

T = TypeVar("T")


def current() -> App:
    """Return what the global options said."""
    return click.get_current_context().ensure_object(App)


def open_host(app: App, wait: float | None = None) -> Host:
    """Return the host with the configuration; `wait` overrides it. Raise UsageError, Refused for a remote libvirt."""
    config = load_config(Path(app.config_file) if app.config_file else None)
    return Host(config if wait is None else replace(config, wait=wait), choose_uri(app.connect))


@contextlib.asynccontextmanager
async def changing(app: App, host: Host, name: str, operation: str, *, adopt: bool = False) -> AsyncIterator[VM]:
    """Hold the VM's lock; first resolve what was interrupted. `adopt`: make records for a domain that has none."""
    async with host.change(name, operation, adopt=adopt) as vm:
        await settle(app, host, vm)
        try:
            yield vm
        except asyncio.CancelledError:
            if app.interrupted == "interrupted":
                app.interrupted = _how_it_stands(vm)
            raise


def _how_it_stands(vm: VM) -> str:
    if look.is_unfinished(vm):
        return f"interrupted; nothing is lost, diskchain recover {vm.name} goes on"
    return "interrupted; nothing is left half-done"


async def settle(app: App, host: Host, vm: VM) -> Recovered | None:
    """Resolve what was interrupted on a VM whose lock we hold, and say so. Return what it was."""
    found = await recover.recover(vm, progress(app))
    if found:
        note(app, f"an interrupted {found.op} of {found.name!r} was {found.outcome} first")
    return found


async def settle_before_plan(app: App, host: Host, name: str, operation: str, *, dry_run: bool) -> Recovered | None:
    """A plan is made on a settled VM: resolve what was interrupted and return it, or say that it will be."""
    async with host.look(name) as vm:
        if not look.is_unfinished(vm):
            return None
    if dry_run:
        progress(app).warn(f"an operation on {name} is at work or was interrupted; it comes first")
        return None
    async with host.change(name, operation) as vm:
        return await settle(app, host, vm)


# -- running -----------------------------------------------------------------------------------------------------------


def run_async(coro: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end. Ctrl-C, SIGTERM and SIGHUP cancel it; then KeyboardInterrupt or Signalled is raised."""
    app = current()
    if app.verbose:
        level = logging.DEBUG if app.verbose > 1 else logging.INFO
        prefix = f"{app.part.vm}: ".replace("%", "%%") if app.part else ""
        logging.basicConfig(level=level, stream=sys.stderr, format=f"{prefix}%(levelname)s %(name)s: %(message)s")
    with asyncio.Runner() as runner:
        return runner.run(_until_signalled(coro, app.part.until if app.part else None))


async def _until_signalled(coro: Coroutine[Any, Any, T], until: int | None) -> T:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task
    got: list[int] = []

    def cancel(number: int) -> None:
        got.append(number)
        task.cancel()

    watched = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
    for number in watched:
        loop.add_signal_handler(number, cancel, number)

    def closed(fd: int) -> None:
        loop.remove_reader(fd)
        cancel(signal.SIGTERM)

    if until is not None:
        loop.add_reader(until, closed, until)
    try:
        return await coro
    except asyncio.CancelledError:
        if got:
            raise Signalled(got[0]) from None
        raise
    finally:
        for number in watched:
            loop.remove_signal_handler(number)
        if until is not None:
            loop.remove_reader(until)


def progress(app: App) -> LineProgress:
    """Return a progress that suits stderr and -q; with several VMs its lines name the VM."""
    vm = app.part.vm if app.part else ""
    return LineProgress(sys.stderr, quiet=app.quiet, warnings=app.warnings, vm=vm, as_json=app.json)


# -- saying and asking -------------------------------------------------------------------------------------------------


def answer(app: App, payload: dict[str, Any], lines: Iterable[str]) -> None:
    """Print a command's answer: the JSON object, or the lines (each made safe for a terminal)."""
    extra = {**app.extra, **({"warnings": app.warnings} if app.warnings and "warnings" not in payload else {})}
    if app.part:
        app.part.body, app.part.lines = {**payload, **extra}, list(lines)
        return
    if app.json:
        click.echo(json.dumps({"schema": 1, **payload, **extra}))
        app.answered = True
        return
    print_lines(lines)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines of an answer, each made safe for a terminal."""
    for line in lines:
        click.echo("\t".join(map(printable, line.split("\t"))))


def note(app: App, text: str) -> None:
    """Print a remark on stderr."""
    if not app.quiet:
        text = render.named(app.part.vm, text) if app.part else text
        click.echo(f"note: {printable(text)}", err=True)


def show_plan(app: App, plan: Plan) -> None:
    """Answer a --dry-run."""
    answer(app, {"plan": plan.to_json()}, render.plan_lines(plan))


@contextlib.contextmanager
def planning(app: App, *, dry_run: bool) -> Iterator[Callable[[Plan], None]]:
    """Look, make a plan, tell of it by the callable, then see whether anything stands in its way.

    A --dry-run is answered at the end: by the plan, and by what was raised after it was made; not when none was made
    (the caller has said why).
    """
    made: list[Plan] = []
    try:
        yield made.append
    except DiskchainError as error:
        if dry_run and made:
            body = {"plan": made[-1].to_json(), "error": error_json(*explained(app, error))}
            answer(app, body, render.plan_lines(made[-1]))
        raise
    if dry_run and made:
        show_plan(app, made[-1])


class Asked(Exception):
    """A command came to its question about one VM of several."""

    def __init__(self, plan: Plan, question: str, about: tuple[str, ...]) -> None:
        super().__init__(question)
        self.plan, self.question, self.about = plan, question, about


def confirm(app: App, plan: Plan, question: str, *, yes: bool, about: Sequence[str] = ()) -> None:
    """Print the plan and ask. Raise UsageError where nobody can be asked, DiskchainError when the answer is no.

    `about` = the ids of the snapshots that the plan destroys or loses. One VM of several: raise Asked; after the
    question raise Busy when it was about other snapshots.
    """
    approved = app.part.approved if app.part else None
    if approved is not None and approved != tuple(about):
        raise Busy("the snapshots were changed meanwhile", hint="look again, then try again")
    if yes or approved is not None:
        return
    if app.part:
        raise Asked(plan, question, tuple(about))
    ask([plan], question)


def ask(plans: Sequence[Plan], question: str) -> None:
    """Print the plans and ask once. Raise UsageError where nobody can be asked, DiskchainError when the answer is no."""
    if not streams.is_terminal(sys.stdin):
        title = plans[0].title + (f" (and {len(plans) - 1} more)" if len(plans) > 1 else "")
        raise UsageError(f"{title} needs a confirmation, and no terminal is there to ask",
                         hint="add --yes if you are sure (--dry-run shows what would be done)")  # fmt: skip
    for line in (line for plan in plans for line in render.plan_lines(plan)):
        click.echo(printable(line), err=True)
    if not _says_yes(question):
        raise DiskchainError("nothing was changed")


def _says_yes(question: str) -> bool:
    """Ask on the terminal; anything but y or yes, the end of the input too, is no."""
    with _signals_end_us():
        click.echo(f"{question} [y/N] ", err=True, nl=False)
        wait_for(sys.stdin)
        line = sys.stdin.readline()
    if not line.endswith("\n"):
        click.echo(err=True)
    return line.strip().lower() in ("y", "yes")


def wait_for(file: TextIO) -> None:
    """Wait until a file can be read. A signal's Python handler runs at once, also when the signal came just before.

    In readline alone such a signal waits for the input: Python looks for it before the call of read(2), not in it.
    """
    ours, woken = socket.socketpair()
    with ours, woken:
        woken.setblocking(False)
        before = signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
        try:
            select.select([file.fileno(), ours.fileno()], [], [])
        finally:
            signal.set_wakeup_fd(before)


@contextlib.contextmanager
def _signals_end_us() -> Iterator[None]:
    """While we wait for an answer the event loop stands still: let Ctrl-C and the others work without it."""
    usual: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {s: signal.getsignal(s) for s in usual}
    for number, handler in usual.items():
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        task = asyncio.current_task()
        if task and task.cancelling():  # Ctrl-C came a moment ago; nobody would look before the answer
            raise KeyboardInterrupt
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
