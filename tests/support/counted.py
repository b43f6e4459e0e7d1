"""What the counting guest had counted when its disks were frozen, read without diskchain."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

SLACK = 3  # counts: the one under way at the instant, the one whose line was cut in two, the one that is read


def count_on(image: Path) -> int:
    """Return the counter in the first block of a frozen image, read without diskchain."""
    argv = ["qemu-io", "-r", "-U", "-f", "qcow2", "-c", "read -v 8 8", str(image)]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    words = re.search(r"^0*8: *((?:[0-9a-f]{2} +){8})", said, re.MULTILINE)
    assert words, said
    return int.from_bytes(bytes.fromhex(words[1]), "little")
