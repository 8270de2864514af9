"""What one change does to one instance: the rules that schema/*.sql states in SQL, as pure functions."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from sys import intern

from seedcore.core import lifecycle
from seedcore.core.answers import Outcome, OutcomeKind
from seedcore.core.changes import RegisterChange, StatusChange
from seedcore.core.instances import Instance
from seedcore.core.lifecycle import Status
from seedcore.core.limits import NOTHING, one_object


def first_registration(change: RegisterChange, epoch: str, now: datetime) -> Instance:
    """The instance that a registration of an unknown id makes."""
    registration = change.registration
    return Instance(
        instance_id=registration.instance_id,
        logical_id=registration.logical_id,
        status=Status.STARTING,
        cluster_epoch=intern(epoch),
        started_at=now,
        status_changed_at=now,
        last_heartbeat=now,
        seq=change.seq,
        actor_name=registration.actor_name,
        namespace=one_object(registration.namespace),
        actor_id=registration.actor_id,
        serve_route=registration.serve_route,
        organ_id=one_object(registration.organ_id),
        labels=dict(registration.labels) or NOTHING,
        metadata=dict(registration.metadata) or NOTHING,
        node_id=one_object(registration.node_id),
        ip_address=one_object(registration.ip_address),
        pid=registration.pid,
        process_key=one_object(registration.process_key),
    )


def apply_registration(known: Instance, change: RegisterChange, now: datetime) -> tuple[Outcome, Instance]:
    """Register an id that is known already: its details are refreshed, its life goes on."""
    if known.logical_id != change.registration.logical_id:
        return _answer(OutcomeKind.CONFLICT, known)
    if known.status is Status.DEAD:
        return _answer(OutcomeKind.DEAD, known)
    if change.seq < known.seq:
        return _answer(OutcomeKind.UNCHANGED, known)
    fresh = replace(
        first_registration(change, known.cluster_epoch, now),
        status=known.status,
        started_at=known.started_at,
        status_changed_at=known.status_changed_at,
        cause=known.cause,
        drain_until=known.drain_until,
        held=known.held,
    )
    return _answer(OutcomeKind.UNCHANGED, fresh)


def apply_status(known: Instance, change: StatusChange, now: datetime) -> tuple[Outcome, Instance]:
    """Change a status under the transition table. A sequence number at or below the known one is a replay. A draining
    that lasts already can be given another end and another cause. One by another hand than the agent's holds: what the
    agent says meanwhile is kept, and is what the end of it gives back."""
    if change.seq is not None and change.seq <= known.seq:
        return _answer(OutcomeKind.UNCHANGED, known)
    becomes, keeps = change.status, None
    if change.seq is None and change.status is Status.DRAINING:
        keeps = known.held or known.status
    elif change.seq is None and change.status is Status.ALIVE:
        becomes = known.held or Status.ALIVE
    elif change.seq is not None and known.held is not None and change.status in {Status.ALIVE, Status.DRAINING}:
        return _answer(OutcomeKind.UNCHANGED, replace(known, held=change.status, seq=change.seq))
    is_same = (known.status, known.drain_until, known.held) == (becomes, change.until, keeps)
    if is_same and (keeps is None or known.cause == change.cause):
        return _answer(OutcomeKind.UNCHANGED, known if change.seq is None else replace(known, seq=change.seq))
    if known.status is Status.DEAD:
        return _answer(OutcomeKind.DEAD, known)
    is_step = known.status is not becomes
    if is_step and becomes is change.status and not lifecycle.is_allowed(known.status, becomes):
        return _answer(OutcomeKind.FORBIDDEN, known)
    happened = max(known.status_changed_at + timedelta(microseconds=1), now - timedelta(seconds=change.age_s))
    changed = replace(
        known,
        status=becomes,
        seq=known.seq if change.seq is None else change.seq,
        cause=change.cause,
        status_changed_at=happened if is_step else known.status_changed_at,
        drain_until=change.until,
        held=keeps,
        stopped_at=happened if becomes is Status.DEAD else None,
        last_heartbeat=known.last_heartbeat if change.seq is None else now,
    )
    return _answer(OutcomeKind.APPLIED, changed)


def _answer(kind: OutcomeKind, row: Instance) -> tuple[Outcome, Instance]:
    return Outcome(kind, row.status, row.cluster_epoch, row.cause), row
