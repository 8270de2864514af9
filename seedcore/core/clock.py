"""The clocks of the registry."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime


def utc_now() -> datetime:
    """The wall-clock time in UTC."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Clock:
    """`monotonic` (seconds) measures silence and waits. `utc` provides the timestamps that are sent; it may jump."""

    monotonic: Callable[[], float] = time.monotonic
    utc: Callable[[], datetime] = utc_now
