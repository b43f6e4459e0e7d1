"""console: a terminal on a VM's serial port. The terminal is put back as it was, whatever ends it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
import sys
import termios
import tty
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import click

from diskchain.cli import context
from diskchain.cli.app import App, common
from diskchain.cli.options import Duration, vm_argument
from diskchain.drivers.protocol import Serial
from diskchain.ops import console as ops
from diskchain.ops.vm import Host

LEAVE = b"\x1d"  # Ctrl-], as in telnet and virsh
POLL = 0.01  # seconds; how late we may see what the guest wrote
PIECE = 256  # bytes written to a terminal at once: it takes so many without making us wait
ANSWER_LIMIT = 16 << 20
STDIN, STDOUT = 0, 1

Sink = Callable[[bytes], Awaitable[None]]


@click.command(epilog="Example: diskchain console web1, or: echo reboot | diskchain console web1")
@vm_argument
@click.option("--linger", type=Duration(), default="1s", metavar="TIME",
              help="When the input is no terminal: how long to go on after its end (default 1s).")  # fmt: skip
@common
def console(vm: str, linger: float) -> None:
    """Be at the serial console of a running VM; leave with Ctrl-]. The VM goes on, its log stays whole."""
    app = context.current()
    try:
        context.run_async(_console(app, context.open_host(app), vm, linger))
    except BrokenPipeError:  # of our own output: nobody reads it any more
        app.exit_code = 141


async def _console(app: App, host: Host, name: str, linger: float) -> None:
    async with host.look(name) as vm:
        serial, name = await ops.attach(vm), vm.name
    said = bytearray()

    async def keep(data: bytes) -> None:
        said.extend(data[: max(0, ANSWER_LIMIT - len(said))])

    try:
        with contextlib.closing(ops.Output(serial)) as output:
            ended = await _relay(app, serial, output, keep if app.json else _print, name, linger)
    finally:
        serial.close()
    if app.json:
        text = said.decode("utf-8", "replace")
        context.answer(app, {"vm": name, "ended": ended, "output": text}, [])
    elif ended == "down":
        context.note(app, f"{name} went down")


async def _relay(app: App, serial: Serial, output: ops.Output, sink: Sink, name: str, linger: float) -> str:
    """Carry bytes both ways until something ends it. Return what: `left`, `down`, `input` (its end)."""
    terminal = _is_terminal()
    if terminal:
        context.note(app, f"at the console of {name}; leave with Ctrl-]")
    with _raw() if terminal else contextlib.nullcontext():
        async with _tasks(_send(serial, terminal), serial.gone(), _follow(output, sink)) as (send, gone, follow):
            await asyncio.wait({send, gone, follow}, return_when=asyncio.FIRST_COMPLETED)
            if send.done() and not gone.done() and send.result() == "input":
                await asyncio.wait({gone, follow}, timeout=linger, return_when=asyncio.FIRST_COMPLETED)
            if follow.done():
                follow.result()  # it ends only with an error
            down, left = gone.done(), str(send.result()) if send.done() else ""
        await _rest(output, sink)
    if terminal and not app.quiet:
        click.echo(err=True)
    return "down" if down or not left else left


@contextlib.asynccontextmanager
async def _tasks(*work: Awaitable[object]) -> AsyncIterator[tuple[asyncio.Future[object], ...]]:
    tasks = tuple(asyncio.ensure_future(one) for one in work)
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# -- the guest to us ---------------------------------------------------------------------------------------------------


async def _follow(output: ops.Output, sink: Sink) -> None:
    while True:
        data = output.read()
        if data:
            await sink(data)
        else:
            await asyncio.sleep(POLL)


async def _rest(output: ops.Output, sink: Sink) -> None:
    """What came in the last moment; a guest that never ends to talk does not keep us."""
    for _ in range(8):
        data = output.read()
        if not data:
            return
        await sink(data)


async def _print(data: bytes) -> None:
    """Write to stdout as far as it takes it; a reader that stops makes us wait here, never the guest."""
    view = memoryview(data)
    while view:
        await _ready(STDOUT, write=True)
        view = view[os.write(STDOUT, view[:PIECE]) :]


# -- us to the guest ---------------------------------------------------------------------------------------------------


async def _send(serial: Serial, terminal: bool) -> str:
    """Send what is typed until Ctrl-] (on a terminal only: elsewhere it is a byte like others) or the end of the input."""
    while True:
        await _ready(STDIN)
        data = _typed()
        if terminal and LEAVE in data:
            await _pass(serial, data.partition(LEAVE)[0], patient=False)
            return "left"
        if not data:
            return "input"
        if terminal and not await _pass_or_leave(serial, data):
            return "left"
        if not terminal:
            await _pass(serial, data)


def _typed() -> bytes:
    try:
        return os.read(STDIN, 4096)
    except OSError:  # the terminal hung up, or there is no stdin at all
        return b""


async def _pass(serial: Serial, data: bytes, *, patient: bool = True) -> None:
    """Give the guest these bytes. A guest that reads nothing takes 64 KiB, then we wait, or let it be."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(serial.input, view) :]
        except BlockingIOError:
            if not patient:
                return
            await _ready(serial.input, write=True)
        except BrokenPipeError:  # QEMU has gone
            await serial.gone()


async def _pass_or_leave(serial: Serial, data: bytes) -> bool:
    """As `_pass`; while the guest takes nothing, look for Ctrl-] and drop what else is typed. False = leave."""
    passing = asyncio.ensure_future(_pass(serial, data))
    try:
        while not passing.done():
            typing = asyncio.ensure_future(_ready(STDIN))
            await asyncio.wait({passing, typing}, return_when=asyncio.FIRST_COMPLETED)
            if passing.done():
                typing.cancel()
                await asyncio.gather(typing, return_exceptions=True)
            elif LEAVE in (typed := _typed()) or not typed:
                return False
        passing.result()
        return True
    finally:
        passing.cancel()


async def _ready(fd: int, *, write: bool = False) -> None:
    """Wait until a descriptor can be read (or written). Files always can."""
    with contextlib.suppress(OSError):
        if stat.S_ISREG(os.fstat(fd).st_mode):
            await asyncio.sleep(0)
            return
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    try:
        add(fd, ready.set)
    except (OSError, ValueError):  # /dev/null and the like can't be waited for; a closed one is found out by its user
        await asyncio.sleep(0)
        return
    try:
        await ready.wait()
    finally:
        remove(fd)


# -- the terminal ------------------------------------------------------------------------------------------------------


def _is_terminal() -> bool:
    return sys.stdin is not None and not sys.stdin.closed and os.isatty(STDIN)


@contextlib.contextmanager
def _raw() -> Iterator[None]:
    """Every key goes to the guest. As it was afterwards; and raw again for who comes back from a stop (fg)."""
    before = termios.tcgetattr(STDIN)
    loop = asyncio.get_running_loop()
    try:
        tty.setraw(STDIN, termios.TCSANOW)
        loop.add_signal_handler(signal.SIGCONT, lambda: tty.setraw(STDIN, termios.TCSANOW))
        yield
    finally:
        loop.remove_signal_handler(signal.SIGCONT)
        with contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(STDIN, termios.TCSANOW, before)  # NOW: one that takes no output must not keep us
