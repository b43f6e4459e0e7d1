"""Is a VM under the care of a cluster? Changing it behind the cluster's back ends badly: what is stopped is started again.

Pacemaker's `ocf:heartbeat:VirtualDomain` starts a VM from the XML file that its `config` parameter names, not from
libvirt's definition: after a snapshot it would run on the base under its own overlay (docs/facts.md).
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from diskchain.errors import Refused

CIB = Path("/var/lib/pacemaker/cib/cib.xml")
PVE_HA, PVE_VMS = Path("/etc/pve/ha/resources.cfg"), Path("/etc/pve/qemu-server")


def refuse_managed(name: str, *, cib: Path = CIB, pve_ha: Path = PVE_HA, pve_vms: Path = PVE_VMS) -> None:
    """Raise Refused when Pacemaker or Proxmox HA manages the VM of that name."""
    resource = pacemaker_resource(name, cib)
    if resource:
        raise Refused(f"{name} is managed by Pacemaker (resource {resource}), which diskchain does not work with yet",
                      hint=f"stop it there and take it out first: pcs resource disable {resource} --wait")  # fmt: skip
    if _in_proxmox_ha(name, pve_ha, pve_vms):
        raise Refused(f"{name} is managed by Proxmox HA, which diskchain does not work with",
                      hint="ha-manager set vm:ID --state disabled; or use qm snapshot")  # fmt: skip


def pacemaker_resource(name: str, cib: Path = CIB) -> str | None:
    """Return the Pacemaker resource that runs the domain of that name, or None."""
    try:
        root = ET.parse(cib).getroot()  # noqa: S314 - the cluster's own
    except (OSError, ET.ParseError):
        return None
    for primitive in root.iter("primitive"):
        if primitive.get("type") != "VirtualDomain":
            continue
        for pair in primitive.iter("nvpair"):
            if pair.get("name") == "config" and _names(Path(pair.get("value", "")), name):
                return primitive.get("id") or "?"
    return None


def _names(config: Path, name: str) -> bool:
    """Whether a domain's XML file is that of the domain; one that can't be read here is judged by its own name."""
    try:
        return (ET.parse(config).getroot().findtext("name") or "").strip() == name  # noqa: S314 - the cluster's own
    except (OSError, ET.ParseError):
        return config.stem == name


def _in_proxmox_ha(name: str, resources: Path, machines: Path) -> bool:
    try:
        ids = re.findall(r"^vm:\s*(\d+)", resources.read_text(), re.MULTILINE)
    except OSError:
        return False
    for number in ids:
        try:
            text = (machines / f"{number}.conf").read_text()
        except OSError:
            continue
        if re.search(rf"^name:\s*{re.escape(name)}\s*$", text, re.MULTILINE):
            return True
    return False
