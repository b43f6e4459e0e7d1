"""libvirt's Python module, with our errors: called off the event loop, translated once.

A daemon that hangs is not waited for: opening a connection has a limit of our own, and an open one sends keepalives
(virConnectSetKeepAlive, as virsh does), so that every call that waits for a dead daemon ends as one whose daemon has ended.
A daemon that is busy answers them beside its work: a long restore is not cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, InvalidStateError, wait
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import libvirt

from diskchain.drivers.domains import ANSWERS_WITHIN
from diskchain.errors import DiskchainError, DriverFailed, NotFound, Refused, Unreachable

T = TypeVar("T")
P = ParamSpec("P")
libvirt.registerErrorHandler(lambda _context, _error: None, None)  # it prints every error to stderr otherwise

LOOK = 3.0  # seconds: whether a daemon answers at all
_waiting: set[Future[Any]] = set()  # calls that have not ended; those that were left are cancelled
_uris: deque[str] = deque(maxlen=1)  # where we connected last
_LOOK_EVERY = 0.1  # seconds between two looks for a Ctrl-C
_EVERY = 5  # seconds between two keepalives
_MISSED = int(ANSWERS_WITHIN) // _EVERY - 1  # of them; the next one closes the connection

_LOST = {
    libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_ERR_INVALID_CONN, libvirt.VIR_ERR_RPC, libvirt.VIR_ERR_AUTH_FAILED,
    libvirt.VIR_ERR_AUTH_UNAVAILABLE, libvirt.VIR_ERR_AUTH_CANCELLED,
}  # fmt: skip


def translated(error: libvirt.libvirtError, what: str) -> DiskchainError:
    """Given what libvirt said while we tried to `what`, return it as one of ours."""
    code, text = error.get_error_code(), str(error.get_error_message() or error)
    if code == libvirt.VIR_ERR_NO_DOMAIN:
        return NotFound(f"libvirt has no such domain: {text}", hint="virsh list --all")
    if (
        code in _LOST or error.get_error_domain() == libvirt.VIR_FROM_RPC
    ):  # "client socket is closed" is an internal error
        return Unreachable(f"libvirt can't be reached to {what}: {text}", hint="is libvirtd running? virsh list --all")
    if code in (libvirt.VIR_ERR_OPERATION_DENIED, libvirt.VIR_ERR_ACCESS_DENIED):
        return Refused(
            f"libvirt does not let us {what}: {text}", hint="run as root, or as a member of the group libvirt"
        )
    return DriverFailed(f"libvirt refused to {what}: {text}")


async def called(what: str, function: Callable[..., T], *arguments: Any) -> T:
    """Call into libvirt off the event loop; `what` (an infinitive) is named in errors. Raise what `translated` returns."""
    _refuse_beside_a_dead_call()
    try:
        return await asyncio.wrap_future(_aside(function, arguments))
    except libvirt.libvirtError as error:
        raise translated(error, what) from error


def asked(what: str, function: Callable[..., T], *arguments: Any) -> T:
    """Call into libvirt and wait: a question that is answered in a moment. Raise as `called`."""
    _refuse_beside_a_dead_call()
    try:
        return _awaited(_aside(function, arguments), math.inf)
    except libvirt.libvirtError as error:
        raise translated(error, what) from error


def connect_now(uri: str, within: float) -> Any:
    """Return a connection that is closed when its daemon hangs. Raise Unreachable, after `within` seconds at the latest."""
    _serve_events(os.getpid())
    _uris.append(uri)
    hint = f"virsh -c {uri} list --all"
    opening = _aside(libvirt.open, (uri,))
    try:
        connection = _awaited(opening, within)
    except libvirt.libvirtError as error:
        raise Unreachable(f"libvirt can't be reached at {uri}: {error}", hint=hint) from error
    except TimeoutError:
        opening.add_done_callback(_close)
        said = f"libvirt at {uri} does not answer (waited {within:g} s): it hangs, or is starting"
        raise Unreachable(said, hint=hint) from None
    with contextlib.suppress(libvirt.libvirtError):  # a driver without a daemon has none
        connection.setKeepAlive(_EVERY, _MISSED)
    return connection


def _close(opening: Future[Any]) -> None:
    if opening.exception() is None:
        opening.result().close()


# -- a daemon that hangs -----------------------------------------------------------------------------------------------


def _aside(function: Callable[..., T], arguments: tuple[Any, ...]) -> Future[T]:
    """Call in a thread that can be left behind: nothing ends a call that a dead daemon should answer.

    Its keepalives do, but of two calls at once on a connection libvirt's client ends one and loses the other (9.0).
    """
    future: Future[T] = Future()
    _waiting.add(future)
    threading.Thread(target=_carry_out, args=(future, function, arguments), daemon=True, name="libvirt-call").start()
    return future


def _carry_out(future: Future[T], function: Callable[..., T], arguments: tuple[Any, ...]) -> None:
    with contextlib.suppress(InvalidStateError):  # whoever asked has gone
        try:
            answer = function(*arguments)
        except Exception as error:  # passed on to whoever asked
            future.set_exception(error)
        else:
            future.set_result(answer)
    _waiting.discard(future)


def _refuse_beside_a_dead_call() -> None:
    """A call that was left (Ctrl-C) may wait for a daemon that hangs: then there is no second one beside it.

    Raise Unreachable when that daemon does not let us in anew.
    """
    if any(future.cancelled() for future in _waiting.copy()):  # they end in threads of their own, just now perhaps
        connect_now(_uris[-1], LOOK).close()


def _awaited(future: Future[T], within: float) -> T:
    """Wait in a thread that runs an event loop; Ctrl-C is heard. Raise TimeoutError; CancelledError for a Ctrl-C."""
    end = time.monotonic() + within
    while not future.done():
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        wait([future], min(left, _LOOK_EVERY))
        if _to_be_cancelled():
            future.cancel()
            raise asyncio.CancelledError
    return future.result()


def _to_be_cancelled() -> bool:
    """Whether the task that waits in us was cancelled (Ctrl-C, a limit) and can't be told: since its last await, or now.

    The number of its cancellations (`cancelling`) does not say which of them it was told of.
    """
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop here
        return False
    return task is not None and bool(task._must_cancel)  # type: ignore[attr-defined]


@functools.cache
def _serve_events(_process: int) -> None:
    """Run libvirt's event loop in a thread, in each process once: keepalives are sent and heard there."""
    libvirt.virEventRegisterDefaultImpl()
    threading.Thread(target=_run_events, daemon=True, name="libvirt-events").start()


def _run_events() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError:
            time.sleep(1)


def is_alive(connection: Any) -> bool:
    """Whether the daemon at the other end still answers."""
    try:
        return bool(connection.isAlive())
    except libvirt.libvirtError:
        return False


class _Reconnecting(Protocol):
    async def reconnect(self) -> None:
        """Find the daemon again. Raise Unreachable."""


D = TypeVar("D", bound=_Reconnecting)


def patient(
    method: Callable[Concatenate[D, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[D, P], Coroutine[Any, Any, T]]:
    """Decorate what can be repeated: libvirtd may be restarting just now, and QEMU goes on meanwhile."""

    async def again(self: D, /, *args: P.args, **words: P.kwargs) -> T:
        try:
            return await method(self, *args, **words)
        except Unreachable:
            await self.reconnect()
            return await method(self, *args, **words)

    functools.update_wrapper(again, method)
    return again
