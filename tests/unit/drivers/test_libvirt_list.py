"""A domain that can't be looked at is no domain without disks: a merge would go ahead into what it uses."""

from __future__ import annotations

from typing import Any

import libvirt
import pytest

from diskchain.drivers.libvirt_list import list_domains
from diskchain.errors import DriverFailed, Unreachable


class Said(libvirt.libvirtError):  # type: ignore[misc]
    """What libvirt says: a code, and which part of it says so."""

    def __init__(self, code: int, domain: int = libvirt.VIR_FROM_QEMU) -> None:
        Exception.__init__(self, "said")
        self.err = (code, domain, "said", 2, None, None, None, -1, -1)


class Connection:
    """A daemon with one domain, whose every question is answered by that error."""

    def __init__(self, error: Said) -> None:
        self.error = error

    def listAllDomains(self) -> list[Connection]:
        return [self]

    def isActive(self) -> Any:
        raise self.error


@pytest.mark.parametrize(
    ("error", "raises"),
    [
        (Said(libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_RPC), Unreachable),
        (Said(libvirt.VIR_ERR_OPERATION_FAILED), DriverFailed),
    ],
)
def test_a_daemon_that_goes_away_after_the_list_is_not_a_host_without_domains(
    error: Said, raises: type[Exception]
) -> None:
    with pytest.raises(raises):
        list_domains(Connection(error))


def test_a_domain_that_vanishes_after_the_list_is_left_out() -> None:
    assert list_domains(Connection(Said(libvirt.VIR_ERR_NO_DOMAIN))) == []
