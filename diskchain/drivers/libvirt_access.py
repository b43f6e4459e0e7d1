"""What a domain's QEMU may do: which user it is, which files it could open, whether its memory could be saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diskchain.drivers import host_xml
from diskchain.drivers.host_xml import Label
from diskchain.drivers.libvirt_api import called
from diskchain.drivers.libvirt_list import SECURE
from diskchain.drivers.memory_saver import MemorySaver
from diskchain.errors import MemoryNotSaved, Refused
from diskchain.host import as_user, libvirt_daemon
from diskchain.host.as_user import Identity

_VERBS = {"r": "read", "w": "write to", "x": "search"}


class DomainAccess(MemorySaver):
    """To be mixed into LibvirtDriver."""

    name: str
    uri: str
    _connection: Any

    async def _xml(self, flags: int) -> str:
        raise NotImplementedError

    async def _labels(self) -> dict[str, Label]:
        return host_xml.labels(await self._xml(SECURE))

    async def qemu_user(self) -> Identity | None:
        """Who the domain's QEMU is, or will be at its next start; None when libvirt does not say."""
        process = self.process()
        if process is not None:
            return as_user.of_process(process.pid)
        capabilities = str(await called("ask for the security drivers", self._connection.getCapabilities))
        own = (await self._labels()).get("dac")
        words = own.label if own and own.kind == "static" and own.label else host_xml.security(capabilities).owner
        user, _, group = words.partition(":")
        uid, gid = as_user.uid_of(user), as_user.gid_of(group)
        if uid is None or gid is None:
            return None
        keeps = libvirt_daemon.settings(self.uri).get("clear_emulator_capabilities") == "0"
        return as_user.of_user(uid, gid, powerless=not (keeps and uid == 0))

    async def check_files(self, paths: Sequence[Path], *, written: bool) -> None:
        """As QEMU's user: every directory on the way is searched; the files opened, unless libvirt makes them its own."""
        labels = await self._labels()
        self._check_profile(labels, paths)
        who = await self.qemu_user()
        if who is None:
            return
        wanted = [("x", directory) for directory in as_user.way_to(paths)]
        if not self._owner_follows(labels):
            wanted += [(test, path) for path in paths for test in ("r", *(["w"] if written else []))]
        for test, path in await as_user.refused(who, wanted):
            raise Refused(f"the QEMU of {self.name} runs as {who.name}, who may not {_VERBS[test]} {path}",
                          hint=f"setfacl -m u:{who.name}:{'x' if test == 'x' else 'rw'} '{path}'; or move the images to a "
                          "directory that it can reach")  # fmt: skip

    def _owner_follows(self, labels: dict[str, Label]) -> bool:
        """Whether libvirt gives the files to QEMU's user before it opens them (dynamic_ownership, the default)."""
        dac = labels.get("dac")
        on = libvirt_daemon.settings(self.uri).get("dynamic_ownership", "1") != "0"
        return on and (dac is None or dac.relabel)

    def _check_profile(self, labels: dict[str, Label], paths: Sequence[Path]) -> None:
        """AppArmor: libvirt's helper adds new layers to the profile, but not everywhere."""
        profile = labels.get("apparmor")
        if profile is None or profile.kind == "none":
            return
        for path in paths:
            why = host_xml.apparmor_forbids(str(path))
            if why:
                raise Refused(f"AppArmor would keep the QEMU of {self.name} from {path}: {why}",
                              hint="move the images, as to /var/lib/libvirt/images")  # fmt: skip

    async def remarks(self) -> list[str]:
        """A lock manager: it guards what libvirt opens, and diskchain's merges are not among that."""
        manager = libvirt_daemon.settings(self.uri).get("lock_manager", "")
        found = []
        if manager and manager != "nop":
            found.append(f"libvirt's lock manager ({manager}) holds the layers of running domains; merges are made with the "
                         "VM off, outside of it: start the VM on no other host meanwhile")  # fmt: skip
        label = (await self._labels()).get("selinux")
        if label is not None and label.kind != "none":
            found.append("SELinux confines its QEMU: saving memory was never tried there, --disk-only needs less")
        return found

    async def check_background_save(self) -> None:
        """As for any QEMU; where it is refused the right, the user is named and what gives it the right."""
        try:
            await super().check_background_save()
        except MemoryNotSaved as error:
            who = await self.qemu_user()
            if "host kernel" not in error.message or who is None or who.uid == 0:
                raise
            raise MemoryNotSaved(f"{error.message}: it runs as {who.name}, who may not track the guest's writes (userfaultfd)",
                                 hint="sysctl vm.unprivileged_userfaultfd=1") from error  # fmt: skip
