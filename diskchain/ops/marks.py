"""Files and directories under names that anybody may want: which of them did this operation make?

A new file is made under a name that nobody else can know (its mark: it has the random id that the journal knew before), and
is written to by that name only. Beside it, the file gets the name that is wanted, unless that is taken: link(2) replaces
nothing. What has both names is ours. As long as the mark is there, no other file can get its inode; so the mark is on disk
before the name, and goes after it. A directory of ours holds its mark.

Without an id (an entry of an earlier version) nothing is known to be ours, and nothing is removed.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from diskchain.errors import ChainDamaged, Refused
from diskchain.host import files
from diskchain.host.fault import point
from diskchain.store import catalog as catalog_store


def mark_of(path: Path, key: str) -> Path:
    """Return the other name of a file that is being made, in the same directory."""
    return path.with_name(_name(key)) if key else path


def _name(key: str) -> str:
    return f".diskchain-new-{key}"


# -- files -------------------------------------------------------------------------------------------------------------


def create(path: Path, key: str) -> int:
    """Make a file; return its descriptor (the caller closes it). Raise Refused when the name is taken."""
    mark = mark_of(path, key)
    fd = files.create_exclusive(mark)
    try:
        files.fsync_dir(mark.parent)
        point("mark.made")
        files.link_new(mark, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def verify(path: Path, key: str) -> None:
    """Make sure that a name leads to the file that was made for it; a name that is gone is given again.

    Raise Refused when another file is there; ChainDamaged when that can't be told any more.
    """
    if not key:
        return
    mark = mark_of(path, key)
    if not mark.is_file():
        raise ChainDamaged(f"{mark} is gone: whether {path} is the file that was written there can't be told",
                           hint=f"if you are sure of it: ln '{path}' '{mark}', then: diskchain recover")  # fmt: skip
    if files.are_one(mark, path):
        return
    if os.path.lexists(path):
        raise Refused(f"{path} is not the file that diskchain wrote there (that is {mark} now)",
                      hint="move it away, then: diskchain recover")  # fmt: skip
    files.link_new(mark, path)
    files.fsync_dir(path.parent)


def unmake(path: Path, key: str) -> None:
    """Remove a file that was made, and nothing else. Can be repeated."""
    if not key:
        return
    mark = mark_of(path, key)
    if files.are_one(mark, path):
        files.unlink_durably(path)
        point("mark.unnamed")
    files.unlink_durably(mark)


def forget(path: Path, key: str) -> None:
    """It is in use: it keeps its name only. Can be repeated."""
    if key:
        files.unlink_durably(mark_of(path, key))


# -- a directory of records --------------------------------------------------------------------------------------------


def make_directory(path: Path, key: str) -> None:
    """Make a directory, durably. Raise Refused when it is there."""
    files.make_dirs_durably(path.parent)
    with files.os_errors(path, "create"):
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            raise Refused(f"{path} is there already", hint="move it away, or choose another directory") from None
    point("mark.directory-made")
    os.close(files.create_exclusive(path / _name(key)))
    files.fsync_dir(path)
    files.fsync_dir(path.parent)


def verify_directory(path: Path, key: str) -> None:
    """Raise ChainDamaged unless this operation made the directory."""
    if key and not (path / _name(key)).is_file():
        raise ChainDamaged(f"{path} is not the directory that diskchain made there",
                           hint="bring that back, then: diskchain recover")  # fmt: skip


def unmake_records(path: Path, key: str) -> None:
    """Remove records that were made, and no others; an empty directory may go. Can be repeated."""
    if key and (path / _name(key)).is_file():
        catalog_store.remove(path, last=_name(key))
    for directory in (path, path.parent):
        with contextlib.suppress(OSError):
            directory.rmdir()


def forget_directory(path: Path, key: str) -> None:
    """It counts: it is like any other. Can be repeated."""
    if key:
        files.unlink_durably(path / _name(key))
