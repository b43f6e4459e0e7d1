"""Names and times that we make ourselves."""

from __future__ import annotations

import secrets
import time


def new_id() -> str:
    """Return a fresh id for an image, a snapshot or an operation: 12 hex digits."""
    return secrets.token_hex(6)


def now_utc(later: float = 0.0) -> str:
    """Return the time, or that in so many seconds, as ISO 8601 UTC, for display only; nothing is decided by a clock."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + later))
