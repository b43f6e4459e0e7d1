"""A VM for tests of the real command line, and an oracle that imports nothing of diskchain.

The rig runs `python -m diskchain` as a user would, in a directory of its own. The oracle reads every state of the tree
through plain qemu-img and compares it with what the test itself wrote.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.guest import boot_words, guest_files
from tests.support.image_bytes import chain_bytes, copy_tree
from tests.support.zygote import Zygote, heed_signals

ROOT = Path(__file__).resolve().parents[2]
MiB = 1 << 20
ZYGOTE = Zygote()


@dataclass
class Answer:
    """What a run of the command line said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The answer as JSON."""
        return json.loads(self.out)


@dataclass
class Rig:
    """One machine in one directory."""

    dir: Path
    name: str = "vm"
    targets: Sequence[str] = ("vda", "vdb")
    size: int = 64 * MiB
    memory: str = "128 MiB"
    cpus: int = 1
    modes: str = "cnt,tick"
    raw: Sequence[str] = ()
    ext4: Sequence[str] = ()  # of the raw ones: those that get a file system
    agent: bool = False
    parts: Sequence[str] = ()  # more lines of the machine file: firmware, tpm
    uri: str = "none"  # no libvirt of the host's is ever asked
    forked: bool = True  # commands come from a process that has imported everything; else each starts Python
    zygote: Zygote = ZYGOTE
    expected: dict[str, dict[str, str]] = field(default_factory=dict)
    _digests: dict[str | None, str] = field(default_factory=dict)
    _checked: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)
        # sockets have short names: the run directory stands outside the (long) test directory
        self.run_dir = Path(tempfile.mkdtemp(prefix="dc-", dir="/tmp"))

    # -- setting up

    def build(self, *, guest: bool, fault: str = "") -> None:
        """Make the disks and define the machine; with `guest` it boots the micro guest."""
        lines = [f'name = "{self.name}"', f'memory = "{self.memory}"', f"cpus = {self.cpus}", 'accel = "tcg"']
        lines += self.parts
        if guest:
            kernel, initrd = guest_files(agent=self.agent, uefi=any("uefi" in part for part in self.parts))
            lines += ["agent = true"] if self.agent else []
            lines += [f'kernel = "{kernel}"', f'initrd = "{initrd}"']
            lines += [f'append = "{boot_words(self.modes)}"']
        for target in self.targets:
            fmt = "raw" if target in self.raw else "qcow2"
            self.qemu_img("create", "-q", "-f", fmt, str(self.dir / f"{target}.{fmt}"), str(self.size))
            self.make_ext4(target)
            lines += ["[[disk]]", f'target = "{target}"', f'image = "{target}.{fmt}"']
        (self.dir / "vm.toml").write_text("\n".join(lines) + "\n")
        self.ok("machine", "define", str(self.dir / "vm.toml"), fault=fault)

    def make_ext4(self, target: str) -> None:
        """A file system on a raw disk that is to have one."""
        if target in self.ext4:
            subprocess.run(["mkfs.ext4", "-q", "-F", str(self.dir / f"{target}.raw")], check=True)

    @property
    def env(self) -> dict[str, str]:
        """The environment of every run."""
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "DISKCHAIN_STATE_DIR": str(self.dir / "state"),
            "DISKCHAIN_RUN_DIR": str(self.run_dir),
            "XDG_CONFIG_HOME": str(self.dir / "config"),
            "LIBVIRT_DEFAULT_URI": self.uri,
        }

    def configure(self, text: str) -> None:
        """Write the user's configuration."""
        path = self.dir / "config/diskchain/diskchain.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    # -- running diskchain

    def popen(self, *args: str, fault: str = "", prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Start diskchain and return the process."""
        return subprocess.Popen(
            [*prefix, sys.executable, "-m", "diskchain", *args],
            env=self._env(fault), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=heed_signals,
        )  # fmt: skip

    def run(self, *args: str, fault: str = "", prefix: Sequence[str] = ()) -> Answer:
        """Run diskchain to its end."""
        if self.forked and not prefix:
            return Answer(*self.zygote.run(args, self._env(fault), timeout=150))
        process = self.popen(*args, fault=fault, prefix=prefix)
        out, err = process.communicate(timeout=150)
        return Answer(process.returncode, out, err)

    def _env(self, fault: str) -> dict[str, str]:
        return {**self.env, **({"DISKCHAIN_FAULT": fault} if fault else {})}

    def ok(self, *args: str, fault: str = "") -> Answer:
        """Run diskchain; it must end with 0."""
        answer = self.run(*args, fault=fault)
        assert answer.code == 0, f"diskchain {' '.join(args)}: {answer.code}\n{answer.out}\n{answer.err}"
        return answer

    def killed(self, *args: str, at: str) -> bool:
        """Run diskchain with a SIGKILL at a fault point; return whether it got there."""
        answer = self.run(*args, fault=f"kill:{at}")
        return answer.code == -signal.SIGKILL

    def points(self, *args: str) -> list[str]:
        """Run diskchain undisturbed and return the fault points it passed, the n-th passing as NAME#n."""
        trace = self.dir.parent / "trace"
        trace.unlink(missing_ok=True)
        self.ok(*args, fault=f"trace:{trace}")
        seen: dict[str, int] = {}
        named = []
        for line in trace.read_text().splitlines():
            seen[line] = seen.get(line, 0) + 1
            named.append(f"{line}#{seen[line]}")
        return named

    # -- looking from outside

    def catalog(self) -> Any:
        """The catalog file, as JSON."""
        (path,) = self.dir.glob(".diskchain/*/catalog.json")
        return json.loads(path.read_bytes())["body"]

    def path_of(self, image: Mapping[str, Any]) -> Path:
        """An image's path."""
        return self.dir / str(image["path"])

    def active(self) -> dict[str, Path]:
        """The active layers."""
        catalog = self.catalog()
        return {t: self.path_of(catalog["images"][i]) for t, i in catalog["active"].items()}

    def snapshots(self) -> dict[str, dict[str, Path]]:
        """Every visible snapshot with its frozen images."""
        catalog = self.catalog()
        return {
            s["name"]: {t: self.path_of(catalog["images"][i]) for t, i in s["disks"].items()}
            for s in catalog["snapshots"].values()
            if not s["deleted"] and not s["creating"]
        }

    def journal(self) -> list[Path]:
        """Open journal entries."""
        return list(self.dir.glob(".diskchain/*/journal/*.json"))

    def console(self) -> Path:
        """The console log."""
        (home,) = self.dir.glob(".diskchain/*")
        return home / "console.log"

    def pid(self) -> int | None:
        """The machine's QEMU, found by its own pid file."""
        for path in self.run_dir.glob("*/pid"):
            pid = int(path.read_text())
            if not has_ended(pid):
                return pid
        return None

    @staticmethod
    def qemu_img(*args: str) -> str:
        """Run qemu-img; it must succeed."""
        done = subprocess.run(["qemu-img", *args], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"qemu-img {' '.join(args)}: {done.stderr}"
        return done.stdout

    @staticmethod
    def fmt(path: Path) -> str:
        """An image's format, by its name (the rig names its bases)."""
        return "raw" if path.suffix == ".raw" else "qcow2"

    def digest(self, path: Path) -> str:
        """The sha256 of what a guest would read from an image; asked once for the same bytes in the same chain."""
        known = None if self.pid() else chain_bytes(path)
        if known in self._digests:
            return self._digests[known]
        found = self._flat_digest(path)
        if known:
            self._digests[known] = found
        return found

    def _flat_digest(self, path: Path) -> str:
        with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="dc-digest-") as flat:
            self.qemu_img("convert", "-U", "-f", self.fmt(path), "-O", "raw", str(path), flat.name)
            return hashlib.file_digest(open(flat.name, "rb"), "sha256").hexdigest()

    def write(self, pattern: int, offset: int, length: int) -> None:
        """Write a pattern into every active layer of the stopped machine, as a guest would."""
        for path in self.active().values():
            command = f"write -P {pattern} {offset} {length}"
            done = subprocess.run(
                ["qemu-io", "-f", self.fmt(path), "-c", command, str(path)], capture_output=True, text=True
            )
            assert done.returncode == 0 and "wrote" in done.stdout, done.stdout + done.stderr

    # -- the oracle

    def remember(self, name: str) -> None:
        """Note what the present holds, as the state that `name` must have from now on."""
        self.expected[name] = {t: self.digest(p) for t, p in self.active().items()}

    def verdict(self, *, present: str | None = None) -> list[str]:
        """Compare every state with what is expected of it; return what is wrong."""
        wrong = []
        states = dict(self.snapshots())
        if present is not None:
            states["(now)"] = self.active()
        for name, disks in states.items():
            want = self.expected.get(present or "" if name == "(now)" else name)
            if want is None:
                wrong.append(f"{name}: nobody knows what it must hold")
                continue
            wrong += [f"{name} {t}: content differs" for t, p in disks.items() if self.digest(p) != want[t]]
        return wrong + self.file_verdict()

    def file_verdict(self) -> list[str]:
        """No orphan, no missing file, no corruption, no journal, no leftover."""
        wrong = []
        images = {self.path_of(i) for i in self.catalog()["images"].values()}
        there = {p for p in self.dir.iterdir() if p.suffix in (".qcow2", ".raw")}
        wrong += [f"orphan {p.name}" for p in sorted(there - images)]
        wrong += [f"missing {p.name}" for p in sorted(images - there)]
        wrong += [f"leftover {p.name}" for p in self.dir.glob(".*.trash")]
        wrong += [f"open journal {p.name}" for p in self.journal()]
        in_use = set(self.active().values()) if self.pid() else set()
        for path in sorted(images & there - in_use):
            if path.suffix == ".qcow2":
                wrong += self._check(path)
        return wrong

    def _check(self, path: Path) -> list[str]:
        """What qemu-img check says against an image; asked once for the same bytes in the same chain."""
        known = chain_bytes(path)
        if known not in self._checked:
            done = subprocess.run(["qemu-img", "check", "-U", "-q", str(path)], capture_output=True, text=True)
            bad = [f"check {path.name}: {done.stdout} {done.stderr}"]
            self._checked[known] = [] if done.returncode in (0, 3) else bad
        return self._checked[known]

    # -- time and end

    def save_template(self, name: str = "template") -> Path:
        """Copy the whole directory away; `restore_template` brings it back."""
        template = self.dir.with_suffix(f".{name}")
        shutil.rmtree(template, ignore_errors=True)
        copy_tree(self.dir, template)
        return template

    def restore_template(self, template: Path) -> None:
        """Put the directory back as it was, with the times of its files."""
        shutil.rmtree(self.dir)
        copy_tree(template, self.dir)

    def destroy(self) -> None:
        """Kill the machine and remove everything."""
        pid = self.pid()
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda: has_ended(pid), "QEMU is gone")
        shutil.rmtree(self.run_dir, ignore_errors=True)
        shutil.rmtree(self.dir, ignore_errors=True)


def process_state(pid: int) -> str:
    """A process's state letter, or nothing when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def has_ended(pid: int) -> bool:
    """Whether a process has ended with all its threads: a killed one whose first thread is a zombie still holds its locks."""
    try:
        return process_state(pid) in ("", "X") or (
            process_state(pid) == "Z" and len(os.listdir(f"/proc/{pid}/task")) <= 1
        )
    except OSError:
        return True


def watchdogs(rig: Rig) -> list[int]:
    """The watchdogs of this machine."""
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_watchdog(pid, str(rig.run_dir))]


def is_watchdog(pid: int, run_dir: str) -> bool:
    """Whether a process is a watchdog of a machine in this run directory."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False
    return "diskchain.drivers.watchdog" in words and run_dir in words


def wait_for(condition: Any, what: str, timeout: float = 60) -> None:
    """Wait until `condition()` is true. Raise AssertionError naming `what` after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {timeout} s"
        time.sleep(0.02)
