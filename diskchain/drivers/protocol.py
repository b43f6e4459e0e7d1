"""How a VM is reached: intents, not commands. No word of QMP or libvirt above this floor.

Every driver passes tests/contract. A driver performs, it does not remember: what was decided stands in the catalog and
the journal. All methods may raise DriverFailed (refused or died) and Unreachable (no connection, outcome unknown).
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from diskchain.chain.model import Image
from diskchain.drivers.suitable import Unsuitable

Chains = Mapping[str, Sequence[Image]]
"""For each disk its chain, active layer first."""


class VMState(enum.Enum):
    """What the VM does. `critical`: it stopped itself because a disk had no space or failed. `suspended`: the guest sleeps
    (ACPI S3): its processors stand until something wakes it, an alarm of its own clock too.
    """

    RUNNING = "running"
    PAUSED = "paused"
    SUSPENDED = "suspended"
    STOPPED = "stopped"
    CRITICAL = "paused-critical"
    CRASHED = "crashed"

    @property
    def is_off(self) -> bool:
        """Its process is gone and its manager says so."""
        return self is VMState.STOPPED


@dataclass(frozen=True)
class Definition:
    """A VM's whole configuration as its driver understands it. Opaque to everybody else."""

    driver: str
    text: str


@dataclass(frozen=True)
class StateFile:
    """What a VM keeps besides its disks and memory: its UEFI variables, the state of its TPM.

    `pattern`: which files of a directory count. `settles`: at once when the VM is paused, so that a copy made then is of
    that instant. `saved_late`: memory that is saved in background holds it as of a later moment. `made_by_manager`: the VM's
    manager makes it at the first start; a VM that never was started has none, and needs none. `in_use`: the configuration is
    that of a VM that is on, so it must be there.
    """

    name: str
    path: Path
    directory: bool = False
    pattern: str = "*"
    settles: bool = True
    saved_late: bool = False
    made_by_manager: bool = False
    in_use: bool = False


@dataclass(frozen=True)
class SaveProgress:
    """How far a memory save is. `status`: running, completed or failed; sizes in bytes."""

    status: str
    done: int = 0
    total: int = 0
    error: str = ""


@dataclass(frozen=True)
class Listed:
    """A snapshot as the VM's manager is to list it. `layers`: for each disk what was frozen, and the file of what is on top."""

    id: str
    name: str
    description: str
    created: int  # seconds of the epoch
    parent: str | None  # its name
    definition: Definition
    layers: Mapping[str, tuple[Image, Path]]
    memory: Path | None
    was: str  # running | paused | stopped
    current: bool


class PauseGuard(Protocol):
    """A process of ours that lets the VM go on, and thaws its file systems, when we can't. See `Driver.pause_guard`."""

    def watch_save(self) -> None:
        """Memory is about to be saved in background: the guard stays until that is over, also after us, and frees a guest that
        hangs because it failed.
        """

    def arm(self) -> None:
        """The pause begins now."""

    def disarm(self) -> None:
        """The pause is over."""

    def fired(self) -> bool:
        """Whether it acted behind our back: resumed the VM (then memory and disks are not of one instant), thawed it."""

    async def freeze(self, limit: float) -> int:
        """Freeze the guest's file systems within `limit` seconds; return how many. The VM runs.

        Raise AgentFailed; they are thawed then, as soon as the guest lets us. They are thawed, whoever of us dies, 8
        seconds after they were frozen or after `disarm`, at the end of the guard, or when we die.
        """

    async def still_frozen(self) -> bool:
        """Whether the guest says so. Raise AgentFailed."""

    async def thaw(self) -> int:
        """Thaw what was frozen; return how many file systems were frozen until now. The VM runs.

        Raise AgentFailed when the guest does not confirm it; the guard goes on trying for an hour, without us.
        """


class Serial(Protocol):
    """The serial console of a running VM, attached: a log that grows, a descriptor that takes input and never blocks."""

    output: Path
    input: int

    async def gone(self) -> None:
        """Return when the VM is down."""

    def close(self) -> None:
        """Let the next one in."""


class Driver(Protocol):
    """One VM."""

    name: str
    uuid: str
    kind: str

    async def close(self) -> None:
        """Let go of connections. The VM is not touched."""

    # -- looking
    async def state(self) -> VMState:
        """Return what the VM does now, asked afresh."""

    async def active_files(self) -> dict[str, Path]:
        """Return for each disk of a VM that is on the file it writes to, as the hypervisor says."""

    async def written_files(self) -> dict[str, Path]:
        """Return the same as the hypervisor process itself says, whatever its manager believes. Before a change, and after
        one that was cut off, only this counts.
        """

    async def next_files(self) -> dict[str, Path] | None:
        """Return for each disk the file that the next start writes to; None where the catalog decides that."""

    async def unsuitable(self) -> list[Unsuitable]:
        """Return the disks that the guest writes to and that can't be in a snapshot of ours."""

    async def refuse(self, operation: str) -> None:
        """Raise Refused when the VM's manager stands in the way (a managed save, a job, a VM that it forgets at its end).

        `operation`: create, revert, merge or restart.
        """

    async def refuse_elsewhere(self) -> None:
        """Raise Refused when the VM is off here because it was migrated to another host: only there can be told what of an
        operation was carried out.
        """

    async def failed_disks(self) -> dict[str, str]:
        """Return for each disk whose last I/O failed why: `nospace` or `failed`. The VM is on."""

    def memory_bytes(self) -> int:
        """Return the size of the guest's memory in bytes."""

    def definition(self) -> Definition:
        """Return the configuration that the next start uses."""

    async def live_definition(self) -> Definition:
        """Return the configuration that the VM runs with now (that of the next start when it is off)."""

    def differences(self, old: Definition, new: Definition) -> list[str]:
        """Return in words what changes from one configuration to the other."""

    def renewed(self, definition: Definition) -> Definition:
        """Return the configuration with which a VM goes back in time: its guest can tell that it did (vmgenid)."""

    def disks(self, definition: Definition) -> dict[str, Path]:
        """Return the disks that a VM with this configuration has, in its order, and the files that it names."""

    def without_memory(self, definition: Definition, attached: Collection[str]) -> Definition:
        """Given a `live_definition`, return the configuration for a start without memory: that of the next start, and these
        disks, also where only the running VM had them.
        """

    def missing_files(self, definition: Definition) -> list[str]:
        """Return in words what a start with this configuration would not find (kernel, firmware, other version)."""

    # -- the guest agent
    def has_agent(self) -> bool:
        """Whether the VM that is on has a channel for a guest agent."""

    async def check_agent(self) -> None:
        """Raise AgentMissing unless an agent answers that can freeze file systems; Refused when they are frozen already."""

    async def is_frozen(self) -> bool:
        """Whether file systems are frozen, as the agent says. Raise AgentMissing, AgentFailed."""

    async def thaw(self, limit: float) -> bool:
        """Thaw every file system, trying for `limit` seconds; return whether any was frozen. The VM runs.

        Raise AgentMissing, AgentFailed.
        """

    async def set_clock(self, limit: float) -> None:
        """Set the guest's clock to ours, within `limit` seconds. Raise AgentMissing, AgentFailed."""

    # -- besides disks and memory
    def state_files(self, definition: Definition) -> list[StateFile]:
        """Return what a VM with this configuration keeps besides its disks."""

    async def make_state_file(self, state: StateFile) -> None:
        """Make it as in a machine fresh from the factory, durably. It does not exist. Raise NotFound (what to install)."""

    def unusable(self, definition: Definition, name: str, sizes: Mapping[str, int]) -> str | None:
        """Given a copy's files and sizes, say why a VM with this configuration could not start with it; None: it could."""

    def check_helpers(self) -> None:
        """Raise Refused when a helper process that the running VM needs (its TPM) has died."""

    def memory_loads_with(self, definition: Definition) -> list[str]:
        """Given a `live_definition` of then, return what is different now and does not keep its memory from loading.

        Raise Refused when something is: then only a start without memory is possible.
        """

    async def unsupported(self, definition: Definition) -> list[str]:
        """Return in words what of this configuration the hypervisor that is installed now can't start."""

    # -- power
    async def start(self, chains: Chains, *, paused: bool = False) -> None:
        """Start the VM on these chains with its definition. The VM is off."""

    async def start_from_memory(self, definition: Definition, chains: Chains, memory: int) -> None:
        """Start the VM paused as `definition` (a `live_definition` of then) says, with the memory at the descriptor.

        Success = loaded and paused. On failure the VM is off again.
        """

    async def power_off(self, timeout: float) -> bool:
        """Press the power button and wait at most `timeout` seconds; return whether the VM is off."""

    async def quit(self) -> None:
        """End the VM where it stands, with everything it wrote on its disks (like a power cut for the guest)."""

    async def kill(self) -> None:
        """End the VM by force; works when nothing else does."""

    async def pause(self) -> None:
        """Stop the virtual CPUs."""

    async def resume(self) -> None:
        """Let the virtual CPUs go on, if they do not run already. A guest that sleeps goes on sleeping."""

    async def wake_up(self) -> None:
        """Wake a guest that sleeps (`VMState.SUSPENDED`)."""

    # -- console
    async def open_serial(self) -> Serial:
        """Attach to the serial console. Whoever is attached can't hold the guest up.

        Raise Busy naming who is attached already, Refused when the VM has none.
        """

    # -- configuration
    async def define(self, definition: Definition, chains: Chains) -> None:
        """Make this the configuration of the next start, with these chains as disks."""

    async def align(self, chains: Chains, was: Collection[Path] = ()) -> list[str]:
        """Let the next start write to these chains, where it would write to another layer of them, or to one that `was`.

        Return the disks that it writes to other files than those: somebody else's, left alone. Nothing is done where the
        catalog decides.
        """

    async def memory_label(self, disks: Mapping[str, Path]) -> str:
        """Return the XML to be put in front of the memory that is saved now; `disks`: the overlays that a restore without
        us is to use.
        """

    def label_now(self, definition: Definition, label: str) -> str:
        """Given the XML in front of a memory and the `live_definition` of then, return what must stand there for it to load
        now: the same, unless the VM was renamed.
        """

    # -- snapshot
    async def check_memory_save(self) -> None:
        """Raise MemoryNotSaved when the memory of this VM can't be saved in any way."""

    async def listed_snapshots(self) -> dict[str, str]:
        """Return the snapshots of ours that the VM's manager lists too: our ids by the names there."""

    async def list_snapshots(self, wanted: Sequence[Listed]) -> None:
        """Let the manager list exactly these of ours, parents first. Names only: no file is touched."""

    async def check_files(self, paths: Sequence[Path], *, written: bool) -> None:
        """Raise Refused naming what the hypervisor could not reach or open. `written`: it writes to them, else it reads.

        Images that are there, tried as the user that the hypervisor runs as.
        """

    async def remarks(self) -> list[str]:
        """Return in words what of this host's VM manager an admin should know of before a snapshot."""

    async def memory_blockers(self) -> list[str]:
        """Return in words what keeps the memory of a VM that is on from being saved at all."""

    async def devices(self) -> list[str]:
        """Return the names of the devices of a VM that is on. Its memory loads only into the same ones; none comes or goes
        while memory is saved.
        """

    async def check_background_save(self) -> None:
        """Raise MemoryNotSaved when memory can't be saved while the VM runs; the message says why, the hint what to set."""

    def pause_guard(self, *, limit: float | None) -> AbstractAsyncContextManager[PauseGuard]:
        """Return a guard, ready when entered: once armed it resumes the VM when we die, or after `limit` seconds."""

    async def prepare_disks(self, overlays: Mapping[str, Image]) -> None:
        """Do everything for `switch_disks` that can be done while the VM runs."""

    async def forget_prepared(self, overlays: Mapping[str, Image]) -> None:
        """Undo `prepare_disks`; what was not prepared is passed over."""

    async def switch_disks(self, overlays: Mapping[str, Image]) -> None:
        """Make these the active layers, all or none. The VM is paused (or just running).

        Raise ChainDamaged when the VM does not write any more to what they stand on.
        """

    async def prepare_memory_save(self, memory: int, *, background: bool) -> None:
        """Do everything for `start_memory_save` that can be done while the VM runs.

        The stream goes into the descriptor at its offset. Raise MemoryNotSaved when this can't be done here.
        """

    async def start_memory_save(self, *, background: bool) -> None:
        """Begin to save memory; return when the instant is captured.

        In background the VM may run (and may have been resumed) afterwards; otherwise it must stay paused to the end.
        """

    async def save_progress(self) -> SaveProgress:
        """Return how far the save that was begun last is."""

    async def give_up_save(self) -> None:
        """End a save that nobody waits for and that would stop the VM once more when it is over (each but one in background).

        It is over afterwards; the VM stands as before the save, or is `stopped_by_save`. Without such a save nothing is done.
        """

    async def stopped_by_save(self) -> bool:
        """Whether a VM that is on stands still because a save that came to its end stopped it, and nobody let it go on.

        Its disks are not locked then; `resume` takes them back.
        """

    async def end_memory_save(self) -> None:
        """Put settings back that the save needed."""

    async def rescue(self) -> bool:
        """After a background save that failed: free a guest that hangs on it; return whether it had to be freed.

        Needs no answer of the hypervisor. Raise Refused without the right to do it, Unfinished when it may hang still.
        """

    async def restore_huge_pages(self, limit: float) -> str:
        """Put the VM's memory, split by an earlier background save, back into huge pages; at most `limit` seconds.

        The VM runs meanwhile; nothing it sees changes, and its resident memory grows by less than 5 %. To be cancelled
        and killed anywhere. Return in words why not all was done; nothing when it was, or nothing was split.
        """

    def save_owner(self) -> str:
        """Return what identifies the hypervisor process that saves, across our own death."""
