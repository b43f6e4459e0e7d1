"""A libvirt domain for tests of the real command line: a Rig that virsh defined, on a private libvirtd."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support.guest import boot_words, guest_files
from tests.support.libvirtd import Libvirtd
from tests.support.rig import Rig, has_ended, wait_for

_ON = ("running", "paused", "idle", "in shutdown")  # what is undefined then is a transient domain for a moment


@dataclass
class DomainRig(Rig):
    """One domain in one directory. `build` defines it with virsh, as an admin would."""

    daemon: Libvirtd | None = None
    broken: bool = False  # libvirt, headers and catalog disagree at the end, on purpose

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.daemon
        self.uri = self.daemon.uri

    def build(self, *, guest: bool, fault: str = "") -> None:
        """Make the disks and define the domain; with `guest` it boots the micro guest."""
        for target in self.targets:
            fmt = "raw" if target in self.raw else "qcow2"
            self.qemu_img("create", "-q", "-f", fmt, str(self.dir / f"{target}.{fmt}"), str(self.size))
            self.make_ext4(target)
        (self.dir / "vm.xml").write_text(self.xml(guest=guest))
        self.virsh("define", str(self.dir / "vm.xml"))

    def xml(self, *, guest: bool = True, disks: str | None = None) -> str:
        """The domain's definition."""
        kernel, initrd = guest_files(agent=self.agent)
        boot = (
            f"<kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{boot_words(self.modes)}</cmdline>"
            if guest
            else ""
        )
        size = self.memory.split()[0]
        return f"""<domain type='qemu'>
  <name>{self.name}</name>
  <memory unit='MiB'>{size}</memory>
  <vcpu>{self.cpus}</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    {boot}
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <on_crash>destroy</on_crash>
  <devices>
    {self.disk_xml() if disks is None else disks}
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    {self.channel_xml()}
    <serial type='file'><source path='{self.dir}/console.log' append='on'/><target port='0'/></serial>
  </devices>
</domain>
"""

    def channel_xml(self) -> str:
        """The guest agent's."""
        channel = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
        return channel if self.agent else ""

    def disk_xml(self) -> str:
        """The `<disk>` elements."""
        return "\n    ".join(
            f"<disk type='file' device='disk'><driver name='qemu' type='{'raw' if t in self.raw else 'qcow2'}'/>"
            f"<source file='{self.dir}/{t}.{'raw' if t in self.raw else 'qcow2'}'/><target dev='{t}' bus='virtio'/></disk>"
            for t in self.targets
        )

    def virsh(self, *words: str, ok: bool = True) -> str:
        """Run virsh on our daemon."""
        assert self.daemon
        return self.daemon.virsh(*words, ok=ok)

    def sources(self, *, inactive: bool = False) -> dict[str, Path]:
        """What libvirt says that the disks are, live or at the next start."""
        xml = self.virsh("dumpxml", self.name, *(["--inactive"] if inactive else []))
        found = {}
        for disk in re.findall(r"<disk .*?</disk>", xml, re.DOTALL):
            source, target = re.search(r"<source file='([^']*)'", disk), re.search(r"<target dev='([^']*)'", disk)
            if source and target:
                found[target[1]] = Path(source[1])
        return found

    def active(self) -> dict[str, Path]:
        """The active layers; before there are records, what libvirt says."""
        known = any(self.dir.glob(".diskchain/*/catalog.json"))
        return super().active() if known else self.sources(inactive=True)

    def agreement(self) -> list[str]:
        """libvirt's XML (live and persistent), headers and our catalog name the same layers; return where they don't."""
        active = self.active()
        wrong = [f"persistent {t}: {p}" for t, p in self.sources(inactive=True).items() if active.get(t) != p]
        wrong += [f"live {t}: {p}" for t, p in self.sources().items() if active.get(t) != p]
        return wrong + self.header_agreement()

    def header_agreement(self) -> list[str]:
        """The backing files that the headers name are those of the catalog; return where they aren't."""
        if not any(self.dir.glob(".diskchain/*/catalog.json")):
            return []
        images, wrong = self.catalog()["images"], []
        for image in images.values():
            path, below = self.path_of(image), image["backing"] and self.path_of(images[image["backing"]])
            if path.suffix == ".qcow2" and path.exists():
                info = json.loads(self.qemu_img("info", "-U", "--output=json", str(path)))
                named = info.get("full-backing-filename")
                if (Path(named) if named else None) != (below or None):
                    wrong.append(f"header of {path.name}: {named}, the catalog says {below}")
        return wrong

    def verdict(self, *, present: str | None = None) -> list[str]:
        """The usual verdict, and the agreement."""
        return super().verdict(present=present) + self.agreement()

    def monitor(self) -> Path:
        """QEMU's socket, to which the daemon connects."""
        assert self.daemon
        (path,) = (self.daemon.dir / "lib" / "qemu").glob(f"domain-*-{self.name}/monitor.sock")
        return path

    def exists(self) -> bool:
        """Whether libvirt knows it."""
        return self.name in self.virsh("list", "--all", "--name").split()

    def console(self) -> Path:
        """The console log."""
        return self.dir / "console.log"

    def pid(self) -> int | None:
        """The domain's QEMU."""
        assert self.daemon
        path = self.daemon.dir / "run" / "qemu" / f"{self.name}.pid"
        try:
            pid = int(path.read_text())
        except (OSError, ValueError):
            return None
        return pid if not has_ended(pid) else None

    def destroy(self) -> None:
        """End the domain, undefine it, remove everything."""
        pid = self.pid()
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
            wait_for(lambda: has_ended(pid), "QEMU is gone")
            wait_for(lambda: self.virsh("domstate", self.name, ok=False) not in _ON, "libvirt knows it")
        self.virsh("undefine", self.name, "--snapshots-metadata", "--managed-save", "--keep-nvram", ok=False)
        subprocess.run(["rm", "-rf", str(self.run_dir), str(self.dir)], check=True)
