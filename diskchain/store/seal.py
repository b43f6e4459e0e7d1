"""What a base was like when it was sealed: a small record beside it, `.NAME.seal`.

It lies there and not in the state directory so that it travels with a shared volume, and every host that mounts it reads
the same. A base that was moved without its seal is still found by its fingerprint, which the catalogs have too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from diskchain.chain.text import name_with
from diskchain.errors import DiskchainError, NotFound, RecordDamaged
from diskchain.store import record


@dataclass(frozen=True)
class Seal:
    """A sealed base. `fingerprint`: as in the catalogs; `sha256`: of every byte, or empty; `created`: ISO 8601 UTC."""

    name: str
    fmt: str
    fingerprint: Mapping[str, object]
    mtime_ns: int
    sha256: str
    created: str
    by: str


def place(image: Path) -> Path:
    """Return where the seal of an image lies."""
    return image.with_name(name_with(".", image.name, ".seal"))


def is_sealed(image: Path) -> bool:
    """Whether an image has a seal, readable or not."""
    return place(image).exists()


def load(image: Path) -> Seal | None:
    """Return the seal of an image; None when it has none. Raise RecordDamaged."""
    try:
        return _read(place(image))
    except NotFound:
        return None


def save(image: Path, seal: Seal) -> None:
    """Write the seal of an image durably. Raise NoSpace, Refused."""
    record.write(place(image), "seal", asdict(seal))


def beside(directory: Path) -> Iterator[tuple[Path, Seal]]:
    """Yield the seals of a directory, each with the image that it was made for; damaged ones are passed over."""
    for path in sorted(directory.glob(".*.seal")):
        try:
            seal = _read(path)
        except DiskchainError:
            continue
        yield directory / seal.name, seal


def _read(path: Path) -> Seal:
    body = record.read(path, "seal")
    try:
        return Seal(**body)
    except TypeError:
        raise RecordDamaged(f"{path} holds something else than a seal") from None
