"""libvirt's capabilities XML and a domain's security labels as values. Pure.

Source: libvirt docs/formatcaps.html, docs/formatdomain.html#security-label.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass

from diskchain.drivers import domain_xml

_MAC = ("apparmor", "selinux")


@dataclass(frozen=True)
class Security:
    """How libvirt confines QEMU here: its models, and `user:group` that QEMU runs as (`+999:+995`; "" when not said)."""

    models: tuple[str, ...]
    owner: str

    @property
    def confined_by(self) -> str:
        """apparmor, selinux or nothing."""
        return next((model for model in self.models if model in _MAC), "")


def security(capabilities: str) -> Security:
    """Given libvirt's capabilities XML, return how it confines QEMU."""
    root = ET.fromstring(capabilities)  # noqa: S314 - libvirtd's own
    models, owner = [], ""
    for model in root.findall("./host/secmodel"):
        models.append(model.findtext("model") or "")
        for label in model.findall("baselabel"):
            if models[-1] == "dac" and label.get("type") in ("kvm", "qemu"):
                owner = (label.text or "").strip()
    return Security(tuple(models), owner)


@dataclass(frozen=True)
class Label:
    """One `<seclabel>` of a domain."""

    model: str
    kind: str  # dynamic | static | none
    relabel: bool
    label: str


def labels(domain: str) -> dict[str, Label]:
    """Given a domain's XML, return its security labels by model."""
    found = {}
    for element in domain_xml.parse(domain).findall("seclabel"):
        model = element.get("model", "")
        text = (element.findtext("label") or element.findtext("baselabel") or "").strip()
        kind = element.get("type", "dynamic")
        relabel = element.get("relabel", "no" if kind in ("static", "none") else "yes") == "yes"
        found[model] = Label(model, kind, relabel, text)
    return found


# What virt-aa-helper never lets a domain write to (libvirt src/security/virt-aa-helper.c, valid_path).
_FORBIDDEN = ("/bin/", "/etc/", "/lib", "/lost+found/", "/proc/", "/sbin/", "/selinux/", "/sys/", "/usr/bin/", "/usr/lib",
              "/usr/sbin/", "/usr/share/", "/usr/local/bin/", "/usr/local/etc/", "/usr/local/lib", "/usr/local/sbin/",
              "/boot/", "/vmlinuz", "/initrd")  # fmt: skip


def apparmor_forbids(path: str) -> str:
    """Return why libvirt's AppArmor helper would not let a domain write to a file of that name; nothing when it would."""
    if '"' in path:
        return "its name holds a double quote"
    place = next((prefix for prefix in _FORBIDDEN if path.startswith(prefix)), "")
    return f"it lies in {place}" if place else ""
