"""The exception tree. An error is data: a one-line message, a hint (what to type next), an exit code.

The exit code says whether anything changed (see docs/exit-codes.md). Imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Sequence


class DiskchainError(Exception):
    """Something failed; nothing changed or everything was put back."""

    exit_code = 1
    usual_hint: str | None = None  # where nothing better is known

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.usual_hint

    @property
    def kind(self) -> str:
        """The name that scripts see in JSON as `error.kind`."""
        return type(self).__name__


class ToolFailed(DiskchainError):
    """A program that we ran failed."""

    usual_hint = "run it again with -vv: it shows each command line"

    def __init__(self, argv: Sequence[str], returncode: int, stderr: str, *, hint: str | None = None) -> None:
        said = stderr.strip().splitlines()[-1] if stderr.strip() else "it said nothing"
        super().__init__(f"{argv[0]} failed with exit code {returncode}: {said}", hint=hint)
        self.argv = list(argv)
        self.returncode = returncode
        self.stderr = stderr


class DriverFailed(DiskchainError):
    """The hypervisor refused a command or died while it was carried out."""

    usual_hint = "run it again with -vv: it shows what QEMU was told and said"


class AgentFailed(DriverFailed):
    """The guest agent did not answer, refused, or answered with nonsense."""

    usual_hint = "look at qemu-guest-agent in the guest"


class UsageError(DiskchainError):
    """Wrong input, or a confirmation was needed and nobody was there. Nothing changed."""

    exit_code = 2
    usual_hint = "diskchain --help"


class BadName(UsageError):
    """A name that can't be used."""


class BadMachineFile(UsageError):
    """A machine file with a wrong key or value; the message names file, key and line."""


class Unfinished(DiskchainError):
    """Stopped half-way; the journal knows, `recover` finishes or undoes it."""

    exit_code = 3
    usual_hint = "diskchain recover"


class NotFound(DiskchainError):
    """No such VM, snapshot or file. Nothing changed."""

    exit_code = 4
    usual_hint = "correct the name, or bring the file back"


class Busy(DiskchainError):
    """Another operation or process has it. Nothing changed."""

    exit_code = 5
    usual_hint = "try again later, or use --wait 10m"


class Refused(DiskchainError):
    """Refused for safety. Nothing changed."""

    exit_code = 6


class VMRunning(Refused):
    """The VM must be off for this."""


class HasSharers(Refused):
    """The image is used by somebody else too."""


class HasChildren(Refused):
    """The snapshot has several overlays; it can't be merged into one of them."""


class Protected(Refused):
    """The snapshot is protected."""


class UnsupportedDisk(Refused):
    """This disk (or a feature of its image) can't be handled."""

    usual_hint = "take that disk out of the machine file, or convert it: qemu-img convert -O qcow2"


class MemoryNotSaved(Refused):
    """Memory can't be saved the way that was asked for."""


class AgentMissing(Refused):
    """Nobody answers on the channel of the guest agent, or there is no channel."""

    usual_hint = "install and start qemu-guest-agent in the guest"


class HostileImage(Refused):
    """An image that QEMU must not be shown (see chain/qcow2.py)."""

    usual_hint = "bring the right image back; QEMU was not shown this one"


class NoSpace(DiskchainError):
    """Not enough space, measured beforehand. Nothing changed."""

    exit_code = 7
    usual_hint = "make room on that filesystem (df -h)"


class ChainDamaged(DiskchainError):
    """Files disagree with each other or with what we remember; stopped before touching them."""

    exit_code = 8
    usual_hint = "bring the right files back; RECOVER.txt beside the catalog lists the chain"


class RecordDamaged(ChainDamaged):
    """A catalog, journal or manifest that can't be read, or was written by a newer diskchain."""


class MemoryDamaged(ChainDamaged):
    """A memory file that is not what was saved."""


class StateMissing(ChainDamaged):
    """UEFI variables or the state of a TPM, or a snapshot's copy of them, are gone or are not what they were."""


class Unreachable(DiskchainError):
    """No connection to QEMU, libvirt, a cluster or an image store."""

    exit_code = 9
    usual_hint = "run it again with -vv; look at qemu.log beside the catalog"


class Degraded(DiskchainError):
    """Done, but less than was asked (memory not saved, for example)."""

    exit_code = 12
