"""The TPM of a machine: swtpm, one process per run of QEMU. It ends when QEMU does, and outlives diskchain.

Its permanent state is `tpm2-00.permall` in a directory of the VM's; swtpm replaces it as a whole with each change. What
is volatile (PCRs, sessions) is in its memory only, and goes with QEMU's stream when memory is saved.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import struct
import time
from collections.abc import Sequence
from pathlib import Path

from diskchain.errors import DriverFailed
from diskchain.host import files
from diskchain.host.fault import point
from diskchain.host.process import ProcessId, find_process, process_id, spawn_detached

PERMANENT = "tpm2-00.permall"
PATTERN = "tpm2-*"  # its files of state; besides, it keeps a lock file and names of unfinished ones there
_INIT, _SHUTDOWN = 2, 3  # commands of swtpm's control channel (swtpm/tpm_ioctl.h): number, then arguments, big-endian
_PATIENCE = 30.0
_ACCEPTS = 0x10000  # __SO_ACCEPTCON of the kernel's net.h, in the column "Flags"


def _state_word(directory: Path) -> str:
    return f"dir={directory},mode=0600"


def _argv(directory: Path, socket: Path, log: Path) -> list[str]:
    # fmt: off
    return ["swtpm", "socket", "--tpm2",
            "--tpmstate", _state_word(directory),
            "--ctrl", f"type=unixio,path={socket},mode=0600",
            "--log", f"file={log},level=1",
            "--pid", f"file={socket.with_suffix('.pid')}",
            "--terminate"]
    # fmt: on


def process(directory: Path, socket: Path) -> ProcessId | None:
    """Return the swtpm that has this directory, or None."""
    word = _state_word(directory)
    try:
        found = process_id(int(socket.with_suffix(".pid").read_text()))
        if found and word.encode() in Path(f"/proc/{found.pid}/cmdline").read_bytes().split(b"\0"):
            return found
    except (OSError, ValueError):
        pass
    return find_process("--tpmstate", word)


async def end(directory: Path, socket: Path, *, patience: float = 5.0) -> None:
    """See that no swtpm has this directory: it ends with its QEMU by itself, else it is killed."""
    found = process(directory, socket)
    if found and not await found.gone(patience):
        found.kill()
        await found.gone(_PATIENCE)


async def launch(directory: Path, socket: Path, log: Path, *, prefix: Sequence[str] = (),
                 die_with_us: bool = False) -> None:  # fmt: skip
    """Start swtpm on this state and wait until it listens. Raise DriverFailed, NotFound when it is not installed."""
    await end(directory, socket, patience=2.0)  # one that lost its QEMU before it had a connection
    socket.unlink(missing_ok=True)
    child = spawn_detached([*prefix, *_argv(directory, socket, log)], log, die_with_us=die_with_us)
    until = time.monotonic() + _PATIENCE
    while not _listens(socket):
        if child.poll() is not None or time.monotonic() > until:
            child.kill()
            raise DriverFailed(f"swtpm did not start: {_last_line(log)}", hint=f"the whole log: {log}")
        await asyncio.sleep(0.005)


def _listens(socket: Path) -> bool:
    """Whether the socket takes connections. It is not connected to: with --terminate swtpm would end when we let go.

    /proc/net/unix lists it as soon as it is bound; a connection is refused until the flag says that it accepts any.
    """
    try:
        rows = [line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines()]
    except OSError:
        return False
    return any(row[-1] == str(socket) and int(row[3], 16) & _ACCEPTS for row in rows if len(row) == 8)


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "it said nothing"


async def manufacture(directory: Path, socket: Path, log: Path) -> None:
    """Make a new TPM: a directory with the state of a chip fresh from the factory, durable when it gets its name."""
    unfinished = directory.with_name(f"{files.TEMPORARY}tpm-{secrets.token_hex(4)}")
    with files.os_errors(directory, "create"):
        unfinished.mkdir(mode=0o700)
    try:
        await launch(unfinished, socket, log, die_with_us=True)
        try:
            await _initialise(socket)
        finally:
            await end(unfinished, socket)
        point("tpm.made")
        if not (unfinished / PERMANENT).is_file():
            raise DriverFailed(f"swtpm made no state: {_last_line(log)}", hint=f"the whole log: {log}")
        for path in unfinished.iterdir():
            files.fsync_file(path)
        files.fsync_dir(unfinished)
        with files.os_errors(directory, "create"):
            unfinished.rename(directory)  # fails on a directory that holds anything
        files.fsync_dir(directory.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


async def _initialise(socket: Path) -> None:
    reader, writer = await asyncio.open_unix_connection(str(socket))
    try:
        for command in (struct.pack(">II", _INIT, 0), struct.pack(">I", _SHUTDOWN)):
            writer.write(command)
            answer = await asyncio.wait_for(reader.readexactly(4), _PATIENCE)
            if answer != bytes(4):
                raise DriverFailed(f"swtpm refused to initialise its state: result {answer.hex()}")
    except (TimeoutError, asyncio.IncompleteReadError, OSError) as error:
        raise DriverFailed("swtpm did not initialise its state") from error
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def words(socket: Path, *, tis: bool) -> list[str]:
    """Return the words for QEMU. CRB is what UEFI and current systems use; the old `pc` machine gets TIS."""
    # fmt: off
    return ["-chardev", f"socket,id=tpm-control,path={str(socket).replace(',', ',,')}",
            "-tpmdev", "emulator,id=tpm,chardev=tpm-control",
            "-device", f"{'tpm-tis' if tis else 'tpm-crb'},tpmdev=tpm,id=tpm0"]
    # fmt: on
