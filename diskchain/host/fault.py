"""Named fault points: where tests kill, stop or fail us.

Switched by the environment variable DISKCHAIN_FAULT of *this* process, so nobody else can reach it and no file in
a shared directory can. Without the variable a point costs one dictionary look-up.

    DISKCHAIN_FAULT=trace:FILE          append the name of every point passed to FILE
    DISKCHAIN_FAULT=kill:NAME           SIGKILL ourselves at that point      (NAME#2: the second time it is passed)
    DISKCHAIN_FAULT=stop:NAME           SIGSTOP ourselves there
    DISKCHAIN_FAULT=fail:NAME           raise OSError(EIO) there
    DISKCHAIN_FAULT=skip:NAME           leave away what stands behind `if not skipped(NAME)`
    (several: separated by semicolons)
    DISKCHAIN_FAULT=full:NAME           raise OSError(ENOSPC) there
"""

from __future__ import annotations

import errno
import os
import signal

_passed: dict[str, int] = {}


def point(name: str) -> None:
    """Given the name of a fault point, do what DISKCHAIN_FAULT asks for there; normally nothing."""
    spec = os.environ.get("DISKCHAIN_FAULT")
    if spec:
        for one in spec.split(";"):
            _consider(one, name)


def _consider(spec: str, name: str) -> None:
    action, _, rest = spec.partition(":")
    if action == "trace":
        _append(rest, name)
        return
    wanted, _, nth = rest.partition("#")
    if wanted != name:
        return
    _passed[name] = _passed.get(name, 0) + 1
    if _passed[name] == int(nth or 1):
        _act(action)


def skipped(name: str) -> bool:
    """Whether DISKCHAIN_FAULT asks to leave something away; normally False."""
    return f"skip:{name}" in os.environ.get("DISKCHAIN_FAULT", "").split(";")


def _append(file: str, name: str) -> None:
    fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, name.encode() + b"\n")
    finally:
        os.close(fd)


def _act(action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "fail":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    elif action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
