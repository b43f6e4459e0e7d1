"""status, check, doctor on a machine that is off: healthy, and with each kind of damage; nothing is ever written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diskchain.chain import rules
from diskchain.chain.model import Catalog, GiB, Image
from diskchain.cli import health
from diskchain.drivers import accel
from diskchain.store import record

from .conftest import Run, Web1

Pieces = dict[str, tuple[int, int, bytes]]


def everything(directory: Path) -> Pieces:
    """All files below a directory: mode, time, content."""
    found: Pieces = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path)] = (status.st_mode, status.st_mtime_ns, content)
    return found


def findings(web1: Web1, *argv: str, code: int) -> list[dict[str, str]]:
    """Check; return what is above info. Nothing is written meanwhile."""
    before = everything(web1.directory)
    found: list[dict[str, str]] = web1.run("check", *argv, "--json", code=code).json["findings"]
    assert everything(web1.directory) == before
    assert all(set(f) == {"code", "severity", "subject", "evidence", "remedy"} for f in found)
    assert all(f["evidence"] and (f["remedy"] or f["severity"] == "info") for f in found)
    return [f for f in found if f["severity"] != "info"]


def home(web1: Web1) -> Path:
    (found,) = web1.directory.glob(".diskchain/*/")
    return found


def frozen(web1: Web1) -> Path:
    """The overlay that the snapshot `two` froze."""
    snapshots = web1.run("list", "web1", "--json").json["snapshots"]
    return Path(next(d["frozen"] for s in snapshots if s["name"] == "two" for d in s["disks"] if d["target"] == "vda"))


def change_catalog(web1: Web1, change: Callable[[Any], object]) -> None:
    """Rewrite the catalog with a right checksum."""
    path = home(web1) / "catalog.json"
    body = json.loads(path.read_bytes())["body"]
    change(body)
    path.write_bytes(record.dump("catalog", body))


@pytest.fixture
def grown(web1: Web1) -> Web1:
    """web1 with the snapshots one - two - (now)."""
    web1.write(1, "0")
    web1.run("create", "web1", "one")
    web1.write(2, "64k")
    web1.run("create", "web1", "two")
    web1.write(3, "128k")
    return web1


# -- healthy -----------------------------------------------------------------------------------------------------------


def test_check_healthy_finds_nothing(grown: Web1) -> None:
    assert findings(grown, code=0) == []
    assert findings(grown, "web1", "--deep", code=0) == []
    assert "1 VM checked: 0 errors, 0 warnings" in grown.run("check").out


def test_check_without_machines_finds_nothing(run: Run) -> None:
    assert run("check", "--json").json["findings"] == []
    assert "no VMs" in run("status").out


def test_check_of_a_name_that_is_not_there_exits_4(run: Run) -> None:
    run("check", "nobody", code=4)
    run("status", "nobody", code=4)


def test_status_healthy_answers_as_the_contract_says(grown: Web1) -> None:
    before = everything(grown.directory)
    (found,) = grown.run("status", "--json").json["vms"]
    assert {"name", "driver", "state", "depth", "used", "free", "volume_size", "findings"} <= set(found)
    assert (found["name"], found["state"], found["depth"], found["snapshots"]) == ("web1", "stopped", 3, 2)
    assert found["used"] > 0 and found["volume_size"] > found["free"] > 0
    lines = grown.run("status", "web1").out.splitlines()
    assert lines[0].split("  ")[0] == "VM" and lines[1].startswith("web1  stopped")
    assert grown.run("status", "-H", "-o", "VM,SNAPS").out == "web1\t2\n"
    assert everything(grown.directory) == before


def test_status_takes_several(grown: Web1) -> None:
    assert [v["name"] for v in grown.run("status", "web*", "--json").json["vms"]] == ["web1"]
    grown.run("status", "web1,other", code=4)


# -- damage ------------------------------------------------------------------------------------------------------------


def _missing(w: Web1) -> None:
    frozen(w).unlink()


def _symlink(w: Web1) -> None:
    path = frozen(w)
    shutil.move(path, path.with_suffix(".away"))
    path.symlink_to(path.with_suffix(".away"))


def _fifo(w: Web1) -> None:
    path = frozen(w)
    path.unlink()
    os.mkfifo(path)


def _cut(w: Web1) -> None:
    os.truncate(frozen(w), 4096)


def _changed(w: Web1) -> None:
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 9 8M 64k", str(frozen(w))], check=True,
                   capture_output=True)  # fmt: skip


def _rebased(w: Web1) -> None:
    subprocess.run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "web1.qcow2", w.active()],
                   check=True)  # fmt: skip


def _linked(w: Web1) -> None:
    os.link(w.active(), w.directory / "other-name.img")


def _overlay(w: Web1, on: str | Path, name: str) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(on), str(w.directory / name)],
                   check=True)  # fmt: skip


def _clone(w: Web1) -> None:
    _overlay(w, frozen(w), "clone.img")


def _clone_of_active(w: Web1) -> None:
    _overlay(w, w.active(), "clone.img")


def _clone_by_json(w: Web1) -> None:
    name = json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": str(frozen(w))}})
    _overlay(w, f"json:{name}", "clone.img")


def _orphan(w: Web1) -> None:
    _overlay(w, w.directory / "web1.qcow2", "web1.vda.0123456789ab.qcow2")


def _trash(w: Web1) -> None:
    (w.directory / ".web1.vda.0123456789ab.qcow2.trash").write_bytes(b"x")


def _temporary(w: Web1) -> None:
    (w.directory / ".diskchain-tmp-0123456789abcdef").write_bytes(b"x")


def _part(w: Web1) -> None:
    next((home(w) / "snapshots").iterdir()).joinpath("memory.part").write_bytes(b"x")


def _orphan_snapshot(w: Web1) -> None:
    (home(w) / "snapshots" / "0123456789ab").mkdir()


def _no_recover_text(w: Web1) -> None:
    (home(w) / "RECOVER.txt").unlink()


def _no_configuration(w: Web1) -> None:
    for path in (home(w) / "snapshots").glob("*/machine.json"):
        path.write_text("{")


def _open_home(w: Web1) -> None:
    home(w).chmod(0o755)


def _catalog_torn(w: Web1) -> None:
    path = home(w) / "catalog.json"
    os.truncate(path, path.stat().st_size // 2)


def _catalog_gone(w: Web1) -> None:
    (home(w) / "catalog.json").unlink()


def _catalog_of_another(w: Web1) -> None:
    change_catalog(w, lambda body: body.update(uuid="00000000-0000-4000-8000-000000000000"))


def _catalog_dangling(w: Web1) -> None:
    change_catalog(w, lambda body: body["images"].popitem())


def _catalog_circle(w: Web1) -> None:
    def change(body: Any) -> None:
        for image in body["images"].values():
            image["backing"] = image["id"]

    change_catalog(w, change)


def _resized_in_catalog(w: Web1) -> None:
    change_catalog(w, lambda body: [i.update(virtual_size=1 << 30) for i in body["images"].values()])


def _records_gone(w: Web1) -> None:
    shutil.rmtree(home(w))


def _definition_torn(w: Web1) -> None:
    os.truncate(w.directory / "state" / "machines" / "web1.json", 40)


def _journal_torn(w: Web1) -> None:
    (home(w) / "journal" / "0123456789ab.json").write_text("{")


def _interrupted(w: Web1) -> None:
    body = {"op": "create", "id": "0123456789ab", "state": "intent", "started": "2026-01-01T00:00:00Z", "pid": 1,
            "boot": "", "data": {"name": "three"}}  # fmt: skip
    (home(w) / "journal" / "0123456789ab.json").write_bytes(record.dump("journal", body))


def _memory(w: Web1, *, mode: int, content: bytes | None, status: str = "saved") -> None:
    def change(body: Any) -> None:
        for key, snapshot in body["snapshots"].items():
            snapshot["memory"].update(status=status, bytes=100, sha256="0" * 64)
            path = home(w) / "snapshots" / key / "memory"
            if content is not None:
                path.write_bytes(content)
                path.chmod(mode)

    change_catalog(w, change)


DAMAGE: dict[str, tuple[Callable[[Web1], None], str, int]] = {
    "missing": (_missing, "layer-missing", 11),
    "symlink": (_symlink, "layer-hostile", 11),
    "fifo": (_fifo, "layer-hostile", 11),
    "cut": (_cut, "layer-damaged", 11),
    "changed": (_changed, "layer-changed", 11),
    "rebased": (_rebased, "backing-differs", 11),
    "hard link": (_linked, "hard-links", 10),
    "clone": (_clone, "foreign-overlay", 10),
    "clone of the active layer": (_clone_of_active, "foreign-overlay", 11),
    "clone by json": (_clone_by_json, "foreign-overlay", 10),
    "orphan": (_orphan, "orphan-overlay", 10),
    "trash": (_trash, "leftover-trash", 10),
    "temporary": (_temporary, "leftover-temporary", 10),
    "part": (_part, "leftover-temporary", 10),
    "orphan snapshot": (_orphan_snapshot, "orphan-snapshot", 10),
    "RECOVER.txt": (_no_recover_text, "recover-text-missing", 10),
    "configuration": (_no_configuration, "configuration-unreadable", 11),
    "open home": (_open_home, "records-open", 10),
    "catalog torn": (_catalog_torn, "catalog-damaged", 11),
    "catalog gone": (_catalog_gone, "catalog-missing", 11),
    "catalog of another": (_catalog_of_another, "catalog-foreign", 11),
    "catalog dangling": (_catalog_dangling, "catalog-inconsistent", 11),
    "catalog circle": (_catalog_circle, "catalog-inconsistent", 11),
    "size": (_resized_in_catalog, "size-differs", 10),
    "records gone": (_records_gone, "records-missing", 11),
    "definition torn": (_definition_torn, "definition-damaged", 11),
    "journal torn": (_journal_torn, "journal-damaged", 11),
    "interrupted": (_interrupted, "interrupted", 10),
    "memory missing": (lambda w: _memory(w, mode=0, content=None), "memory-missing", 11),
    "memory damaged": (lambda w: _memory(w, mode=0o600, content=b"x" * 100), "memory-damaged", 11),
    "memory open": (lambda w: _memory(w, mode=0o644, content=b"x" * 100), "memory-mode", 11),
    "memory unfinished": (lambda w: _memory(w, mode=0, content=None, status="saving"), "memory-unfinished", 10),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_check_names_each_damage(grown: Web1, kind: str) -> None:
    damage, code, exits = DAMAGE[kind]
    damage(grown)
    found = findings(grown, code=exits)
    assert code in {f["code"] for f in found}, found
    said = grown.run("check", "web1", code=exits).out
    assert "  do: " in said and said.isascii()
    grown.run("status", code=None)
    assert grown.run("status", "--json", code=None).code in (0, 10, 11)


@pytest.mark.parametrize("kind", ["missing", "catalog torn", "records gone", "definition torn", "journal torn"])
def test_status_says_the_worst(grown: Web1, kind: str) -> None:
    damage, code, exits = DAMAGE[kind]
    damage(grown)
    (found,) = grown.run("status", "--json", code=exits).json["vms"]
    assert code in {f["code"] for f in found["findings"]}


def test_check_deep_reads_inside_an_image(grown: Web1) -> None:
    path = Path(grown.active())
    with path.open("r+b") as file:  # the refcount table's place: every cluster looks unused
        file.seek(2 * 65536)
        file.write(bytes(65536))
    assert "image-corrupt" not in {f["code"] for f in findings(grown, code=0)}
    assert "image-corrupt" in {f["code"] for f in findings(grown, "--deep", code=11)}


def test_check_a_writer_that_is_not_ours(grown: Web1) -> None:
    argv = ["qemu-io", "-f", "qcow2", grown.active()]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as other:
        assert other.stdin and other.stdout
        other.stdin.write(b"length\n")
        other.stdout.readline()
        found = findings(grown, code=11)
        other.stdin.close()
    assert [f["code"] for f in found] == ["foreign-writer"] and "qemu-io" in found[0]["evidence"]


def test_status_warns_of_old_snapshots_and_says_what_to_do(grown: Web1) -> None:
    change_catalog(grown, lambda b: [s.update(created="2020-01-01T00:00:00Z") for s in b["snapshots"].values()])
    said = grown.run("status", code=10).out
    assert "2 snapshots older than 14d: one, two" in said and "diskchain delete web1 one" in said


# -- rules -------------------------------------------------------------------------------------------------------------


def _codes(found: Any) -> list[tuple[str, str]]:
    return [(f.code, f.severity.value) for f in found]


def test_rules_of_space() -> None:
    assert _codes(rules.full_volume("v", Path("/v"), 5 * GiB, 100 * GiB)) == [("volume-nearly-full", "warning")]
    assert _codes(rules.full_volume("v", Path("/v"), 1 * GiB, 5 * GiB)) == [("volume-nearly-full", "warning")]
    assert _codes(rules.full_volume("v", Path("/v"), 50 * GiB, 100 * GiB)) == []
    assert _codes(rules.memory_fits("vm", Path("/v"), 1, 2)) == [("memory-would-not-fit", "warning")]
    assert _codes(rules.memory_fits("vm", Path("/v"), 2, 2)) == []


def test_rules_of_a_vm_that_stopped_itself() -> None:
    found = rules.stopped_itself("db1", {"vdb": "nospace"}, {"vdb": (Path("/srv/vm"), 0)})
    assert (found.code, found.severity) == ("paused-critical", rules.Severity.ERROR)
    assert "vdb: no space (0 free on /srv/vm)" in found.evidence and "diskchain resume db1" in str(found.remedy)


@pytest.mark.parametrize(
    ("version", "rescue", "expected"),
    [("5.2.0", None, [("qemu-no-background-save", "warning")]), ("7.2.22", None, [("qemu-save-may-hang", "info")]),
     ("7.2.22", "no right", [("qemu-save-may-hang", "warning")]), ("10.0.13", "no right", [])],
)  # fmt: skip
def test_rules_of_qemu_versions(version: str, rescue: str | None, expected: list[tuple[str, str]]) -> None:
    assert _codes(rules.qemu_traps(version, rescue)) == expected


def test_rules_of_depth_and_of_circles() -> None:
    assert _codes(rules.deep_chains("vm", 51)) == [("chain-deep", "warning")]
    images = {k: Image(k, Path(k), "qcow2", "vda", 1, b) for k, b in (("a", "b"), ("b", "a"), ("c", None))}
    assert _codes(rules.dangling(Catalog("u", "vm", images))) == [("catalog-inconsistent", "error")]
    assert _codes(rules.dangling(Catalog("u", "vm", {"c": images["c"]}, {"vda": "c"}))) == []


def test_exit_code_is_that_of_the_worst() -> None:
    found = [rules.info("a", "s", "e"), rules.warning("b", "s", "e", "r")]
    assert [rules.exit_code(found[:1]), rules.exit_code(found), rules.exit_code([])] == [0, 10, 0]
    lines = health.finding_lines([*found, rules.error("c", "s", "e", "r")], "done")
    assert [line.split()[0] for line in lines] == ["error", "do:", "warning", "do:", "info", "done:"]


# -- doctor ------------------------------------------------------------------------------------------------------------


def test_doctor_looks_at_this_host(web1: Web1, monkeypatch: pytest.MonkeyPatch) -> None:
    async def boots(name: str) -> float | None:
        assert name == "kvm"
        return None

    monkeypatch.setattr(accel, "boots", boots)
    before = everything(web1.directory)
    answer = web1.run("doctor", "--json", code=None)
    assert everything(web1.directory) == before
    found = {f["code"]: f for f in answer.json["findings"]}
    assert {"qemu", "packages", "image-locks", "volume", "python", "apparmor", "selinux"} <= set(found)
    assert found["kvm-unusable"]["severity"] == "warning" and answer.code >= 10
    assert "kvm" not in found


def test_doctor_names_directories_that_others_can_write_to(web1: Web1, monkeypatch: pytest.MonkeyPatch) -> None:
    async def boots(name: str) -> float | None:
        return 0.1

    monkeypatch.setattr(accel, "boots", boots)
    (web1.directory / "state").chmod(0o777)
    monkeypatch.setenv("DISKCHAIN_RUN_DIR", "/run/" + "long" * 30)
    found = {f["code"]: f["severity"] for f in web1.run("doctor", "--json", code=11).json["findings"]}
    assert found["directory-open"] == "warning" and found["run-dir-too-long"] == "error"


def test_expired_snapshots_are_warned_of_and_stay(web1: Web1) -> None:
    web1.run("create", "web1", "soon", "--expires", "14d")
    made = web1.run("create", "web1", "it's over", "--expires", "0s", "--json").json["snapshot"]
    assert made["expires"] >= made["created"]
    change_catalog(web1, lambda b: b["snapshots"][made["id"]].update(expires="2020-01-01T00:00:00Z"))
    for command in ("status", "check"):
        (found,) = web1.run(command, "web1", "--json", code=10).json[{"status": "vms", "check": "findings"}[command]]
        (found,) = found.get("findings", [found])
        assert (found["code"], found["evidence"]) == ("expired-snapshots", "expired: it's over")
        assert found["remedy"] == """diskchain delete web1 'it'"'"'s over'"""
    warned = {s["name"]: s["warnings"] for s in web1.run("list", "web1", "--json").json["snapshots"]}
    assert warned == {"soon": [], "it's over": ["expired"]}
    assert "! expired" in web1.run("list", "web1").out
    assert "expires:       2020-01-01T00:00:00Z" in web1.run("show", "web1", "it's over").out
    web1.run("delete", "web1", "it's over", "-y")
    web1.run("status", code=0)
