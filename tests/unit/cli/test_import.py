"""machine import: around chains that others made; nothing is written when it is refused, nothing of theirs is ever removed."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest

from diskchain.errors import Refused
from diskchain.ops import import_disks
from diskchain.ops.approve import approve_chain
from tests.unit.cli.conftest import Run, io


def qemu_img(*argv: str, cwd: Path | None = None) -> str:
    return subprocess.run(["qemu-img", *argv], check=True, capture_output=True, text=True, cwd=cwd).stdout


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """template.raw <- mid.qcow2 (named absolutely) <- top.qcow2 (named relatively), with data in each."""
    directory = tmp_path / "images"
    directory.mkdir()
    qemu_img("create", "-q", "-f", "raw", str(directory / "template.raw"), "16M")
    io("-f", "raw", "-c", "write -P 1 0 64k", str(directory / "template.raw"))
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(directory / "template.raw"),
             str(directory / "mid.qcow2"))  # fmt: skip
    io("-f", "qcow2", "-c", "write -P 2 64k 64k", str(directory / "mid.qcow2"))
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "mid.qcow2", "top.qcow2", cwd=directory)
    io("-f", "qcow2", "-c", "write -P 3 128k 64k", str(directory / "top.qcow2"))
    return directory


def everything(directory: Path) -> dict[str, str]:
    """Every file below, with its content."""
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in directory.rglob("*") if p.is_file()
    }  # fmt: skip


def refused(run: Run, directory: Path, *argv: str, code: int) -> str:
    """Import; it must be refused with this code, and leave everything as it was. Return what was said."""
    before = everything(directory)
    said = run("machine", "import", *argv, code=code).err
    assert everything(directory) == before
    return said


def reads(image: str, *pairs: tuple[int, str]) -> bool:
    """Whether the image holds these bytes at these places."""
    words = [w for byte, at in pairs for w in ("-c", f"read -P {byte} {at} 64k")]
    return "failed" not in io("-r", "-f", "qcow2", *words, image)


def test_import_writes_a_file_that_define_reads(run: Run, chain: Path, tmp_path: Path) -> None:
    """Beside the first disk; relative names; the second disk gets the next name; the answer names the file."""
    qemu_img("create", "-q", "-f", "qcow2", str(tmp_path / "d,ata.qcow2"), "8M")
    answer = run("machine", "import", "web1", "--disk", f"{chain}/top.qcow2", "--disk", f"{tmp_path}/d,ata.qcow2",
                 "--memory", "64M", "--cpus", "2", "--json").json["machine"]  # fmt: skip
    file = chain / "web1.toml"
    assert answer["file"] == str(file) and answer["again"] is False
    made = tomllib.loads(file.read_text())
    assert (made["name"], made["memory"], made["cpus"]) == ("web1", "64 MiB", 2)
    assert [(d["target"], d["image"], d["format"], d["role"]) for d in made["disk"]] == [
        ("vda", "top.qcow2", "qcow2", "os"),
        ("vdb", str(tmp_path / "d,ata.qcow2"), "qcow2", "data"),
    ]
    assert run("machine", "define", str(file), "--json").json["machine"]["again"] is True
    assert run("check", "web1", "--deep").code == 0


def test_import_of_raw_and_targets_as_said(run: Run, tmp_path: Path) -> None:
    """format= where the name does not tell, target= and role= as they were given; -n writes nothing."""
    qemu_img("create", "-q", "-f", "raw", str(tmp_path / "a.img"), "4M")
    qemu_img("create", "-q", "-f", "raw", str(tmp_path / "b.raw"), "4M")
    said = refused(run, tmp_path, "web1", "--disk", f"{tmp_path}/a.img", code=2)
    assert "format of a.img is not clear" in said and f"--disk {tmp_path}/a.img,format=raw" in said
    disks = ("--disk", f"{tmp_path}/a.img,format=raw,target=vdb,role=data", "--disk", f"{tmp_path}/b.raw,role=os")
    before = everything(tmp_path)
    plan = run("machine", "import", "web1", *disks, "-n", "--json").json["plan"]
    assert everything(tmp_path) == before and f"write {tmp_path}/web1.toml" in plan["steps"]
    made = run("machine", "import", "web1", *disks, "--json").json["machine"]["disks"]
    assert [(d["target"], d["fmt"], d["role"]) for d in made] == [("vdb", "raw", "data"), ("vda", "raw", "os")]
    run("create", "web1", "one")
    run("delete", "web1", "one", "-y")
    assert run("check", "web1", "--deep").code == 0


def test_layers_of_others_survive_and_the_imported_one_takes_merges(run: Run, chain: Path) -> None:
    """create, write, delete: the write goes into top.qcow2; what lies below is never touched; no file of theirs goes."""
    below = {name: (chain / name).read_bytes() for name in ("template.raw", "mid.qcow2")}
    run("machine", "import", "web1", "--disk", f"{chain}/top.qcow2")
    for name in ("one", "two"):
        run("create", "web1", name)
        active = run("machine", "list", "--json").json["machines"][0]["disks"][0]["active"]
        io("-f", "qcow2", "-c", "write -P 9 0 64k", active)
    run("delete", "web1", "two", "one", "-y")
    active = run("machine", "list", "--json").json["machines"][0]["disks"][0]["active"]
    assert active == str(chain / "top.qcow2")
    assert reads(active, (9, "0"), (2, "64k"), (3, "128k"))
    assert {name: (chain / name).read_bytes() for name in below} == below
    run("create", "web1", "three")
    run("revert", "web1", "three", "--discard", "-y")
    run("machine", "undefine", "web1", "-y")
    assert all((chain / name).exists() for name in ("template.raw", "mid.qcow2", "top.qcow2"))


def test_snapshot_on_an_imported_image_that_nothing_stands_on_leaves_the_image(run: Run, chain: Path) -> None:
    """A branch is deleted whose frozen image was imported: let go of, never unlinked."""
    run("machine", "import", "web1", "--disk", f"{chain}/top.qcow2")
    run("create", "web1", "one")
    run("create", "web1", "two")
    run("delete", "web1", "one", "-y")
    run("delete", "web1", "two", "-y")
    assert (chain / "top.qcow2").exists() and reads(str(chain / "top.qcow2"), (1, "0"), (2, "64k"), (3, "128k"))


def test_lower_layer_is_refused_and_its_overlay_named(run: Run, chain: Path, tmp_path: Path) -> None:
    """Also when the overlay lies in the directory of another disk of the same import."""
    said = refused(run, tmp_path, "web1", "--disk", f"{chain}/mid.qcow2", code=6)
    assert f"backing file of {chain}/top.qcow2" in said
    other = tmp_path / "other"
    other.mkdir()
    qemu_img("create", "-q", "-f", "qcow2", str(tmp_path / "base.qcow2"), "8M")
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(tmp_path / "base.qcow2"), str(other / "o.qcow2"))
    qemu_img("create", "-q", "-f", "qcow2", str(other / "x.qcow2"), "8M")
    said = refused(run, tmp_path, "web1", "--disk", f"{tmp_path}/base.qcow2", "--disk", f"{other}/x.qcow2", code=6)
    assert f"{other}/o.qcow2" in said


def test_missing_backing_format_is_refused_with_the_command_that_helps(run: Run, chain: Path) -> None:
    """As an old qemu-img wrote it. The command in the hint is typed, then it works."""
    old = chain / "old one.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", str(old), "16M")
    with old.open("r+b") as file:  # a backing file name and no format, as QEMU before 2.x wrote it
        file.seek(1024)
        file.write(b"top.qcow2")
        file.seek(8)
        file.write((1024).to_bytes(8, "big") + (9).to_bytes(4, "big"))
    said = refused(run, chain, "web1", "--disk", str(old), code=6)
    command = said.partition("write it down: ")[2].strip()
    assert command.startswith("qemu-img rebase -u -f qcow2 -b top.qcow2 -F qcow2 ")
    subprocess.run(command, shell=True, check=True, cwd=chain)
    run("machine", "import", "web1", "--disk", str(old))
    assert reads(str(old), (1, "0"), (2, "64k"), (3, "128k"))


def test_internal_snapshots_and_bitmaps_are_said_and_refuse_the_merge_by_name(run: Run, chain: Path) -> None:
    """Both stay; the delete that would lose them is refused and says which."""
    top = str(chain / "top.qcow2")
    qemu_img("snapshot", "-c", "inside", top)
    notes = run("machine", "import", "web1", "--disk", top, "--json").json["machine"]["notes"]
    assert any("1 internal snapshot:" in note for note in notes)
    run("create", "web1", "one")
    assert "internal snapshots; a merge would lose them" in run("delete", "web1", "one", "-y", code=6).err
    assert "inside" in qemu_img("snapshot", "-l", top)
    other = str(chain / "bitmap.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", other, "8M")
    qemu_img("bitmap", "--add", other, "bits")
    notes = run("machine", "import", "web2", "--disk", other, "--json").json["machine"]["notes"]
    assert any("dirty bitmaps" in note for note in notes)


def test_image_that_somebody_uses_is_busy_and_the_process_named(run: Run, chain: Path) -> None:
    """A program of QEMU's has the top open; or writes to a lower layer."""
    for name in ("top.qcow2", "mid.qcow2"):
        holder = subprocess.Popen(["qemu-io", "-f", "qcow2", str(chain / name)], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True)  # fmt: skip
        assert holder.stdin and holder.stdout
        holder.stdin.write("length\n")
        holder.stdin.flush()
        while "MiB" not in holder.stdout.readline():
            pass
        said = refused(run, chain, "web1", "--disk", f"{chain}/top.qcow2", code=5)
        assert f"qemu-io (pid {holder.pid})" in said and name in said
        holder.communicate("quit\n")


def test_hostile_chain_and_backing_file_from_elsewhere_are_refused(run: Run, chain: Path, tmp_path: Path) -> None:
    """A cycle; a backing file outside the directories of the disks, with image_roots as the way out."""
    for name, below in (("c1", "c2"), ("c2", "c1")):
        qemu_img(
            "create", "-q", "-f", "qcow2", "-u", "-F", "qcow2", "-b", f"{below}.qcow2", f"{name}.qcow2", "8M", cwd=chain
        )
    assert "cycle" in refused(run, chain, "web1", "--disk", f"{chain}/c1.qcow2", code=6)
    away = tmp_path / "away"
    away.mkdir()
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", f"{chain}/top.qcow2", str(away / "mine.qcow2"))
    said = refused(run, away, "web1", "--disk", f"{away}/mine.qcow2", code=6)
    assert "outside the allowed" in said and "image_roots" in said
    config = tmp_path / "c.toml"
    config.write_text(f'image_roots = ["{chain}"]\n')
    run("--config", str(config), "machine", "import", "web1", "--disk", f"{away}/mine.qcow2")


@pytest.mark.parametrize(("size", "code", "hint"), [(0, 6, "name the right file"), (4097, 6, "truncate -s %512")])
def test_odd_sizes_are_refused_in_clear_words(run: Run, tmp_path: Path, size: int, code: int, hint: str) -> None:
    """An empty file; one whose last sector is not whole."""
    (tmp_path / "x.raw").write_bytes(b"\1" * size)
    said = refused(run, tmp_path, "web1", "--disk", f"{tmp_path}/x.raw", code=code)
    assert hint in said and str(size) in said


def test_files_that_are_no_disks_of_ours_are_refused(run: Run, tmp_path: Path) -> None:
    """A directory, a FIFO, a text, nothing; a word after the name that is no option; two disks on one file."""
    (tmp_path / "d.qcow2").mkdir()
    os.mkfifo(tmp_path / "f.qcow2")
    (tmp_path / "t.qcow2").write_text("hello")
    for name, code in (("d", 6), ("f", 6), ("t", 8), ("no", 4)):
        refused(run, tmp_path, "web1", "--disk", f"{tmp_path}/{name}.qcow2", code=code)
    qemu_img("create", "-q", "-f", "qcow2", str(tmp_path / "a.qcow2"), "8M")
    for word in ("fromat=raw", "format=vmdk", "target=hda", "role=boot", "format=raw,format=raw"):
        refused(run, tmp_path, "web1", "--disk", f"{tmp_path}/a.qcow2,{word}", code=2)
    twice = ("--disk", f"{tmp_path}/a.qcow2", "--disk", f"{tmp_path}/a.qcow2")
    assert "two disks" in refused(run, tmp_path, "web1", *twice, code=2)
    assert "stands twice" in refused(run, tmp_path, "web1", "--disk", f"{tmp_path}/a.qcow2,target=vda", "--disk",
                                     f"{tmp_path}/a.qcow2,target=vda", code=2)  # fmt: skip


def test_machine_file_is_never_overwritten_and_goes_when_define_refuses(
    run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with that name; a machine with that name; a kill leaves a file that define reads; an error leaves none."""
    file = chain / "web1.toml"
    file.write_text("mine")
    assert f"{file} is there already" in refused(run, chain, "web1", "--disk", f"{chain}/top.qcow2", code=6)
    monkeypatch.setenv("DISKCHAIN_FAULT", "full:import.written")
    refused(run, chain, "web9", "--disk", f"{chain}/top.qcow2", code=7)
    monkeypatch.delenv("DISKCHAIN_FAULT")
    other = chain / "o.toml"
    argv = [sys.executable, "-m", "diskchain", "machine", "import", "web8", "--disk", f"{chain}/top.qcow2"]
    killed = subprocess.run(argv, env={**os.environ, "DISKCHAIN_FAULT": "kill:import.written"}, check=False)
    assert killed.returncode == -signal.SIGKILL and run("machine", "list", "--json").json["machines"] == []
    run("machine", "define", str(chain / "web8.toml"))
    run("machine", "undefine", "web8", "-y")
    run("machine", "import", "web1", "--disk", f"{chain}/top.qcow2", "--file", str(other))
    qemu_img("create", "-q", "-f", "qcow2", str(chain / "x.qcow2"), "8M")
    assert "a machine web1 already" in refused(run, chain, "web1", "--disk", f"{chain}/x.qcow2", code=6)
    assert "part of the chain of the machine web1" in refused(
        run, chain, "web2", "--disk", f"{chain}/top.qcow2", code=6
    )
    assert file.read_text() == "mine"


def test_names_that_toml_can_not_hold_are_refused_and_odd_ones_are_kept(run: Run, tmp_path: Path) -> None:
    """Quotes, backslashes and umlauts come back as they were; a newline and bytes that are no text do not go in."""
    odd = tmp_path / 'w "ä\\b 𝄞\u00a0.qcow2'
    qemu_img("create", "-q", "-f", "qcow2", str(odd), "8M")
    run("machine", "import", "web1", "--disk", str(odd))
    assert tomllib.loads((tmp_path / "web1.toml").read_text())["disk"][0]["image"] == odd.name
    for name in (b"new\nline.qcow2", b"by\xfftes.qcow2", b"d\x7fel.qcow2"):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        odd_copy = path.with_name(path.name)
        odd_copy.write_bytes(odd.read_bytes())
        assert "machine file" in refused(run, tmp_path, "web2", "--disk", str(odd_copy), code=2)


def test_records_of_a_machine_that_was_undefined_come_back(run: Run, chain: Path) -> None:
    """Its snapshots are there again, and it writes to the layer that the catalog names, not to the base."""
    run("machine", "import", "web1", "--disk", f"{chain}/top.qcow2")
    run("create", "web1", "one")
    active = run("machine", "list", "--json").json["machines"][0]["disks"][0]["active"]
    run("machine", "undefine", "web1", "-y")
    again = ("--file", str(chain / "again.toml"), "--json")
    assert "backing file of" in run("machine", "import", "web1", "--disk", f"{chain}/top.qcow2", *again, code=6).err
    notes = run("machine", "import", "web1", "--disk", active, *again).json["machine"]["notes"]
    assert any("records of web1" in note for note in notes)
    assert [s["name"] for s in run("list", "web1", "--json").json["snapshots"]] == ["one"]
    assert run("machine", "list", "--json").json["machines"][0]["disks"][0]["active"] == active


def test_files_of_others_are_refused_with_owner_and_mode() -> None:
    """As a user who may read but not write the image, or not the directory: what is wrong is said; nothing is written."""
    with tempfile.TemporaryDirectory(prefix="dc-import-") as name:
        directory = Path(name)
        directory.chmod(0o777)
        image = directory / "web1.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", str(image), "8M")
        image.chmod(0o444)
        approved = approve_chain(image, "qcow2")
        us = os.geteuid()
        other = us or 65534  # root may do everything
        try:
            os.seteuid(other)
            with pytest.raises(Refused, match="mode 444, owner "):
                import_disks._refuse_unusable(approved)
            os.seteuid(us)
            image.chmod(0o666)
            directory.chmod(0o555)
            os.seteuid(other)
            with pytest.raises(Refused, match="no file can be made in"):
                import_disks._refuse_unusable(approved)
        finally:
            os.seteuid(us)
            directory.chmod(0o755)
