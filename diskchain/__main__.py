"""`python -m diskchain`, and the `diskchain` script."""

from __future__ import annotations

import sys

from diskchain.cli import streams
from diskchain.cli.app import main as run


def main() -> None:
    """Run the command line; end with its exit code."""
    streams.secure()
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
