"""check --repair: plans, one question, what was put right."""

from __future__ import annotations

from collections.abc import Sequence

from diskchain.chain.plan import Plan
from diskchain.cli import context
from diskchain.cli.app import App
from diskchain.errors import DiskchainError, Unfinished
from diskchain.ops import repair as ops
from diskchain.ops.repair import Repair
from diskchain.ops.vm import Host


async def repair(app: App, host: Host, names: Sequence[str], *, yes: bool, dry_run: bool) -> list[Repair]:
    """Ask once about all that can be put right of these VMs, and do it; return what was done."""
    found = {name: await _find(app, host, name, dry_run=dry_run) for name in names}
    plans = [_plan(name, repairs) for name, repairs in found.items() if repairs or dry_run]
    if dry_run:
        whole = plans[0] if len(plans) == 1 else _together(plans)
        context.show_plan(app, whole)
        return []
    if plans and not yes:
        context.ask(plans, "Repair?")
    done: list[Repair] = []
    for name, repairs in found.items():
        if repairs:
            done += await _carry_out(app, host, name, repairs)
    app.extra["repaired"] = [
        {"code": r.kind, "subject": r.subject, "evidence": r.evidence, "step": r.step} for r in done
    ]
    return done


async def _find(app: App, host: Host, name: str, *, dry_run: bool) -> list[Repair]:
    try:
        await context.settle_before_plan(app, host, name, "check --repair", dry_run=dry_run)
        async with host.look(name) as vm:
            return await ops.find(vm)
    except DiskchainError as error:
        context.progress(app).warn(f"{name}: nothing can be repaired now: {error.message}")
        return []


def _plan(name: str, repairs: Sequence[Repair]) -> Plan:
    steps = tuple(f"{r.subject}: {r.evidence}: {r.step}" for r in repairs)
    return Plan(f"{name}: repair", steps or ("nothing is to be repaired that is beyond doubt",))


def _together(plans: Sequence[Plan]) -> Plan:
    return Plan("repair", tuple(f"{plan.title}: {step}" for plan in plans for step in plan.steps))


async def _carry_out(app: App, host: Host, name: str, approved: Sequence[Repair]) -> list[Repair]:
    """Do what was approved and is found again, now that the lock is held."""
    done = []
    async with context.changing(app, host, name, "check --repair") as vm:
        for repair in await ops.find(vm):
            if repair not in approved:
                continue
            try:
                await ops.carry_out(vm, repair)
            except Unfinished:
                raise
            except DiskchainError as error:
                context.progress(app).warn(f"{repair.subject}: not repaired: {error.message}")
                continue
            context.note(app, f"{repair.subject}: repaired: {repair.step}")
            done.append(repair)
    return done
