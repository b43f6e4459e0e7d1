"""What another user may do with files: tried as that user, not computed (modes, groups, ACLs and a server's mapping count)."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from diskchain.errors import DiskchainError
from diskchain.host.process import run

_TRY = 'while [ $# -gt 0 ]; do test "$1" "$2" || printf "%s\\0%s\\0" "$1" "$2"; shift 2; done'


@dataclass(frozen=True)
class Identity:
    """Who a process is. `powerless`: without capabilities (root then has the rights of an owner only)."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    powerless: bool = True

    @property
    def name(self) -> str:
        """The user's name."""
        return name_of(self.uid)


def name_of(uid: int) -> str:
    """Return a user's name; of one without a name its number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def of_process(pid: int) -> Identity | None:
    """Return who a process is; None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    rows = {name: rest.split() for name, _, rest in (line.partition(":") for line in text.splitlines())}
    groups = tuple(int(word) for word in rows["Groups"])
    return Identity(int(rows["Uid"][1]), int(rows["Gid"][1]), groups, int(rows["CapEff"][0], 16) == 0)


def of_user(uid: int, gid: int, *, powerless: bool) -> Identity:
    """Return who a process of that user and group will be, with the groups that the user is in."""
    try:
        name = pwd.getpwuid(uid).pw_name
        groups = os.getgrouplist(name, gid)
    except KeyError:
        groups = [gid]
    return Identity(uid, gid, tuple(groups), powerless)


def uid_of(word: str) -> int | None:
    """Given a user as libvirt writes it (`+64055`, `64055`, `libvirt-qemu`), return its number."""
    return _number(word, lambda name: pwd.getpwnam(name).pw_uid)


def gid_of(word: str) -> int | None:
    """The same for a group."""
    return _number(word, lambda name: grp.getgrnam(name).gr_gid)


def _number(word: str, look_up: Callable[[str], int]) -> int | None:
    if word.removeprefix("+").isdigit():
        return int(word.removeprefix("+"))
    try:
        return look_up(word)
    except KeyError:
        return None


async def refused(who: Identity, wanted: Sequence[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Given pairs of a test (`r`, `w`, `x`) and a file, return those that the user fails.

    Only root can try it for others; without that right, or setpriv, nothing is known to fail.
    """
    if os.geteuid() not in (0, who.uid):
        return []
    words = [text for test, path in wanted for text in (f"-{test}", str(path))]
    try:
        said = (await run([*_become(who), "sh", "-c", _TRY, "try", *words])).stdout
    except DiskchainError:
        return []
    parts = said.split("\0")[:-1]
    return [(test.removeprefix("-"), Path(path)) for test, path in zip(parts[::2], parts[1::2], strict=True)]


def _become(who: Identity) -> list[str]:
    if os.geteuid() != 0:
        return []
    groups = ",".join(map(str, who.groups))
    words = [
        "setpriv",
        f"--reuid={who.uid}",
        f"--regid={who.gid}",
        f"--groups={groups}" if groups else "--clear-groups",
    ]
    return [*words, "--inh-caps=-all", "--bounding-set=-all"] if who.powerless else words


def way_to(paths: Iterable[Path]) -> list[Path]:
    """Return the directories that must be searched to reach these files, from the root down, each once."""
    found = {parent: None for path in paths for parent in path.parents}
    return sorted(found, key=lambda directory: len(directory.parts))
