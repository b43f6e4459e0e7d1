"""Settings: frozen dataclasses and a TOML loader. One comment per setting; docs/configuration.md is made from them."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from diskchain.errors import UsageError

_UNITS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(ms|s|m|h|d|)", re.ASCII)


def parse_duration(text: str) -> float:
    """Given `500ms`, `60s`, `5m`, `1h`, `14d` or a number of seconds, return seconds. Raise ValueError."""
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is no duration; write for example 500ms, 60s, 5m or 1h")
    return float(match[1]) * _UNITS[match[2]]


@dataclass(frozen=True)
class CreateSettings:
    """[create]"""

    memory: str = "auto"  # auto | always | never: save memory where nothing else is said
    max_pause: float = 0.5  # seconds; a longer pause is warned of
    huge_pages: bool = True  # before and after a background save, put the guest's memory back into huge pages
    freeze_timeout: float = 10.0  # seconds that --quiesce gives the guest agent to freeze its file systems


@dataclass(frozen=True)
class RevertSettings:
    """[revert]"""

    set_clock: bool = True  # after a revert with memory let the guest agent set the guest's clock
    keep: float = (
        7 * 86400.0
    )  # seconds that a present which a revert kept stays (inf: for ever); the newest always does


@dataclass(frozen=True)
class StopSettings:
    """[stop]"""

    timeout: float = 300.0  # seconds to wait for the guest after the power button


@dataclass(frozen=True)
class DeleteSettings:
    """[delete]"""

    when: str = "stopped"  # stopped | restart: what delete and accept do on a VM that is on, where nothing is said


@dataclass(frozen=True)
class MergeSettings:
    """[merge]"""

    io_priority: str = "normal"  # normal | idle: whether a merge gets the disk only while nobody else wants it
    on_start: str = "interrupt"  # interrupt | wait | refuse: what a start does while another command merges


@dataclass(frozen=True)
class LibvirtSettings:
    """[libvirt]"""

    register: bool = False  # list new snapshots of domains in virsh snapshot-list too, where virsh could destroy them


@dataclass(frozen=True)
class Config:
    """All settings, and where diskchain keeps what belongs to this host."""

    create: CreateSettings = field(default_factory=CreateSettings)
    revert: RevertSettings = field(default_factory=RevertSettings)
    stop: StopSettings = field(default_factory=StopSettings)
    delete: DeleteSettings = field(default_factory=DeleteSettings)
    merge: MergeSettings = field(default_factory=MergeSettings)
    libvirt: LibvirtSettings = field(default_factory=LibvirtSettings)
    state_dir: Path = Path("/var/lib/diskchain")  # definitions of the machines that diskchain runs
    run_dir: Path = Path("/run/diskchain")  # sockets and pid files of running machines
    wait: float = 10.0  # seconds to wait for another operation on the same VM
    # where backing files may lie besides the directories of a VM's own disks and machine file; an image that names
    # something else (/etc/shadow) is refused, or its guest could read it
    image_roots: tuple[Path, ...] = (Path("/var/lib/libvirt/images"), Path("/srv"))
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # what @NAME means: names and patterns of VMs


_WORDS = {  # settings that are one of some words
    "create.memory": ("auto", "always", "never"),
    "delete.when": ("stopped", "restart"),
    "merge.io_priority": ("normal", "idle"),
    "merge.on_start": ("interrupt", "wait", "refuse"),
}


def _usual_dirs(env: Mapping[str, str]) -> dict[str, Any]:
    if os.geteuid() == 0:
        return {}
    home = Path(env.get("HOME", "/nonexistent"))
    run = env.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    return {"state_dir": Path(env.get("XDG_STATE_HOME") or home / ".local/state") / "diskchain",
            "run_dir": Path(run) / "diskchain"}  # fmt: skip


def _told_dirs(env: Mapping[str, str]) -> dict[str, Any]:
    """What the environment says wins over files."""
    names = {"state_dir": "DISKCHAIN_STATE_DIR", "run_dir": "DISKCHAIN_RUN_DIR"}
    return {key: Path(env[name]) for key, name in names.items() if env.get(name)}


def config_files(env: Mapping[str, str]) -> list[Path]:
    """Return the configuration files that exist, in reading order (later ones win)."""
    home = Path(env.get("XDG_CONFIG_HOME") or Path(env.get("HOME", "/nonexistent")) / ".config")
    found: list[Path] = []
    for root in (Path("/etc/diskchain"), home / "diskchain"):
        found += [root / "diskchain.toml", *sorted((root / "conf.d").glob("*.toml"))]
    return [path for path in found if path.is_file()]


def load_config(path: Path | None = None, env: Mapping[str, str] = os.environ) -> Config:
    """Return the settings from `path`, or from the usual files. Raise UsageError naming file and key of a mistake."""
    config = replace(Config(), **_usual_dirs(env))
    for file in [path] if path else config_files(env):
        config = _merged(config, _read(file), file)
    return replace(config, **_told_dirs(env))


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:  # a number of 5000 digits is a plain ValueError
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{file}: {why}", hint="correct the file or name another with --config") from None


def _merged(config: Config, data: Mapping[str, Any], file: Path) -> Config:
    for key, value in data.items():
        _known(key, (f.name for f in fields(config)), file, key)
        now = getattr(config, key)
        if isinstance(
            now, (CreateSettings, RevertSettings, StopSettings, DeleteSettings, MergeSettings, LibvirtSettings)
        ):
            if not isinstance(value, dict):
                raise UsageError(f"{file}: {key} is a table: [{key}]")
            for name, item in value.items():
                _known(name, (f.name for f in fields(now)), file, f"{key}.{name}")
                now = replace(now, **{name: _typed(getattr(now, name), item, file, f"{key}.{name}")})
            config = replace(config, **{key: now})  # type: ignore[arg-type]
        elif key == "groups":
            config = replace(config, groups={**config.groups, **_groups(value, file)})
        else:
            config = replace(config, **{key: _typed(now, value, file, key)})
    return config


def _groups(value: Any, file: Path) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, dict):
        raise UsageError(f"{file}: groups is a table: [groups]")
    for name, items in value.items():
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise UsageError(f"{file}: groups.{name} has the wrong type", hint=f'{name} = ["web1", "web*"]')
    return {name: tuple(items) for name, items in value.items()}


def _known(key: str, names: Iterable[str], file: Path, shown: str) -> None:
    if key not in set(names):
        raise UsageError(
            f"{file}: there is no setting {shown!r}", hint="look into docs/configuration.md: it lists them"
        )


def _typed(now: Any, value: Any, file: Path, key: str) -> Any:
    if isinstance(now, Path) and isinstance(value, str):
        return Path(value)
    if isinstance(now, tuple) and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(Path(v) for v in value)
    if isinstance(now, bool) and isinstance(value, bool):
        return value
    if isinstance(now, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(now, float) and isinstance(value, str):
        try:
            return parse_duration(value)
        except ValueError as error:
            raise UsageError(f"{file}: {key}: {error}", hint="or a number of seconds, without quotes") from None
    if isinstance(now, str) and isinstance(value, str):
        if value not in _WORDS.get(key, (value,)):
            raise UsageError(f"{file}: {key} is {value!r}", hint=" or ".join(_WORDS[key]))
        return value
    raise UsageError(
        f"{file}: {key} must be {_wanted(now)}", hint="correct the file; docs/configuration.md lists all settings"
    )


def _wanted(now: Any) -> str:
    """Say in words what a setting must be, given what it is."""
    if isinstance(now, bool):
        return "true or false"
    if isinstance(now, float):
        return 'a number of seconds, or a text like "5m"'
    return 'a list of paths: ["/srv"]' if isinstance(now, tuple) else "a text in quotes"
