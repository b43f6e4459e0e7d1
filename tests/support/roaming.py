"""A rig whose layers and records may lie in any directory below its own; its vda stands on a template of somebody else's."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.rig import Rig


class Roaming(Rig):
    """Two disks: vda (qcow2, on base/template.qcow2), vdb (raw)."""

    @property
    def template(self) -> Path:
        """The image that is not the VM's own."""
        return self.dir / "base/template.qcow2"

    def make_images(self) -> None:
        """The template, the disks, a second directory."""
        for name in ("base", "there"):
            (self.dir / name).mkdir()
        self.qemu_img("create", "-q", "-f", "qcow2", str(self.template), str(self.size))
        io(self.template, "write -P 7 0 3M")
        self.qemu_img(
            "create", "-q", "-f", "qcow2", "-b", str(self.template), "-F", "qcow2", str(self.dir / "vda.qcow2")
        )
        self.qemu_img("create", "-q", "-f", "raw", str(self.dir / "vdb.raw"), str(self.size))
        self.configure(f'image_roots = ["{self.dir}"]\n')

    def build(self, *, guest: bool, fault: str = "") -> None:
        """Make the images, and define the machine."""
        self.make_images()
        disks = "".join(f'[[disk]]\ntarget = "{t}"\nimage = "{t}.{f}"\n' for t, f in (("vda", "qcow2"), ("vdb", "raw")))
        (self.dir / "vm.toml").write_text(f'name = "vm"\nmemory = "64 MiB"\naccel = "tcg"\n{disks}')
        self.ok("machine", "define", str(self.dir / "vm.toml"), fault=fault)

    @property
    def _catalog(self) -> Path:
        (path,) = self.dir.rglob(".diskchain/*/catalog.json")
        return path

    def catalog(self) -> Any:
        """The one catalog that there is."""
        return json.loads(self._catalog.read_bytes())["body"]

    def path_of(self, image: Mapping[str, Any]) -> Path:
        """Relative to where the records are."""
        return self._catalog.parents[2] / str(image["path"])

    def journal(self) -> list[Path]:
        """Open entries anywhere."""
        return list(self.dir.rglob(".diskchain/*/journal/*.json"))

    def images(self) -> set[Path]:
        """All that the catalog names."""
        return {self.path_of(i) for i in self.catalog()["images"].values()}

    def file_verdict(self) -> list[str]:
        """As the rig's, in every directory; `orphan` with the path below the rig's."""
        there = {p for p in self.dir.rglob("*") if p.suffix in (".qcow2", ".raw") and p.is_file()}
        wrong = [f"orphan {os.path.relpath(p, self.dir)}" for p in sorted(there - self.images())]
        wrong += [f"missing {os.path.relpath(p, self.dir)}" for p in sorted(self.images() - there) if not p.exists()]
        left = [p for name in ("*.trash", ".diskchain-new-*") for p in self.dir.rglob(name)]
        wrong += [f"leftover {p}" for p in left] + [f"open journal {p}" for p in self.journal()]
        wrong += [f"second records {p}" for p in self.dir.rglob(".diskchain/*") if p != self._catalog.parent]
        for path in sorted(self.images()):
            if path.suffix == ".qcow2":
                wrong += self._check(path)
        return wrong


def io(path: Path, command: str) -> None:
    """Write into an image as a guest would."""
    done = subprocess.run(["qemu-io", "-f", Rig.fmt(path), "-c", command, str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and "wrote" in done.stdout, done.stdout + done.stderr
