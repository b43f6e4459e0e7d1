"""The VMs that the contract is tested on: one case for each driver. A new driver joins DRIVERS.

A case is a real VM with the counting guest on two disks.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diskchain.chain.machine import DiskSpec, Machine, NetSpec
from diskchain.chain.model import Image
from diskchain.drivers import accel
from diskchain.drivers.libvirt import connect_now, open_driver
from diskchain.drivers.machines import Machines, Registered
from diskchain.drivers.protocol import Definition, Driver
from diskchain.drivers.qemu import QemuDriver
from tests.support.domain import DomainRig
from tests.support.guest import boot_words, guest_files
from tests.support.libvirtd import Libvirtd

MiB = 1 << 20


class Case:
    """One VM. `console_path`: the guest's log; `guard_word`: what on a watchdog's command line names the VM."""

    console_path: Path
    guard_word: str

    def __init__(self, directory: Path) -> None:
        self.dir = directory
        self.bases = {t: self.image(t, None) for t in ("vda", "vdb")}

    def image(self, target: str, backing: Image | None) -> Image:
        """Make a base, or an overlay."""
        name = f"{target}.{len(list(self.dir.glob('*.qcow2')))}.qcow2"
        on = ["-b", str(backing.path), "-F", "qcow2"] if backing else []
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *on, name, "64M"], cwd=self.dir, check=True)
        return Image(name.replace(".", ""), self.dir / name, "qcow2", target, 64 * MiB, backing.id if backing else None)

    def overlays(self, on: Mapping[str, Image]) -> dict[str, Image]:
        """An overlay for every disk."""
        return {t: self.image(t, image) for t, image in on.items()}

    def make_ext4(self) -> None:
        """A file system on vdb."""
        raw = self.dir / "ext4.raw"
        subprocess.run(["mkfs.ext4", "-q", "-F", raw, "64M"], check=True)
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, self.bases["vdb"].path], check=True)
        raw.unlink()

    def give_agent(self) -> None:
        """Before the first start: the guest agent's channel, an agent, and a program that writes to an ext4 on vdb."""
        raise NotImplementedError

    def open(self) -> Driver:
        """Return the driver."""
        raise NotImplementedError

    def altered(self, *, memory: int = 128, machine: str = "") -> Definition:
        """Return its definition with other memory (MiB) or of another machine type."""
        raise NotImplementedError

    def cleanup(self) -> None:
        """Kill what is left."""
        raise NotImplementedError


def paths(images: Mapping[str, Image]) -> dict[str, Path]:
    """Their files."""
    return {target: image.path for target, image in images.items()}


def base_chains(case: Case) -> dict[str, tuple[Image, ...]]:
    """The chains of a fresh machine."""
    return {t: (image,) for t, image in case.bases.items()}


class QemuCase(Case):
    """The embedded driver with a machine of its own."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.run = Path(tempfile.mkdtemp(prefix="dc-", dir="/tmp"))
        self.guard_word = str(self.run)
        self.home = directory / "home"
        self.home.mkdir()
        self.console_path = self.home / "console.log"
        kernel, initrd = (str(p) for p in guest_files())
        machine = Machine(
            name="contract", memory=128 * MiB, uuid=str(uuid.uuid4()), accel="tcg",
            machine=asyncio.run(accel.versioned_machine("q35")), genid=str(uuid.uuid4()),
            kernel=kernel, initrd=initrd, append=boot_words("cnt,tick"),
            disks=tuple(DiskSpec(t, str(i.path), "qcow2") for t, i in self.bases.items()),
            nets=(NetSpec(mac="52:54:00:00:00:01"),),
        )  # fmt: skip
        self.machines = Machines(directory / "state")
        self.registered = Registered(machine, self.home, "contract.toml")
        self.machines.put(self.registered)

    def give_agent(self) -> None:
        """In the definition."""
        self.make_ext4()
        machine = replace(self.registered.machine, agent=True, initrd=str(guest_files(agent=True)[1]),
                          append=boot_words("tick,fsvdb,agent"))  # fmt: skip
        self.registered = replace(self.registered, machine=machine)
        self.machines.put(self.registered)

    def open(self) -> Driver:
        """On its sockets."""
        return QemuDriver(self.registered, self.machines, self.run)

    def altered(self, *, memory: int = 128, machine: str = "") -> Definition:
        """Of a machine that was never registered."""
        now = self.registered.machine
        other = replace(now, memory=memory * MiB, machine=machine or now.machine)
        return QemuDriver(replace(self.registered, machine=other), self.machines, self.run).definition()

    def cleanup(self) -> None:
        """By SIGKILL."""
        process = QemuDriver(self.registered, self.machines, self.run).process()
        if process:
            process.kill()
        shutil.rmtree(self.run, ignore_errors=True)


class LibvirtCase(Case):
    """A domain of its own, on the session's libvirtd."""

    def __init__(self, directory: Path, daemon: Libvirtd) -> None:
        super().__init__(directory)
        self.rig = DomainRig(directory / "domain", name=f"contract-{uuid.uuid4().hex[:8]}", daemon=daemon)
        self.console_path = self.rig.console()
        self._define()

    def _define(self) -> None:
        disks = "".join(
            f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{i.path}'/>"
            f"<target dev='{t}' bus='virtio'/></disk>"
            for t, i in self.bases.items()
        )
        path = self.rig.dir / "vm.xml"
        path.write_text(self.rig.xml(disks=disks).replace("<memory ", "<genid/><memory ", 1))
        self.rig.virsh("define", str(path))
        self.guard_word = self.rig.virsh("domuuid", self.rig.name)

    def give_agent(self) -> None:
        """Defined anew."""
        self.make_ext4()
        self.rig.virsh("undefine", self.rig.name)
        self.rig.agent, self.rig.modes = True, "tick,fsvdb,agent"
        self._define()

    def open(self) -> Driver:
        """On a connection of its own."""
        return open_driver(
            connect_now(self.rig.uri, 30), self.guard_word, self.rig.uri, self.dir / "log" / "watchdog.log"
        )

    def altered(self, *, memory: int = 128, machine: str = "") -> Definition:
        """With another XML."""
        now = self.open().definition()
        text: dict[str, Any] = json.loads(now.text)
        xml = text["persistent"].replace(f">{128 * 1024}</memory>", f">{memory * 1024}</memory>")
        kind = xml.partition("machine='")[2].partition("'")[0]
        return replace(now, text=json.dumps({**text, "persistent": xml.replace(kind, machine or kind)}))

    def cleanup(self) -> None:
        """Destroyed and undefined."""
        self.rig.destroy()


DRIVERS: dict[str, Callable[[Path, pytest.FixtureRequest], Case]] = {
    "qemu": lambda directory, _: QemuCase(directory),
    "libvirt": lambda directory, request: LibvirtCase(directory, request.getfixturevalue("daemon")),
}
