"""Several VMs in one command: `web1,web2`, `'web*'`, `@group`.

One after the other, the work is done in this process, each VM with an App of its own. With --jobs N each VM gets a
process of ours, N at once: their locks wait, and they crash, without each other. Such a process is started with the
hidden option --part: what it says goes to us line by line, its answer last, as one record. When we end, it ends as
after SIGTERM: it puts back what it can.

A question is asked once. Until then every VM is looked at here, in turn, up to its question (context.Asked); with the
answer the work begins anew, and refuses when the snapshots are not those of the question.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import click

from diskchain.chain.text import counted, printable
from diskchain.cli import context
from diskchain.cli.app import RECORD, App, Part, error_json, error_lines, explained
from diskchain.cli.render import named
from diskchain.config import Config
from diskchain.errors import DiskchainError, NotFound, ToolFailed, Unfinished
from diskchain.host.process import our_module, run
from diskchain.ops import look
from diskchain.ops.vm import Host

Work = Callable[[App, str], Coroutine[Any, Any, None]]
Approved = tuple[str, ...] | None


# -- which VMs ---------------------------------------------------------------------------------------------------------


def select(host: Host, text: str) -> list[str] | None:
    """Given what was typed as VM, return the names of several, or None when it is the plain name of one.

    The form decides, not how many there are: `'web*'` that fits one VM is a list of one. Raise NotFound for whatever
    was typed and fits nothing.
    """
    if not ("," in text or text.startswith("@") or _is_pattern(text)):
        return None
    names = host.names()
    if text in names:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    found = [name for part in parts for name in _fitting(host.config, names, part)]
    if not found:
        raise NotFound(f"no VM fits {text!r}", hint="diskchain machine list")
    return list(dict.fromkeys(found))


def _is_pattern(text: str) -> bool:
    return any(char in text for char in "*?[")


def _fitting(config: Config, names: list[str], part: str) -> list[str]:
    in_group = part.startswith("@")
    if part.removeprefix("qemu:") in names:
        return [part.removeprefix("qemu:")]  # the plain name means it as well; libvirt: is kept where it is needed
    found = _of_group(config, names, part) if in_group else [name for name in names if fnmatchcase(name, part)]
    if not found:
        raise NotFound(f"no VM fits {part!r}" if in_group or _is_pattern(part) else f"there is no VM {part!r}",
                       hint="diskchain machine list")  # fmt: skip
    return found


def _of_group(config: Config, names: list[str], group: str) -> list[str]:
    """Return the members of a group. A plain name is one even if there is no such VM: that is its error, not theirs."""
    members = config.groups.get(group[1:])
    if members is None:
        known = ", ".join(f"@{name}" for name in config.groups)
        none = "" if known else "; the configuration has no [groups]"
        raise NotFound(f"there is no group {group!r}{none}", hint=known or "diskchain machine list")
    found: list[str] = []
    for member in (member.removeprefix("qemu:") for member in members):
        found += [name for name in names if fnmatchcase(name, member)] if _is_pattern(member) else [member]
    return found


# -- work on them ------------------------------------------------------------------------------------------------------


def on_each(
    app: App,
    host: Host,
    vm: str,
    work: Work,
    *,
    jobs: int = 1,
    asks: bool = False,
    table: bool = False,
    gap: bool = False,
) -> None:
    """Do the work on the VM, or on each of the VMs, that were typed.

    `asks`: the work may come to a question. `table`: its lines are a table or tree, to be printed as they are;
    `gap`: with an empty line between two.
    """
    names = select(host, vm)
    if names is not None:
        context.run_async(_Many(app, host, names, work, jobs, table, gap).work(asks))
        return
    if app.part:
        app.part.vm = vm
    context.run_async(work(app, vm))


class _Many:
    """One command on several VMs."""

    def __init__(self, app: App, host: Host, names: list[str], work: Work, jobs: int, table: bool, gap: bool) -> None:
        self._app, self._host, self._names, self._work, self._jobs = app, host, names, work, jobs
        self._table, self._gap = table, gap
        self._ctx = click.get_current_context()
        self._results: dict[str, dict[str, Any]] = {}
        self._at = ""  # the VM that was at work when we were interrupted
        self._printed = False

    async def work(self, asks: bool) -> None:
        """Work on all of them, ask once if that is needed, answer."""
        try:
            if self._jobs > 1 and not asks:
                await self._in_processes(dict.fromkeys(self._names))
            else:
                await self._here_then_ask()
        except asyncio.CancelledError:
            self._app.interrupted = self._how_it_stands()
            raise
        finally:
            self._app.results = [self._results[name] for name in self._names if name in self._results]
        context.answer(self._app, {"results": self._app.results}, [])

    async def _here_then_ask(self) -> None:
        asked: dict[str, context.Asked] = {}
        for name in self._names:
            try:
                await self._here(name, None)
            except context.Asked as came:
                asked[name] = came
        if not asked:
            return
        plans, (first, *_) = [one.plan for one in asked.values()], asked.values()
        context.ask(plans, f"{first.question.rstrip('?')} on {counted(len(plans), 'VM')}?")
        approved: dict[str, Approved] = {name: one.about for name, one in asked.items()}
        if self._jobs > 1:
            await self._in_processes(approved)
            return
        for name, about in approved.items():
            await self._here(name, about)

    async def _here(self, name: str, approved: Approved) -> None:
        """Work on one VM in this process. Raise Asked."""
        part = Part(name, approved)
        app = replace(self._app, part=part, warnings=[], results=[])
        try:
            await self._work(app, name)
        except context.Asked:
            raise
        except asyncio.CancelledError:
            self._at, self._app.interrupted = name, app.interrupted
            raise
        except Exception as error:
            part.error = error_json(*explained(app, error))
        self._tell(part)

    def _tell(self, part: Part) -> None:
        """Print what came of one VM."""
        result = {"vm": part.vm, **part.body}
        if part.error:
            result["error"] = part.error
        self._results[part.vm] = result
        if not self._app.json:
            if self._gap and self._printed and part.lines:
                click.echo()
            context.print_lines(part.lines if self._table else _named_lines(part))
            self._printed = self._printed or bool(part.lines)
        if part.error:
            for line in error_lines(named(part.vm, part.error["message"]), part.error["hint"]):
                click.echo(line, err=True)
            self._app.exit_code = max(self._app.exit_code, part.error["code"])

    def _how_it_stands(self) -> str:
        done = [name for name in self._names if name in self._results and "error" not in self._results[name]]
        left = [name for name in self._names if name not in self._results and name != self._at]
        words = [named(self._at, self._app.interrupted)]
        words += [f"done: {', '.join(done)}"] if done else []
        words += [f"not done: {', '.join(left)}"] if left else []
        return "; ".join(words)

    # -- a process for each

    async def _in_processes(self, approved: Mapping[str, Approved]) -> None:
        """Work on the VMs in processes of their own. When we are interrupted, they are, and we wait for them."""
        turn, (until, ours) = asyncio.Semaphore(self._jobs), os.pipe()
        going_on = True

        async def one(name: str, about: Approved) -> None:
            async with turn:
                if going_on:
                    self._tell(await self._in_process(name, about, until))

        tasks = [asyncio.ensure_future(one(name, about)) for name, about in approved.items()]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            going_on = False
            os.close(ours)
            said = await asyncio.gather(*tasks, return_exceptions=True)
            os.close(until)
        for error in said:
            if error is not None:
                raise error

    async def _in_process(self, name: str, approved: Approved, until: int) -> Part:
        words, env = our_module("diskchain")
        settings = [f"{key}={value}" for key, value in {**env, "PYTHONSAFEPATH": "1"}.items()]
        argv = ["env", *settings, *words, *self._global_words(approved, until), *_words(self._ctx, name, approved)]
        heard = _Heard(name)
        try:
            result = await run(argv, timeout=None, pass_fds=[until], ok=range(256), on_output=heard.take)
            if heard.part is None:
                raise ToolFailed(["diskchain"], result.returncode, result.stderr)
        except DiskchainError as error:
            return Part(name, error=error_json(*explained(self._app, await self._died(name, error))))
        return heard.part

    async def _died(self, name: str, error: DiskchainError) -> DiskchainError:
        """Our process for a VM ended without an answer: say whether it left something half-done."""
        with contextlib.suppress(DiskchainError):
            async with self._host.look(name) as vm:
                if look.is_unfinished(vm):
                    return Unfinished(f"{error.message}; stopped half-way", hint=f"diskchain recover {name}")
        return error

    def _global_words(self, approved: Approved, until: int) -> list[str]:
        words = ["--color=never", "--part", str(until) if approved is None else f"{until}:{','.join(approved)}"]
        words += ["--verbose"] * self._app.verbose + ["--quiet"] * self._app.quiet
        return [*words, f"--config={self._app.config_file}"] if self._app.config_file else words


def _named_lines(part: Part) -> Iterator[str]:
    """Yield the usual lines: the first names the VM, those that don't are indented below it."""
    for number, line in enumerate(part.lines):
        if number == 0:
            yield named(part.vm, line)
        else:
            yield line if line.startswith(" ") or named(part.vm, line) == line else f"  {line}"


def _words(ctx: click.Context, vm: str, approved: Approved) -> list[str]:
    """Return the command as it was typed, for one VM."""
    given = {**ctx.params, "vm": vm, **({} if approved is None else {"yes": True})}
    options, arguments = [], []
    for param in ctx.command.params:
        value = given.get(str(param.name))
        if value is None or param.name == "jobs":
            continue
        values = value if isinstance(value, tuple) else (value,)
        if isinstance(param, click.Argument):
            arguments += list(values)
        else:
            options += [word for item in values for word in _option(param.opts[-1], item)]
    return [str(ctx.command.name), *options, "--", *arguments]


def _option(name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [name] * value
    if isinstance(value, float):  # a duration; nine digits are what it may have
        return [f"{name}={min(value, 999_999_999.0):f}"]
    return [f"{name}={value}"]


class _Heard:
    """What a process for one VM says: lines for stderr at once, its record at the end."""

    def __init__(self, vm: str) -> None:
        self._vm, self._rest = vm, ""
        self.part: Part | None = None

    def take(self, text: str) -> None:
        """Take the next piece of its output."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.startswith(RECORD):
                self.part = Part(self._vm, **json.loads(line.removeprefix(RECORD)))
            elif line:
                click.echo(printable(line), err=True)
