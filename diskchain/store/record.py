"""One record = one small JSON file that is whole or refused: version, kind, body, and the sha256 of the body."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from diskchain.chain.text import printable
from diskchain.errors import BadName, NotFound, RecordDamaged
from diskchain.host import files

VERSION = 1


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def dump(kind: str, body: Any) -> bytes:
    """Given a JSON-able body, return the record's bytes (readable with any editor). Raise BadName for what is no UTF-8."""
    record = {"diskchain": kind, "version": VERSION, "body": body, "sha256": _digest(body)}
    text = json.dumps(record, indent=1, ensure_ascii=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        bad = next(line for line in text.splitlines() if not _is_utf8(line))
        raise BadName(f"a record can't hold {printable(bad.strip())}: it has bytes that are no UTF-8",
                      hint="rename the file or its directory") from None  # fmt: skip


def _is_utf8(text: str) -> bool:
    return not any(0xD800 <= code <= 0xDFFF for code in map(ord, text))


def load(kind: str, data: bytes, source: str) -> Any:
    """Given a record's bytes, return its body. Raise RecordDamaged when it is torn, altered or from a newer version."""
    try:
        record = json.loads(data)
        version, found, body, digest = record["version"], record["diskchain"], record["body"], record["sha256"]
        is_whole = _digest(body) == digest
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RecordDamaged(f"{source} is damaged (not a whole record)", hint=_HINT) from None
    if not isinstance(version, int) or version > VERSION:
        raise RecordDamaged(f"{source} was written by a newer diskchain (format {version!r:.20})",
                            hint="use that version; this one will not touch the VM")  # fmt: skip
    if found != kind or not is_whole:
        raise RecordDamaged(f"{source} is damaged (its checksum does not fit)", hint=_HINT)
    return body


_HINT = "RECOVER.txt beside it lists the chain in plain qemu-img commands; restore the file from a backup"


def write(path: Path, kind: str, body: Any) -> None:
    """Write the record durably: temporary file, fsync, rename, fsync of the directory. Raise NoSpace, Refused."""
    files.write_durably(path, dump(kind, body))


def read(path: Path, kind: str) -> Any:
    """Return the body of the record at `path`. Raise NotFound, RecordDamaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist") from None
    except OSError as error:
        raise RecordDamaged(f"{path} can't be read: {error.strerror}", hint="run as the user who owns it") from error
    return load(kind, data, str(path))
