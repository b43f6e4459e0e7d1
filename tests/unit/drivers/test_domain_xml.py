"""libvirt's domain XML: what is read out of it, what is changed, and that all the rest passes through untouched."""

from __future__ import annotations

from pathlib import Path

import pytest

from diskchain.chain.model import Image
from diskchain.drivers import domain_xml
from diskchain.drivers.domains import Domain, choose_uri
from diskchain.drivers.suitable import suitable
from diskchain.errors import DriverFailed, Refused

XML = """<domain type='kvm' id='3'>
  <name>web1</name>
  <uuid>5a3f8f6e-0000-4000-8000-000000000001</uuid>
  <!-- kept -->
  <memory unit='KiB'>2097152</memory>
  <currentMemory unit='KiB'>1048576</currentMemory>
  <vcpu placement='static'>2</vcpu>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>
    <nvram>/var/lib/libvirt/qemu/nvram/web1_VARS.fd</nvram>
  </os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='/vm/a.s1.qcow2' index='3'/>
      <backingStore type='file' index='2'>
        <format type='qcow2'/>
        <source file='/vm/a.qcow2'/>
        <backingStore/>
      </backingStore>
      <target dev='vda' bus='virtio'/>
      <alias name='virtio-disk0'/>
    </disk>
    <disk type='file' device='disk'><source file='/vm/b.img'/><target dev='vdb' bus='virtio'/></disk>
    <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>
    <disk type='block' device='disk'><source dev='/dev/vg/lv'/><target dev='vdc'/></disk>
    <disk type='network' device='disk'><source protocol='rbd' name='pool/x'/><target dev='vdd'/></disk>
    <disk type='volume' device='disk'><source pool='p' volume='v'/><target dev='vde'/></disk>
    <disk type='file' device='disk'><source file='/vm/s.img'/><target dev='vdf'/><shareable/></disk>
    <disk type='file' device='disk'><driver type='vmdk'/><source file='/vm/v.vmdk'/><target dev='vdg'/></disk>
    <interface type='network'><mac address='52:54:00:00:00:01'/></interface>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
    <hostdev mode='subsystem' type='pci'/><hostdev mode='subsystem' type='usb'/>
  </devices>
</domain>
"""


def test_facts_are_read_out() -> None:
    """What a snapshot must know."""
    assert domain_xml.name(XML) == "web1" and domain_xml.memory_bytes(XML) == 2 << 30
    assert domain_xml.nvram(XML) == Path("/var/lib/libvirt/qemu/nvram/web1_VARS.fd") and domain_xml.tpm(XML) == "2.0"
    assert domain_xml.passthrough(XML) == ["hostdev pci"] and domain_xml.machine_type(XML) == "pc-q35-7.2"


def test_floppy_that_can_be_written_is_named() -> None:
    """One that is read-only, or empty, needs no snapshot."""
    floppy = "<disk type='file' device='floppy'><source file='/vm/f.img'/><target dev='fda'/></disk>"
    text = XML.replace("<interface ", floppy + "<interface ")
    assert [(u.target, u.why) for u in suitable(domain_xml.disks(text))[1]][-1] == (
        "fda",
        "a floppy that can be written",
    )
    for harmless in (floppy.replace("</disk>", "<readonly/></disk>"), floppy.replace("<source file='/vm/f.img'/>", "")):
        found = suitable(domain_xml.disks(text.replace(floppy, harmless)))
        assert "fda" not in found[0] and "fda" not in [u.target for u in found[1]]


def test_uefi_variables_and_tpms_that_no_plain_file_holds_are_told_apart() -> None:
    """A qcow2 file is open in QEMU, so a copy of it is of no instant; a domain with BIOS has none."""
    line, chip = "<nvram>/var/lib/libvirt/qemu/nvram/web1_VARS.fd</nvram>", "<backend type='emulator' version='2.0'/>"

    def kept(nvram: str) -> tuple[Path | None, str, bool]:
        text = XML.replace(line, nvram)
        return domain_xml.nvram(text), domain_xml.nvram_problem(text), domain_xml.leaves_nvram_to_libvirt(text)

    assert kept(line) == (Path("/var/lib/libvirt/qemu/nvram/web1_VARS.fd"), "", False)
    assert kept("<nvram type='file'><source file='/x.fd'/></nvram>") == (Path("/x.fd"), "", False)
    assert kept("<nvram format='qcow2'>/x.qcow2</nvram>") == (Path("/x.qcow2"), "in the format qcow2", False)
    assert kept("<nvram type='block'><source dev='/dev/x'/></nvram>") == (None, "of type block", False)
    assert kept("") == (None, "", True)
    bios = XML.replace(line, "").replace("type='pflash'", "type='rom'")
    assert not domain_xml.leaves_nvram_to_libvirt(bios)
    assert domain_xml.leaves_nvram_to_libvirt(bios.replace("<os>", "<os firmware='efi'>"))
    assert not domain_xml.leaves_nvram_to_libvirt(XML.replace(line, "").replace("<loader ", "<loader stateless='yes' "))
    assert domain_xml.tpm(XML.replace(chip, "<backend type='passthrough'/>")) == "passthrough"
    assert (
        domain_xml.tpm(XML.replace(chip, "<backend type='emulator'><source type='dir'/></backend>")) == "kept elsewhere"
    )
    assert domain_xml.tpm(XML.replace(chip, "").replace("<tpm model='tpm-crb'></tpm>", "")) is None


def test_disks_are_classified() -> None:
    """Taken: qcow2 and raw files; refused with the native way: everything else that is written; the rest needs nothing."""
    taken, refused = suitable(domain_xml.disks(XML))
    assert {t: (str(d.path), d.fmt) for t, d in taken.items()} == {
        "vda": ("/vm/a.s1.qcow2", "qcow2"), "vdb": ("/vm/b.img", ""),
    }  # fmt: skip
    assert [u.target for u in refused] == ["vdc", "vdd", "vde", "vdf", "vdg"]
    assert "lvcreate -s" in refused[0].instead and "rbd snap create" in refused[1].instead


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ("<source file='/vm/b.img'><encryption format='luks'/></source>", "<encryption>"),
        ("<encryption format='luks'/><source file='/vm/b.img'/>", "<encryption>"),
        ("<source file='/vm/b.img'><slices><slice type='storage' offset='1' size='2'/></slices></source>", "<slices>"),
        ("<source file='/vm/b.img'/><backingStore type='file'><format type='raw'/><source file='/vm/l.img'>"
         "<encryption format='luks'/></source></backingStore>", "<encryption>"),
    ],
)  # fmt: skip
def test_disks_that_need_more_than_their_file_are_refused(more: str, why: str) -> None:
    """A layer on top would carry on what belongs to the image below."""
    taken, refused = suitable(domain_xml.disks(XML.replace("<source file='/vm/b.img'/>", more)))
    assert "vdb" not in taken and why in next(u.why for u in refused if u.target == "vdb")


def test_sources_are_replaced_and_nothing_else() -> None:
    """The old chain and index go; format, comments, layout and every other disk stay."""
    changed = domain_xml.with_sources(
        XML, {"vda": (Path("/vm/a.x.qcow2"), "qcow2"), "vdb": (Path("/vm/b.x.qcow2"), "qcow2")}
    )
    assert "<!-- kept -->" in changed and "backingStore" not in changed and 'index="3"' not in changed
    disks = {d.target: d for d in domain_xml.disks(changed)}
    assert (disks["vda"].path, disks["vdb"].path, disks["vdb"].fmt) == (
        Path("/vm/a.x.qcow2"),
        Path("/vm/b.x.qcow2"),
        "qcow2",
    )
    assert disks["vdc"] == domain_xml.disks(XML)[3]
    assert "\n  <name>web1</name>\n" in changed  # Pacemaker's agent greps for it at the end of a line


def test_snapshot_names_every_disk() -> None:
    """Those not asked for are switched off by name: libvirt's default would take them along."""
    overlay = Image("i", Path("/vm/a.i.qcow2"), "qcow2", "vda", 1, "b")
    made = domain_xml.snapshot(XML, {"vda": overlay})
    assert made.count('snapshot="no"') == 8 and made.count('snapshot="external"') == 1 and "/vm/a.i.qcow2" in made


def test_differences_are_words() -> None:
    """Where disks lie is no difference; memory, devices and disks that come and go are."""
    other = (
        XML.replace("2097152", "4194304")
        .replace("dev='vdb'", "dev='vdz'")
        .replace("52:54:00:00:00:01", "52:54:00:00:00:02")
    )
    other = other.replace("/vm/a.s1.qcow2", "/vm/elsewhere.qcow2").replace(
        "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>", ""
    )
    assert domain_xml.differences(XML, XML) == []
    assert domain_xml.differences(XML, other) == [
        "memory 2048 MiB -> 4096 MiB", "vdb detached, its file kept", "vdz attached", "network devices differ",
        "tpm devices 1 -> 0",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "no xml", "<domain>", "<pool/>"])
def test_what_is_no_domain_is_an_error(text: str) -> None:
    """Never a traceback."""
    with pytest.raises(DriverFailed):
        domain_xml.disks(text)


def test_images_of_a_domain_are_those_of_all_its_definitions() -> None:
    """A managed save or the persistent definition may name another layer than the live one."""
    saved = XML.replace("/vm/a.s1.qcow2", "/vm/a.qcow2")
    domain = Domain("web1", "u", True, True, True, (), (XML, saved), domain_xml.disks(XML))
    assert {Path("/vm/a.s1.qcow2"), Path("/vm/a.qcow2"), Path("/vm/b.img")} <= set(domain.images)


def test_uri_is_chosen_by_name_then_environment_and_remote_ones_are_refused() -> None:
    """The images of another host are not here."""
    assert choose_uri("qemu:///session", {"LIBVIRT_DEFAULT_URI": "x"}) == "qemu:///session"
    assert choose_uri(None, {"LIBVIRT_DEFAULT_URI": "qemu+unix:///system?socket=/x"}) == "qemu+unix:///system?socket=/x"
    assert choose_uri("none", {}) is None and choose_uri(None, {"LIBVIRT_DEFAULT_URI": "none"}) is None
    for uri in ("qemu+ssh://host/system", "qemu://host/system", "qemu+tcp:///system", "xen:///", "test:///default"):
        with pytest.raises(Refused):
            choose_uri(uri, {})


def test_name_and_generation_id_are_replaced_where_they_are() -> None:
    """A domain without `<genid>` gets none."""
    assert domain_xml.parse(domain_xml.with_name(XML, "web2")).findtext("name") == "web2"
    assert domain_xml.with_genid(XML, "new") == XML
    there = XML.replace("<vcpu", "<genid>old</genid><vcpu", 1)
    assert domain_xml.parse(domain_xml.with_genid(there, "new")).findtext("genid") == "new"


def test_place_of_the_uefi_variables_is_replaced_where_there_is_one() -> None:
    """In both ways to write it."""
    there, line = Path("/new.fd"), "<nvram>/var/lib/libvirt/qemu/nvram/web1_VARS.fd</nvram>"
    for text in (XML, XML.replace(line, "<nvram type='file'><source file='/x.fd'/></nvram>")):
        assert domain_xml.nvram(domain_xml.with_nvram(text, there)) == there
    for text in (XML.replace(line, ""), XML.replace(line, "<nvram type='block'><source dev='/dev/x'/></nvram>")):
        assert domain_xml.with_nvram(text, there) == text


def test_disks_of_another_definition_are_added_without_their_place() -> None:
    """Those that are there already stay as they are."""
    other = XML.replace("dev='vdb' bus='virtio'/>", "dev='vdx' bus='virtio'/><address type='pci' slot='9'/>")
    made = domain_xml.with_disks_of(XML, other, ["vda", "vdx"])
    assert [d.target for d in domain_xml.disks(made)] == [*(d.target for d in domain_xml.disks(XML)), "vdx"]
    assert "<address" not in made and domain_xml.with_disks_of(XML, other, ["vda"]) == XML


def test_aliases_are_those_of_disks_that_have_one() -> None:
    """libvirt gives them at the start."""
    assert domain_xml.aliases(XML) == {"vda": "virtio-disk0"}


def test_memory_that_could_be_plugged_is_not_counted() -> None:
    """libvirt adds plugged DIMMs to `<memory>` (seen with 9.0)."""
    more = XML.replace("<memory ", "<maxMemory slots='4' unit='GiB'>512</maxMemory><memory ", 1)
    assert domain_xml.memory_bytes(more) == 2 << 30


def test_memory_that_is_no_number_is_an_error_in_words() -> None:
    """Found by scripts/torture (fuzz)."""
    with pytest.raises(DriverFailed, match="no number"):
        domain_xml.memory_bytes("<domain><memory>much</memory></domain>")
