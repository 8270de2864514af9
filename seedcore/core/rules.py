"""What one change does to one instance: the rules of schema/*.sql, as pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from datetime import datetime, timedelta
from sys import intern
from typing import Any

from seedcore.core import lifecycle
from seedcore.core.answers import Outcome, OutcomeKind
from seedcore.core.changes import HoldChange, RegisterChange, Registration, StatusChange
from seedcore.core.holds import Hold, effective_status
from seedcore.core.instances import Instance
from seedcore.core.lifecycle import Status
from seedcore.core.limits import NOTHING, one_object

_DECIDED_BY_THE_REGISTRY = frozenset({"cluster_epoch"})
_OF_ONE_AGENT = frozenset({"instance_id", "logical_id", "actor_name", "actor_id", "serve_route"})
_REGISTERED = tuple(
    field.name
    for field in fields(Registration)
    if field.name in {known.name for known in fields(Instance)} - _DECIDED_BY_THE_REGISTRY
)
"""The fields of an instance that its registration decides."""


def first_registration(change: RegisterChange, epoch: str, now: datetime) -> Instance:
    """The instance that a registration of an unknown id makes."""
    details = {name: _kept(name, getattr(change.registration, name)) for name in _REGISTERED}
    at = now - timedelta(seconds=change.age_s) if change.age_s else now
    status = Status.ALIVE if change.is_alive else Status.STARTING
    return Instance(
        **details,
        status=status,
        reported_status=status,
        cluster_epoch=intern(epoch),
        started_at=at,
        status_changed_at=at,
        last_heartbeat=now,
        seq=change.seq,
    )


def _kept(name: str, value: Any) -> Any:
    """The value as an instance keeps it: what many instances have in common is in memory once."""
    if isinstance(value, str):
        return value if name in _OF_ONE_AGENT else one_object(value)
    return (dict(value) or NOTHING) if isinstance(value, Mapping) else value


def apply_registration(known: Instance, change: RegisterChange, now: datetime) -> tuple[Outcome, Instance]:
    """Register a known id again: its details are refreshed, its life continues."""
    if change.is_alive:
        outcome, row = apply_registration(known, change.alone(), now)
        is_taken = outcome.kind is OutcomeKind.UNCHANGED
        return apply_status(row, change.status_change(), now) if is_taken else (outcome, row)
    if known.logical_id != change.registration.logical_id:
        return _answer(OutcomeKind.CONFLICT, known)
    if known.status is Status.DEAD:
        return _answer(OutcomeKind.DEAD, known)
    if change.seq < known.seq:
        return _answer(OutcomeKind.UNCHANGED, known)
    details = {name: _kept(name, getattr(change.registration, name)) for name in _REGISTERED}
    return _answer(OutcomeKind.UNCHANGED, replace(known, **details, seq=change.seq, last_heartbeat=now))


def apply_status(known: Instance, change: StatusChange, now: datetime) -> tuple[Outcome, Instance]:
    """Change the reported status under the transition table. A sequence number at or below the known one is a
    repetition.

    Under a hold the effective status may stay as it is: then the outcome is `unchanged`, and the cause stays too.
    """
    if change.seq is not None and change.seq <= known.seq:
        return _answer(OutcomeKind.UNCHANGED, known)
    if known.reported_status is change.status:
        return _answer(OutcomeKind.UNCHANGED, known if change.seq is None else replace(known, seq=change.seq))
    if known.reported_status is Status.DEAD:
        return _answer(OutcomeKind.DEAD, known)
    if not lifecycle.is_allowed(known.reported_status, change.status):
        return _answer(OutcomeKind.FORBIDDEN, known)
    holds = () if change.status is Status.DEAD else known.holds
    effects = _effects(known, change.status, holds, now - timedelta(seconds=change.age_s))
    if effects:
        effects["cause"] = change.cause
    return _answer(
        OutcomeKind.APPLIED if effects else OutcomeKind.UNCHANGED,
        replace(
            known,
            reported_status=change.status,
            holds=holds,
            seq=known.seq if change.seq is None else change.seq,
            last_heartbeat=known.last_heartbeat if change.seq is None else now,
            **effects,
        ),
    )


def apply_hold(known: Instance, change: HoldChange, now: datetime) -> tuple[Outcome, Instance]:
    """Place, replace or release one hold. The same hold again, or the release of none, changes nothing. A sequence
    number is as in `apply_status`."""
    if change.seq is not None and change.seq <= known.seq:
        return _answer(OutcomeKind.UNCHANGED, known)
    before = known.hold(change.kind)
    if change.hold is None if before is None else before.is_same(change.hold):
        return _answer(OutcomeKind.UNCHANGED, known if change.seq is None else replace(known, seq=change.seq))
    if known.reported_status is Status.DEAD:
        return _answer(OutcomeKind.DEAD, known)
    others = [hold for hold in known.holds if hold.kind is not change.kind]
    holds = sorted_holds(others if change.hold is None else [*others, change.hold])
    changed = replace(
        known,
        holds=holds,
        cause=change.why,
        seq=known.seq if change.seq is None else change.seq,
        last_heartbeat=known.last_heartbeat if change.seq is None else now,
        **_effects(known, known.reported_status, holds, now - timedelta(seconds=change.age_s)),
    )
    return _answer(OutcomeKind.APPLIED, changed)


def sorted_holds(holds: Iterable[Hold]) -> tuple[Hold, ...]:
    """Holds as an instance has them: by kind."""
    return tuple(sorted(holds, key=lambda hold: hold.kind.value))


def _effects(known: Instance, reported: Status, holds: Iterable[Hold], at: datetime) -> dict[str, Any]:
    """What changes with the effective status that follows from what an instance reports and its holds, `at` this time:
    fields of an instance. Empty where that status stays."""
    status = effective_status(reported, [hold.kind for hold in holds])
    if status is known.status:
        return {}
    # a change that is stored late does not precede the one before it
    happened = max(known.status_changed_at + timedelta(microseconds=1), at)
    stopped_at = happened if status is Status.DEAD else None
    return {"status": status, "status_changed_at": happened, "stopped_at": stopped_at}


def _answer(kind: OutcomeKind, row: Instance) -> tuple[Outcome, Instance]:
    return Outcome(kind, row.status, row.cluster_epoch, row.cause), row
