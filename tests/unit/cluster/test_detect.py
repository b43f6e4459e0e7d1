"""VMs under a cluster are told from others."""

from __future__ import annotations

from pathlib import Path

import pytest

from diskchain.cluster.detect import pacemaker_resource, refuse_managed
from diskchain.errors import Refused

CIB = """<cib><configuration><resources>
 <primitive id="vm-web1" class="ocf" provider="heartbeat" type="VirtualDomain">
  <instance_attributes id="a"><nvpair id="b" name="config" value="{config}"/></instance_attributes>
 </primitive>
 <primitive id="ip" type="IPaddr2"/>
</resources></configuration></cib>"""


def test_pacemaker_resource_is_found_by_the_name_in_its_config(tmp_path: Path) -> None:
    """Not by the file's name: that may be anything; only where it can't be read here."""
    config, cib = tmp_path / "x.xml", tmp_path / "cib.xml"
    cib.write_text(CIB.format(config=config))
    config.write_text("<domain><name>web1</name></domain>")
    assert pacemaker_resource("web1", cib) == "vm-web1" and pacemaker_resource("web2", cib) is None
    with pytest.raises(Refused, match="vm-web1"):
        refuse_managed("web1", cib=cib)
    config.unlink()
    assert pacemaker_resource("x", cib) == "vm-web1" and pacemaker_resource("web1", cib) is None


@pytest.mark.parametrize("text", ["", "no xml", "<cib/>"])
def test_no_cluster_and_a_torn_cib_manage_nothing(tmp_path: Path, text: str) -> None:
    """Without a readable CIB there is nothing to hold us off."""
    cib = tmp_path / "cib.xml"
    refuse_managed("web1", cib=cib)
    cib.write_text(text)
    refuse_managed("web1", cib=cib)


def test_proxmox_ha_is_seen(tmp_path: Path) -> None:
    """By the id in its resources and the name in the VM's own file."""
    (tmp_path / "ha").write_text("vm: 100\n\tstate started\n")
    (tmp_path / "100.conf").write_text("cores: 2\nname: web1\n")
    with pytest.raises(Refused, match="Proxmox"):
        refuse_managed("web1", cib=tmp_path / "none", pve_ha=tmp_path / "ha", pve_vms=tmp_path)
    refuse_managed("web2", cib=tmp_path / "none", pve_ha=tmp_path / "ha", pve_vms=tmp_path)
