"""Why the agents that were waited for are not ready: from the registry's records, else from what this process knows.

Pure functions over records. `waiting` asks for the records, once, at the deadline.
"""

from __future__ import annotations

from datetime import datetime

from seedcore.core.answers import NotResolved
from seedcore.core.errors import NotResolvableError, RegistryError, first_line
from seedcore.core.holds import Hold, HoldKind
from seedcore.core.instances import Instance, Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.not_ready import MissingAgent, NotReady
from seedcore.core.selection import preference
from seedcore.registry.protocol.messages import Description, Observed

_MAX_CHARS = 300

# of several holds, the first one is the reason
_OF_HOLD = {
    HoldKind.OPERATOR: NotReady.DRAINING,
    HoldKind.NODE: NotReady.NODE,
    HoldKind.PROCESS: NotReady.PROCESS,
    HoldKind.READINESS: NotReady.NOT_READY,
}
_IN_WORDS = {
    HoldKind.OPERATOR: "has been drained by {by} for {age}",
    HoldKind.NODE: "has been held for {age}, because its node is drained",
    HoldKind.PROCESS: "has been held for {age}, because a process that it depends on has ended",
    HoldKind.READINESS: "has not been ready for {age}",
}
_OF_REFUSAL = {
    NotResolved.NOT_REGISTERED: NotReady.NEVER_REGISTERED,
    NotResolved.OTHER_EPOCH: NotReady.OTHER_EPOCH,
    NotResolved.EPOCH_UNCONFIRMED: NotReady.OTHER_EPOCH,
    NotResolved.STARTING: NotReady.STARTING,
    NotResolved.NOT_READY: NotReady.NOT_READY,
    NotResolved.DRAINING: NotReady.DRAINING,
    NotResolved.LATE: NotReady.LATE,
    NotResolved.SUSPECT: NotReady.SUSPECT,
    NotResolved.LEASE_EXPIRED: NotReady.SUSPECT,
    NotResolved.REPORTED_DEAD: NotReady.SUSPECT,
    NotResolved.DIED: NotReady.DEAD,
    NotResolved.NO_HANDLE: NotReady.NO_HANDLE,
    NotResolved.UNREACHABLE: NotReady.UNREACHABLE,
}
# the records of a live, fresh instance do not have these
_BEYOND_RECORDS = frozenset({NotReady.OTHER_EPOCH, NotReady.NO_HANDLE, NotReady.UNREACHABLE, NotReady.DEAD})


def of_description(described: Description, refusal: RegistryError | None) -> MissingAgent:
    """Why an agent is not ready, by its records. `refusal` is what its last resolution raised."""
    logical_id, at = described.logical_id, described.as_of
    if described.live:
        return of_live(min(described.live, key=_nearest), at, refusal)
    # without verdicts, as the database has them
    recorded = [row for row in described.instances if row.status is not Status.DEAD]
    if recorded:
        return of_live(Observed(min(recorded, key=preference), Verdict.FRESH, 0.0), at, refusal)
    if described.instances:
        return of_dead(max(described.instances, key=lambda row: row.stopped_at or row.started_at), at)
    if described.complete:
        return MissingAgent(logical_id, NotReady.NEVER_REGISTERED, "has never registered")
    return MissingAgent(logical_id, NotReady.UNKNOWN, "is not registered now, and whether it ever was cannot be read")


def of_live(observed: Observed, at: datetime, refusal: RegistryError | None = None) -> MissingAgent:
    """Why a live instance is not ready at a time."""
    row, verdict = observed.instance, observed.verdict
    if row.status is not Status.ALIVE:
        return _of_status(row, at)
    if verdict is not Verdict.FRESH:
        reason = NotReady.LATE if verdict is Verdict.LATE else NotReady.SUSPECT
        silent = f": silent for {age_text(observed.silence_s)}" if observed.silence_s > 0 else ""
        return MissingAgent(row.logical_id, reason, f"is {reason}{silent}")
    refused = None if refusal is None else of_refusal(row.logical_id, refusal)
    if refused is not None and refused.reason in _BEYOND_RECORDS:
        return refused
    return MissingAgent(
        row.logical_id, NotReady.UNREACHABLE, "appears ready, and its actor did not prove it in time", row.started_at
    )


def of_dead(row: Instance, at: datetime) -> MissingAgent:
    """Of a dead instance."""
    died = "is dead" if row.stopped_at is None else f"died {age_text((at - row.stopped_at).total_seconds())} ago"
    why = "no cause is known" if row.cause is None else one_line(str(row.cause))
    return MissingAgent(row.logical_id, NotReady.DEAD, f"{died}: {why}", row.stopped_at, row.cause)


def of_refusal(logical_id: str, refusal: RegistryError | None) -> MissingAgent:
    """By the last resolution alone: its records could not be read."""
    if isinstance(refusal, NotResolvableError):
        return MissingAgent(logical_id, _OF_REFUSAL[refusal.reason], f"is not ready: {one_line(refusal.detail)}")
    why = "its resolution has not ended" if refusal is None else one_line(getattr(refusal, "why", first_line(refusal)))
    return MissingAgent(logical_id, NotReady.UNKNOWN, f"cannot be known: {why}")


def age_text(seconds: float) -> str:
    """An age in words: 40 s, 5 min, 3 h, 2 d."""
    for unit, size_s, up_to_s in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < up_to_s:
            return f"{max(0.0, seconds) / size_s:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def one_line(text: str) -> str:
    """A text of any origin as one short line."""
    line = " ".join(text.split())
    return line if len(line) <= _MAX_CHARS else f"{line[: _MAX_CHARS - 3]}..."


def _of_status(row: Instance, at: datetime) -> MissingAgent:
    """Of an instance whose own report, or a hold, keeps it from being alive."""
    for kind, reason in _OF_HOLD.items():
        hold = row.hold(kind)
        if hold is not None:
            return MissingAgent(row.logical_id, reason, _of_hold(hold, at), hold.since, row.cause)
    since = row.status_changed_at
    own = "" if row.cause is None or row.cause.detail is None else f": {one_line(row.cause.detail)}"
    detail = f"has been {row.status} for {age_text((at - since).total_seconds())}{own}"
    return MissingAgent(row.logical_id, NotReady(row.status), detail, since, row.cause)


def _of_hold(hold: Hold, at: datetime) -> str:
    age = age_text((at - hold.since).total_seconds())
    words = _IN_WORDS[hold.kind].format(by=hold.by if hold.by is not None else "an operator", age=age)
    return words if hold.reason is None else f"{words}: {one_line(hold.reason)}"


def _nearest(observed: Observed) -> tuple[object, ...]:
    return (preference(observed.instance)[0], observed.verdict is not Verdict.FRESH, preference(observed.instance))
