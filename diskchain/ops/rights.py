"""May we do to a file what a merge does to it? Asked before anything changes; nothing is written."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from diskchain.errors import Refused
from diskchain.host import files
from diskchain.host.as_user import name_of

_HINT = "run diskchain as its owner or as root, or change owner and mode; see also lsattr, findmnt"


def refuse_unwritable(path: Path) -> None:
    """Raise Refused, naming it, for an image that we can't write: it is opened for that."""
    error = _refusal(path)
    if error is not None:
        status = path.stat()
        raise Refused(f"{path} can't be written by us ({os.strerror(error)}): mode {stat.S_IMODE(status.st_mode):o}, "
                      f"owner {name_of(status.st_uid)}", hint=_HINT)  # fmt: skip


def refuse_unremovable(path: Path) -> None:
    """Raise Refused, naming it, for a file that we can't remove, as far as its directory, its owner and its flags tell."""
    error, directory, file = _refusal(path), path.parent.stat(), path.stat()
    allowed = os.access(path.parent, os.W_OK | os.X_OK, effective_ids=True)
    if directory.st_mode & stat.S_ISVTX:
        allowed = allowed and os.geteuid() in (0, file.st_uid, directory.st_uid)
    if not allowed:
        raise Refused(f"{path} can't be removed by us: mode {stat.S_IMODE(directory.st_mode):o} of {path.parent}, "
                      f"owner {name_of(directory.st_uid)}", hint=_HINT)  # fmt: skip
    if error == errno.EPERM:
        raise Refused(f"{path} can't be removed by us: it is immutable or append-only", hint=f"chattr -ia '{path}'")


def _refusal(path: Path) -> int | None:
    """Why it can't be opened for writing, or None: EPERM is a flag (chattr), EACCES a mode. Raise what it is besides."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            return error.errno
        raise files.translated(error, path, "open for writing") from error
    return None
