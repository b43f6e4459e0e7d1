"""Run the command line in processes that are forked from one that has imported everything already.

Starting Python and importing diskchain takes 0.25 s of processor; the tests run thousands of commands. What they run
here is the same `main` in a process of its own, with its own environment, descriptors, exit code and signals; what
needs a start of its own (a terminal, another user, a prefix) uses Rig.popen.

    process A (this module as a program)   imports, waits for requests
      process B                            one for each request: says how the command ended
        process C                          the command
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[2]
LATE = ("asyncio", "libvirt", "libvirt_qemu", "qemu.qmp", "rich.console", "rich.progress", "rich.table")
PROGRAMS = ("diskchain.__main__", "diskchain.host.libvirt_hook")  # imported to be run, or copied elsewhere


class Zygote:
    """The process that is forked, started when it is first needed; it ends with the process that made it.

    `root`: where diskchain and tests are imported from; `env`: more of the environment that it starts with (LD_PRELOAD).
    """

    def __init__(self, root: Path = ROOT, env: Mapping[str, str] | None = None) -> None:
        self._root, self._env = root, dict(env or {})
        self._dir = tempfile.TemporaryDirectory(prefix="dc-zygote-")
        self._address = f"{self._dir.name}/socket"
        self._process: subprocess.Popen[bytes] | None = None

    def run(
        self, args: Sequence[str], env: Mapping[str, str], timeout: float, started: Callable[[int], None] | None = None
    ) -> tuple[int, str, str]:
        """Run `diskchain ARGS` with exactly this environment; return exit code (a signal's is negative), stdout, stderr.

        `started` is called with the command's process number.

        Raise subprocess.TimeoutExpired after `timeout` seconds, when the command is killed.
        """
        self._start()
        with (
            tempfile.TemporaryFile(dir="/dev/shm") as out,
            tempfile.TemporaryFile(dir="/dev/shm") as err,
            socket.socket(socket.AF_UNIX) as connection,
        ):
            connection.connect(self._address)
            socket.send_fds(connection, [b"."], [out.fileno(), err.fileno()])
            connection.sendall(json.dumps({"args": list(args), "env": dict(env), "cwd": os.getcwd()}).encode() + b"\n")
            code = _ended(connection.makefile("r"), connection, args, timeout, started)
            return code, _text(out.fileno()), _text(err.fileno())

    def _start(self) -> None:
        if self._process and self._process.poll() is None:
            return
        Path(self._address).unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.zygote", self._address],
            cwd=self._root, env={**os.environ, "PYTHONPATH": str(self._root), **self._env},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            preexec_fn=heed_signals,
        )  # fmt: skip
        assert self._process.stdout and self._process.stdout.readline() == b"ready\n"


def heed_signals() -> None:
    """A shell's background ignores SIGINT, nohup SIGHUP, and what is started from there inherits it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _ended(
    answers: TextIO,
    connection: socket.socket,
    args: Sequence[str],
    timeout: float,
    started: Callable[[int], None] | None,
) -> int:
    pid = int(answers.readline())
    if started:
        started(pid)
    connection.settimeout(timeout)
    try:
        return int(answers.readline())
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)
        raise subprocess.TimeoutExpired(["diskchain", *args], timeout) from None


def _text(fd: int) -> str:
    return os.pread(fd, os.fstat(fd).st_size, 0).decode()


# -- the program


def serve(address: str) -> socket.socket:
    """Import everything; return in a child of ours for each request, with its connection."""
    for module in pkgutil.walk_packages([str(ROOT / "diskchain")], "diskchain."):
        if module.name not in PROGRAMS:
            importlib.import_module(module.name)
    for name in LATE:
        importlib.import_module(name)
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a process B ended
    print("ready", flush=True)
    while True:
        readable, _, _ = select.select([listener.fileno(), 0], [], [])
        if 0 in readable:  # who made us is gone
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return connection
        connection.close()


def answer(connection: socket.socket) -> None:
    """In process B: fork the command and say how it ended; return in the command's process, which is set up."""
    _, fds, _, _ = socket.recv_fds(connection, 1, 2)
    request = json.loads(connection.makefile("r").readline())
    if pid := os.fork():
        connection.sendall(b"%d\n" % pid)
        _, status = os.waitpid(pid, 0)
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    for fd, number in ((os.open("/dev/null", os.O_RDONLY), 0), (fds[0], 1), (fds[1], 2)):
        os.dup2(fd, number)
    os.closerange(3, 256)
    connection.detach()
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = ["diskchain", *request["args"]]


def carry_out() -> None:
    """Run the command and end as Python does: threads, what is registered for the end, what is not written yet; the code.

    But for the last: it gives all memory back piece by piece, and so copies what is shared with us (20 ms of processor).
    """
    try:
        importlib.import_module("diskchain.__main__").main()
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(end.code)


if __name__ == "__main__":
    answer(serve(sys.argv[1]))
    carry_out()
