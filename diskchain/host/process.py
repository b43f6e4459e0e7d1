"""The only place that starts programs. Output is captured, stdin is closed, the child dies with us."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diskchain.errors import NotFound, ToolFailed

log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_PACKAGES = {"swtpm": "swtpm", "ionice": "util-linux"}  # programs that are not of qemu-utils
_OUR_ROOT = str(Path(__file__).resolve().parents[2])


def our_module(name: str) -> tuple[list[str], dict[str, str]]:
    """Return the words and the environment that run one of our own modules, from wherever we run ourselves."""
    known = os.environ.get("PYTHONPATH", "")
    path = _OUR_ROOT + (os.pathsep + known if known else "")
    return [sys.executable, "-m", name], {"PYTHONPATH": path, "DISKCHAIN_FAULT": ""}


@dataclass(frozen=True)
class Result:
    """What a program said. `returncode` as the kernel gave it (negative: killed by that signal)."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Limits:
    """Limits for programs that read untrusted metadata (the values Nova uses): CPU seconds, bytes of address space."""

    cpu: int = 30
    memory: int = 2 << 30


def _prepare_child(limits: Limits | None, die_with_us: bool) -> Callable[[], None]:
    def prepare() -> None:
        if die_with_us:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if limits:
            resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu, limits.cpu))
            resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    return prepare


def find_program(name: str) -> str:
    """Given a program's name, return its absolute path. Raise NotFound saying how to install it."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/libexec")
    if path is None:
        package = "qemu-system-x86" if name.startswith("qemu-system") else _PACKAGES.get(name, "qemu-utils")
        raise NotFound(f"{name} is not installed", hint=f"apt install {package}")
    return path


async def run(
    argv: Sequence[str],
    *,
    limits: Limits | None = None,
    timeout: float | None = 60,
    pass_fds: Sequence[int] = (),
    ok: Sequence[int] = (0,),
    on_output: Callable[[str], None] | None = None,
    idle: bool = False,
    stdin: int = subprocess.DEVNULL,
) -> Result:
    """Run a program to its end and return what it said. Times in seconds, None = as long as it takes.

    `stdin`: a descriptor that it reads from.
    `idle`: it gets the disk only when nobody else wants it (the kernel's idle I/O class; ionice becomes the program).
    `on_output` is called with each piece of stdout as it comes (progress). The child is killed with us, and when
    the caller is cancelled. Raise ToolFailed when the exit code is not in `ok` or the time is over.
    """
    argv = [*([find_program("ionice"), "-c", "3"] if idle else []), find_program(argv[0]), *argv[1:]]
    log.debug("%s", shlex.join(argv))
    child = await asyncio.create_subprocess_exec(
        *argv,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        pass_fds=tuple(pass_fds),
        env={**os.environ, "LC_ALL": "C"},
        preexec_fn=_prepare_child(limits, die_with_us=True),
    )
    try:
        out, err = await asyncio.wait_for(_collect(child, on_output), timeout)
    except TimeoutError:
        raise ToolFailed(argv, -signal.SIGKILL, f"no end after {timeout} seconds") from None
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
    result = Result(child.returncode or 0, out, err)
    if result.returncode not in ok:
        raise ToolFailed(argv, result.returncode, err or out)
    return result


@contextlib.contextmanager
def open_memory(lines: Iterable[str]) -> Iterator[int]:
    """A descriptor to read some lines from, for a program's stdin: they may be more than a command line or a pipe takes."""
    fd = os.memfd_create("lines")
    try:
        with os.fdopen(fd, "w", closefd=False) as file:
            file.writelines(lines)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


async def _collect(child: asyncio.subprocess.Process, on_output: Callable[[str], None] | None) -> tuple[str, str]:
    assert child.stdout and child.stderr

    async def read_stdout(stream: asyncio.StreamReader) -> str:
        pieces = []
        while piece := await stream.read(65536):
            text = piece.decode("utf-8", "replace")
            if on_output:
                on_output(text)
            else:
                pieces.append(text)
        return "".join(pieces)

    out, err = await asyncio.gather(read_stdout(child.stdout), child.stderr.read())
    await child.wait()
    return out, err.decode("utf-8", "replace")


def spawn_detached(argv: Sequence[str], log_file: Path, *, env: Mapping[str, str] | None = None,
                   pass_fds: Sequence[int] = (), die_with_us: bool = False) -> subprocess.Popen[bytes]:  # fmt: skip
    """Start a program in a session of its own, output appended to `log_file` (mode 0600). It outlives us and the terminal.

    `die_with_us`: it does not outlive us.
    """
    argv = [find_program(argv[0]), *argv[1:]]
    log.debug("detached: %s", shlex.join(argv))
    fd = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=fd, stderr=fd, start_new_session=True,
            pass_fds=tuple(pass_fds), env=None if env is None else {**os.environ, **env},
            preexec_fn=_prepare_child(None, die_with_us=die_with_us),
        )  # fmt: skip
    finally:
        os.close(fd)


class Piped:
    """A program of ours that outlives us, with pipes for its stdin and stdout.

    Not asyncio's own: since Python 3.13 that kills the child when its transport goes away, so when we end.
    """

    def __init__(self, child: subprocess.Popen[bytes], stdout: asyncio.StreamReader) -> None:
        self._child = child
        self.stdout = stdout

    def write(self, data: bytes) -> None:
        """Give it a few bytes. Raise OSError, ValueError when it does not read any more."""
        assert self._child.stdin
        self._child.stdin.write(data)

    def close_stdin(self) -> None:
        """Let it see the end of its input."""
        assert self._child.stdin
        with contextlib.suppress(OSError, ValueError):
            self._child.stdin.close()

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._child.poll()

    async def wait(self) -> None:
        """Wait until it has ended."""
        while self._child.poll() is None:
            await asyncio.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL; nothing when it has gone."""
        self._child.kill()


async def spawn_piped(argv: Sequence[str], log_file: Path, *, env: Mapping[str, str]) -> Piped:
    """Start a program that outlives us, with pipes for stdin and stdout; stderr goes to `log_file`.

    `env`: environment variables that it gets besides ours.
    """
    fd = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        child = subprocess.Popen(  # noqa: ASYNC220 - see Piped
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=fd, start_new_session=True, bufsize=0,
            env={**os.environ, **env},
        )  # fmt: skip
    finally:
        os.close(fd)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), child.stdout)
    return Piped(child, reader)


async def scope(name: str) -> list[str]:
    """Return the words that put a program into a systemd scope of its own, so that it outlives our session's end.

    Empty where systemd does not run or does not let us (then the own session must do).
    """
    if not Path("/run/systemd/system").is_dir():
        return []
    words = ["systemd-run", "--scope", "--quiet", "--collect", *([] if os.geteuid() == 0 else ["--user"])]
    try:
        await run([*words, "true"], timeout=10)
    except (ToolFailed, NotFound):
        return []
    return [*words, f"--description=diskchain machine {name}"]


# -- who is there ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProcessId:
    """A process that can't be confused with a later one of the same number: pid and kernel start time (ticks)."""

    pid: int
    start: int

    def alive(self) -> bool:
        """Whether that very process still runs (a zombie does not)."""
        return process_id(self.pid) == self

    def kill(self, sig: int = signal.SIGKILL) -> None:
        """Send a signal to it; nothing when it has gone. Raise PermissionError when it is somebody else's."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sig)

    async def gone(self, timeout: float) -> bool:
        """Wait until it has ended, at most `timeout` seconds; return whether it has."""
        try:
            fd = os.pidfd_open(self.pid)
        except OSError:
            return not self.alive()
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        try:
            if not self.alive():  # the number was somebody else's by the time we opened it
                return True
            loop.add_reader(fd, ended.set)  # readable when the process has ended, pidfd_open(2)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), timeout)
            return ended.is_set()
        finally:
            loop.remove_reader(fd)
            os.close(fd)


def process_id(pid: int) -> ProcessId | None:
    """Given a pid, return its identity, or None when there is no such (living) process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    gone = fields[0] == "X" or (fields[0] == "Z" and not _has_other_threads(pid))
    return None if gone else ProcessId(pid, int(fields[19]))


def _has_other_threads(pid: int) -> bool:
    """Whether threads besides the first still end: until then a killed QEMU holds its files and their locks."""
    try:
        return len(list(Path(f"/proc/{pid}/task").iterdir())) > 1
    except OSError:
        return False


def boot_id() -> str:
    """Return the kernel's id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def find_process(*words: str) -> ProcessId | None:
    """Return the living process whose command line holds these words next to each other, or None."""
    needle = b"\0".join(w.encode() for w in words)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                cmdline = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if needle in cmdline and int(entry.name) != os.getpid():
                return process_id(int(entry.name))
    return None


async def uninterrupted(work: Awaitable[None]) -> None:
    """Carry a short piece of work to its end, also when we are cancelled meanwhile (Ctrl-C, SIGTERM).

    The cancellation is not lost: it arrives at the next await after this one. (Blocking the signals would not do:
    the kernel hands them to any thread that does not block them, and Python runs the handler all the same.)
    """
    task, me = asyncio.ensure_future(work), asyncio.current_task()
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
            if me:
                me.uncancel()  # counted once more below; asyncio.Runner tells Ctrl-C by the count
        except Exception:  # noqa: S110 - it is raised below, from the task itself
            pass
    if cancelled and me:
        me.cancel()
    task.result()
