"""setup: the libvirt hook, an extra for hosts where other tools redefine domains. Nothing of ours depends on it."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from diskchain.chain.plan import Plan
from diskchain.errors import DiskchainError, Refused
from diskchain.host import files, libvirt_hook
from diskchain.host.process import run

HOOKS = Path("/etc/libvirt/hooks")
MARK = b"# diskchain libvirt hook:"


@dataclass(frozen=True)
class Installed:
    """What was done. `changed` is False when the same hook was there."""

    path: Path
    changed: bool


def hook_path(directory: Path) -> Path:
    """Return where the hook goes: beside others (libvirt runs every file of qemu.d), never in place of one."""
    return directory / "qemu.d" / "diskchain"


def plan_hook(directory: Path) -> Plan:
    """Return what would be installed. Raise Refused where a file of somebody else has that name."""
    path = hook_path(directory)
    _refuse_foreign(path)
    steps = [
        f"write {path}: refuses to start a domain on a frozen layer",
        "try it: one refusal, one start that it lets pass",
    ]
    restart = "restart libvirtd once if it does not take notice: systemctl restart libvirtd"
    return Plan("setup: the libvirt hook", tuple(steps), warnings=(restart,))


def is_ours(path: Path) -> bool:
    """Whether a file is a hook of ours. Raise OSError."""
    return MARK in path.read_bytes()[:400]


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not is_ours(path):
        raise Refused(f"{path} exists and is not ours", hint="move it away, then try again")


async def install_hook(directory: Path) -> Installed:
    """Install the hook and prove that it refuses; on failure it is taken away again. Raise Refused, DiskchainError."""
    path = hook_path(directory)
    _refuse_foreign(path)
    text = Path(libvirt_hook.__file__).read_bytes()
    if path.exists() and path.read_bytes() == text:
        return Installed(path, changed=False)
    with files.os_errors(path, "create"):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.write_durably(path, text, mode=0o755)
    try:
        await prove(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Installed(path, changed=True)


async def prove(hook: Path) -> None:
    """Run the hook as libvirt does, on a domain that writes to a frozen layer, and on one that does not."""
    with tempfile.TemporaryDirectory(prefix="diskchain-") as scratch:
        root = Path(scratch)
        for name in ("frozen", "active"):
            (root / name).write_bytes(b"")
        home = root / ".diskchain" / "u"
        home.mkdir(parents=True)
        images = {name: {"path": name} for name in ("frozen", "active")}
        snapshots = {"s": {"name": "probe", "deleted": False, "disks": {"vda": "frozen"}}}
        body = {"name": "probe", "images": images, "active": {"vda": "active"}, "snapshots": snapshots}
        (home / "catalog.json").write_text(json.dumps({"body": body}))
        for name, wanted in (("frozen", 1), ("active", 0)):
            xml = f"<domain><devices><disk device='disk'><source file='{root / name}'/></disk></devices></domain>"
            (root / "xml").write_text(xml)
            words = ["sh", "-c", '"$0" probe prepare begin - < "$1"', str(hook), str(root / "xml")]
            got = (await run(words, ok=(0, 1))).returncode
            if got != wanted:
                raise DiskchainError(f"the hook {hook} answered {got} for a domain on an {name} layer, not {wanted}",
                                     hint="it was taken away again; does /usr/bin/python3 run?")  # fmt: skip
