"""What the QEMUs of a failed test are doing: a guest that says nothing on its console may stand, run, or hang in its kernel."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.bare_qmp import Qmp


def qemus_below(directory: Path) -> str:
    """Describe each QEMU whose command line names this directory: its status, and twice where its processors are."""
    told = [_describe(pid, words) for pid, words in _qemus() if str(directory) in words]
    return "\n\n".join(told)


def _qemus() -> list[tuple[int, str]]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "comm").read_text().startswith("qemu-system"):
                found.append((int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()))
        except OSError:
            continue
    return found


def _describe(pid: int, words: str) -> str:
    lines = [f"QEMU {pid}: {words[:200]}"]
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        name, _, rest = path.read_text().rpartition(")")
        lines.append(f"  {name}): {rest.split()[0]}")
    for monitor in re.findall(r"path=([^, ]+\.sock),server", words):  # the one that is taken does not answer
        try:
            lines += _asked(monitor)
            break
        except (OSError, ValueError, RuntimeError) as error:
            lines.append(f"  {monitor}: {error}")
    return "\n".join(lines)


def _asked(monitor: str) -> list[str]:
    qmp = Qmp(Path(monitor), timeout=0, answers_within=2)
    try:
        told = [f"  {qmp('query-status')}"]
        for _ in range(2):
            registers = str(qmp("human-monitor-command", command_line="info registers -a"))
            told += [f"  {line}" for line in registers.splitlines() if re.match(r"CPU#|RIP=|RAX=|RSP=", line.strip())]
        return told
    finally:
        qmp.close()
