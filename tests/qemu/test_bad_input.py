"""Wrong names: a clear error, the documented exit code, and not one byte of difference."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.refusals import check_error, refused, unchanged
from tests.support.rig import Answer, Rig

ON_A_SNAPSHOT = [
    ("revert", "vm", "NAME", "-y"), ("delete", "vm", "NAME", "-y"), ("delete", "vm", "s2", "NAME", "-y"),
    ("show", "vm", "NAME"), ("rename", "vm", "NAME", "other"), ("describe", "vm", "NAME", "text"),
    ("protect", "vm", "NAME"), ("unprotect", "vm", "NAME"),
]  # fmt: skip
ON_A_VM = [
    ("start", "NAME"), ("stop", "NAME"), ("pause", "NAME"), ("resume", "NAME"), ("create", "NAME", "x"),
    ("list", "NAME"), ("tree", "NAME"), ("undo", "NAME", "-y"), ("merge", "NAME"), ("recover", "NAME"),
    ("machine", "undefine", "NAME", "-y"), ("revert", "NAME", "s1", "-y"), ("delete", "NAME", "s1", "-y"),
]  # fmt: skip
HOSTILE = {
    "parent": "..", "dot": ".", "slash": "a/b", "absolute": "/etc/passwd", "newline": "a\nb", "escape": "a\x1b[31mb",
    "tab": "a\tb", "dash": "-rf", "long": "n" * 300, "bidi": "a\u202eb", "no-utf8": "a\udcff\udcfe", "empty": "",
    "space": " ", "trailing": "a ", "line-separator": "a\u2028b", "delete": "a\x7f", "c1": "a\x9bb",
}  # fmt: skip


def named(args: tuple[str, ...], name: str) -> list[str]:
    """Put the name in its place."""
    return [name if word == "NAME" else word for word in args]


def test_unknown_snapshot_is_not_found_by_every_command(tree: Rig) -> None:
    """Exit 4 with the command that lists what there is."""
    with unchanged(tree):
        for args in ON_A_SNAPSHOT:
            error = refused(tree, *named(args, "nosuch"), code=4, says="nosuch")
            assert error["hint"] == "diskchain list vm"


def test_unknown_vm_is_not_found_by_every_command(tree: Rig) -> None:
    """Exit 4, also for names that would be paths."""
    with unchanged(tree):
        for args in ON_A_VM:
            refused(tree, *named(args, "nosuch"), code=4, says="nosuch")
        for name in ("../vm", "", "a\nb", "a\udcff", "n" * 300):
            refused(tree, "start", "--", name, code=4)


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_name_for_a_new_snapshot_says_what_is_wrong(tree: Rig, kind: str) -> None:
    """Exit 2."""
    with unchanged(tree):
        refused(tree, "create", "vm", "--", HOSTILE[kind], code=2, says="snapshot name")


def test_hostile_name_is_refused_by_rename_and_keep_as_too(tree: Rig) -> None:
    """The same rules wherever a name is given; looking for such a snapshot finds none."""
    with unchanged(tree):
        for kind in ("parent", "newline", "empty", "no-utf8"):
            refused(tree, "rename", "vm", "s1", "--", HOSTILE[kind], code=2, says="snapshot name")
            refused(tree, "revert", "vm", "s1", "-y", f"--keep-as={HOSTILE[kind]}", code=2, says="snapshot name")
        for kind in ("parent", "escape", "no-utf8", "dash", "empty", "bidi"):
            refused(tree, "revert", "-y", "vm", "--", HOSTILE[kind], code=4)
        refused(tree, "delete", "-y", "vm", "--", HOSTILE["absolute"], code=4)


def test_leading_dash_without_the_two_dashes_is_a_usage_error(tree: Rig) -> None:
    """Click takes it for an option: exit 2 and the command's help as a hint."""
    with unchanged(tree):
        refused(tree, "create", "vm", "-rf", code=2)
        refused(tree, "rename", "vm", "s1", "--rf", code=2)


def test_bytes_that_are_no_text_come_through_argv_as_a_clean_error(tree: Rig) -> None:
    """As bytes, with a locale that has no UTF-8 either."""
    argv: list[str | bytes] = [sys.executable, "-m", "diskchain", "--json", "create", "vm", b"a\xff\xfeb"]
    with unchanged(tree):
        for language in ("C", "C.UTF-8"):
            env = {**tree.env, "LC_ALL": language}
            done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
            check_error(Answer(done.returncode, done.stdout, done.stderr), code=2, says="UTF-8")


def test_name_that_is_taken_is_refused_also_in_another_unicode_form(tree: Rig) -> None:
    """Exit 2; the name of another snapshot, in whatever form it was typed."""
    tree.ok("rename", "vm", "s2", "caf\u00e9")
    with unchanged(tree):
        for name in ("s1", "cafe\u0301", "caf\u00e9"):
            refused(tree, "create", "vm", name, code=2, says="already")
            refused(tree, "rename", "vm", "s3", name, code=2, says="already")
            refused(tree, "revert", "vm", "s3", "-y", "--keep-as", name, code=2, says="already")


def test_description_of_hostile_text_is_kept_and_shown_harmlessly(tree: Rig) -> None:
    """A description is free text: it is stored, and no terminal gets its control characters."""
    tree.ok("describe", "vm", "s1", "a\x1b]0;evil\x07\u202e\nb\udcff")
    for args in (("list", "vm"), ("show", "vm", "s1"), ("tree", "vm")):
        shown = tree.ok(*args).out
        assert all(c.isprintable() or c in "\n\t" for c in shown), shown
    assert tree.verdict(present="now") == []
    refused(tree, "describe", "vm", "s1", "x" * 4001, code=2)


def test_contradicting_options_and_missing_confirmation_change_nothing(tree: Rig) -> None:
    """Exit 2, before anything is looked at."""
    with unchanged(tree):
        refused(tree, "revert", "vm", "s1", "--discard", "--keep-as", "k", "-y", code=2)
        refused(tree, "revert", "vm", "s1", "--start", "--stopped", "-y", code=2)
        refused(tree, "create", "vm", "x", "--memory", "--disk-only", code=2)
        refused(tree, "recover", "vm", "--undo", "--finish", code=2)
        refused(tree, "revert", "vm", "s1", code=2, says="confirmation")
        refused(tree, "delete", "vm", "s3", code=2, says="confirmation")
        refused(tree, "create", "vm", "x", "--wait", "soon", code=2)
        refused(tree, "create", "vm", "x", "--memory", code=6, says="off")
        refused(tree, "delete", "vm", "s1", "--when-stopped", "--copy", "-y", code=2)
        refused(tree, "pause", "vm", code=6)
        refused(tree, "start", "libvirt:vm", code=4)


def test_one_wrong_name_of_several_deletes_none(tree: Rig) -> None:
    """All or none: the wrong one is the last."""
    with unchanged(tree):
        refused(tree, "delete", "vm", "before-revert-1", "s3", "nosuch", "-y", code=4)
    tree.ok("protect", "vm", "s3")
    with unchanged(tree):
        refused(tree, "delete", "vm", "before-revert-1", "s3", "-y", code=6, says="protected")
