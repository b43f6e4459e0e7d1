"""The machine file: what is right is read, what is wrong is named with key and line."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskchain.chain.machine import Machine, parse_machine_file, parse_size
from diskchain.errors import BadMachineFile

GOOD = """name = "web1"
memory = "1 GiB"
cpus = 2
accel = "auto"
firmware = "bios"
machine = "q35"
kernel = "vmlinuz"
console = "log"
extra = ["-device", "virtio-rng-pci"]
[[disk]]
target = "vda"
image = "web1.qcow2"
role = "os"
[[disk]]
target = "vdb"
image = "data.raw"
format = "raw"
"""


def test_the_documented_file_is_read() -> None:
    machine = parse_machine_file(GOOD, "web1.toml")
    assert (machine.name, machine.memory, machine.cpus) == ("web1", 1 << 30, 2)
    assert [(d.target, d.image, d.fmt, d.role) for d in machine.disks] == [
        ("vda", "web1.qcow2", "", "os"),
        ("vdb", "data.raw", "raw", "data"),
    ]
    assert machine.extra == ("-device", "virtio-rng-pci")
    assert len(machine.nets) == 1
    assert Machine.from_dict(machine.to_dict()) == machine


@pytest.mark.parametrize(
    ("change", "line", "words"),
    [
        ('cpus = 2->cpus = "two"', 3, "cpus"),
        ("cpus = 2->cpu_count = 2", 3, "cpu_count"),
        ('memory = "1 GiB"->memory = "much"', 2, "memory"),
        ('memory = "1 GiB"->memory = "1 KiB"', 2, "memory"),
        ('memory = "1 GiB"->memory = -5', 2, "memory"),
        ('name = "web1"->name = "../web1"', 1, "name"),
        ('accel = "auto"->accel = "xen"', 4, "accel"),
        ('firmware = "bios"\nmachine = "q35"->firmware = "uefi"\nmachine = "pc"', 5, "UEFI"),
        ('firmware = "bios"->firmware = "coreboot"', 5, "firmware"),
        ('accel = "auto"->tpm = "yes"', 4, "tpm"),
        ('machine = "q35"->machine = "q35,x=y"', 6, "machine"),
        ('target = "vdb"->target = "vda"', 15, "vda stands twice"),
        ('target = "vdb"->target = "hda"', 15, "target"),
        ('target = "vdb"->taget = "vdb"', 15, "taget"),
        ('format = "raw"->format = "vmdk"', 17, "format"),
        ('image = "data.raw"->size = 5', 16, "size"),
        ('console = "log"->console = "log"\ninitrd = 5', 9, "initrd"),
    ],
)
def test_a_wrong_key_is_named_with_its_line(change: str, line: int, words: str) -> None:
    old, new = change.split("->")
    with pytest.raises(BadMachineFile) as caught:
        parse_machine_file(GOOD.replace(old, new), "web1.toml")
    assert re.search(rf"web1\.toml, line {line}: .*{re.escape(words)}", caught.value.message), caught.value.message
    assert caught.value.exit_code == 2 and caught.value.hint


def test_broken_toml_says_where() -> None:
    with pytest.raises(BadMachineFile, match="line 2"):
        parse_machine_file('name = "x"\nmemory = = 5\n', "f.toml")


@pytest.mark.parametrize(
    "text", ["", "name = 'x'\nmemory = '1G'\n", "name='x'\nmemory='1G'\ndisk = 5\n", "name='x'\nmemory='1G'\n[disk]\n"]
)
def test_without_disks_it_is_refused(text: str) -> None:
    with pytest.raises(BadMachineFile):
        parse_machine_file(text, "f.toml")


@given(st.text())
def test_any_text_is_answered_with_a_clear_error_or_a_machine(text: str) -> None:
    with contextlib.suppress(BadMachineFile):
        parse_machine_file(text, "f.toml")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner), max_leaves=5),
       st.sampled_from(["name", "memory", "cpus", "extra", "nets", "machine", "agent", "uuid"]))  # fmt: skip
def test_any_value_of_any_key_is_answered_with_a_clear_error(value: object, key: str) -> None:
    import json

    if value is None:
        return
    text = f"{key} = {json.dumps(value)}\n" + "\n".join(x for x in GOOD.splitlines() if not x.startswith(f"{key} "))
    try:
        parse_machine_file(text, "f.toml")
    except BadMachineFile as error:
        assert "\n" not in error.message or "TOML" in error.message


@pytest.mark.parametrize(
    ("text", "size"), [("512M", 512 << 20), ("1 GiB", 1 << 30), ("2g", 2 << 30), ("4096", 4096), ("1.5G", 3 << 29)]
)
def test_sizes_are_binary(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "1X", "-1", "1 2"])
def test_nonsense_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


def test_size_without_end_is_no_size() -> None:
    """Found by scripts/torture (fuzz): a float that is infinite."""
    with pytest.raises(ValueError, match="no size"):
        parse_size("9" * 4000)


@pytest.mark.parametrize("value", ["[" * 5000, "9" * 5000])
def test_parse_nested_too_deeply_or_a_number_without_end_is_an_error_in_words(value: str) -> None:
    """tomllib recurses, int() has a limit; found by scripts/torture (fuzz)."""
    with pytest.raises(BadMachineFile):
        parse_machine_file("name = " + value, "deep.toml")
