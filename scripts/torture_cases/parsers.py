"""What reads things that others may have made or damaged: each parser with good inputs, and how to damage them.

    python -m scripts.torture_cases.parsers PARSER SEED COUNT

feeds COUNT damaged inputs to one of them and prints what came of it as JSON. Only DiskchainError may come out.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diskchain.chain import qcow2
from diskchain.chain.machine import parse_machine_file
from diskchain.chain.model import Catalog, Image, Memory, Snapshot
from diskchain.config import load_config
from diskchain.drivers import domain_xml
from diskchain.errors import DiskchainError
from diskchain.ops.approve import approve_chain
from diskchain.store import catalog as catalog_store
from diskchain.store import journal, memory_file, record, state_copy
from diskchain.store.catalog import Home
from fixtures.hostile import BACKING_FORMAT, BITMAPS, DATA_FILE, header
from scripts.torture_cases.mutate import changed, damaged

Feed = Callable[[random.Random], None]
HEADERS = (
    header(), header(backing=b"base.qcow2"), header(version=2, backing=b"base.raw", backing_format=b"raw"),
    header(backing=b"x", extensions=[(BITMAPS, bytes(24)), (0x6803F857, bytes(96))]), header(extensions=[(DATA_FILE, b"data")]),
    header(backing=b"json:{}", extensions=[(BACKING_FORMAT, b"raw")]), header(cluster_bits=9), header(incompatible=16),
)  # fmt: skip
MACHINE = """# a comment
name = "web1"
memory = "2 GiB"
cpus = 2
machine = "q35"
agent = true
[[disk]]
target = "vda"
image = "disk.qcow2"
[[disk]]
target = "vdb"
image = "data.raw"
format = "raw"
[[net]]
bridge = "br0"
"""
SETTINGS = """lock_wait = 5
image_roots = ["/srv"]
[create]
memory = "auto"
[groups]
web = ["web1", "web*"]
"""
DOMAIN = """<domain type='kvm' id='3' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>web1</name>
<uuid>5a3f8f6e-0000-4000-8000-000000000001</uuid><!-- kept --><memory unit='KiB'>2097152</memory>
<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><nvram>/n/VARS.fd</nvram></os><devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/vm/a.s1.qcow2' index='3'/>
<backingStore type='file'><format type='qcow2'/><source file='/vm/a.qcow2'/><backingStore/></backingStore>
<target dev='vda' bus='virtio'/><alias name='virtio-disk0'/></disk>
<disk type='volume' device='disk'><source pool='p' volume='v'/><target dev='vde'/><shareable/></disk>
<channel type='unix'><source mode='bind' path='/a'/><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<interface type='network'><mac address='52:54:00:00:00:01'/></interface>
<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm><hostdev mode='subsystem' type='pci'/></devices>
<qemu:commandline><qemu:arg value='-x'/></qemu:commandline></domain>"""


def _a_catalog(directory: Path) -> Any:
    images = {
        "a": Image("a", directory / "a.qcow2", "qcow2", "vda", 5, fingerprint={"size": 1}),
        "b": Image("b", directory / "b.qcow2", "qcow2", "vda", 5, "a", ours=True),
    }
    catalog = Catalog("u", "vm", active={"vda": "b"}, current="s", targets=("vda",)).with_images(images.values())
    catalog = catalog.with_snapshot(
        Snapshot("s", "s", "2026", None, {"vda": "a"}, memory=Memory("saved", 5, "ab", 0.5))
    )
    body = asdict(catalog)
    return json.loads(json.dumps(body, default=str))


def feeds(place: Path) -> Mapping[str, Feed]:
    """Return what feeds each parser one damaged input."""
    home = Home(place / ".diskchain/u")
    home.path.parent.mkdir()
    home.make()
    file, body = place / "file", _a_catalog(place)
    entry = {"op": "delete", "id": "e", "state": "commit", "started": "2026", "pid": 1, "boot": "b",
             "data": {"name": "s", "snapshots": ["s"], "folds": [], "unlinks": [], "kept": [], "unclean": False}}  # fmt: skip
    saved = _saved_memory()
    packed = state_copy.pack({"nvram": {"nvram": b"x" * 99}, "tpm": {"tpm/a": b"y", "tpm/b": b""}})

    def written(data: bytes) -> Path:
        file.write_bytes(data)
        return file

    def header_alone(rng: random.Random) -> None:
        data = damaged(rng.choice(HEADERS), rng)
        qcow2.reject_unsafe(qcow2.parse_header(data, rng.choice((len(data), 1 << 18, 1 << 40))))

    def image(rng: random.Random) -> None:
        approve_chain(written(damaged(rng.choice(HEADERS).ljust(1 << 18, b"\0"), rng)), "qcow2", roots=[place])

    def a_record(kind: str, good: Any, path: Path, load: Callable[[], object]) -> Feed:
        whole = record.dump(kind, good)

        def feed(rng: random.Random) -> None:
            path.write_bytes(damaged(whole, rng) if rng.random() < 0.4 else _as_record(kind, changed(good, rng)))
            load()

        return feed

    def memory(rng: random.Random) -> None:
        fd = os.open(written(damaged(saved, rng)), os.O_RDONLY)
        try:
            memory_file.read_header(fd)
            memory_file.ran(fd)
        finally:
            os.close(fd)

    def domain(rng: random.Random) -> None:
        text = damaged(DOMAIN.encode(), rng).decode("utf-8", "replace")
        for look in (domain_xml.disks, domain_xml.memory_bytes, domain_xml.backing_stores, domain_xml.aliases, domain_xml.nvram,
                     domain_xml.tpm, domain_xml.passthrough, domain_xml.agent_channel, domain_xml.machine_type,
                     domain_xml.summary):  # fmt: skip
            look(text)

    def state(rng: random.Random) -> None:
        head, _, rest = packed.partition(b"\n")
        data = damaged(packed, rng)
        if rng.random() < 0.5:
            data = json.dumps(changed(json.loads(head), rng)).encode() + b"\n" + rest
        state_copy.unpack(data)

    return {
        "header": header_alone,
        "image": image,
        "catalog": a_record("catalog", body, home.catalog, lambda: catalog_store.load(home)),
        "journal": a_record("journal", entry, home.journal / "e.json", lambda: journal.open_entry(home)),
        "machine": lambda rng: void(parse_machine_file(damaged(MACHINE.encode(), rng).decode("utf-8", "replace"), "m.toml")),
        "config": lambda rng: void(load_config(written(damaged(SETTINGS.encode(), rng)), {})),
        "memory": memory,
        "domain": domain,
        "state": state,
    }  # fmt: skip


def _as_record(kind: str, body: Any) -> bytes:
    """A record whose checksum fits, whatever is in it."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps({"diskchain": kind, "version": 1, "body": body, "sha256": digest}).encode()


def void(_value: object) -> None:
    """What comes out does not matter."""


def _saved_memory() -> bytes:
    with tempfile.TemporaryFile() as file:
        memory_file.write_header(file.fileno(), DOMAIN, was_running=True)
        os.write(file.fileno(), b"QEVM" + bytes(4000))
        memory_file.seal(file.fileno())
        return os.pread(file.fileno(), 1 << 20, 0)


NAMES = ("header", "image", "catalog", "journal", "machine", "config", "memory", "domain", "state")


def main(name: str, seed: str, count: int) -> None:
    """Feed one parser; print how slow the slowest was (s), how much memory came on top (bytes), what went wrong."""
    wrong, slowest = [], 0.0
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        feed = feeds(Path(place))[name]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(count):
            took, said = fed(feed, f"{seed} {number}")
            if took > slowest:  # or the first that needed so deep a stack, whose pages had to be found
                took = min(took, fed(feed, f"{seed} {number}")[0])
            slowest = max(slowest, took)
            wrong += [f"input {number}: {said}"] if said else []
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"slowest": slowest, "grown": grown << 10, "wrong": wrong[:5], "bad": len(wrong)}))


def fed(feed: Feed, seed: str) -> tuple[float, str]:
    """Feed a parser once; return the seconds of processor that it took, and what went wrong, if anything."""
    began, said = time.process_time(), ""
    try:
        feed(random.Random(seed))
    except DiskchainError:
        pass
    except Exception:
        said = traceback.format_exc(limit=-3)
    return time.process_time() - began, said


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
