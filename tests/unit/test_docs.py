"""The documents say what the code does: every command, key, setting and exit code stands in its document."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import click
import pytest

from diskchain import errors
from diskchain.chain import machine
from diskchain.cli.app import COMMANDS, Entry, root
from diskchain.config import Config, load_config

ROOT = Path(__file__).resolve().parents[2]
TEXTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
# made in pieces, so that this file does not hold what it looks for
FORBIDDEN = ["/" + "work/", "/" + "tmp/w/", "/" + "root/", "/" + "opt/pypi", "py" + "env"]


def text(name: str) -> str:
    """Return one document."""
    return (ROOT / name).read_text()


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield every command of the table, and the commands of groups, with the words to type."""
    ctx = click.Context(root)
    for entry in COMMANDS:
        command = root.get_command(ctx, entry.name)
        assert command
        if isinstance(command, click.Group):
            yield from ((f"{entry.name} {name}", sub) for name, sub in command.commands.items())
        else:
            yield entry.name, command


def settings(value: object, prefix: str = "") -> Iterator[str]:
    """Yield the names of all settings, tables with a dot."""
    assert is_dataclass(value)
    for field in fields(value):
        item = getattr(value, field.name)
        if is_dataclass(item):
            yield from settings(item, f"{field.name}.")
        else:
            yield prefix + field.name


def error_classes(base: type[errors.DiskchainError] = errors.DiskchainError) -> Iterator[type[errors.DiskchainError]]:
    """Yield every class of errors.py."""
    if base.__module__ == errors.__name__:
        yield base
    for below in base.__subclasses__():
        yield from error_classes(below)


@pytest.mark.parametrize("entry", COMMANDS, ids=lambda entry: entry.name)
def test_commands_every_one_has_a_heading(entry: Entry) -> None:
    """docs/commands.md has a section for it."""
    assert re.search(rf"^### {entry.name}$", text("docs/commands.md"), re.MULTILINE)


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=lambda value: str(value))
def test_commands_every_option_is_named(name: str, command: click.Command) -> None:
    """Each command stands there as it is typed, and each of its options somewhere."""
    document = text("docs/commands.md")
    assert f"diskchain {name} " in document
    options = [p for p in command.params if isinstance(p, click.Option)]
    missing = [o.opts for o in options if not any(re.search(rf"(?<![\w-]){opt}(?![\w-])", document) for opt in o.opts)]
    assert not missing


def test_commands_no_section_of_a_command_that_is_not_there() -> None:
    """Nothing is promised that can't be typed."""
    headings = set(re.findall(r"^### (\S+)$", text("docs/commands.md"), re.MULTILINE))
    assert headings == {entry.name for entry in COMMANDS}


@pytest.mark.parametrize(
    "key", sorted({*machine._MACHINE_KEYS, *machine._DISK_KEYS, *machine._NET_KEYS})
)  # fmt: skip
def test_machine_file_every_key_has_a_row(key: str) -> None:
    """docs/machine-file.md explains it."""
    assert f"\n| `{key}` |" in text("docs/machine-file.md")


def test_machine_file_examples_are_read() -> None:
    """The example of docs/machine-file.md and the one of README.md are machine files."""
    for name in ("docs/machine-file.md", "README.md"):
        found = [b for b in blocks(text(name)) if "[[disk]]" in b and b.startswith("name =")]
        assert found, name
        for block in found:
            assert machine.parse_machine_file(block, name).disks


def blocks(document: str) -> list[str]:
    """Return the indented blocks of a document, without the indent."""
    found = re.findall(r"(?:^    .*\n(?:^\n(?=    ))?)+", document, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in found]


@pytest.mark.parametrize("name", list(settings(Config())))
def test_configuration_every_setting_has_a_row(name: str) -> None:
    """docs/configuration.md explains it."""
    assert f"\n| `{name}` |" in text("docs/configuration.md")


def test_configuration_example_holds_the_defaults(tmp_path: Path) -> None:
    """The example is a whole configuration, and changes nothing."""
    (example,) = [b for b in blocks(text("docs/configuration.md")) if "state_dir" in b]
    file = tmp_path / "diskchain.toml"
    file.write_text(example)
    assert load_config(file, env={}) == Config()
    assert set(re.findall(r"^(\w+) =", example, re.MULTILINE)) == {n.split(".")[-1] for n in settings(Config())}


def test_configuration_a_word_that_is_none_of_a_settings_words_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "diskchain.toml"
    file.write_text('[merge]\nio_priority = "low"\n')
    with pytest.raises(errors.UsageError, match=r"merge\.io_priority is 'low'"):
        load_config(file, env={})


def test_exit_codes_every_class_stands_in_the_row_of_its_code() -> None:
    """docs/exit-codes.md has a row for each code, with the kinds that scripts see."""
    rows = dict(re.findall(r"^\| (\d+) \| (.*?) \|", text("docs/exit-codes.md"), re.MULTILINE))
    for found in error_classes():
        assert f"`{found.__name__}`" in rows.get(str(found.exit_code), ""), found.__name__


def test_troubleshooting_every_code_of_a_finding_has_a_row() -> None:
    """docs/troubleshooting.md says what each means."""
    sources = [ROOT / "diskchain/chain/rules.py", *(ROOT / "diskchain/ops").glob("*.py")]
    made = re.compile(r'\b(?:info|warning|error)\(\s*"([a-z][a-z-]+)"')
    codes = {code for path in sources for code in made.findall(path.read_text())}
    assert len(codes) > 40
    assert codes - set(re.findall(r"`([a-z-]+)`", text("docs/troubleshooting.md"))) == set()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    """Every relative link of a document exists."""
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_texts_name_no_place_of_the_machine_they_were_written_on(path: Path) -> None:
    """No paths of somebody's workplace."""
    found = [word for word in FORBIDDEN if word in path.read_text()]
    assert not found


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_tests_and_scripts_that_texts_name_exist(path: Path) -> None:
    """A path below tests/ or scripts/ that is named in backquotes exists."""
    named = re.findall(r"`((?:tests|scripts|docs)/[\w./-]+)`", path.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []
