"""What a VM's disks look like, as values: images, chains, snapshots, and the tree they form.

Glossary (the field's words, one word per thing):

image         one file with (a part of) a disk's data, qcow2 or raw
backing file  the image that an overlay falls back to where it holds no data itself
overlay       an image with a backing file; only the topmost one is ever written
base          the lowest image of a chain
active layer  the image a disk writes to now; every image that is not active is *frozen*
chain         active layer, its backing file, the backing file's backing file, ... down to the base
snapshot S    froze, for each disk it covers, the image that was active then: F(S)
current       the snapshot whose frozen images the active layers stand on

The tree of snapshots mirrors the tree of images. Everything here is pure: no I/O, no clock.
"""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from diskchain.chain.text import cut
from diskchain.errors import BadName, ChainDamaged, NotFound

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30

Fingerprint = Mapping[str, object]
"""What a frozen image must still look like: size, virtual_size and sha256 of its tables (raw: mtime_ns). What is only
compared in some places (`map`, `written_ns`): ops/approve.py."""


@dataclass(frozen=True)
class Image:
    """One file of a chain."""

    id: str
    path: Path
    fmt: str
    target: str
    virtual_size: int
    backing: str | None = None
    ours: bool = False  # only files that diskchain created are ever unlinked
    fingerprint: Fingerprint | None = None  # None while the image is active


@dataclass(frozen=True)
class Memory:
    """The saved memory of a snapshot. `status` is none, saving, saved or failed; sizes in bytes.

    `configuration`: the sha256 of the one that it loads into; older versions did not note it.
    """

    status: str = "none"
    bytes: int = 0
    sha256: str = ""
    seconds: float = 0.0
    reason: str = ""
    configuration: str = ""

    @property
    def saved(self) -> bool:
        """Whether a revert can load it."""
        return self.status == "saved"


@dataclass(frozen=True)
class Snapshot:
    """A named point in time. `disks` maps a disk's target to the id of the image frozen for it."""

    id: str
    name: str
    created: str
    parent: str | None
    disks: Mapping[str, str]
    description: str = ""
    consistency: str = "crash"  # memory | quiesced | crash | off
    was: str = "stopped"  # running | paused | stopped: what the VM did at that moment
    memory: Memory = field(default_factory=Memory)
    protected: bool = False
    automatic: bool = False  # made by revert to keep the present
    deleted: bool = False  # its merge is recorded and not finished
    merge_begun: bool = False  # some of that merge was done: its frozen images are no state of their own any more
    creating: bool = False  # create has not come past its point of no return
    by: str = ""
    expires: str = ""  # until when it is of use (--expires): warned of afterwards, never deleted for it
    pause_ms: float | None = None
    partial: tuple[str, ...] = ()
    quiesced: bool = False  # its file systems were frozen at that moment, all of them, until we thawed them
    unquiesced: str = ""  # why they were not, though that was asked for
    frozen: bool = False  # its memory may hold them frozen: whoever loads it thaws them
    registered: bool = False  # libvirt lists it too
    captured: Mapping[str, Mapping[str, str]] = field(
        default_factory=dict
    )  # nvram, tpm: sha256 by file in its directory

    @property
    def state(self) -> str:
        """`memory` when a revert can bring the running programs back, else `disk`."""
        return "memory" if self.memory.saved else "disk"


@dataclass(frozen=True)
class Catalog:
    """All that diskchain remembers of one VM. Methods return new values, nothing is changed in place."""

    uuid: str
    name: str
    images: Mapping[str, Image] = field(default_factory=dict)
    active: Mapping[str, str] = field(default_factory=dict)
    snapshots: Mapping[str, Snapshot] = field(default_factory=dict)
    current: str | None = None
    left: str | None = None  # the snapshot that `undo` goes back to
    keeps: int = 0  # number of the newest before-revert-N
    targets: tuple[str, ...] = ()  # disk order
    detached: tuple[
        str, ...
    ] = ()  # last layers of disks that the VM had once: kept, active again if the disk comes back
    asleep: bool = False  # its memory was loaded, and it has not run since: `resume` wakes it
    roles: Mapping[str, str] = field(default_factory=dict)  # os or data, where disk-role said so
    state_files: tuple[str, ...] = ()  # nvram, tpm: made once, so never made anew in silence

    # -- looking ---------------------------------------------------------------------------------------------------

    def chain(self, image_id: str) -> list[Image]:
        """Given an image's id, return its chain, top first. Raise ChainDamaged when the record itself is a circle."""
        found: list[Image] = []
        walk: str | None = image_id
        while walk is not None:
            if walk not in self.images or len(found) > len(self.images):
                raise ChainDamaged(f"the catalog of {self.name} names an image {walk} that it does not know",
                                   hint="keep every file; see RECOVER.txt")  # fmt: skip
            found.append(self.images[walk])
            walk = found[-1].backing
        return found

    def active_chains(self) -> dict[str, list[Image]]:
        """Return for each disk its chain, active layer first."""
        return {target: self.chain(image_id) for target, image_id in self.active.items()}

    def detached_on(self, image_id: str) -> str | None:
        """Given an image, return the last layer of a detached disk whose chain it belongs to, or None."""
        return next((top for top in self.detached if any(i.id == image_id for i in self.chain(top))), None)

    def overlays_on(self, image_id: str) -> list[Image]:
        """Return the images whose backing file is the given one, oldest first."""
        return [image for image in self.images.values() if image.backing == image_id]

    def is_fork(self, snapshot: Snapshot) -> bool:
        """Whether several overlays stand on a layer that the snapshot froze: such a layer can't be merged into one."""
        return any(len(self.overlays_on(image_id)) > 1 for image_id in snapshot.disks.values())

    def image_at(self, path: Path) -> Image | None:
        """Return the image of that path, or None."""
        return next((image for image in self.images.values() if image.path == path), None)

    def visible(self) -> list[Snapshot]:
        """Return the snapshots that an admin sees, oldest first."""
        return [s for s in self.snapshots.values() if not s.deleted and not s.creating]

    def pending(self) -> list[Snapshot]:
        """Return the deleted snapshots whose merge is still to be done, oldest first."""
        return [s for s in self.snapshots.values() if s.deleted]

    def find(self, name: str) -> Snapshot:
        """Given a name (or id), return the snapshot. Raise NotFound, for a deleted one with the way back."""
        found = named(self.visible(), name)
        if found:
            return found[0]
        if named(self.pending(), name):
            raise NotFound(f"snapshot {name!r} of {self.name} is deleted, and waits for its merge",
                           hint=f"diskchain undelete {self.name} {shlex.quote(name)}")  # fmt: skip
        raise NotFound(f"{self.name} has no snapshot {name!r}", hint=f"diskchain list {self.name}")

    def children(self, snapshot_id: str | None) -> list[Snapshot]:
        """Return the visible snapshots whose (visible) parent is the given one."""
        return [s for s in self.visible() if self.visible_parent(s.parent) == snapshot_id]

    def visible_parent(self, snapshot_id: str | None) -> str | None:
        """Given a snapshot's id, return it, or its nearest ancestor that is not deleted."""
        while snapshot_id is not None and self.snapshots[snapshot_id].deleted:
            snapshot_id = self.snapshots[snapshot_id].parent
        return snapshot_id

    def line(self, snapshot_id: str | None) -> Iterator[Snapshot]:
        """Yield the snapshot and its ancestors, deleted ones included."""
        while snapshot_id is not None:
            yield self.snapshots[snapshot_id]
            snapshot_id = self.snapshots[snapshot_id].parent

    def frozen_by(self, image_id: str) -> Snapshot | None:
        """Return the snapshot that froze the image, or None."""
        return next((s for s in self.snapshots.values() if image_id in s.disks.values()), None)

    # -- changing --------------------------------------------------------------------------------------------------

    def with_images(self, images: Iterable[Image]) -> Catalog:
        """Return the catalog with these images added or replaced."""
        return replace(self, images={**self.images, **{image.id: image for image in images}})

    def without_images(self, ids: Iterable[str]) -> Catalog:
        """Return the catalog without these images."""
        gone = set(ids)
        return replace(self, images={k: v for k, v in self.images.items() if k not in gone})

    def with_snapshot(self, snapshot: Snapshot) -> Catalog:
        """Return the catalog with the snapshot added or replaced."""
        return replace(self, snapshots={**self.snapshots, snapshot.id: snapshot})

    def without_snapshot(self, snapshot_id: str) -> Catalog:
        """Return the catalog without the snapshot; its children become its parent's."""
        gone = self.snapshots[snapshot_id]
        kept = {
            k: replace(s, parent=gone.parent) if s.parent == snapshot_id else s
            for k, s in self.snapshots.items()
            if k != snapshot_id
        }
        current = gone.parent if self.current == snapshot_id else self.current
        left = None if self.left == snapshot_id else self.left
        return replace(self, snapshots=kept, current=current, left=left)

    def switched_to(self, overlays: Mapping[str, Image], current: str | None) -> Catalog:
        """Return the catalog with these overlays as active layers, standing on the snapshot `current`."""
        active = {**self.active, **{target: image.id for target, image in overlays.items()}}
        return replace(self.with_images(overlays.values()), active=active, current=current)

    def without_disks(self, targets: Iterable[str]) -> Catalog:
        """Return the catalog of a VM that has these disks no more.

        The last layer of such a disk is kept as detached, unless no snapshot froze anything of its chain and none of it
        is ours: then the chain is merely let go of.
        """
        catalog, gone = self, set(targets)
        for target in gone:
            chain = self.chain(self.active[target])
            if any(image.ours or self.frozen_by(image.id) for image in chain):
                catalog = replace(catalog, detached=(*catalog.detached, chain[0].id))
            else:
                catalog = catalog.without_images(image.id for image in chain)
        return replace(catalog, active={t: i for t, i in self.active.items() if t not in gone})

    def folded(self, target: str, top: str, into: str) -> Catalog:
        """Return the catalog after image `top` was committed into its backing file `into` and is gone.

        Whatever stood on `top` stands on `into` now; the snapshot that froze `top` names `into`; an active `top`
        makes `into` active (operations.md 1: a merge changes files, not states).
        """
        images = {
            k: replace(image, backing=into) if image.backing == top else image
            for k, image in self.images.items()
            if k != top
        }
        images[into] = replace(images[into], virtual_size=self.images[top].virtual_size)
        snapshots = {
            k: replace(s, disks={t: into if i == top else i for t, i in s.disks.items()})
            for k, s in self.snapshots.items()
        }
        active = {t: into if i == top else i for t, i in self.active.items()}
        detached = tuple(into if i == top else i for i in self.detached)
        return replace(self, images=images, snapshots=snapshots, active=active, detached=detached)


def named(snapshots: Iterable[Snapshot], text: str) -> list[Snapshot]:
    """Given what an admin typed, return the snapshots of that name; where there is none, the one with that id."""
    known, wanted = list(snapshots), unicodedata.normalize("NFC", text)
    return [s for s in known if s.name == wanted] or [s for s in known if s.id == wanted]


_MAX_NAME = 120
_MAX_STEM = 100
_BIDI = set("‎‏‪‫‬‭‮⁦⁧⁨⁩؜")


def snapshot_name(text: str) -> str:
    """Given an admin's name for a snapshot, return it normalised (NFC).

    Raise BadName for what would confuse people or tools: empty, over 120 characters, control or
    bidirectional-override characters, a leading '-', leading or trailing space, `.`/`..` or a slash.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadName("a snapshot name must be valid text (UTF-8)", hint="choose another name") from None
    name = unicodedata.normalize("NFC", text)
    reason = _why_bad(name)
    if reason:
        raise BadName(f"a snapshot name {reason}", hint="for example: before-upgrade")
    return name


def _why_bad(name: str) -> str | None:
    if not name.strip() or name != name.strip():
        return "can't be empty or begin or end with a space"
    if len(name) > _MAX_NAME:
        return f"has at most {_MAX_NAME} characters, this one has {len(name)}"
    if name.startswith("-"):
        return "can't begin with '-'"
    if "/" in name or name in (".", ".."):
        return "can't hold '/' or be '.' or '..'"
    if any(unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn", "Zl", "Zp") or c in _BIDI for c in name):
        return "can't hold control or text-direction characters"
    return None


_VM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,62}")


def vm_name(text: str) -> str:
    """Given a machine's name, return it. Raise BadName unless it is 1-63 letters, digits, `.`, `_`, `+`, `-`."""
    if not _VM_NAME.fullmatch(text):
        raise BadName("a machine name is 1 to 63 letters, digits, '.', '_', '+' or '-', beginning with a letter or digit",
                      hint='for example: name = "web1"')  # fmt: skip
    return text


def layer_name(base: Path, target: str, image_id: str) -> str:
    """Return the file name of a new layer in the chain of that base: `<stem of the base>.<target>.<id>.qcow2`.

    A base that got such a name itself (`delete --to`, `detach --to`) gives the stem that it was made of: names do not grow.
    """
    return f"{layer_stem(base, target)}.{target}.{image_id}.qcow2"


def layer_stem(base: Path, target: str) -> str:
    """Return what the names of the layers on a base begin with. At most 100 bytes: more is put around these names later."""
    stem = re.sub(rf"(\.{re.escape(target)}\.[0-9a-f]{{12}})+$", "", base.stem) or base.stem
    return cut(stem, _MAX_STEM)
