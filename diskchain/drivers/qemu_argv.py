"""Machine -> the command line of its QEMU. Values in, list of words out; compare it with qemu(1)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diskchain.chain.machine import Machine, NetSpec, is_scsi
from diskchain.chain.model import Image, MiB
from diskchain.drivers.accel import cpu
from diskchain.drivers.protocol import Chains

FIRST_DISK_SLOT = 5  # below: the chipset's own, network devices at 3 and 4
SCSI_SLOT = 0xD  # after 64 virtio-blk disks


def node_name(image: Image) -> str:
    """Return the node-name of an image: unique, stable, at most 31 characters."""
    return f"layer-{image.id}"


def blockdev(image: Image, backing: str | None, *, read_only: bool) -> dict[str, Any]:
    """Return the block node of one layer. Formats and backing files are explicit: nothing is probed or followed."""
    node: dict[str, Any] = {
        "driver": image.fmt,
        "node-name": node_name(image),
        "read-only": read_only,
        "file": {"driver": "file", "node-name": f"file-{image.id}", "filename": str(image.path)},
    }
    if not read_only:
        node["discard"] = "unmap"
        node["file"]["discard"] = "unmap"
    if image.fmt == "qcow2":
        node["backing"] = backing
    return node


def chain_nodes(chain: Sequence[Image]) -> list[dict[str, Any]]:
    """Given a chain, active layer first, return its nodes in the order QEMU needs them: base first."""
    nodes: list[dict[str, Any]] = []
    below: str | None = None
    for image in reversed(chain):
        nodes.append(blockdev(image, below, read_only=image is not chain[0]))
        below = node_name(image)
    return nodes


def pci_address(index: int, first_slot: int) -> str:
    """Return the fixed PCI address of the index-th device: a saved memory finds its devices by it."""
    return f"{first_slot + index // 8:#x}.{index % 8:#x}"


def _bus(machine: Machine) -> str:
    return "pci.0" if machine.machine == "pc" or "i440fx" in machine.machine else "pcie.0"


def _disk_words(machine: Machine, chains: Chains) -> list[str]:
    words: list[str] = []
    if any(is_scsi(disk.target) for disk in machine.disks):
        words += ["-device", f"virtio-scsi-pci,id=scsi,bus={_bus(machine)},addr={SCSI_SLOT:#x}"]
    for index, disk in enumerate(machine.disks):
        chain = chains[disk.target]
        for node in chain_nodes(chain):
            words += ["-blockdev", json.dumps(node)]
        place = _scsi_place(disk.target) if is_scsi(disk.target) else _pci_place(machine, index)
        device = {
            **place, "id": disk.target, "drive": node_name(chain[0]), "bootindex": index + 1, "serial": disk.target
        }  # fmt: skip
        words += ["-device", json.dumps(device)]
    return words


def _pci_place(machine: Machine, index: int) -> dict[str, Any]:
    """A PCI device for each disk: in the pause QEMU writes out the state of each (0.7 ms, mostly of 1024 queues)."""
    return {
        "driver": "virtio-blk-pci", "bus": _bus(machine), "addr": pci_address(index, FIRST_DISK_SLOT),
        "multifunction": True,
    }  # fmt: skip


def _scsi_place(target: str) -> dict[str, Any]:
    """All disks of this kind are units of one PCI device: sda is unit 0, sdb 1, sdaa 26."""
    unit = 0
    for letter in target.removeprefix("sd"):
        unit = unit * 26 + ord(letter) - ord("a") + 1
    return {"driver": "scsi-hd", "bus": "scsi.0", "channel": 0, "scsi-id": 0, "lun": unit - 1}


def _net_words(machine: Machine) -> list[str]:
    words: list[str] = []
    for index, net in enumerate(machine.nets):
        words += ["-netdev", _netdev(net, f"net{index}")]
        words += ["-device", f"{net.model},netdev=net{index},id=nic{index},mac={net.mac},bus={_bus(machine)},"
                             f"addr={pci_address(index, 3)},multifunction=on,romfile="]  # fmt: skip
    return words


def _netdev(net: NetSpec, name: str) -> str:
    if net.type == "bridge":
        return f"bridge,id={name},br={net.bridge}"
    if net.type == "tap":
        return f"tap,id={name},ifname={net.ifname},script=no,downscript=no"
    return f"user,id={name}"


def _monitor_words(run_dir: Path, sockets: Sequence[str]) -> list[str]:
    words: list[str] = []
    for name in sockets:
        words += ["-chardev", f"socket,id={name},path={_escaped(run_dir / f'{name}.sock')},server=on,wait=off"]
        words += ["-mon", f"chardev={name},mode=control"]
    return words


def _escaped(path: Path) -> str:
    return str(path).replace(",", ",,")


def _kernel_words(machine: Machine) -> list[str]:
    words: list[str] = []
    for option, value in (("-kernel", machine.kernel), ("-initrd", machine.initrd), ("-append", machine.append)):
        if value:
            words += [option, value]
    return words


def _console_words(machine: Machine, console: Path) -> list[str]:
    if machine.console == "none":
        return ["-serial", "none"]
    return ["-chardev", f"file,id=console,path={_escaped(console)},append=on", "-serial", "chardev:console"]


def command_line(
    machine: Machine,
    chains: Chains,
    *,
    run_dir: Path,
    console: Path,
    sockets: Sequence[str],
    stopped: bool,
    incoming: bool,
    parts: Sequence[str] = (),
) -> list[str]:
    """Return the words that start the machine on these chains, with one monitor per socket name.

    `parts`: the words of its firmware and TPM.

    `machine` is complete: accelerator decided, machine type versioned. `stopped`: its CPUs wait for us (-S);
    `incoming`: it waits for its memory.
    """
    accel = machine.accel
    words = ["qemu-system-x86_64"]
    words += ["-name", f"guest={machine.name},debug-threads=on"]
    words += ["-uuid", machine.uuid]
    words += ["-nodefaults", "-no-user-config", "-display", "none"]
    # no description of the saved state in JSON: only scripts that take a state apart read it, and it is made in the pause
    words += ["-machine", f"{machine.machine},usb=off,suppress-vmdesc=on", "-accel", accel]
    words += ["-cpu", machine.cpu or cpu(accel)]
    words += ["-m", f"size={machine.memory // MiB}M", "-smp", str(machine.cpus)]
    words += _kernel_words(machine)
    words += _console_words(machine, console)
    words += _monitor_words(run_dir, sockets)
    words += parts
    words += _disk_words(machine, chains)
    words += _net_words(machine)
    if machine.agent:
        words += ["-device", f"virtio-serial-pci,id=agentbus,bus={_bus(machine)},addr=0x2"]
        words += ["-chardev", f"socket,id=agent,path={_escaped(run_dir / 'agent.sock')},server=on,wait=off"]
        words += ["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
    if machine.genid:
        words += ["-device", f"vmgenid,id=genid,guid={machine.genid}"]
    words += ["-pidfile", str(run_dir / "pid")]
    words += machine.extra
    if stopped:
        words.append("-S")
    if incoming:
        words += ["-incoming", "defer"]
    return words
