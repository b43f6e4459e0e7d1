"""A private libvirtd: its own configuration, state, sockets and logs, in a mount namespace of its own.

No system daemon is touched or needed; virsh and diskchain reach it by `uri`. The probe cache is kept (8 s cold, 0.2 s
warm). QEMU runs as root (background saves need the right to userfaultfd on QEMU 7.2), or as `libvirt-qemu`, Debian's own way.
It has no /dev/kvm: where that is there and not usable, libvirt probes QEMU anew at every call (8 to 16 s). The domains of
the tests are emulated.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.rig import ROOT, has_ended

PARTS = {"etc": "/etc/libvirt", "lib": "/var/lib/libvirt", "run": "/run/libvirt", "log": "/var/log/libvirt"}
CACHE = "/var/cache/libvirt"
HIDE_KVM = """
hide_kvm() {
    mkdir -p "$1"; mount -t tmpfs -o mode=755 tmpfs "$1"
    for node in /dev/*; do
        if [ -d "$node" ] && [ ! -L "$node" ]; then
            mkdir -p "$1/${node#/dev/}"; mount --rbind "$node" "$1/${node#/dev/}"
        elif [ "$node" != /dev/kvm ]; then
            cp -a "$node" "$1/"
        fi
    done
    mount --move "$1" /dev
}
"""


class Libvirtd:
    """One daemon. `start` and `stop` may be called again and again; its VMs outlive it, as real ones do.

    `host`: a uuid, so that libvirt takes it for that of another host, to which a domain can be migrated.
    """

    def __init__(self, *, user: str = "root", settings: tuple[str, ...] = (), host: str = "") -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="dclv-", dir="/tmp"))  # sockets have short names
        self.cache = ROOT / ".cache" / "libvirt"
        self.cache.mkdir(parents=True, exist_ok=True)
        for name in (*PARTS, "sock"):
            (self.dir / name).mkdir()
        self.dir.chmod(0o755)
        group = user if user == "root" else "kvm"
        lines = [
            *settings,
            f'user="{user}"',
            f'group="{group}"',
            'stdio_handler="file"',
            "clear_emulator_capabilities=0",
        ]
        if (
            "DISKCHAIN_DEBIAN13" in os.environ
        ):  # in the chroot libvirt gives QEMU a /dev without /dev/null: then it takes no
            lines.append(
                "namespaces=[]"
            )  # locks on its images ("Failed to open /dev/null for OFD lock probing" in its log)
        (self.dir / "etc" / "qemu.conf").write_text("\n".join(lines) + "\n")
        (self.dir / "etc" / "libvirtd.conf").write_text(
            f'unix_sock_dir="{self.dir}/sock"\nauth_unix_ro="none"\nauth_unix_rw="none"\n'
            f'log_outputs="3:file:{self.dir}/log/libvirtd.log"\n' + (f'host_uuid="{host}"\n' if host else "")
        )
        self._daemon: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """What to connect to."""
        return f"qemu+unix:///system?socket={self.dir}/sock/libvirt-sock"

    def start(self) -> None:
        """Start it and wait until it answers; only one fills the cache at a time.

        It sees no mounts of other tests: there they would stay mounted until it ends.
        """
        theirs = "awk '$2 ~ \"/pytest-of-\" { print $2 }' /proc/self/mounts | xargs -r -d '\\n' umount --lazy"
        mounts = "; ".join(f"mkdir -p {place}; mount --bind {self.dir}/{name} {place}" for name, place in PARTS.items())
        script = (
            f"{HIDE_KVM}[ ! -e /dev/kvm ] || hide_kvm {self.dir}/dev; "
            f"{theirs}; {mounts}; mkdir -p {CACHE}; mount --bind {self.cache} {CACHE}; "
            f"exec libvirtd -f {self.dir}/etc/libvirtd.conf -p {self.dir}/pid"
        )
        with (self.cache / "lock").open("w") as lock, (self.dir / "out").open("ab") as out:
            fcntl.flock(lock, fcntl.LOCK_EX)
            argv = ["unshare", "--mount", "--propagation", "private", "bash", "-c", script]
            self._daemon = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
            self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + 90
        while subprocess.run(["virsh", "-c", self.uri, "version"], capture_output=True).returncode:
            assert self._daemon and self._daemon.poll() is None, (self.dir / "out").read_text()
            assert time.monotonic() < end, "libvirtd does not answer"
            time.sleep(0.05)

    def stop(self, sig: int = signal.SIGTERM) -> None:
        """End the daemon; its VMs go on."""
        if self._daemon:
            self._daemon.send_signal(sig)
            self._daemon.wait(30)
            self._daemon = None

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """In the block it is there, takes connections, and says nothing."""
        assert self._daemon
        self._daemon.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._daemon.send_signal(signal.SIGCONT)

    def virsh(self, *words: str, ok: bool = True) -> str:
        """Run virsh; it must succeed unless `ok` is False. Return what it said."""
        done = subprocess.run(["virsh", "-q", "-c", self.uri, *words], capture_output=True, text=True)
        assert done.returncode == 0 or not ok, f"virsh {' '.join(words)}: {done.stderr}"
        return done.stdout.strip() if done.returncode == 0 else done.stderr.strip()

    def destroy(self) -> None:
        """End the daemon and every VM of it, and remove its files."""
        self.stop()
        for path in (self.dir / "run").glob("qemu/*.pid"):
            pid = int(path.read_text())
            if not has_ended(pid):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.dir, ignore_errors=True)
