"""console: what is typed reaches the guest, what it says reaches us, and nobody who is attached can hold it up."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator

import pytest

from tests.support.console import Console
from tests.support.rig import MiB, Rig, process_state, wait_for
from tests.support.zygote import heed_signals


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A guest with a shell on its serial port, at its prompt, that says a line each 10 ms when asked to (`counter tick`)."""
    rig = Rig(tmp_path_factory.mktemp("shell") / "vm", size=16 * MiB, targets=("vda",), modes="shell")
    rig.build(guest=True)
    rig.ok("start", "vm")
    wait_for(lambda: rig.console().exists() and b"GUEST$ " in rig.console().read_bytes(), "the prompt")
    yield rig
    rig.destroy()


class Terminal:
    """`diskchain console vm` on a terminal of its own, in a session of its own as a login shell would be."""

    def __init__(self, rig: Rig, *args: str) -> None:
        self.ours, theirs = pty.openpty()
        self.before = termios.tcgetattr(theirs)
        self.theirs = theirs
        self.seen = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "diskchain", "console", "vm", *args], env=rig.env, start_new_session=True,
            stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=heed_signals,
        )  # fmt: skip
        os.set_blocking(self.ours, False)

    def type(self, data: bytes) -> None:
        """Type."""
        os.write(self.ours, data)

    def look(self) -> bytes:
        """All that was shown so far."""
        with contextlib.suppress(BlockingIOError, OSError):
            while data := os.read(self.ours, 65536):
                self.seen += data
        return self.seen

    def shows(self, text: bytes) -> None:
        """Wait until it is shown."""
        wait_for(lambda: text in self.look(), f"{text!r} on the terminal: {self.seen[-500:]!r}")

    def attached(self) -> Terminal:
        """Wait until keys go to the guest."""
        self.shows(b"leave with Ctrl-]")
        wait_for(lambda: not termios.tcgetattr(self.theirs)[3] & termios.ECHO, "the terminal is raw")
        return self

    def end(self) -> int:
        """Wait for its end; the terminal must be as it was. Return the exit code."""
        code = self.process.wait(60)
        self.look()
        assert termios.tcgetattr(self.theirs) == self.before
        os.close(self.ours)
        os.close(self.theirs)
        return code


def console(rig: Rig, *args: str, input_: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """The command in a pipe."""
    argv = [sys.executable, "-m", "diskchain", *args]
    return subprocess.run(argv, env=rig.env, input=input_, capture_output=True, timeout=120, check=False)


def test_terminal_talks_to_the_guest_and_leaves_with_its_key(shell: Rig) -> None:
    """The prompt is shown at once; a line is carried out; a resize is harmless; Ctrl-] leaves, the guest goes on."""
    terminal = Terminal(shell).attached()
    terminal.shows(b"GUEST$ ")
    terminal.type(b"echo $((6*7))x\n")
    terminal.shows(b"\n42x")
    fcntl.ioctl(terminal.ours, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 20, 0, 0))
    os.kill(terminal.process.pid, signal.SIGWINCH)
    terminal.type(b"unfinished\x03")  # it ends the guest's line, not us
    terminal.shows(b"^C")
    terminal.type(b"echo after-$((1+1))\n")
    terminal.shows(b"after-2")
    terminal.type(b"\x1d")
    assert terminal.end() == 0
    assert shell.ok("machine", "list", "-o", "STATE").out.split()[-1] == "running"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_terminal_is_put_back_after_a_signal(shell: Rig, number: int, code: int) -> None:
    """As it was before, and the next one gets in."""
    terminal = Terminal(shell).attached()
    os.kill(terminal.process.pid, number)
    assert terminal.end() == code
    assert console(shell, "console", "vm", "--linger", "0").returncode == 0


def test_second_one_is_busy_and_the_first_is_named(shell: Rig) -> None:
    """Exit 5, with the pid; after a SIGKILL of the first the next gets in and is heard."""
    terminal = Terminal(shell).attached()
    answer = console(shell, "console", "vm")
    assert answer.returncode == 5 and f"pid {terminal.process.pid}".encode() in answer.stderr
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.ours)
    os.close(terminal.theirs)
    assert b"\nagain-4" in console(shell, "console", "vm", input_=b"echo again-$((2+2))\n").stdout


def test_pipe_sends_its_input_and_ends_after_it(shell: Rig) -> None:
    """Bytes as they are (no key leaves); the answer is seen; a file as input; nothing at all as input; JSON."""
    answer = console(shell, "console", "vm", input_=b"echo 'a\x1db' | tr '\\035' '-'\n")
    assert answer.returncode == 0 and b"a-b" in answer.stdout and answer.stderr == b""
    script = shell.dir / "script"
    script.write_text("echo from-a-$((40+2))-file\n")
    with script.open("rb") as file:
        argv = [sys.executable, "-m", "diskchain", "console", "vm"]
        done = subprocess.run(argv, env=shell.env, stdin=file, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0 and b"from-a-42-file" in done.stdout
    said = shell.ok("console", "vm", "--json", "--linger", "100ms").json
    assert (said["vm"], said["ended"]) == ("vm", "input")


def test_nobody_who_is_attached_and_does_not_read_holds_the_guest_up(shell: Rig) -> None:
    """One client is stopped (SIGSTOP), one has a reader that never reads: the guest's lines come on, and all are logged."""
    with Console(shell.console()) as log:
        start = log.mark()
        assert console(shell, "console", "vm", "--linger", "0", input_=b"counter tick &\n").returncode == 0
        log.wait(r"^T 20 ", after=start)
        for how in (_stopped, _unread):
            with how(shell):
                at = int(log.wait(r"^T (\d+) ", after=log.mark())[1])
                log.wait(rf"^T {at + 300} ", after=start, timeout=120)
        assert console(shell, "console", "vm", "--linger", "0", input_=b"kill $!\n").returncode == 0
        numbers = [int(line.split()[1]) for _, line in log.lines(start) if line.startswith("T ")]
        assert len(numbers) > 600 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))


@contextlib.contextmanager
def _stopped(rig: Rig) -> Iterator[None]:
    terminal = Terminal(rig).attached()
    os.kill(terminal.process.pid, signal.SIGSTOP)
    yield
    os.kill(terminal.process.pid, signal.SIGCONT)
    terminal.type(b"\x1d")
    wait_for(lambda: terminal.look() and terminal.process.poll() is not None, "it leaves")
    assert terminal.end() == 0


@contextlib.contextmanager
def _unread(rig: Rig) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-m", "diskchain", "console", "vm"], env=rig.env, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_signals)  # fmt: skip
    wait_for(lambda: list(rig.run_dir.glob("*/console.in")), "it is attached")
    yield
    process.terminate()  # its output pipe is full by now or not: it ends
    assert process.wait(60) == 143


def test_a_machine_without_console_or_off_is_refused(tree: Rig) -> None:
    """Off: exit 6 with what to type; no VM: exit 4."""
    answer = console(tree, "console", "vm")
    assert answer.returncode == 6 and b"diskchain start vm" in answer.stderr
    assert console(tree, "console", "nobody").returncode == 4


def _revert(rig: Rig) -> None:
    rig.ok("revert", "vm", "one", "-y")


def _force(rig: Rig) -> None:
    rig.ok("stop", "vm", "--force", "-y")


@pytest.mark.parametrize("how", [_revert, _force])
def test_vm_that_goes_down_ends_it_with_exit_0(shell: Rig, how: Callable[[Rig], None]) -> None:
    """It says so; memory that was saved while somebody was attached reverts, and the console works again."""
    if how is _revert:
        terminal = Terminal(shell).attached()
        shell.ok("create", "vm", "one", "--memory")
        terminal.type(b"\x1d")
        assert terminal.end() == 0
    terminal = Terminal(shell).attached()
    how(shell)
    terminal.shows(b"vm went down")
    assert terminal.end() == 0
    if how is _revert:
        assert b"\nback-6" in console(shell, "console", "vm", input_=b"echo back-$((3+3))\n").stdout
    pid = shell.pid()
    assert pid is None or process_state(pid) != ""
