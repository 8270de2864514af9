"""Rows become values here, and values parameters: the only module of the store that names the columns.

CONTRIBUTING.md lists the places where a column is added, and the tests of each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from datetime import UTC, datetime
from operator import attrgetter
from sys import intern
from typing import Any, NamedTuple

from seedcore.core.answers import InstanceFilter, Outcome, OutcomeKind
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import HoldChange, RegisterChange, Registration, StatusChange
from seedcore.core.dependencies import Dependency
from seedcore.core.errors import InvalidInputError, StoreRejectedError, first_line
from seedcore.core.holds import Hold, HoldKind
from seedcore.core.instances import Instance, LiveState, Transition
from seedcore.core.lifecycle import Status
from seedcore.core.limits import NOTHING, one_object
from seedcore.core.rules import sorted_holds
from seedcore.store.sessions import Row


class InstanceRow(NamedTuple):
    """The columns of the view instance_row, in its order. A later column is appended, with a default for the time in
    which the database does not have it yet."""

    instance_id: str
    logical_id: str
    status: str
    reported_status: str
    holds: Mapping[str, Mapping[str, str | None]]
    cluster_epoch: str
    started_at: datetime
    status_changed_at: datetime
    last_heartbeat: datetime
    stopped_at: datetime | None
    seq: int
    cause_kind: str | None
    cause_detail: str | None
    cause_by: str | None
    actor_name: str | None
    namespace: str | None
    actor_id: str | None
    serve_route: str | None
    organ_id: str | None
    labels: Mapping[str, str]
    metadata: Mapping[str, Any]
    endpoints: Mapping[str, Any]
    node_id: str | None
    ip_address: str | None
    pid: int | None
    process_key: str | None
    dependencies: Sequence[Mapping[str, Any]]


_WIDTH = len(InstanceRow._fields)
_STATUSES = {status.value: status for status in Status}
_SENT = tuple(field.name for field in fields(Registration) if field.name != "started_epoch")
"""What of a registration is stored: the epoch that it was started in decides only where it belongs."""
_sent = attrgetter(*_SENT)
_LEFT_OUT: tuple[object, ...] = (None, {}, ())
"""What the database has without being told."""


def instance_of(row: Row) -> Instance:
    """An instance from a row of instance_row. Registries have 100,000 of them: equal values are one object."""
    known = InstanceRow._make(row) if len(row) == _WIDTH else InstanceRow(*row[:_WIDTH])
    started_at = known.started_at
    return Instance(
        instance_id=known.instance_id,
        logical_id=known.logical_id,
        status=_STATUSES[known.status],
        reported_status=_STATUSES[known.reported_status],
        holds=_holds_of(known.holds) if known.holds else (),
        cluster_epoch=intern(known.cluster_epoch),
        started_at=started_at,
        status_changed_at=started_at if known.status_changed_at == started_at else known.status_changed_at,
        last_heartbeat=started_at if known.last_heartbeat == started_at else known.last_heartbeat,
        stopped_at=known.stopped_at,
        seq=known.seq,
        cause=_cause_of(known.cause_kind, known.cause_detail, known.cause_by),
        actor_name=known.actor_name,
        namespace=one_object(known.namespace),
        actor_id=known.actor_id,
        serve_route=known.serve_route,
        organ_id=one_object(known.organ_id),
        labels=known.labels,
        metadata=known.metadata,
        endpoints=_endpoints_of(known.endpoints),
        node_id=one_object(known.node_id),
        ip_address=one_object(known.ip_address),
        pid=known.pid,
        process_key=one_object(known.process_key),
        dependencies=_dependencies_of(known.dependencies) if known.dependencies else (),
    )


def transition_of(row: Row) -> Transition:
    """A transition from a row of the statement of that name."""
    instance_id, logical_id, from_status, to_status, seq, kind, detail, by, hold, expires_at, at = row
    return Transition(
        instance_id=instance_id,
        logical_id=logical_id,
        from_status=None if from_status is None else _STATUSES[from_status],
        to_status=_STATUSES[to_status],
        seq=seq,
        cause=_cause_of(kind, detail, by),
        at=at,
        hold=None if hold is None else HoldKind(hold),
        expires_at=expires_at,
    )


def live_state_of(row: Row) -> LiveState:
    """A live state from a row of the statement live_states."""
    logical_id, instance_id, status, seq, epoch, reported_status, holds, endpoints, dependencies = row
    return LiveState(
        logical_id,
        instance_id,
        _STATUSES[status],
        seq,
        epoch,
        _STATUSES[reported_status],
        _holds_of(holds),
        _endpoints_of(endpoints),
        _dependencies_of(dependencies),
    )


def outcome_of(row: Row) -> Outcome:
    """An outcome from a row of type change_outcome."""
    _, kind, status, cluster_epoch, *cause = row
    return Outcome(OutcomeKind(kind), None if status is None else _STATUSES[status], cluster_epoch, _cause_of(*cause))


def _cause_of(kind: str | None, detail: str | None, by: str | None) -> Cause | None:
    if kind is None:
        # written by another program, without a kind
        return None if detail is None and by is None else Cause(CauseKind.UNKNOWN, detail, by)
    return Cause(CauseKind(kind), detail, by)


def _holds_of(holds: Mapping[str, Mapping[str, str | None]]) -> tuple[Hold, ...]:
    return sorted_holds(
        Hold(HoldKind(kind), hold["reason"], hold["by"], _time(str(hold["since"])), _time_or_none(hold["expires_at"]))
        for kind, hold in holds.items()
    )


def _endpoints_of(endpoints: Mapping[str, Any]) -> Mapping[str, str]:
    # another program may have written any JSON object
    return {name: url for name, url in endpoints.items() if isinstance(url, str)} or NOTHING


def _dependencies_of(given: Sequence[Mapping[str, Any]]) -> tuple[Dependency, ...]:
    """What another program wrote past register_instances, and is none, is left out."""
    found = []
    for one in given:
        with suppress(TypeError, InvalidInputError):
            found.append(Dependency(**one).validated())
    return tuple(found)


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def _time_or_none(text: str | None) -> datetime | None:
    return None if text is None else _time(text)


# Parameters of statements


def registrations(changes: Sequence[RegisterChange]) -> dict[str, object]:
    """The parameters of register_many. Raises StoreRejectedError for what cannot be JSON."""
    rows = [
        dict(
            [pair for pair in zip(_SENT, _sent(change.registration), strict=True) if pair[1] not in _LEFT_OUT],
            seq=change.seq,
            age_s=change.age_s,
            is_update=change.is_update,
            is_alive=change.is_alive,
        )
        for change in changes
    ]
    try:
        return {"rows": json.dumps(rows, default=_plain)}
    except (ValueError, TypeError, RecursionError) as error:
        raise StoreRejectedError(first_line(error)) from error


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Dependency):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def statuses(changes: Sequence[StatusChange]) -> dict[str, object]:
    """The parameters of set_status_many."""
    return {
        "statuses": [change.status.value for change in changes],
        "seqs": [change.seq for change in changes],
        **_causes(change.cause for change in changes),
        **_written(changes),
    }


def holds(changes: Sequence[HoldChange]) -> dict[str, object]:
    """The parameters of hold_many."""
    return {
        "kinds": [change.kind.value for change in changes],
        "holds": [None if change.hold is None else _hold(change.hold) for change in changes],
        "seqs": [change.seq for change in changes],
        **_causes(change.why for change in changes),
        **_written(changes),
    }


def _written(changes: Sequence[StatusChange] | Sequence[HoldChange]) -> dict[str, object]:
    return {
        "ids": [change.instance_id for change in changes],
        "writer_seqs": [change.number for change in changes],
        "ages_s": [change.age_s for change in changes],
    }


def _hold(hold: Hold) -> str:
    expires_at = None if hold.expires_at is None else hold.expires_at.isoformat()
    return json.dumps({"reason": hold.reason, "by": hold.by, "since": hold.since.isoformat(), "expires_at": expires_at})


def refined(causes: Mapping[str, Cause]) -> dict[str, object]:
    """The parameters of refine_causes."""
    known = _causes(causes.values())
    return {"ids": list(causes), "cause_kinds": known["cause_kinds"], "cause_details": known["cause_details"]}


def _causes(causes: Iterable[Cause | None]) -> dict[str, list[str | None]]:
    given = list(causes)
    return {
        "cause_kinds": [None if cause is None else cause.kind.value for cause in given],
        "cause_details": [None if cause is None else cause.detail for cause in given],
        "cause_by": [None if cause is None else cause.by for cause in given],
    }


def filters(wanted: InstanceFilter) -> dict[str, object]:
    """The parameters of list_instances but for the page. Raises InvalidInputError."""
    return {
        "statuses": None if wanted.statuses is None else [status.value for status in wanted.statuses],
        "epoch": wanted.epoch,
        "organ_id": wanted.organ_id,
        "logical_id": wanted.logical_id,
        "labels": json.dumps(dict(wanted.validated().labels)),
        "node_id": wanted.node_id,
        "endpoint": wanted.endpoint,
        "selector": json.dumps(
            [
                {"key": requirement.key, "op": requirement.operator.value, "values": requirement.values}
                for requirement in wanted.selector
            ]
        ),
        "fresh_only": wanted.fresh_only,
    }
