"""qemu-img, one function per subcommand, named after it. Formats are always given, paths are absolute."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from diskchain.errors import ChainDamaged, Refused, ToolFailed
from diskchain.host.process import Limits, open_memory, run

METADATA = Limits()
MAX_BACKING_NAME = 1023  # bytes; a limit of the format
COPIED_AT_ONCE, IN_FLIGHT = 512 << 10, 8  # bytes of a piece; pieces at a time (4 MiB, one at a time: 1.3x as long)


@dataclass(frozen=True)
class Pace:
    """How hard an engine may work. `rate`: bytes a second at most; `idle`: only while nobody else wants the disk."""

    rate: int | None = None
    idle: bool = False


AS_FAST_AS_IT_CAN = Pace()


class Caching(Enum):
    """How an engine reads and writes the images: through the kernel's page cache, or around it (O_DIRECT).

    `WRITES_AROUND`: what goes is read through it. `AROUND_NATIVE`: around it with Linux AIO, which takes half the processor
    of QEMU's threads and 5 to 20 % less time.
    """

    THROUGH, AROUND, WRITES_AROUND, AROUND_NATIVE = "through", "around", "writes around", "around, native"

    @property
    def mode(self) -> str:
        """The word for qemu-img's -t."""
        return "writeback" if self is Caching.THROUGH else "none"


@dataclass(frozen=True)
class CheckResult:
    """What `qemu-img check` found: number of corruptions and of leaked clusters."""

    corruptions: int
    leaks: int

    @property
    def clean(self) -> bool:
        """Nothing to repair."""
        return not self.corruptions and not self.leaks


def unlocked(path: Path, fmt: str, backing: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the block node of an image that we guard ourselves: QEMU takes no locks of its own on it."""
    node: dict[str, Any] = {"driver": fmt, "file": {"driver": "file", "filename": str(path), "locking": "off"}}
    if fmt == "qcow2":
        node["backing"] = backing
    return node


def read_only(path: Path, fmt: str, backing: dict[str, Any] | None) -> dict[str, Any]:
    """Return the block node of an image that is only read, with QEMU's own locks."""
    return {**unlocked(path, fmt, backing), "read-only": True, "file": {"driver": "file", "filename": str(path)}}


def unlocked_chain(images: Sequence[tuple[Path, str]]) -> dict[str, Any]:
    """Return the node of a chain, top first, whose images we all guard; names come from the headers (so -b finds them:
    but only the lowest of these, one with options for what is below itself has no plain name any more).
    """
    off: dict[str, Any] = {"locking": "off"}
    backing: dict[str, Any] = {"file": off}
    for _ in images[2:]:
        backing = {"file": off, "backing": backing}
    path, fmt = images[0]
    return {"driver": fmt, "file": {"driver": "file", "filename": str(path), **off}, "backing": backing}


def _json(node: dict[str, Any]) -> str:
    return "json:" + json.dumps(node)


async def create(fd: int, backing_name: str, backing_fmt: str, virtual_size: int) -> None:
    """Write an empty qcow2 overlay of `virtual_size` bytes into the open file `fd`, naming its backing file.

    The file is reached by descriptor (nobody can swap it for a link) and the backing file is not opened (-u).
    """
    refuse_unnameable(backing_name)
    await run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", backing_name, "-F", backing_fmt,
               f"/proc/self/fd/{fd}", str(virtual_size)], limits=METADATA, pass_fds=[fd])  # fmt: skip


async def rebase(overlay: Path, backing_name: str, backing_fmt: str) -> None:
    """Change only the reference to the backing file (`-u`). Exit code 0 is no proof (facts.md): re-read the header."""
    refuse_unnameable(backing_name)
    await run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", backing_fmt, "-b", backing_name, str(overlay)],
              limits=METADATA)  # fmt: skip


async def rebase_node(overlay: dict[str, Any], backing_name: str, backing_fmt: str) -> None:
    """As `rebase`, of an image that we guard; without a name it stands on nothing."""
    refuse_unnameable(backing_name)
    fmt = ["-F", backing_fmt] if backing_name else []
    await run(["qemu-img", "rebase", "-u", *fmt, "-b", backing_name, _json(overlay)], limits=METADATA)


async def check(node: dict[str, Any], *, repair: bool = False, direct: bool = False) -> CheckResult:
    """Check the metadata of an image that we guard; with `repair` put it right first. Raw images have none.

    `direct`: read around the page cache (-T none), which after a failed write may show what the disk does not have.
    Raise ToolFailed when it could not be checked.
    """
    if node["driver"] == "raw":
        return CheckResult(0, 0)
    argv = ["qemu-img", "check", "--output=json", *(["-r", "all"] if repair else []),
            *(["-T", "none"] if direct else []), _json(node)]  # fmt: skip
    result = await run(argv, timeout=None, ok=(0, 2, 3))
    try:
        found = json.loads(result.stdout)
    except ValueError:
        raise ToolFailed(argv, result.returncode, result.stderr or "no answer in JSON") from None
    if found.get("check-errors"):
        raise ToolFailed(argv, result.returncode, result.stderr or "the image could not be checked to its end")
    return CheckResult(int(found.get("corruptions", 0)), int(found.get("leaks", 0)))


async def commit(
    overlay: dict[str, Any],
    *,
    base: str = "",
    layers: int = 1,
    caching: Caching,
    guard: Sequence[int],
    on_percent: Callable[[float], None],
    pace: Pace = AS_FAST_AS_IT_CAN,
) -> None:
    """Write the overlay's data into its backing file, or with those of the layers between into `base`, as QEMU calls it.

    The overlay stays as it is (`-d`; `-b` implies it), so the commit can be done again (290 of 290 kills, facts.md).
    `layers`: so many are above the base. `guard`: descriptors that carry our locks; the engine inherits them, so the locks
    live as long as it does. Raise ToolFailed.
    """
    argv = ["qemu-img", "commit", "-p", "-d", "-t", caching.mode, *_rate(pace), *(["-b", base] if base else [])]
    nodes = [_read_through(overlay, layers) if caching is Caching.WRITES_AROUND else overlay]
    if caching is Caching.AROUND_NATIVE:
        nodes.insert(0, _native(overlay))
    for node in nodes:
        try:
            await run(
                [*argv, _json(node)], timeout=None, pass_fds=guard, on_output=_percent(on_percent), idle=pace.idle
            )
            return
        except ToolFailed as error:
            if node is nodes[-1] or not _has_no_native(error):
                raise


def _read_through(node: dict[str, Any], layers: int) -> dict[str, Any]:
    """The same node: so many layers, the topmost first, are read through the page cache; what is below them around it.

    A backing file takes its parent's way, unless it has its own (QEMU, block.c, bdrv_backing_options).
    """
    way = {"cache": {"direct": layers <= 0}}
    told = {**node, **way, "file": {**node["file"], **way}}
    if isinstance(node.get("backing"), dict):
        told["backing"] = _read_through(node["backing"], layers - 1)
    return told


def _native(node: dict[str, Any]) -> dict[str, Any]:
    """The same node, its file and those below read and written with Linux AIO."""
    with_it = {**node, "file": {**node["file"], "aio": "native"}}
    if isinstance(node.get("backing"), dict):
        with_it["backing"] = _native(node["backing"])
    return with_it


def _has_no_native(error: ToolFailed) -> bool:
    """Whether it was Linux AIO that failed: not built in, or none left on this host (fs.aio-max-nr). Said when the image is
    opened, so nothing has been written (QEMU, block/file-posix.c).
    """
    return "aio=native" in error.stderr or "native AIO" in error.stderr


async def convert_into(
    overlay: dict[str, Any],
    into: dict[str, Any],
    *,
    clone: bool,
    caching: Caching = Caching.THROUGH,
    guard: Sequence[int],
    on_percent: Callable[[float], None],
    pace: Pace = AS_FAST_AS_IT_CAN,
) -> None:
    """Write what the overlay itself holds into an image below it, in place; both of one size, under our guard.

    `-B` makes convert look at the overlay's own layer only (the name is never opened), `-n` keeps the target. Never
    without -t (the default writes without a flush), never -S 0. `clone`: let the filesystem share the blocks (`-C`).
    The caller syncs and checks. Raise ToolFailed.
    """
    await _run_to_the_last_word(
        ["qemu-img", "convert", "-p", "-n", "-W", "-m", "16", "-t", caching.mode, "-B", "below",
         *(["-C"] if clone else []), *_rate(pace), "-O", str(into["driver"]), _json(overlay), _json(into)],
        guard, on_percent, pace)  # fmt: skip


async def convert_new(
    source: dict[str, Any], into: dict[str, Any], *, guard: Sequence[int], on_percent: Callable[[float], None]
) -> None:
    """Write all that a chain shows into an image that is new and empty. Otherwise as `convert_into`."""
    await _run_to_the_last_word(
        ["qemu-img", "convert", "-p", "-n", "-W", "-m", "16", "-t", "writeback", "--target-is-zero",
         "-O", str(into["driver"]), _json(source), _json(into)],
        guard, on_percent, AS_FAST_AS_IT_CAN)  # fmt: skip


def _rate(pace: Pace) -> list[str]:
    return ["-r", str(pace.rate)] if pace.rate else []


async def _run_to_the_last_word(
    argv: list[str], guard: Sequence[int], on_percent: Callable[[float], None], pace: Pace
) -> None:
    """Run it; whatever it says on stderr is a failure, too.

    qemu-img writes an image's tables when it closes it, and ends with 0 when that fails: all that is heard of it is
    "Failed to flush the L2 table cache: No space left on device". The image is clean then, and lacks the data.
    """
    result = await run(argv, timeout=None, pass_fds=guard, on_output=_percent(on_percent), idle=pace.idle)
    if result.stderr.strip():
        raise ToolFailed(argv, result.returncode, result.stderr)


async def copy_up(
    overlay: dict[str, Any],
    parts: Iterable[tuple[int, int]],
    *,
    cluster: int = 0,
    caching: Caching = Caching.THROUGH,
    guard: Sequence[int],
    on_bytes: Callable[[int], None],
    pace: Pace = AS_FAST_AS_IT_CAN,
) -> None:
    """Copy parts, (start, end), of what an overlay (a node) shows from below into itself; its reference stays.

    QEMU's copy-on-read, as its own streaming does it: what the overlay holds is left alone, and killed at any time it
    shows the same. (`qemu-img rebase` flushes every run of sectors that are not zero, or would have to be trusted to
    write its new reference after the data; facts.md.) A `cluster` is read in one piece, where the part has all of it.
    The caller syncs, checks, and changes the reference. Raise ToolFailed.
    """
    group, file = _throttled(overlay["file"], pace)
    argv = ["qemu-io", *group, "-C", "-t", caching.mode, _json({**overlay, "file": file})]
    heard = _Copied(on_bytes)
    with open_memory(_commands(parts, max(COPIED_AT_ONCE, cluster))) as commands:
        result = await run(
            argv, timeout=None, ok=(0, 1), pass_fds=guard, on_output=heard, idle=pace.idle, stdin=commands
        )
    if result.returncode or result.stderr.strip() or heard.failed:
        raise ToolFailed(argv, result.returncode, heard.failed or result.stderr or "a flush failed")


def _commands(parts: Iterable[tuple[int, int]], piece: int) -> Iterator[str]:
    begun = 0
    for start, end in parts:
        for at in range(start, end, piece):
            yield f"aio_read {at} {min(end - at, piece)}\n"
            begun += 1
            if begun % IN_FLIGHT == 0:
                yield "aio_flush\n"  # waits for all of them
    yield "aio_flush\n"
    yield "flush\n"  # a failure counts here; one at the end, when the image is closed, would not


class _Copied:
    """What qemu-io says: how many bytes were read, so copied, until now; the first failure."""

    def __init__(self, on_bytes: Callable[[int], None]) -> None:
        self._on_bytes, self._rest, self._done, self.failed = on_bytes, "", 0, ""

    def __call__(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if "failed" in line:
                self.failed = self.failed or line.removeprefix("qemu-io> ")
            elif found := re.search(r"read (\d+)/\d+ bytes", line):
                self._done += int(found[1])
        self._on_bytes(self._done)


def _throttled(file: dict[str, Any], pace: Pace) -> tuple[list[str], dict[str, Any]]:
    """Return the words and the node that let no more bytes a second be written to a file than the pace allows."""
    if not pace.rate:
        return [], file
    group = {"qom-type": "throttle-group", "id": "pace", "limits": {"bps-write": pace.rate}}
    return ["--object", json.dumps(group)], {"driver": "throttle", "throttle-group": "pace", "file": file}


def _percent(on_percent: Callable[[float], None]) -> Callable[[str], None]:
    def progress(text: str) -> None:
        found = re.findall(r"\(([\d.]+)/100%\)", text)
        if found:
            on_percent(float(found[-1]))

    return progress


async def shrink(node: dict[str, Any], virtual_size: int) -> None:
    """Make an image that we guard smaller: what lies beyond `virtual_size` bytes is discarded. Can be repeated."""
    await run(["qemu-img", "resize", "-q", "--shrink", _json(node), str(virtual_size)], timeout=None)


async def compare(one: dict[str, Any], other: dict[str, Any], *, direct: bool) -> None:
    """Compare two images' guest content, `direct` around the page cache. Raise ChainDamaged when they differ."""
    argv = ["qemu-img", "compare", "-q", *(["-T", "none"] if direct else []), _json(one), _json(other)]
    result = await run(argv, timeout=None, ok=(0, 1))
    if result.returncode == 1:
        raise ChainDamaged("after the merge the base does not hold what the overlay shows", hint="keep both files; diskchain recover")  # noqa: E501  # fmt: skip


def backing_name_for(overlay: Path, backing: Path) -> str:
    """Return how an overlay names its backing file: the plain name within one directory, else the absolute path.

    `./NAME` where there is a colon in it: QEMU takes what stands before a colon, without a slash, for a protocol.
    """
    if overlay.parent != backing.parent:
        return os.fspath(backing)
    return f"./{backing.name}" if ":" in backing.name else backing.name


def has_unwritable(name: str) -> bool:
    """Whether a name has control characters, or bytes that are no UTF-8."""
    return any(code < 0x20 or 0x7F <= code < 0xA0 or 0xD800 <= code <= 0xDFFF for code in map(ord, name))


def refuse_unnameable(backing_name: str) -> None:
    """Raise Refused for what no header may name: control characters, bytes that are no UTF-8, more than fits.

    With such a name in its header we would refuse the overlay ourselves at the next start.
    """
    if has_unwritable(backing_name):
        what = "it has control characters, or bytes that are no UTF-8"
    elif len(backing_name.encode()) > MAX_BACKING_NAME:
        what = f"it has more than {MAX_BACKING_NAME} bytes"
    else:
        return
    raise Refused(f"no image can stand on {backing_name!r}: {what}", hint="rename the file or its directory")
