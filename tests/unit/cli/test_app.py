"""Help, the border where errors end, names, options before and after the command."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import click
import pytest

from diskchain.cli.app import COMMANDS, root
from diskchain.cli.options import parse_rate
from diskchain.config import Config, parse_duration

from .conftest import Run, Web1

BAD_NAMES = ["..", ".", "a/b", "a\nb", " a", "n" * 300, "a\u202eb", "a\x1b[31m"]
DESTROYING = [["revert", "web1", "one"], ["delete", "web1", "one"], ["machine", "undefine", "web1"],
              ["recover", "web1", "--undo"]]  # fmt: skip


def commands() -> list[list[str]]:
    ctx = click.Context(root)
    found = [[entry.name] for entry in COMMANDS]
    group = root.get_command(ctx, "machine")
    assert isinstance(group, click.Group)
    return [[], *found, *(["machine", name] for name in group.list_commands(ctx))]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_help_of_every_command_ends_with_an_example(run: Run, words: list[str]) -> None:
    help_text = run(*words, "--help").out
    assert help_text.rstrip().splitlines()[-1].strip().startswith("Example: diskchain " + " ".join(words))


def test_help_names_every_command_and_none_that_is_not_built(run: Run) -> None:
    lines = run("--help").out.splitlines()
    shown = [line.split()[0] for line in lines if line.startswith("  ") and line.split()[0].replace("-", "").isalpha()]
    assert [entry.name for entry in COMMANDS] == [word for word in shown if word in {e.name for e in COMMANDS}]
    assert not {"backup", "watch", "report"} & set(shown)
    sections = [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert sections == ["Options", "Machines", "Any VM", "Snapshots", "Health"]


def test_help_imports_nothing_heavy() -> None:
    code = ("import sys; from diskchain.cli.app import main; main(['--help']); "
            "sys.exit(any(m in sys.modules for m in ('asyncio', 'rich', 'qemu', 'libvirt', 'diskchain.ops')))")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_table_of_commands_fits_their_modules(run: Run) -> None:
    ctx = click.Context(root)
    assert all(root.get_command(ctx, entry.name) is not None for entry in COMMANDS)
    assert root.get_command(ctx, "rm") is root.get_command(ctx, "delete")
    assert root.get_command(ctx, "rollback") is root.get_command(ctx, "revert")


@pytest.mark.parametrize("command", ["list", "tree", "start", "create", "undo", "merge", "recover"])
def test_unknown_vm_exits_4_in_text_and_json(run: Run, command: str) -> None:
    answer = run(command, "nope", code=4)
    assert answer.out == ""
    assert answer.err == "diskchain: there is no VM 'nope'\n  try: diskchain machine list\n"
    error = run(command, "nope", "--json", code=4).json["error"]
    assert (error["code"], error["kind"]) == (4, "NotFound")


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "..", "a\x1b[31mb"])
def test_vm_name_that_cannot_be_exits_4_and_is_escaped(run: Run, name: str) -> None:
    for words in (["list", name], ["machine", "undefine", name, "-y"]):
        assert "\x1b" not in run(*words, code=4).err


@pytest.mark.parametrize(("words", "code"), [
    (["list", "libvirt:web1"], 4),
    (["-c", "qemu+unix:///system?socket=/nonexistent/socket", "list"], 9),
    (["-c", "qemu+ssh://elsewhere/system", "list"], 6),
    (["-c", "xen:///", "list"], 6),
])  # fmt: skip
def test_libvirt_that_is_not_there_or_not_ours_is_refused(run: Run, words: list[str], code: int) -> None:
    run(*words, code=code)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_create_with_bad_name_exits_2_and_changes_nothing(web1: Web1, name: str) -> None:
    assert "\x1b" not in web1.run("create", "web1", name, code=2).err
    assert web1.names() == []


def test_create_with_leading_dash_exits_2(web1: Web1) -> None:
    web1.run("create", "web1", "--", "-x", code=2)
    web1.run("create", "web1", "-x", code=2)
    web1.run("create", "web1", "one")
    web1.run("rename", "web1", "one", "--", "-x", code=2)
    assert web1.names() == ["one"]


@pytest.mark.parametrize("words", [["--json", "frobnicate"], ["list", "--json", "--frobnicate"], ["show", "--json"]])
def test_usage_error_with_json_is_an_object(run: Run, words: list[str]) -> None:
    assert run(*words, code=2).json["error"]["kind"] == "UsageError"


@pytest.mark.parametrize("words", DESTROYING, ids=" ".join)
def test_destroying_without_terminal_needs_yes(web1: Web1, words: list[str]) -> None:
    web1.run("create", "web1", "one")
    assert "--yes" in web1.run(*words, code=2).err
    assert web1.run(*words, "--json", code=2).json["error"]["code"] == 2
    assert web1.names() == ["one"]


@pytest.mark.parametrize("words", DESTROYING, ids=" ".join)
def test_dry_run_changes_nothing(web1: Web1, words: list[str]) -> None:
    web1.run("create", "web1", "one")
    assert set(web1.run(*words, "-n", "--json").json["plan"]) >= {
        "steps", "bytes", "space_needed", "downtime_estimate_s", "lost", "point_of_no_return"
    }  # fmt: skip
    web1.run(*words, "-n")
    assert web1.names() == ["one"]


def test_memory_option_takes_no_word_after_it(web1: Web1) -> None:
    assert "off" in web1.run("create", "web1", "--memory", "snap1", code=6).err
    web1.run("create", "web1", "--memory=never", "snap1", code=2)
    web1.run("create", "web1", "--memory", "--disk-only", code=2)


def test_json_is_taken_before_and_after_the_command_and_from_the_environment(
    web1: Web1, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (["--json", "list", "web1"], ["list", "--json", "web1"], ["machine", "--json", "list"]):
        assert web1.run(*words).json["schema"] == 1
    monkeypatch.setenv("DISKCHAIN_JSON", "1")
    assert web1.run("list", "web1").json["vm"] == "web1"


def test_config_file_with_unknown_key_exits_2(run: Run, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("frobnicate = 1\n")
    assert "frobnicate" in run("--config", str(tmp_path / "c.toml"), "list", code=2).err


def test_unexpected_exception_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Config:
        raise RuntimeError("boom\x1b")

    monkeypatch.setattr("diskchain.cli.context.load_config", fail)
    assert run("list", code=1).err == "diskchain: RuntimeError: boom\\x1b\n  this is a bug; run again with -vv\n"
    assert "Traceback" in run("list", "-vv", code=1).err


def test_broken_pipe_is_quiet(web1: Web1) -> None:
    command = f"{sys.executable} -m diskchain --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize(("text", "seconds"), [("500ms", 0.5), ("60s", 60), ("5m", 300), ("1h", 3600), ("2", 2)])
def test_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "rate"), [("200M", 200 << 20), ("1.5G/s", 3 << 29), ("64KiB", 1 << 16), ("65536", 1 << 16)]
)
def test_rate_is_read(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "M", "-5M", "1e9", "fast", "63K", "0", "1P"])
def test_rate_that_is_none_or_too_small_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"rate|less than"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["", "m", "-5s", "1y", "1e9", "٣s", "nan", "inf"])
def test_duration_that_is_none_is_refused(web1: Web1, text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)
    web1.run("create", "web1", f"--wait={text}", code=2)


def test_completion_offers_names_and_never_fails(web1: Web1, monkeypatch: pytest.MonkeyPatch) -> None:
    web1.run("create", "web1", "one")
    assert complete("list ", monkeypatch) == ["web1"]
    assert complete("show web1 ", monkeypatch) == ["one"]
    assert complete("show nope ", monkeypatch) == []
    assert "revert" in complete("re", monkeypatch)


def complete(line: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from click.shell_completion import BashComplete

    words = line.split(" ")
    found = BashComplete(root, {}, "diskchain", "_X").get_completions(words[:-1], words[-1])
    return [item.value for item in found]


# -- what is said ------------------------------------------------------------------------------------------------------


def test_wrong_words_are_told_apart_with_what_to_do(web1: Web1) -> None:
    def error(*words: str, code: int) -> str:
        found = web1.run(*words, "--json", code=code).json["error"]
        return f"{found['kind']}: {found['message']} / {found['hint']}"

    assert error("machine", "import", "bad name", "--disk", "x.qcow2", code=2).startswith("BadName: ")
    web1.run("create", "web1", "one")
    assert "leave one of them out" in error("delete", "web1", "one", "--older-than", "1d", code=2)
    assert "diskchain list web1" in error("delete", "web1", code=2)
    assert error("delete", "web1", "one", "--when-stopped", "--restart", code=2).endswith("/ diskchain delete --help")
    assert error("accept", "web1", "--when-stopped", "--restart", code=2).endswith("/ diskchain accept --help")
    for words in (["delete", "web1", "one"], ["accept", "web1"]):
        assert "--restart merges now" in error(*words, "--live", code=2)
    assert error("undo", "web1", "-y", code=4).endswith("see: diskchain list web1")
    assert error("create", "@nope", code=4) == (
        "NotFound: there is no group '@nope'; the configuration has no [groups] / diskchain machine list"
    )


def test_repair_is_offered_with_the_name_of_the_vm(web1: Web1) -> None:
    web1.run("create", "web1", "one")
    (web1.directory / "web1.qcow2").rename(web1.directory / "away")
    for words in (["start"], ["create"], ["check"]):
        answer = web1.run(words[0], "web1", "--json", code=None).out
        assert "check --repair web1" in answer and "--repair VM" not in answer


@pytest.mark.parametrize(("text", "said"), [
    ('wait = "soon"', "wait: 'soon' is no duration"),
    ("wait = true", "wait must be a number of seconds"), ("state_dir = 1", "state_dir must be a text in quotes"),
    ("[create]\nhuge_pages = 1", "create.huge_pages must be true or false"), ('[create]\nmemory = "x"', "auto or always or never"),
    ('image_roots = "/srv"', "must be a list of paths"),
])  # fmt: skip
def test_configuration_says_what_a_setting_must_be_whatever_the_command(
    run: Run, tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "c.toml").write_text(text)
    assert said in run("--config", str(tmp_path / "c.toml"), "list", code=2).err


def test_no_right_to_the_state_directory_is_told_in_words(
    web1: Web1, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> bool:
        if self.is_relative_to(tmp_path / "state"):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self)

    real = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", refuse)
    for words in (["list"], ["machine", "list"]):
        answer = web1.run(*words, code=6).err
        assert "state/machines: Permission denied\n" in answer and "dmesg" not in answer
    findings = web1.run("doctor", "--json", code=11).json["findings"]
    (found,) = [f for f in findings if f["code"] == "directory-not-writable"]
    assert found["subject"] == f"state_dir {tmp_path / 'state'}"
