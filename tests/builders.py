"""Short forms of the instances, registrations and changes of tests."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import HoldChange, RegisterChange, Registration, StatusChange
from seedcore.core.holds import Hold, HoldKind, effective_status
from seedcore.core.instances import Instance
from seedcore.core.lifecycle import Status

START = datetime(2024, 1, 1, tzinfo=UTC)


def iid(number: int) -> str:
    """The id of the number-th instance: they sort as their numbers do."""
    return f"00000000-0000-4000-8000-{number:012d}"


def joins(
    number: int, logical_id: str = "agent", seq: int = 0, *, is_alive: bool = False, **details: Any
) -> RegisterChange:
    """The number-th instance registers."""
    return RegisterChange(Registration(iid(number), logical_id, **details), seq, is_alive=is_alive)


def turns(number: int, status: Status, seq: int | None = None, cause: Cause | str | None = None) -> StatusChange:
    """The number-th instance reports a status. A text is the agent's own word."""
    return StatusChange(iid(number), status, seq, Cause(CauseKind.AGENT, cause) if isinstance(cause, str) else cause)


def hold(
    reason: str | None = None,
    expires_at: datetime | None = None,
    kind: HoldKind = HoldKind.OPERATOR,
    by: str | None = None,
    since: datetime = START,
) -> Hold:
    """An operator's hold, unless `kind` is another."""
    return Hold(kind, reason, by, since, expires_at)


def holds(number: int, reason: str | None = None, expires_at: datetime | None = None, **details: Any) -> HoldChange:
    """A hold is placed on the number-th instance: an operator drains it, unless `kind` is another."""
    placed = hold(reason, expires_at, **details)
    return HoldChange(iid(number), placed.kind, placed)


def releases(number: int, reason: str | None = None, kind: HoldKind = HoldKind.OPERATOR) -> HoldChange:
    """The hold of the number-th instance is released by an operator."""
    return HoldChange(iid(number), kind, cause=Cause(CauseKind.OPERATOR, reason))


def readies(number: int, ready: bool, seq: int | None, reason: str | None = None) -> HoldChange:
    """The number-th instance reports that it is ready, or not."""
    kind = HoldKind.READINESS
    if ready:
        return HoldChange(iid(number), kind, cause=Cause(CauseKind.AGENT, reason), seq=seq)
    return HoldChange(iid(number), kind, hold(reason, kind=kind), seq=seq)


def instance(number: int = 1, logical_id: str = "agent", age_s: float = 0.0, **details: Any) -> Instance:
    """The number-th instance, alive since `age_s` seconds before START. Its status follows from its holds, if it has
    any."""
    started_at = START - timedelta(seconds=age_s)
    reported = details.get("reported_status", Status(details.get("status", Status.ALIVE)))
    known: dict[str, Any] = {
        "status": effective_status(reported, [held.kind for held in details.get("holds", ())]),
        "reported_status": reported,
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
