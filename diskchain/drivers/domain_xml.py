"""libvirt's domain XML as values: what of it concerns snapshots, and the few changes that we make to it. Pure.

Everything that is not named here passes through as it is: element order, line layout (Pacemaker's agent greps it),
comments. Source: libvirt docs/formatdomain.html, docs/formatsnapshot.html.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diskchain.chain.model import Image
from diskchain.errors import DriverFailed

_UNITS = {"b": 1, "bytes": 1, "KB": 1000, "k": 1024, "KiB": 1024, "MB": 10**6, "M": 1 << 20, "MiB": 1 << 20,
          "GB": 10**9, "G": 1 << 30, "GiB": 1 << 30, "TB": 10**12, "T": 1 << 40, "TiB": 1 << 40}  # fmt: skip


@dataclass(frozen=True)
class DomainDisk:
    """One `<disk>`. `path` is None where it is no file, or a pool's volume that is not resolved yet."""

    target: str
    type: str  # file | block | volume | network | dir | nvme | vhostuser | vhostvdpa
    device: str  # disk | cdrom | floppy | lun
    fmt: str  # what <driver type=> says; "" when it says nothing (libvirt takes raw then)
    path: Path | None
    pool: str = ""
    volume: str = ""
    read_only: bool = False
    shareable: bool = False
    transient: bool = False
    protocol: str = ""  # of a network disk
    encrypted: bool = False  # by QEMU (LUKS), the disk or a layer below it
    sliced: bool = False  # a part of its file

    @property
    def is_empty(self) -> bool:
        """A drive without a medium."""
        return self.path is None and self.type in ("file", "block", "dir")


def parse(text: str) -> ET.Element:
    """Given a domain's XML, return its root. Raise DriverFailed for what is none."""
    for prefix, uri in re.findall(r"xmlns:([A-Za-z]\w*)=[\"']([^\"']+)", text):
        if not re.fullmatch(r"ns\d+", prefix):
            ET.register_namespace(prefix, uri)  # <qemu:commandline> stays what it is called
    try:
        root = ET.fromstring(text, ET.XMLParser(target=ET.TreeBuilder(insert_comments=True)))  # noqa: S314 - libvirtd's own
    except ET.ParseError as error:
        raise DriverFailed(f"libvirt's XML can't be read: {error}") from None
    if root.tag != "domain":
        raise DriverFailed(f"libvirt's XML is a <{root.tag}>, not a <domain>")
    return root


def _text(root: ET.Element) -> str:
    return ET.tostring(root, encoding="unicode")


def name(text: str) -> str:
    """Return the domain's name."""
    return parse(text).findtext("name") or ""


def memory_bytes(text: str) -> int:
    """Return how much memory the guest has (bytes), plugged DIMMs too: what a saved memory can be as large as.

    `<maxMemory>` is only how much could be plugged; libvirt counts what is plugged into `<memory>`.
    """
    found = parse(text).find("memory")
    return 0 if found is None else _size(found)


def _size(element: ET.Element) -> int:
    try:
        return int(element.text or 0) * _UNITS.get(element.get("unit", "KiB"), 1024)
    except ValueError:
        raise DriverFailed(f"libvirt's XML has a <{element.tag}> that is no number: {element.text!r:.40}") from None


def disks(text: str) -> tuple[DomainDisk, ...]:
    """Return the domain's disks in their order, CD-ROM and floppy drives too."""
    return tuple(_disk(element) for element in _disk_elements(parse(text)))


def _disk_elements(root: ET.Element) -> Iterator[ET.Element]:
    yield from root.findall("./devices/disk")


def _target(element: ET.Element) -> str:
    found = element.find("target")
    return found.get("dev", "") if found is not None else ""


def _disk(element: ET.Element) -> DomainDisk:
    source, driver = element.find("source"), element.find("driver")
    attributes: Mapping[str, str] = source.attrib if source is not None else {}
    place = attributes.get("file") or attributes.get("dev") or attributes.get("dir")
    return DomainDisk(
        target=_target(element), type=element.get("type", "file"), device=element.get("device", "disk"),
        fmt=driver.get("type", "") if driver is not None else "", path=Path(place) if place else None,
        pool=attributes.get("pool", ""), volume=attributes.get("volume", ""), protocol=attributes.get("protocol", ""),
        read_only=element.find("readonly") is not None, shareable=element.find("shareable") is not None,
        transient=element.find("transient") is not None,
        encrypted=element.find(".//encryption") is not None, sliced=element.find(".//slices") is not None,
    )  # fmt: skip


def aliases(text: str) -> dict[str, str]:
    """Return what libvirt calls the device of each disk of a running domain."""
    found = {
        _target(e): alias.get("name", "") for e in _disk_elements(parse(text)) if (alias := e.find("alias")) is not None
    }
    return {target: alias for target, alias in found.items() if alias}


def backing_stores(text: str) -> dict[str, list[Path]]:
    """Return for each disk the chain that libvirt noted, top first; nothing for one without a note, or not all in files."""
    found = {}
    for element in _disk_elements(parse(text)):
        chain, store = [element.find("source")], element.find("backingStore")
        while store is not None and store.find("source") is not None:
            chain.append(store.find("source"))
            store = store.find("backingStore")
        paths = [Path(s.get("file", "")) for s in chain if s is not None and s.get("file")]
        found[_target(element)] = paths if len(paths) == len(chain) and len(paths) > 1 and store is not None else []
    return found


def noted_backing(text: str) -> set[str]:
    """Return the targets of the disks of which the definition says what lies below the top."""
    return {_target(e) for e in _disk_elements(parse(text)) if e.find("./backingStore/source") is not None}


def with_sources(text: str, tops: Mapping[str, tuple[Path, str]]) -> str:
    """Return the XML with these files (and formats) as the disks' sources.

    What libvirt noted of the old chain goes (`backingStore`, the source's `index`): it is read anew at the next start.
    """
    root = parse(text)
    for element in _disk_elements(root):
        found = tops.get(_target(element))
        if found is not None:
            _set_source(element, *found)
    return _text(root)


def _set_source(element: ET.Element, path: Path, fmt: str) -> None:
    source, driver = element.find("source"), element.find("driver")
    if source is None:
        source = ET.SubElement(element, "source")
    policy = {k: v for k, v in source.attrib.items() if k == "startupPolicy"}
    source.attrib.clear()
    source.attrib.update({"file": str(path), **policy})
    element.set("type", "file")
    for stale in [*element.findall("backingStore"), *element.findall("mirror")]:
        element.remove(stale)
    if driver is None:
        driver = ET.Element("driver", {"name": "qemu"})
        element.insert(0, driver)
    driver.set("type", fmt)


def with_disks_of(text: str, other: str, targets: Collection[str]) -> str:
    """Return the XML with these disks of another one too, where it has none of that name; libvirt finds a place for them."""
    root = parse(text)
    there, devices = [_target(element) for element in _disk_elements(root)], root.find("devices")
    missing = [e for e in _disk_elements(parse(other)) if _target(e) in targets and _target(e) not in there]
    if devices is None or not missing:
        return text
    for element in missing:
        for stale in [*element.findall("address"), *element.findall("alias")]:
            element.remove(stale)
        devices.append(element)
    return _text(root)


def with_name(text: str, name: str) -> str:
    """Return the XML with this name."""
    root = parse(text)
    element = root.find("name")
    if element is not None:
        element.text = name
    return _text(root)


def with_nvram(text: str, path: Path) -> str:
    """Return the XML with this file for the UEFI variables, if it names one."""
    root = parse(text)
    element = root.find("./os/nvram")
    if element is None or nvram(text) is None:
        return text
    source = element.find("source")
    if source is not None:
        source.set("file", str(path))
    else:
        element.text = str(path)
    return _text(root)


def with_genid(text: str, genid: str) -> str:
    """Return the XML with this generation id, if it has one."""
    root = parse(text)
    element = root.find("genid")
    if element is None:
        return text
    element.text = genid
    return _text(root)


def snapshot(text: str, overlays: Mapping[str, Image]) -> str:
    """Return the snapshot XML that switches these disks to overlays that exist already, and no other disk."""
    root = ET.Element("domainsnapshot")
    ET.SubElement(root, "memory", {"snapshot": "no"})
    _list_disks(root, text, {target: image.path for target, image in overlays.items()})
    return _text(root)


def _list_disks(root: ET.Element, domain: str, overlays: Mapping[str, Path]) -> None:
    """Add to a snapshot's XML every disk of the domain: these external, on those overlays, and no other."""
    listed = ET.SubElement(root, "disks")
    for disk in disks(domain):
        if disk.target not in overlays:
            ET.SubElement(listed, "disk", {"name": disk.target, "snapshot": "no"})
            continue
        element = ET.SubElement(listed, "disk", {"name": disk.target, "snapshot": "external", "type": "file"})
        ET.SubElement(element, "driver", {"type": "qcow2"})
        ET.SubElement(element, "source", {"file": str(overlays[disk.target])})


def listed(name: str, description: str, created: int, parent: str | None, state: str, memory: Path | None, domain: str,
           layers: Mapping[str, tuple[Image, Path]]) -> str:  # fmt: skip
    """Return the snapshot XML that stands in libvirt's list. `layers`: for each disk what was frozen, and what came on top.

    `state`: running, paused, shutoff or disk-snapshot; `domain`: the definition of then.
    """
    root = ET.Element("domainsnapshot")
    for tag, text in (("name", name), ("description", description), ("state", state), ("creationTime", str(created))):
        ET.SubElement(root, tag).text = text
    if parent:
        ET.SubElement(ET.SubElement(root, "parent"), "name").text = parent
    kept = {"snapshot": "external", "file": str(memory)} if memory else {"snapshot": "no"}
    ET.SubElement(root, "memory", kept)
    _list_disks(root, domain, {target: on_top for target, (_, on_top) in layers.items()})
    root.append(parse(with_sources(domain, {t: (frozen.path, frozen.fmt) for t, (frozen, _) in layers.items()})))
    return _text(root)


def with_mark(snapshot: str, mark: str) -> str:
    """Return a listed snapshot's XML with a mark at the end of its description."""
    root = ET.fromstring(snapshot)  # noqa: S314 - our own
    element = root.find("description")
    assert element is not None
    element.text = f"{element.text or ''} {mark}".strip()
    return _text(root)


# -- what else a snapshot must know ------------------------------------------------------------------------------------


def nvram(text: str) -> Path | None:
    """Return the file of the UEFI variables, or None."""
    element = parse(text).find("./os/nvram")
    if element is None:
        return None
    source = element.find("source")
    place = source.get("file") if source is not None else (element.text or "").strip()
    return Path(place) if place else None


def leaves_nvram_to_libvirt(text: str) -> bool:
    """Whether it is a UEFI domain that does not say where its variables are: libvirt has a usual place for them."""
    system = parse(text).find("./os")
    if system is None or system.find("nvram") is not None:
        return False
    loader = system.find("loader")
    kept = loader is None or loader.get("stateless") != "yes"
    return kept and (system.get("firmware") == "efi" or (loader is not None and loader.get("type") == "pflash"))


def nvram_problem(text: str) -> str:
    """Return why the UEFI variables can't be copied as a plain file; nothing when they can, or when there are none."""
    element = parse(text).find("./os/nvram")
    if element is None:
        return ""
    kind, fmt = element.get("type", "file"), element.get("format", "raw")
    if kind != "file":
        return f"of type {kind}"
    return "" if fmt == "raw" else f"in the format {fmt}"


def tpm(text: str) -> str | None:
    """Return the version of the domain's emulated TPM ("2.0"), what else another is ("passthrough"), None without one."""
    backend = parse(text).find("./devices/tpm/backend")
    if backend is None:
        return None
    kind = backend.get("type", "?")
    if kind != "emulator":
        return kind
    return "kept elsewhere" if backend.find("source") is not None else f"{backend.get('version', '?')}"


def passthrough(text: str) -> list[str]:
    """Return the host devices that are passed to the guest, whose state no saved memory holds. USB devices: QEMU saves."""
    root = parse(text)
    kinds = [element.get("type", "?") for element in root.findall("./devices/hostdev")]
    found = [f"hostdev {kind}" for kind in kinds if kind != "usb"]
    found += ["interface hostdev" for e in root.findall("./devices/interface") if e.get("type") == "hostdev"]
    return found


def agent_channel(text: str) -> str | None:
    """Return the state of the guest agent's channel (`connected`, `disconnected`, ""), None when there is no such channel."""
    for target in parse(text).findall("./devices/channel/target"):
        if target.get("name") == "org.qemu.guest_agent.0":
            return target.get("state", "")
    return None


def machine_types(capabilities: str) -> set[str]:
    """Given libvirt's capabilities XML, return the machine types of its x86_64 QEMU."""
    root = ET.fromstring(capabilities)  # noqa: S314 - libvirtd's own
    return {m.text or "" for arch in root.iter("arch") if arch.get("name") == "x86_64" for m in arch.iter("machine")}


def machine_type(text: str) -> str:
    """Return the machine type, like pc-q35-7.2."""
    found = parse(text).find("./os/type")
    return found.get("machine", "") if found is not None else ""


def summary(text: str) -> dict[str, object]:
    """Return what people look for in a configuration, under the names that a machine file has for it."""
    root = parse(text)
    memory, machine = root.find("memory"), root.find("./os/type")
    loader = (root.findtext("./os/loader") or "") + _attribute(root, "./os", "firmware")
    firmware = "uefi" if "efi" in loader.lower() or "OVMF" in loader else "bios"
    return {
        "name": root.findtext("name") or "", "memory": _size(memory) if memory is not None else 0,
        "cpus": int(root.findtext("vcpu") or 1), "machine": machine.get("machine", "") if machine is not None else "",
        "firmware": firmware, "tpm": bool(root.findall("./devices/tpm")), "nets": [{"mac": mac} for mac in _macs(root)],
    }  # fmt: skip


# -- differences in words ----------------------------------------------------------------------------------------------


def differences(old: str, new: str) -> list[str]:
    """Return in words what changes from one configuration to the other; where disks lie is left out."""
    one, other = parse(old), parse(new)
    found = [f"{word} {before} -> {after}" for word, before, after in _plain_values(one, other) if before != after]
    found += _devices(one, other)
    return found


def _plain_values(one: ET.Element, other: ET.Element) -> Iterator[tuple[str, str, str]]:
    for word, place in (("cpus", "vcpu"), ("title", "title")):
        yield word, one.findtext(place) or "-", other.findtext(place) or "-"
    for word, place in (("memory", "memory"), ("memory in use", "currentMemory")):
        yield word, _in_mib(one.find(place)), _in_mib(other.find(place))
    for word, place, attribute in (("machine", "./os/type", "machine"), ("firmware", "./os", "firmware"),
                                   ("cpu mode", "./cpu", "mode")):  # fmt: skip
        yield word, _attribute(one, place, attribute), _attribute(other, place, attribute)
    for word, place in (("kernel", "./os/kernel"), ("initrd", "./os/initrd"), ("cmdline", "./os/cmdline"),
                        ("loader", "./os/loader"), ("cpu model", "./cpu/model")):  # fmt: skip
        yield word, one.findtext(place) or "-", other.findtext(place) or "-"


def _in_mib(element: ET.Element | None) -> str:
    return "-" if element is None else f"{_size(element) >> 20} MiB"


def _attribute(root: ET.Element, place: str, attribute: str) -> str:
    element = root.find(place)
    return "-" if element is None else element.get(attribute, "-")


def _devices(one: ET.Element, other: ET.Element) -> list[str]:
    before, after = ([_target(e) for e in _disk_elements(root)] for root in (one, other))
    found = [f"{t} detached, its file kept" for t in before if t not in after]
    found += [f"{t} attached" for t in after if t not in before]
    if _macs(one) != _macs(other):
        found.append("network devices differ")
    for tag in ("hostdev", "tpm", "rng", "video", "graphics", "sound", "watchdog", "filesystem", "vsock"):
        counts = [len(root.findall(f"./devices/{tag}")) for root in (one, other)]
        if counts[0] != counts[1]:
            found.append(f"{tag} devices {counts[0]} -> {counts[1]}")
    return found


def _macs(root: ET.Element) -> Sequence[str]:
    return [e.get("address", "") for e in root.findall("./devices/interface/mac")]
