"""Short ways to say which instance, registration or change a test means."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from seedcore.core.changes import RegisterChange, Registration, StatusChange
from seedcore.core.instances import Instance
from seedcore.core.lifecycle import Status

START = datetime(2024, 1, 1, tzinfo=UTC)


def iid(number: int) -> str:
    """The id of the number-th instance: they sort as their numbers do."""
    return f"00000000-0000-4000-8000-{number:012d}"


def joins(number: int, logical_id: str = "agent", seq: int = 0, **details: Any) -> RegisterChange:
    """The number-th instance registers."""
    return RegisterChange(Registration(iid(number), logical_id, **details), seq)


def turns(
    number: int, status: Status, seq: int | None = None, cause: str | None = None, until: datetime | None = None
) -> StatusChange:
    """The number-th instance changes its status."""
    return StatusChange(iid(number), status, seq, cause, until=until)


def instance(number: int = 1, logical_id: str = "agent", age_s: float = 0.0, **details: Any) -> Instance:
    """The number-th instance, alive since `age_s` seconds before START."""
    started_at = START - timedelta(seconds=age_s)
    known: dict[str, Any] = {
        "status": Status.ALIVE,
        "cluster_epoch": "epoch-1",
        "started_at": started_at,
        "status_changed_at": started_at,
        "last_heartbeat": started_at,
    }
    return Instance(iid(number), logical_id, **{**known, **details})


class FakeClock:
    """A clock that only `advance` moves."""

    def __init__(self, now: datetime = START) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += timedelta(seconds=seconds)
