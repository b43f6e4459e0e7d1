"""libvirt's Python module, with our errors: called off the event loop, translated once."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import libvirt

from diskchain.errors import DiskchainError, DriverFailed, NotFound, Refused, Unreachable

T = TypeVar("T")
P = ParamSpec("P")
libvirt.registerErrorHandler(lambda _context, _error: None, None)  # it prints every error to stderr otherwise

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
    try:
        return await asyncio.to_thread(function, *arguments)
    except libvirt.libvirtError as error:
        raise translated(error, what) from error


def connect_now(uri: str) -> Any:
    """Return a connection. Raise Unreachable."""
    try:
        return libvirt.open(uri)
    except libvirt.libvirtError as error:
        raise Unreachable(f"libvirt can't be reached at {uri}: {error}", hint=f"virsh -c {uri} list --all") from error


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
