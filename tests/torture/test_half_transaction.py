"""The second disk of a running VM can't be switched: QEMU's transaction is whole or nothing, and so is the create."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from tests.support.bare_qmp import Qmp
from tests.support.refusals import check_error
from tests.support.rig import Answer, MiB, Rig, process_state, wait_for


def written(qmp: Qmp) -> dict[str, str]:
    """The files that QEMU writes to, by disk."""
    return {Path(b["qdev"]).parent.name: b["inserted"]["file"] for b in qmp("query-block")}


@pytest.mark.parametrize("memory", ["--memory", "--disk-only"])
def test_second_disk_busy_in_the_transaction_leaves_the_first_where_it_was(rig: Rig, memory: str) -> None:
    """Somebody begins to copy the second disk when all was checked. The VM runs on, on its disks; nothing is left behind."""
    (socket,) = rig.run_dir.glob("*/info.sock")
    with contextlib.closing(Qmp(socket)) as qmp:
        before = written(qmp)
        process = rig.popen("--json", "create", "vm", "s1", memory, fault="stop:create.prepared.after")
        wait_for(lambda: process_state(process.pid) == "T", "diskchain stops when all is prepared")
        (node,) = (b["inserted"]["node-name"] for b in qmp("query-block") if b["inserted"]["file"] == before["vdb"])
        qmp("blockdev-add", driver="null-co", node_name="sink", size=8 * MiB)
        qmp("blockdev-mirror", job_id="copy", device=node, target="sink", sync="none")
        os.kill(process.pid, signal.SIGCONT)
        out, err = process.communicate(timeout=60)
        check_error(Answer(process.returncode, out, err), code=1, says="in use by block job")
        assert written(qmp) == before
        assert qmp("query-status")["status"] == "running"
        qmp("block-job-cancel", device="copy", force=True)
        wait_for(lambda: not qmp("query-block-jobs"), "the copy is over")
    assert rig.journal() == [] and rig.snapshots() == {}
    assert rig.file_verdict() == []
    rig.expected["s1"] = rig.expected["now"]
    rig.ok("create", "vm", "s1", memory)
    rig.ok("stop", "vm", "--force", "-y")
    assert rig.verdict(present="now") == []
