"""What every driver must do. A new driver joins DRIVERS (cases.py) and passes this file unchanged.

A case opens a real VM with the counting guest on two disks; what is checked is what the guest and the files show.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from diskchain.chain.model import Image
from diskchain.drivers.protocol import Driver, VMState
from diskchain.errors import DiskchainError, DriverFailed
from diskchain.store import memory_file
from tests.contract.cases import DRIVERS, Case, base_chains, paths
from tests.support.console import Console

COUNT = r"^C (\d+) bad="


@pytest.fixture(params=sorted(DRIVERS))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    """One driver and its machine."""
    found = DRIVERS[request.param](tmp_path, request)
    yield found
    found.cleanup()


def play(case: Case, story: Callable[[Driver, Console], Awaitable[Any]]) -> None:
    """Run a story with an open driver and the guest's console."""

    async def run() -> None:
        driver = case.open()
        try:
            with Console(case.console_path) as console:
                await story(driver, console)
        finally:
            await driver.close()

    asyncio.run(run())


def chains(*tops: tuple[Image, ...]) -> dict[str, tuple[Image, ...]]:
    """Chains by target."""
    return {c[0].target: c for c in tops}


async def started(driver: Driver, case: Case, console: Console) -> None:
    """Start and wait until the guest counts."""
    await driver.start(base_chains(case))
    await asyncio.to_thread(console.wait, r"^C 50 bad=")


def test_power_states_follow_the_verbs(case: Case) -> None:
    """off -> running -> paused -> running -> off, each as asked afresh."""

    async def story(driver: Driver, console: Console) -> None:
        assert await driver.state() is VMState.STOPPED
        await started(driver, case, console)
        assert await driver.state() is VMState.RUNNING
        await driver.pause()
        assert await driver.state() is VMState.PAUSED
        await driver.resume()
        await driver.resume()
        assert await driver.state() is VMState.RUNNING
        await driver.quit()
        assert await driver.state() is VMState.STOPPED

    play(case, story)


def test_start_paused_runs_nothing_until_resumed(case: Case) -> None:
    """The guest's console stays empty."""

    async def story(driver: Driver, console: Console) -> None:
        await driver.start(base_chains(case), paused=True)
        await asyncio.sleep(1)
        assert await driver.state() is VMState.PAUSED and console.lines() == []
        await driver.resume()
        await asyncio.to_thread(console.wait, COUNT)

    play(case, story)


def test_power_off_presses_the_button_and_waits(case: Case) -> None:
    """The guest shuts down by itself."""

    async def story(driver: Driver, console: Console) -> None:
        await started(driver, case, console)
        assert await driver.power_off(60)
        assert await driver.state() is VMState.STOPPED
        assert any("GUEST POWEROFF" in line for _, line in console.lines())

    play(case, story)


@contextlib.contextmanager
def held(image: Path) -> Iterator[None]:
    """While somebody else has an image open."""
    name = json.dumps({"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": str(image)}})
    with subprocess.Popen(["qemu-io", f"json:{name}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin and holder.stdout
        holder.stdin.write(b"read 0 512\n")
        holder.stdin.flush()
        holder.stdout.readline()
        yield
        holder.kill()


def test_start_on_a_used_image_fails_with_the_reason(case: Case) -> None:
    """The hypervisor's own words reach the admin, and nothing stays behind."""

    async def story(driver: Driver, console: Console) -> None:
        with held(case.bases["vda"].path):
            with pytest.raises(DriverFailed, match="lock"):
                await driver.start(base_chains(case))
            assert await driver.state() is VMState.STOPPED

    play(case, story)


def test_switch_disks_is_all_and_the_guest_counts_on(case: Case) -> None:
    """After the switch the frozen images do not change any more, and the guest never sees a difference."""

    async def story(driver: Driver, console: Console) -> None:
        await started(driver, case, console)
        overlays, devices = case.overlays(case.bases), await driver.devices()
        await driver.prepare_disks(overlays)
        await driver.pause()
        await driver.switch_disks(overlays)
        await driver.resume()
        assert await driver.devices() == devices and len(devices) >= len(overlays)
        assert await driver.active_files() == await driver.written_files() == paths(overlays)
        frozen = [i.path.read_bytes() for i in case.bases.values()]
        now = console.counter() or 0
        await asyncio.to_thread(console.wait, rf"^C {now + 100} bad=")
        assert [i.path.read_bytes() for i in case.bases.values()] == frozen
        assert console.bad() == []

    play(case, story)


def test_switch_disks_fails_as_a_whole(case: Case) -> None:
    """One disk can't (somebody has its overlay): none is switched, and what was prepared can be taken back."""

    async def story(driver: Driver, console: Console) -> None:
        await started(driver, case, console)
        overlays = case.overlays(case.bases)
        with held(overlays["vdb"].path), pytest.raises(DiskchainError):
            await driver.prepare_disks(overlays)
            await driver.switch_disks(overlays)
        assert await driver.active_files() == await driver.written_files() == paths(case.bases)
        await driver.forget_prepared(overlays)
        await driver.prepare_disks(overlays)
        await driver.switch_disks(overlays)
        assert await driver.active_files() == await driver.written_files() == paths(overlays)

    play(case, story)


@pytest.mark.parametrize("background", [True, False])
def test_saved_memory_and_frozen_disks_are_one_instant(case: Case, background: bool) -> None:
    """Save memory at the switch, let the guest go on, load it on other overlays: it counts on from the instant."""

    async def story(driver: Driver, console: Console) -> None:
        await started(driver, case, console)
        overlays = case.overlays(case.bases)
        definition = await driver.live_definition()
        fd = os.open(case.dir / "memory", os.O_RDWR | os.O_CREAT, 0o600)
        stream = memory_file.write_header(fd, await driver.memory_label(paths(overlays)), was_running=True)
        await driver.prepare_disks(overlays)
        await driver.prepare_memory_save(fd, background=background)
        await driver.pause()
        await asyncio.sleep(0.2)  # what the guest printed before has been read
        at = console.counter() or 0
        await driver.switch_disks(overlays)
        await driver.start_memory_save(background=background)
        while not background and (await driver.save_progress()).status == "running":
            await asyncio.sleep(0.01)
        await driver.resume()
        while (progress := await driver.save_progress()).status == "running":
            await asyncio.sleep(0.01)
        assert progress.status == "completed"
        await driver.end_memory_save()
        await asyncio.to_thread(console.wait, rf"^C {at + 200} bad=")
        await driver.kill()
        again = case.overlays(case.bases)
        mark = console.mark()
        memory_file.seal(fd)
        os.lseek(fd, stream, os.SEEK_SET)
        await driver.start_from_memory(definition, {t: (i, case.bases[t]) for t, i in again.items()}, fd)
        assert await driver.state() is VMState.PAUSED
        await driver.resume()
        first = int((await asyncio.to_thread(console.wait, COUNT, 60, mark))[1])
        assert at <= first <= at + 3
        await asyncio.to_thread(console.wait, rf"^C {first + 50} bad=")
        assert console.bad() == []

    play(case, story)


def test_memory_that_is_none_is_refused_and_the_vm_is_off(case: Case) -> None:
    """Garbage instead of a stream: an error in words, no VM left behind."""

    async def story(driver: Driver, console: Console) -> None:
        await started(driver, case, console)
        definition = await driver.live_definition()
        await driver.kill()
        fd = os.open(case.dir / "garbage", os.O_RDWR | os.O_CREAT, 0o600)
        os.write(fd, b"no stream at all" * 4096)
        os.lseek(fd, 0, os.SEEK_SET)
        with pytest.raises(DiskchainError):
            await driver.start_from_memory(definition, base_chains(case), fd)
        assert await driver.state() is VMState.STOPPED

    play(case, story)


def test_pause_guard_lets_the_vm_go_on_after_its_limit_and_on_our_death(case: Case) -> None:
    """Armed and forgotten: it fires. Armed and disarmed: it does not."""

    async def story(driver: Driver, console: Console) -> None:
        await started(driver, case, console)
        async with driver.pause_guard(limit=1.0) as guard:
            guard.arm()
            await driver.pause()
            began = time.monotonic()
            while await driver.state() is VMState.PAUSED:
                await asyncio.sleep(0.05)
            assert 0.5 < time.monotonic() - began < 5 and guard.fired()
        async with driver.pause_guard(limit=30) as guard:
            guard.arm()
            await driver.pause()  # leaving the block without `disarm` is what our death looks like to it
        while await driver.state() is VMState.PAUSED:
            await asyncio.sleep(0.05)
        async with driver.pause_guard(limit=0.5) as guard:
            guard.arm()
            await driver.pause()
            guard.disarm()
            await asyncio.sleep(1)
            assert await driver.state() is VMState.PAUSED and not guard.fired()

    play(case, story)


async def slow_save(driver: Driver, case: Case) -> None:
    """Pause, and begin to save memory: it takes minutes."""
    fd = os.open(case.dir / "memory", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    await driver.prepare_memory_save(fd, background=False)
    os.close(fd)
    await (await cast(Any, driver)._commander()).execute("migrate-set-parameters", max_bandwidth=16384)
    await driver.pause()
    await driver.start_memory_save(background=False)
    assert (await driver.save_progress()).status == "running"


def test_a_save_that_is_given_up_does_not_stop_the_vm_again(case: Case) -> None:
    """By us, and by the guard when we die; without a save both do nothing. One that ended by itself leaves its mark."""

    async def story(driver: Driver, console: Console) -> None:
        await started(driver, case, console)
        await driver.give_up_save()
        assert await driver.state() is VMState.RUNNING and not await driver.stopped_by_save()
        await slow_save(driver, case)
        await driver.give_up_save()
        assert (await driver.save_progress()).status == "failed"
        assert await driver.state() is VMState.PAUSED and not await driver.stopped_by_save()
        await driver.resume()
        async with driver.pause_guard(limit=None) as guard:
            guard.arm()
            await slow_save(driver, case)
        assert (await driver.save_progress()).status == "failed" and await driver.state() is VMState.RUNNING
        await slow_save(driver, case)
        await (await cast(Any, driver)._commander()).execute("migrate-set-parameters", max_bandwidth=1 << 40)
        while (await driver.save_progress()).status == "running":
            await asyncio.sleep(0.01)
        assert await driver.stopped_by_save()
        await driver.resume()
        assert await driver.state() is VMState.RUNNING and not await driver.stopped_by_save()
        now = console.counter() or 0
        await asyncio.to_thread(console.wait, rf"^C {now + 50} bad=")
        assert console.bad() == []

    play(case, story)


def test_a_plain_machine_keeps_nothing_besides_disks_and_memory(case: Case) -> None:
    """No state files, no helpers to miss, nothing that keeps its memory from loading."""

    async def story(driver: Driver, console: Console) -> None:
        await driver.start(base_chains(case), paused=True)
        definition = await driver.live_definition()
        assert driver.state_files(definition) == []
        assert driver.memory_loads_with(definition) == []
        driver.check_helpers()

    play(case, story)


def test_definition_survives_define_and_says_what_differs(case: Case) -> None:
    """What is defined is what comes back; differences are words."""

    async def story(driver: Driver, console: Console) -> None:
        old = driver.definition()
        assert driver.differences(old, old) == []
        assert driver.missing_files(old) == []
        assert await driver.unsupported(old) == []
        assert driver.renewed(old) != old and driver.differences(old, driver.renewed(old)) == []
        await driver.define(old, base_chains(case))
        assert driver.definition() == old

    play(case, story)
    driver = case.open()
    coming = case.altered(machine="pc-q35-99.0")
    assert "no machine type pc-q35-99.0" in asyncio.run(driver.unsupported(coming))[0]
    assert driver.differences(driver.definition(), case.altered(memory=256)) == ["memory 128 MiB -> 256 MiB"]
