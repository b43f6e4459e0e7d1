"""These tests need two systems: scripts/in-debian13 shows the old one to the new one, and names it here."""

from __future__ import annotations

import os

collect_ignore_glob = [] if "DISKCHAIN_OLD_ROOT" in os.environ else ["test_*"]
