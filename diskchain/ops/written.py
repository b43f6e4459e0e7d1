"""Names that go into records and headers: what can't be written there is refused before anything is done."""

from __future__ import annotations

from pathlib import Path

from diskchain.chain.text import printable
from diskchain.errors import BadName, NotFound
from diskchain.host import qemu_img


def refuse_unwritable(path: Path) -> None:
    """Raise BadName for a path with control characters, or with bytes that are no UTF-8: a record can't hold these, a
    header must not.
    """
    if qemu_img.has_unwritable(str(path)):
        raise BadName(f"{printable(str(path))} has control characters, or bytes that are no UTF-8: such a name can't be recorded",
                      hint="rename the file or its directory")  # fmt: skip


def directory_for_layers(directory: Path) -> Path:
    """Return a directory that layers are to be made in, without symlinks. Raise NotFound, BadName."""
    if not directory.is_dir():
        raise NotFound(f"{directory} is no directory", hint="make it; QEMU's user must be able to search it")
    refuse_unwritable(directory.resolve())
    return directory.resolve()
