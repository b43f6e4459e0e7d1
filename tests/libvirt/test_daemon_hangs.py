"""libvirtd hangs: it is there, it takes connections, and says nothing. What waits for it ends as if it had ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diskchain.drivers import libvirt_api
from diskchain.drivers.domains import Domains
from diskchain.errors import Unreachable
from tests.support.domain import DomainRig
from tests.support.libvirtd import Libvirtd
from tests.support.rig import Rig, wait_for


@contextlib.contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    """Whatever is in the block does not hang."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def test_a_daemon_that_hangs_is_not_waited_for(daemon: Libvirtd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where a connection is opened nor on one that is open; afterwards all is as before."""
    monkeypatch.setattr(libvirt_api, "_EVERY", 1)
    monkeypatch.setattr(libvirt_api, "_MISSED", 2)
    domains = Domains(daemon.uri)
    before = domains.names()
    with daemon.hanging():
        with ends_within(20), pytest.raises(Unreachable, match="keepalive"):
            domains.names()
        with ends_within(20), pytest.raises(Unreachable, match=r"does not answer \(waited 1 s\)"):
            libvirt_api.connect_now(daemon.uri, 1)
    assert domains.names() == before


def test_no_call_is_made_beside_one_that_was_left(daemon: Libvirtd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two calls at once libvirt's client would end one only; at a daemon that answers there are two at once."""
    monkeypatch.setattr(libvirt_api, "LOOK", 0.5)
    connection = libvirt_api.connect_now(daemon.uri, 30)

    async def one_more(*, hanging: bool) -> str:
        with daemon.hanging() if hanging else contextlib.nullcontext():
            left = asyncio.create_task(libvirt_api.called("ask", connection.getCapabilities if hanging else time.sleep,
                                                          *(() if hanging else (1,))))  # fmt: skip
            await asyncio.sleep(0.1)
            left.cancel()
            await asyncio.sleep(0.1)
            return str(await libvirt_api.called("ask", connection.getCapabilities))

    with ends_within(10), pytest.raises(Unreachable):
        asyncio.run(one_more(hanging=True))
    assert "<capabilities>" in asyncio.run(one_more(hanging=False))


def test_calls_that_end_in_their_threads_do_not_disturb_one_that_begins(daemon: Libvirtd) -> None:
    """Whoever begins a call looks at all that have not ended, and at that moment they end."""
    connection, switch = libvirt_api.connect_now(daemon.uri, 30), sys.getswitchinterval()

    def ask() -> None:
        for _ in range(500):
            libvirt_api.asked("ask", connection.getType)

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as others:
            for other in [others.submit(ask) for _ in range(4)]:
                other.result()
    finally:
        sys.setswitchinterval(switch)


def test_ctrl_c_is_heard_while_a_daemon_hangs(domain: Callable[..., DomainRig], daemon: Libvirtd) -> None:
    """At once, not when it is given up."""
    rig = domain(guest=False)
    with daemon.hanging():
        asking = rig.popen("list", "vm")
        wait_for(
            lambda: len(os.listdir(f"/proc/{asking.pid}/task")) >= 3,
            "it asks: libvirt's events, the call, and who waits",
        )
        began = time.monotonic()
        asking.send_signal(signal.SIGINT)
        _, err = asking.communicate(timeout=60)
    assert (asking.returncode, "interrupted" in err) == (130, True), err
    assert time.monotonic() - began < 15


def test_a_ctrl_c_that_came_just_before_is_heard(daemon: Libvirtd) -> None:
    """Between the last await and the call: nobody was told of it. One that was told of is none."""

    async def cancelled_before(*, told: bool) -> None:
        task = asyncio.current_task()
        assert task
        task.cancel()
        if told:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        libvirt_api.connect_now(daemon.uri, 30).close()

    asyncio.run(cancelled_before(told=True))
    with daemon.hanging(), ends_within(10), pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled_before(told=False))


def test_a_long_answer_is_waited_for(daemon: Libvirtd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keepalives are answered beside the work: a connection on which nothing else happens stays open."""
    monkeypatch.setattr(libvirt_api, "_EVERY", 1)
    monkeypatch.setattr(libvirt_api, "_MISSED", 3)
    connection = libvirt_api.connect_now(daemon.uri, 30)
    time.sleep(6)
    assert libvirt_api.is_alive(connection) and connection.listAllDomains() is not None


def test_a_machine_of_ours_is_not_held_up(daemon: Libvirtd, tmp_path: Path) -> None:
    """Only its name is looked up in libvirt, for three seconds."""
    rig = Rig(tmp_path / "vm", targets=("vda",), memory="64 MiB")
    rig.build(guest=False)
    rig.uri = daemon.uri
    try:
        with daemon.hanging(), ends_within(30):
            assert rig.ok("create", "vm", "s0").code == 0
            rig.ok("list", "vm")
        assert set(rig.snapshots()) == {"s0"}
    finally:
        rig.destroy()
