"""What a libvirt daemon on this host was configured with: its qemu.conf, as the daemon itself sees it.

It has no API for that. The daemon is found by the socket that clients use, and its file through its own root directory, so
that a daemon in a mount namespace or a container is asked for its file, not for the host's.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

SOCKETS = (Path("/run/libvirt/libvirt-sock"), Path("/run/libvirt/virtqemud-sock"))
_LINE = re.compile(r"^\s*(\w+)\s*=\s*(.*?)\s*$")


def config_file(uri: str) -> Path | None:
    """Given a local URI, return where its daemon's qemu.conf can be read (it may not exist); None when nobody answers."""
    if urlsplit(uri).path == "/session":
        return Path.home() / ".config" / "libvirt" / "qemu.conf"
    pid = _daemon(uri)
    return None if pid is None else Path(f"/proc/{pid}/root/etc/libvirt/qemu.conf")


def root(uri: str) -> Path:
    """Return the root directory that a local URI's daemon sees: `/`, unless it has mounts of its own."""
    pid = _daemon(uri)
    return Path("/") if pid is None or _same_mounts(pid) else Path(f"/proc/{pid}/root")


def _daemon(uri: str) -> int | None:
    """The process behind the first socket of the URI that somebody answers on."""
    named = parse_qs(urlsplit(uri).query).get("socket")
    places = [Path(named[0])] if named else SOCKETS
    return next((pid for place in places if (pid := _peer(place)) is not None), None)


def _same_mounts(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/ns/mnt").readlink() == Path("/proc/self/ns/mnt").readlink()
    except OSError:
        return True  # not ours to look: then it is root's, and root has those of the host


def _peer(place: Path) -> int | None:
    """Who listens there: the daemon, or systemd in its place (pid 1), which sees the same files."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.settimeout(5)
            client.connect(str(place))
            pid = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        except OSError:
            return None
    return pid if isinstance(pid, int) and pid > 0 else None


def settings(uri: str) -> Mapping[str, str]:
    """Return what is set there, as text without quotes; nothing where the file is not there or not ours to read."""
    file = config_file(uri)
    try:
        return parse(file.read_text()) if file else {}
    except (OSError, UnicodeDecodeError):
        return {}


def parse(text: str) -> dict[str, str]:
    """Given a qemu.conf, return its values as text; a list as it is written."""
    found = {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if match:
            value = match[2].split("#")[0].strip() if not match[2].startswith('"') else match[2]
            found[match[1]] = value.strip('"')
    return found
