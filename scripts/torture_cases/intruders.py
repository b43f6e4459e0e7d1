"""Those who open an image while diskchain works on it: they write, and count what they were told is written, or read."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.bare_qmp import Qmp
from tests.support.libvirtd import Libvirtd
from tests.support.rig import Rig, wait_for


@dataclass(frozen=True)
class Write:
    """One write of a guest (bytes), `wait` seconds after what was before it."""

    pattern: int
    offset: int
    length: int
    wait: float

    def words(self) -> str:
        """As a command of qemu-io."""
        return f"write -P {self.pattern} {self.offset} {self.length}"


@dataclass(frozen=True)
class Visit:
    """How it went: writes that were acknowledged, in words, and what should not have been."""

    count: int
    words: str
    wrong: Sequence[str] = ()


def by_backup(path: Path, to: Path, states: Collection[str]) -> Visit:
    """Read a layer as backups do, whole and with QEMU's locks; it must hold one of these states (sha256), not a mixture."""
    argv = ["qemu-img", "convert", "-f", Rig.fmt(path), "-O", "raw", str(path), str(to)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        return Visit(0, f"backup: {done.stderr.strip()[-90:]}")
    found = hashlib.sha256(to.read_bytes()).hexdigest()
    return Visit(0, "backup: read", () if found in states else (f"the backup of {path.name} holds no state",))


def by_qemu_io(path: Path, writes: Sequence[Write]) -> Visit:
    """Open an image as a QEMU does, within 20 ms."""
    words = [word for write in writes for word in ("-c", f"sleep {int(write.wait * 1000)}", "-c", write.words())]
    done = subprocess.run(["qemu-io", "-f", "qcow2", *words, str(path)], capture_output=True, text=True)
    return _said(done.stdout, done.stderr)


def by_qemu(path: Path, writes: Sequence[Write]) -> Visit:
    """Start a QEMU with a disk on this image, as somebody does who knows no more than the file's name."""
    drive = f"qcow2,node-name=b,file.driver=file,file.filename={path}"
    argv = ["qemu-system-x86_64", "-machine", "q35,accel=tcg", "-m", "64", "-S", "-nodefaults", "-display", "none",
            "-monitor", "stdio", "-blockdev", drive, "-device", "virtio-blk-pci,drive=b,id=vda"]  # fmt: skip
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe) as qemu:
        assert qemu.stdin
        with contextlib.suppress(BrokenPipeError):  # it was refused, and is gone
            for write in writes:
                time.sleep(write.wait)
                qemu.stdin.write(_hmp("vda", write.words()).encode() + b"\n")
            qemu.stdin.write(b"quit\n")
        out, err = qemu.communicate(timeout=60)
    return _said(out.decode(), err.decode())


def by_monitor(rig: Rig, writes: Sequence[Write]) -> int:
    """Write as the guest of a machine that diskchain has started; return how many QEMU acknowledged."""
    (socket,) = rig.run_dir.glob("*/info.sock")
    with contextlib.closing(Qmp(socket)) as qmp:
        return _acknowledged("vda", writes, lambda line: str(qmp("human-monitor-command", command_line=line)))


def by_virsh(daemon: Libvirtd, name: str, writes: Sequence[Write]) -> Visit:
    """`virsh start`, the writes, `virsh destroy`. libvirt knows nothing of merges."""
    argv = ["virsh", "-q", "-c", daemon.uri, "start", "--paused", name]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        return Visit(0, f"virsh: {done.stderr.strip()[-90:]}")
    monitor = ("qemu-monitor-command", "--hmp", name)
    count = _acknowledged("virtio-disk0", writes, lambda line: daemon.virsh(*monitor, line))
    daemon.virsh("destroy", name)
    wait_for(lambda: daemon.virsh("domstate", name) == "shut off", "it is off")
    return Visit(count, f"virsh wrote {count} times")


def _acknowledged(device: str, writes: Sequence[Write], hmp: Callable[[str], str]) -> int:
    """Write and flush: the end of this QEMU may be a power cut for its guest.

    What QEMU could not begin is answered in words; what it began comes back when it is done.
    """
    for done, write in enumerate(writes):
        time.sleep(write.wait)
        if any(hmp(_hmp(device, words)).strip() for words in (write.words(), "flush")):
            return done
    return len(writes)


def _hmp(device: str, words: str) -> str:
    return f'qemu-io -d /machine/peripheral/{device}/virtio-backend "{words}"'


def _said(out: str, err: str) -> Visit:
    count = out.count("wrote ")
    return Visit(count, f"wrote {count} times" if count else f"refused: {err.strip()[-90:]}")
