"""The root of the command line: the table of commands, the global options, and the border where errors end.

Starts quickly: imports click and nothing else that takes time. A command's module is imported when it is invoked.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import click
from click.shell_completion import CompletionItem

from diskchain.chain.text import printable
from diskchain.cli import streams
from diskchain.errors import Degraded, DiskchainError

F = TypeVar("F", bound=Callable[..., Any])
RECORD = "\x1e"  # as in RFC 7464


@dataclass
class Part:
    """One VM of several. What a command says of it is kept here; who began the whole prints it (see many.py)."""

    vm: str = ""
    approved: tuple[str, ...] | None = None  # a question was answered with yes; it was about these snapshots
    until: int | None = None  # we are a process for this VM: end, as after SIGTERM, when this descriptor is closed
    body: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None


@dataclass
class App:
    """What the global options said, and what a command leaves for the end."""

    connect: str | None = None
    config_file: str | None = None
    quiet: bool = False
    verbose: int = 0
    json: bool = False
    color: str = "auto"
    exit_code: int = 0
    changes: bool = False  # the command is one that changes something, and no dry run
    answered: bool = False  # the JSON object was printed
    interrupted: str = "interrupted"  # what Ctrl-C means now
    warnings: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)  # more keys of the answer
    part: Part | None = None  # the command works on several VMs, and this is for one of them
    results: list[dict[str, Any]] = field(default_factory=list)  # of several VMs, so far


class Signalled(BaseException):
    """The process was told to end by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Entry(NamedTuple):
    """One command of the table: where it is, and what help says of it."""

    name: str
    module: str
    attribute: str
    help: str
    section: str


_MACHINES, _ANY, _SNAPSHOTS, _HEALTH = "Machines", "Any VM", "Snapshots", "Health"
COMMANDS = [
    Entry(
        "machine",
        "machine",
        "machine",
        "Define, import, undefine and list the machines that diskchain runs.",
        _MACHINES,
    ),
    Entry("start", "power", "start", "Start a VM.", _ANY),
    Entry("stop", "power", "stop", "Stop a VM; then carry out its pending merges.", _ANY),
    Entry("pause", "power", "pause", "Let a VM stand still.", _ANY),
    Entry("resume", "power", "resume", "Let a paused VM go on.", _ANY),
    Entry("console", "console", "console", "Be at the serial console of a VM; leave with Ctrl-].", _ANY),
    Entry("disk-role", "disk", "disk_role", "Say what a domain's disk is for: os or data.", _ANY),
    Entry("create", "create", "create", "Take a snapshot of a VM, with its memory when it runs.", _SNAPSHOTS),
    Entry("list", "look", "list_", "List snapshots, oldest first.", _SNAPSHOTS),
    Entry("tree", "look", "tree", "Show the tree of snapshots, and where the VM is in it.", _SNAPSHOTS),
    Entry("show", "look", "show", "Show everything about one snapshot.", _SNAPSHOTS),
    Entry("revert", "revert", "revert", "Go back to a snapshot; the present is kept. Alias: rollback.", _SNAPSHOTS),
    Entry("undo", "revert", "undo", "Go back to where the last revert left from.", _SNAPSHOTS),
    Entry("delete", "delete", "delete", "Delete snapshots; what the VM sees stays as it is. Alias: rm.", _SNAPSHOTS),
    Entry("accept", "delete", "accept", "Keep the present, delete every snapshot of its line.", _SNAPSHOTS),
    Entry("undelete", "delete", "undelete", "Take a delete back whose merge has not begun.", _SNAPSHOTS),
    Entry("merge", "merge", "merge", "Carry out the pending merges of stopped VMs.", _SNAPSHOTS),
    Entry("detach", "places", "detach", "Let a VM no longer depend on images that others use.", _SNAPSHOTS),
    Entry("rename", "edit", "rename", "Give a snapshot another name.", _SNAPSHOTS),
    Entry("describe", "edit", "describe", "Give a snapshot a description.", _SNAPSHOTS),
    Entry("protect", "edit", "protect", "Protect a snapshot against deletion.", _SNAPSHOTS),
    Entry("unprotect", "edit", "unprotect", "Take a snapshot's protection away.", _SNAPSHOTS),
    Entry("status", "health", "status", "One line a VM: state, snapshots, space, what to look at.", _HEALTH),
    Entry("check", "health", "check", "Hold records, files and hypervisor against each other.", _HEALTH),
    Entry("doctor", "health", "doctor", "Look at the host: QEMU, KVM, memory saving, locks, places.", _HEALTH),
    Entry("adopt", "records", "adopt", "Take up a libvirt domain, and what others did to its chains.", _HEALTH),
    Entry("forget", "records", "forget", "Let go of a libvirt domain: its records go, its images stay.", _HEALTH),
    Entry("move", "places", "move", "Move all layers and records of a VM to another directory.", _HEALTH),
    Entry("setup", "setup", "setup", "Install the libvirt hook.", _HEALTH),
    Entry("base", "base", "base", "Seal a base that VMs share, verify it, list who uses it.", _HEALTH),
    Entry("recover", "recover", "recover", "Finish or undo what was interrupted.", _HEALTH),
]
_TABLE = {entry.name: entry for entry in COMMANDS}
_ALIASES = {"rollback": "revert", "rm": "delete"}


class LazyGroup(click.Group):
    """A group that knows its commands from a table, and imports one when it is invoked."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the table."""
        return list(_TABLE)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        entry = _TABLE.get(_ALIASES.get(cmd_name, cmd_name))
        if entry is None:
            _suggest(ctx, cmd_name)
            return None
        command = getattr(importlib.import_module(f"diskchain.cli.{entry.module}"), entry.attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands in their sections."""
        width = max(map(len, _TABLE))
        for section in dict.fromkeys(entry.section for entry in COMMANDS):
            with formatter.section(section):
                rows = [(e.name.ljust(width), e.help) for e in COMMANDS if e.section == section]
                formatter.write_dl(rows)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Offer commands (from the table) and options."""
        found = [CompletionItem(e.name, help=e.help) for e in COMMANDS if e.name.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)


def _suggest(ctx: click.Context, name: str) -> None:
    close = importlib.import_module("difflib").get_close_matches(name, _TABLE, n=1)
    if close:
        ctx.fail(f"there is no command {name!r}; did you mean {close[0]!r}?")


def _told(ctx: click.Context, name: str, value: Any) -> None:
    """Note a global option that was given (before or after the command)."""
    app = ctx.ensure_object(App)
    if name == "verbose":
        app.verbose += value
    elif value not in (None, False):
        setattr(app, name, value)


def _note(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    _told(ctx, str(param.name), value)


def common(command: F) -> F:
    """Let a command accept --json, -q and -v after its name too."""
    for option in (
        click.option("-v", "--verbose", count=True, expose_value=False, callback=_note,
                     help="Say more; -vv everything."),
        click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_note, help="No progress."),
        click.option("--json", is_flag=True, expose_value=False, callback=_note, help="Answer with one JSON object."),
    ):  # fmt: skip
        command = option(command)
    return command


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"diskchain {_version()}")
        ctx.exit()


def _version() -> str:
    metadata = importlib.import_module("importlib.metadata")  # takes 20 ms; nobody else needs it
    try:
        return str(metadata.version("diskchain"))
    except metadata.PackageNotFoundError:
        return "(not installed, from its source tree)"


def _begin_part(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """--part FD:IDS of our own making (many.py): work on one VM for a process that reads our stdout."""
    if value is None:
        return
    fd, given, ids = value.partition(":")
    if not fd.isdecimal():
        raise click.BadParameter("it is for diskchain's own use", ctx=ctx, param=param)
    os.set_inheritable(int(fd), False)
    os.dup2(1, 2)  # what we say there is passed on line by line, as it comes
    approved = tuple(filter(None, ids.split(","))) if given else None
    ctx.ensure_object(App).part = Part(approved=approved, until=int(fd))


@click.group(
    cls=LazyGroup,
    context_settings={
        "auto_envvar_prefix": "DISKCHAIN",
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
    },
    epilog="Example: diskchain create web1 before-upgrade",
)
@click.option("-c", "--connect", metavar="URI", expose_value=False, callback=_note, help="libvirt connection.")
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    envvar="DISKCHAIN_CONFIG",
    expose_value=False,
    callback=_note,
    help="Read only this configuration.",
)
@click.option(
    "--color", type=click.Choice(["auto", "always", "never"]), expose_value=False, callback=_note, help="Colours."
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version,
              allow_from_autoenv=False, help="Show the version.")  # fmt: skip
@click.option("--part", hidden=True, expose_value=False, callback=_begin_part, allow_from_autoenv=False)
@common
@click.pass_context
def root(ctx: click.Context) -> None:
    """Snapshots of QEMU virtual machines as qcow2 overlay chains, with memory."""
    ctx.ensure_object(App)


def main(argv: Sequence[str]) -> int:
    """Run one command line; return its exit code. Every error ends here, in one line and a hint."""
    app = App()
    code = _run(app, list(argv))
    if app.part:
        _hand_over(app.part)
    error = streams.unwritten()
    return _unwritten(app, code, error) if error else code


def _unwritten(app: App, code: int, error: OSError) -> int:
    """The answer could not be written: that is told, and never that nothing was changed. What failed has its own code."""
    if code not in (0, 10, 11):
        return code
    if isinstance(error, BrokenPipeError):
        return 141
    done = "done; " if app.changes else ""
    click.echo(f"diskchain: {done}the answer could not be written: {_of_the_system(error)}", err=True)
    return Degraded.exit_code if app.changes else 1


def _run(app: App, argv: list[str]) -> int:
    try:
        result = root.main(argv, prog_name="diskchain", standalone_mode=False, obj=app)
    except click.exceptions.ClickException as error:
        return _report_usage(app, argv, error)
    except click.Abort as error:
        return _report_abort(app, error)
    except KeyboardInterrupt:
        return _report(app, 130, "Interrupted", app.interrupted, None)
    except Signalled as error:
        return _report(app, 128 + error.number, "Interrupted", app.interrupted, None)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except Exception as error:
        return _report(app, *explained(app, error))
    return result if isinstance(result, int) and result else app.exit_code


def _report_usage(app: App, argv: Sequence[str], error: click.ClickException) -> int:
    app.json = app.json or "--json" in argv
    ctx = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return 2
    if isinstance(error, click.FileError):
        return _report(app, 2, "UsageError", error.format_message(), None)
    hint = f"{ctx.command_path} --help" if ctx else "diskchain --help"
    return _report(app, 2, "UsageError", error.format_message(), hint)


def _report_abort(app: App, error: click.Abort) -> int:
    if isinstance(error.__cause__, EOFError):
        return _report(app, 1, "NotConfirmed", "nothing was changed", None)
    return _report(app, 130, "Interrupted", app.interrupted, None)


def _of_the_system(error: OSError) -> str:
    text = error.strerror or str(error)
    return f"{error.filename}: {text}" if error.filename else text


def explained(app: App, error: Exception) -> tuple[int, str, str, str | None]:
    """Given an error, return its exit code, kind, message and hint. A bug is shown whole with -vv."""
    if isinstance(error, DiskchainError):
        return error.exit_code, error.kind, error.message, error.hint
    if isinstance(error, OSError):
        if isinstance(error, PermissionError):
            return 6, "Refused", _of_the_system(error), "run it as root, or as the owner of that file or directory"
        return 1, "OSError", _of_the_system(error), "look at dmesg and at that file, then try again"
    if app.verbose > 1:
        sys.excepthook(type(error), error, error.__traceback__)
    return 1, "Bug", f"{type(error).__name__}: {error}", "this is a bug; run again with -vv"


def _hand_over(part: Part) -> None:
    """Give the process that started us what it prints: a line that begins with RECORD."""
    record = {"body": part.body, "lines": part.lines, "error": part.error}
    sys.stdout.write(f"\n{RECORD}{json.dumps(record)}\n")


def _report(app: App, code: int, kind: str, message: str, hint: str | None) -> int:
    """Say what went wrong on stderr; with --json on stdout too, unless the answer is there already."""
    if app.part:
        app.part.error = error_json(code, kind, message, hint)
        return code
    for line in error_lines(message, hint):
        click.echo(_coloured(app, line), err=True)
    if app.json and not app.answered:
        app.answered = True
        so_far = {"results": app.results} if app.results else {}
        click.echo(json.dumps({"schema": 1, **so_far, "error": error_json(code, kind, message, hint)}))
    return code


def error_lines(message: str, hint: str | None) -> list[str]:
    """Return an error as it is shown: one line, and one with what to do."""
    lines = [f"diskchain: {printable(message)}"]
    if hint:
        lines.append(f"  {printable(hint)}" if hint.startswith("this is a bug") else f"  try: {printable(hint)}")
    return lines


def error_json(code: int, kind: str, message: str, hint: str | None) -> dict[str, Any]:
    """Return the form of an error that scripts see."""
    return {"code": code, "kind": kind, "message": message, "hint": hint}


def _coloured(app: App, line: str) -> str:
    return click.style(line, fg="red") if line.startswith("diskchain:") and wants_color(app, sys.stderr) else line


def wants_color(app: App, stream: Any) -> bool:
    """Whether to colour what goes to the stream: --color, NO_COLOR, terminal or not."""
    if app.color != "auto":
        return app.color == "always"
    return not os.environ.get("NO_COLOR") and streams.is_terminal(stream)
