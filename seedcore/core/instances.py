"""Instances as the registry has them, with their verdicts, transitions and epochs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

from seedcore.core.causes import Cause
from seedcore.core.dependencies import Dependency
from seedcore.core.holds import Hold, HoldKind
from seedcore.core.lifecycle import Status
from seedcore.core.limits import NOTHING, Json
from seedcore.core.wire import wire


class Verdict(StrEnum):
    """The registry's current judgement of an instance, from its beats."""

    FRESH = "fresh"
    LATE = "late"
    SUSPECT = "suspect"
    UNKNOWN = "unknown"


@wire
@dataclass(frozen=True, slots=True)
class Instance:
    """One incarnation of an agent as a source knows it. Times are the database's, in UTC.

    `status` is the effective status: it follows from `reported_status`, which the agent reported last, and `holds`,
    which are sorted by kind (see core.holds). `cause` is the cause of the last change of the status or of a hold.
    `endpoints` are the URLs at which other programs reach the agent, by name.
    """

    instance_id: str
    logical_id: str
    status: Status
    reported_status: Status
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
    cause: Cause | None = None
    holds: tuple[Hold, ...] = ()
    endpoints: Mapping[str, str] = field(default_factory=dict)
    dependencies: tuple[Dependency, ...] = ()

    def hold(self, kind: HoldKind) -> Hold | None:
        """Its hold of a kind, or None."""
        return next((hold for hold in self.holds if hold.kind is kind), None)


class Beat(NamedTuple):
    """A renewal, received `age_s` seconds before the statement runs. A tuple: there are 10,000 in a batch."""

    instance_id: str
    age_s: float = 0.0


@wire
@dataclass(frozen=True, slots=True)
class Transition:
    """A committed change of an instance's effective status or of one of its holds.

    `from_status` None: it was registered. `seq` is the agent's own number of the change, None where the agent did not
    send it. `hold` is the kind of hold that was placed, until `expires_at`, or released; then both statuses may be the
    same.
    """

    instance_id: str
    logical_id: str
    from_status: Status | None
    to_status: Status
    seq: int | None
    cause: Cause | None
    at: datetime
    hold: HoldKind | None = None
    expires_at: datetime | None = None


class LiveState(NamedTuple):
    """What must be the same of a live instance in memory and in the database. A tuple: there are 100,000."""

    logical_id: str
    instance_id: str
    status: Status
    seq: int
    cluster_epoch: str
    reported_status: Status
    holds: tuple[Hold, ...]
    endpoints: Mapping[str, str] = NOTHING
    dependencies: tuple[Dependency, ...] = ()

    @classmethod
    def of(cls, instance: Instance) -> LiveState:
        """The state of an instance."""
        return cls(
            instance.logical_id,
            instance.instance_id,
            instance.status,
            instance.seq,
            instance.cluster_epoch,
            instance.reported_status,
            instance.holds,
            instance.endpoints,
            instance.dependencies,
        )

    def has_details_of(self, instance: Instance) -> bool:
        """Whether it has those details of an instance that change during its life."""
        return self.endpoints == instance.endpoints and self.dependencies == instance.dependencies


@wire
@dataclass(frozen=True, slots=True)
class Epoch:
    """A fleet generation: its name and its monotonic number."""

    name: str
    number: int


@dataclass(frozen=True, slots=True)
class TermSeen:
    """The registry in force, as its database shows it: its term, and when it was last seen at work. The clock of that
    time may jump: another time means that it was at work in between, and the age of a time means nothing."""

    term: int
    at: datetime


@wire
@dataclass(frozen=True, slots=True)
class EpochRecord:
    """The life of an epoch: staged at `staged_at`, current from `current_at` (None: not yet) to `retired_at` (None:
    still, or not yet), with the number of its instances that are not dead."""

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
