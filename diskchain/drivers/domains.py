"""The libvirt domains of this host: which there are, and what they name. The library is imported when it is needed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from diskchain.drivers import domain_xml
from diskchain.drivers.domain_xml import DomainDisk
from diskchain.drivers.host_xml import Security, security
from diskchain.errors import NotFound, Refused, Unreachable
from diskchain.host import libvirt_daemon

SYSTEM = "qemu:///system"
ANSWERS_WITHIN = 30.0  # seconds that a daemon has: of virsh's keepalives it is 35


@dataclass(frozen=True)
class Domain:
    """One domain as libvirt knows it. `xmls`: its live and persistent definition, and that of a managed save."""

    name: str
    uuid: str
    persistent: bool
    active: bool
    managed_save: bool
    snapshots: tuple[
        tuple[str, int], ...
    ]  # that libvirt has metadata of: name, time of its making (seconds of the epoch)
    xmls: tuple[str, ...]
    disks: tuple[DomainDisk, ...] = ()  # of the first of them (live, where it runs), pool volumes resolved

    @property
    def images(self) -> tuple[Path, ...]:
        """Every file that any of its definitions names as a disk's source."""
        all_disks = [*self.disks, *(disk for xml in self.xmls for disk in domain_xml.disks(xml))]
        return tuple(dict.fromkeys(disk.path for disk in all_disks if disk.path is not None))


@dataclass(frozen=True)
class Facts:
    """A libvirt daemon: versions as numbers (9.0.0 = 9000000), how it confines QEMU, its qemu.conf as far as it can be read."""

    libvirt: int
    qemu: int
    security: Security
    settings: Mapping[str, str]
    config: Path | None


def choose_uri(asked: str | None, env: Mapping[str, str] = os.environ) -> str | None:
    """Given what -c said, return the URI to use; None when there is no libvirt to ask.

    Asked for by name (-c, LIBVIRT_DEFAULT_URI) it is used, whether it answers or not; else qemu:///system where its
    daemon's socket is. `none` switches it off. Raise Refused for a remote host: the images are not here.
    """
    uri = asked or env.get("LIBVIRT_DEFAULT_URI")
    if uri == "none":
        return None
    if not uri:
        there = any(socket.exists() for socket in libvirt_daemon.SOCKETS)
        return SYSTEM if there and importlib.util.find_spec("libvirt") else None
    parts = urlsplit(uri)
    driver, _, transport = parts.scheme.partition("+")
    if parts.hostname or transport not in ("", "unix"):
        raise Refused(f"{uri} is another host: its images are not here", hint="run diskchain on that host")
    if driver != "qemu":
        raise Refused(f"{uri} is no QEMU: diskchain handles qemu:///system and qemu:///session",
                      hint="-c qemu:///system")  # fmt: skip
    return uri


class Domains:
    """The domains of one URI; without a URI there are none."""

    def __init__(self, uri: str | None) -> None:
        self.uri = uri
        self._connection: Any = None
        self._hangs: tuple[float, Unreachable] | None = None  # seconds that it was given, what was said then

    @staticmethod
    def _library() -> Any:
        try:
            return importlib.import_module("diskchain.drivers.libvirt")
        except ImportError as error:
            raise Unreachable(f"libvirt's Python module can't be loaded: {error}",
                              hint="apt install python3-libvirt") from error  # fmt: skip

    def _connected(self, within: float = ANSWERS_WITHIN) -> Any:
        """Return the connection. A daemon that did not let us in within a time is not given that time again."""
        library = self._library()
        if self._connection is None or not library.is_alive(self._connection):
            if self._hangs and self._hangs[0] >= within:
                raise self._hangs[1]
            began = time.monotonic()
            try:
                self._connection = library.connect_now(self.uri, within)
            except Unreachable as error:
                if time.monotonic() - began >= within:
                    self._hangs = (within, error)
                raise
        return self._connection

    def all(self) -> list[Domain]:
        """Return every domain, running or not, sorted by name. Raise Unreachable, Refused."""
        if self.uri is None:
            return []
        library = self._library()
        found: list[Domain] = library.asked("list the domains", library.list_domains, self._connected())
        return sorted(found, key=lambda domain: domain.name)

    def names(self) -> list[str]:
        """Return the names of all domains. Raise Unreachable, Refused."""
        return [domain.name for domain in self.all()]

    def find(self, name: str, within: float = ANSWERS_WITHIN) -> Domain | None:
        """Return a domain by its name or uuid, or None: one question, however many domains there are.

        `within`: seconds that a daemon has to let us in. Raise Unreachable, Refused.
        """
        if self.uri is None:
            return None
        library = self._library()
        found: Domain | None = library.asked(f"look for {name}", library.find_domain, self._connected(within), name)
        return found

    def get(self, name: str) -> Domain:
        """Return a domain by its name or uuid. Raise NotFound, Unreachable."""
        found = self.find(name)
        if found is None:
            raise NotFound(f"libvirt has no domain {name!r}", hint="virsh list --all")
        return found

    def facts(self) -> Facts:
        """Return what the daemon says of itself. Raise Unreachable."""
        assert self.uri
        library = self._library()
        libvirt, qemu, capabilities = library.asked("ask what it can do", library.host_facts, self._connected())
        file = libvirt_daemon.config_file(self.uri)
        return Facts(libvirt, qemu, security(capabilities), libvirt_daemon.settings(self.uri), file)

    def driver(self, domain: Domain, log: Path) -> Any:
        """Return the driver of a domain. It shares our connection; its watchdogs write to `log`."""
        return self._library().open_driver(self._connected(), domain.uuid, self.uri, log)
