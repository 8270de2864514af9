"""Instances as the registry has them, with their verdicts, transitions and epochs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

from seedcore.core.lifecycle import Status
from seedcore.core.limits import (
    Json,
)
from seedcore.core.wire import wire


class Verdict(StrEnum):
    """What we believe of an instance now, from its beats."""

    FRESH = "fresh"
    LATE = "late"
    SUSPECT = "suspect"
    UNKNOWN = "unknown"


@wire
@dataclass(frozen=True, slots=True)
class Instance:
    """One incarnation of an agent as a source knows it. Times are the database's, in UTC."""

    instance_id: str
    logical_id: str
    status: Status
    cluster_epoch: str
    started_at: datetime
    status_changed_at: datetime
    last_heartbeat: datetime
    seq: int = 0
    actor_name: str | None = None
    namespace: str | None = None
    actor_id: str | None = None
    serve_route: str | None = None
    organ_id: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Json] = field(default_factory=dict)
    node_id: str | None = None
    ip_address: str | None = None
    pid: int | None = None
    process_key: str | None = None
    stopped_at: datetime | None = None
    cause: str | None = None
    drain_until: datetime | None = None
    held: Status | None = None


class Beat(NamedTuple):
    """A renewal: the agent was heard `age_s` seconds before the statement runs. A tuple: they come by the 10,000."""

    instance_id: str
    age_s: float = 0.0


@wire
@dataclass(frozen=True, slots=True)
class Transition:
    """A committed step of an instance's life. `from_status` None: it was registered. `seq` is the agent's own number
    of the change, None where another hand made it. `until` is when a draining ends by itself."""

    instance_id: str
    logical_id: str
    from_status: Status | None
    to_status: Status
    seq: int | None
    cause: str | None
    at: datetime
    until: datetime | None = None


class LiveState(NamedTuple):
    """What must be the same of a live instance wherever it is known. A tuple: they come by the 100,000."""

    logical_id: str
    instance_id: str
    status: Status
    seq: int
    cluster_epoch: str


@wire
@dataclass(frozen=True, slots=True)
class Epoch:
    """A fleet generation: its name and its monotonic number."""

    name: str
    number: int


@wire
@dataclass(frozen=True, slots=True)
class EpochRecord:
    """An epoch's story: named at `staged_at`, shown from `current_at` (None: not yet) to `retired_at` (None: still,
    or not yet), with the number of its instances that are not dead."""

    name: str
    number: int
    staged_at: datetime
    current_at: datetime | None
    retired_at: datetime | None
    live: int

    @property
    def state(self) -> str:
        """`staged`, `current` or `retired`."""
        if self.retired_at is not None:
            return "retired"
        return "staged" if self.current_at is None else "current"
