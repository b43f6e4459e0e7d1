"""What doctor concludes from a daemon's answers; libvirt's XML and qemu.conf as values."""

from __future__ import annotations

from pathlib import Path

import pytest

from diskchain.drivers import domain_xml, host_xml
from diskchain.drivers.domains import Facts
from diskchain.drivers.host_xml import Security
from diskchain.host import libvirt_daemon
from diskchain.host.as_user import way_to
from diskchain.ops.doctor_libvirt import userfaultfd

CAPABILITIES = """<capabilities><host><secmodel><model>apparmor</model><doi>0</doi></secmodel>
<secmodel><model>dac</model><doi>0</doi><baselabel type='kvm'>+64055:+995</baselabel></secmodel></host></capabilities>"""


@pytest.mark.parametrize(
    ("libvirt", "qemu", "user", "sysctl", "code"),
    [
        (9000000, 7002022, "libvirt-qemu", "0", "libvirt-userfaultfd-unusable"),  # stock Debian 12
        (9000000, 7002022, "libvirt-qemu", "1", "libvirt-userfaultfd"),
        (9000000, 7002022, "root", "0", "libvirt-userfaultfd"),
        (11003000, 10000013, "libvirt-qemu", "0", "libvirt-userfaultfd"),  # Debian 13
        (11003000, 7002022, "libvirt-qemu", "0", "libvirt-userfaultfd-unusable"),
    ],
)  # fmt: skip
def test_the_right_to_save_memory_follows_user_sysctl_and_versions(
    libvirt: int, qemu: int, user: str, sysctl: str, code: str
) -> None:
    facts = Facts(libvirt, qemu, Security(("dac",), "+1:+1"), {}, None)
    assert [f.code for f in userfaultfd(facts, user, sysctl)] == [code]


def test_a_device_node_without_namespaces_is_warned_of() -> None:
    facts = Facts(11003000, 10000013, Security(("dac",), "+1:+1"), {"namespaces": "[ ]"}, None)
    assert [f.code for f in userfaultfd(facts, "libvirt-qemu", "0")][-1] == "libvirt-no-namespaces"


def test_capabilities_say_who_qemu_is_and_what_confines_it() -> None:
    found = host_xml.security(CAPABILITIES)
    assert found.models == ("apparmor", "dac") and found.owner == "+64055:+995" and found.confined_by == "apparmor"


def test_labels_of_a_domain_by_model() -> None:
    xml = """<domain><seclabel type='dynamic' model='dac' relabel='yes'><label>+1:+2</label></seclabel>
    <seclabel type='none' model='apparmor'/><seclabel type='static' model='selinux'><label>x</label></seclabel></domain>"""
    found = host_xml.labels(xml)
    assert found["dac"].relabel and found["dac"].label == "+1:+2"
    assert found["apparmor"].kind == "none" and not found["selinux"].relabel


@pytest.mark.parametrize(
    ("path", "why"), [("/srv/vm/a.qcow2", ""), ("/etc/a.qcow2", "/etc/"), ('/srv/a".qcow2', "quote")]
)
def test_apparmor_helper_keeps_domains_from_some_places(path: str, why: str) -> None:
    said = host_xml.apparmor_forbids(path)
    assert (why in said) if why else said == ""


def test_qemu_conf_values_without_quotes_and_comments() -> None:
    text = '# user = "nobody"\nuser = "root"\ndynamic_ownership = 0 # off\nnamespaces = [ ]\n lock_manager="lockd"\n'
    assert libvirt_daemon.parse(text) == {
        "user": "root",
        "dynamic_ownership": "0",
        "namespaces": "[ ]",
        "lock_manager": "lockd",
    }


def test_the_way_to_files_goes_from_the_root_down() -> None:
    assert way_to([Path("/a/b/c"), Path("/a/d")]) == [Path("/"), Path("/a"), Path("/a/b")]


def test_a_noted_chain_counts_only_where_all_of_it_is_in_files() -> None:
    disk = "<domain><devices><disk type='file'><target dev='vda'/><source file='/t'/>{}</disk></devices></domain>"
    whole = "<backingStore type='file'><source file='/b'/><backingStore/></backingStore>"
    assert [str(p) for p in domain_xml.backing_stores(disk.format(whole))["vda"]] == ["/t", "/b"]
    assert domain_xml.backing_stores(disk.format(""))["vda"] == []
    assert (
        domain_xml.backing_stores(disk.format("<backingStore type='network'><source name='x'/></backingStore>"))["vda"]
        == []
    )
