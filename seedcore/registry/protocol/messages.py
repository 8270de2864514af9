"""What the registry actor answers about itself and about an agent: plain frozen values, since they cross processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from seedcore.core.answers import Origin
from seedcore.core.causes import Cause
from seedcore.core.dependencies import Dependency
from seedcore.core.errors import RegistryError, VersionMismatchError
from seedcore.core.instances import Instance, Transition, Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.wire import wire

PROTOCOL = 1
"""The protocol of this code. It grows with anything that another side can notice."""
OLDEST_PROTOCOL = 1
"""The oldest protocol that this code works with; at least that of the release before."""
INSTANCES_LIMIT = 20
TRANSITIONS_LIMIT = 100


@wire
@dataclass(frozen=True, slots=True)
class Hello:
    """The handshake: which code runs under the registry's name.

    `agent_call_s` is how long an agent waits for the registry's answer: after a restart the registry allows for calls
    that were under way. None: as long as the agent's own setting.
    """

    protocol: int
    code_version: str
    pid: int
    node_id: str
    started_at: datetime
    oldest_protocol: int = 0
    agent_call_s: float | None = None

    def require_understood(self) -> None:
        """Raise VersionMismatchError where the two protocols are too far apart."""
        if self.protocol < OLDEST_PROTOCOL or self.oldest_protocol > PROTOCOL:
            raise VersionMismatchError(self.protocol, PROTOCOL)


@wire
@dataclass(frozen=True, slots=True)
class OperationResult:
    """What an operator's call did to one instance.

    `status` is the instance's after it. `durable` is False if it is not committed yet; then `why` is what prevents
    that. Otherwise `why` is the reason why the instance is still not alive after its release, if it is not. `error` is
    the refusal, if there is one; `instance_id` is None if the agent has no live instance.
    """

    instance_id: str | None
    logical_id: str | None = None
    status: Status | None = None
    durable: bool = False
    why: str | None = None
    error: RegistryError | None = None

    def raise_if_refused(self) -> OperationResult:
        """The same result, or its error."""
        if self.error is not None:
            raise self.error
        return self


@wire
@dataclass(frozen=True, slots=True)
class Observed:
    """A live instance with the verdict on its beats. `silence_s` in seconds."""

    instance: Instance
    verdict: Verdict
    silence_s: float


@wire
@dataclass(frozen=True, slots=True)
class Description:
    """An agent: its live instances, its newest instances, dead ones included, and their newest transitions (both empty
    when `complete` is False because the database could not be read)."""

    logical_id: str
    live: tuple[Observed, ...]
    instances: tuple[Instance, ...]
    source: Origin
    as_of: datetime
    version: int
    complete: bool
    transitions: tuple[Transition, ...] = ()


@wire
@dataclass(frozen=True, slots=True)
class FlushCounts:
    """What the write loop has done since the actor started."""

    flushes: int = 0
    failures: int = 0
    statements: int = 0
    changes_committed: int = 0
    beats_committed: int = 0
    beats_offered: int = 0
    beats_coalesced: int = 0
    beats_dropped: int = 0
    last_flush_s: float = 0.0


@wire
@dataclass(frozen=True, slots=True)
class DatabaseLoss:
    """The database had lost `commits` commits of this registry, which was noticed and mended at `at`: a standby without
    them was promoted, or a backup was restored. `written_again` counts what was written again, `refused` what the
    database did not take again. `has_whole_history` False: the states are restored, and the oldest of the lost
    transitions are not."""

    at: datetime
    commits: int
    written_again: int
    refused: int
    has_whole_history: bool


@wire
@dataclass(frozen=True, slots=True)
class Health:
    """The registry's own state. `store_problem` None means that the database answers.

    `term` is its writer's number, None before it has joined the database; `fenced_by` is the term of a newer registry
    that took the database over, after which this one only reads. `is_frozen`: so many instances miss their
    beats at once that no lease ends by silence alone. `deaths_reported` counts the reports of the relays and of Ray's
    node table; `watch_problem` names those that cannot report, and why. So many `relays` are at work, and watch
    `watched` of the instances; the others are judged by their beats alone, and `unwatched` counts them by reason (see
    Unwatched).
    So many `followers` wait for a change. `silent` instances are not fresh now; `became_silent` counts how often an
    instance became so, `came_back` how often one of them beat again; `deaths_declared` counts the registry's own
    verdicts. `healed` counts instances that differed between memory and database at their comparison, the last one at
    `compared_at`; `pruned` counts rows that were deleted from the past. `beats_per_s` is the present rate; `fences`
    counts how often a newer registry took over. `losses` counts how often the database had lost commits, `lost_commits`
    how many in all; `last_loss` is the last time. `agents_ahead` counts instances of which the agents knew later
    changes than the database, the last one at `agents_ahead_at`: it lost commits before this registry started.
    `epoch_problem`: a flip is lost, no agent is resolved, and what an operator must do. `capacity_used` is the used
    share of each bound of the registry, from 0 to 1; `capacity_problem`: one is nearly reached, and what an operator
    must do; `registrations_refused` counts those refused at a bound. Ray drains so many `draining_nodes`.
    """

    hello: Hello
    as_of: datetime
    recovered: bool
    store_problem: str | None
    store_kind: str
    term: int | None
    fenced_by: int | None
    epoch: str | None
    lease_s: float
    beat_interval_s: float
    instances: Mapping[str, int]
    pending_changes: int
    pending_beats: int
    credited_s: float
    is_frozen: bool
    deaths_reported: int
    watch_problem: str | None
    relays: int
    watched: int
    followers: int
    silent: int
    became_silent: int
    healed: int
    pruned: int
    compared_at: datetime | None
    flush: FlushCounts
    beats_per_s: float | None = None
    fences: int = 0
    came_back: int = 0
    deaths_declared: int = 0
    notes: tuple[str, ...] = field(default=())
    unwatched: Mapping[str, int] = field(default_factory=dict)
    losses: int = 0
    lost_commits: int = 0
    last_loss: DatabaseLoss | None = None
    agents_ahead: int = 0
    agents_ahead_at: datetime | None = None
    epoch_problem: str | None = None
    capacity_problem: str | None = None
    capacity_used: Mapping[str, float] = field(default_factory=dict)
    registrations_refused: int = 0
    draining_nodes: int = 0

    @property
    def is_ready(self) -> bool:
        """Whether answers are complete, changes become durable, and it is known which epoch is current."""
        return self.recovered and self.store_problem is None and self.fenced_by is None and self.epoch_problem is None


@wire
@dataclass(frozen=True, slots=True)
class Watched:
    """An instance, where it lives, and the processes there that it depends on."""

    instance_id: str
    pid: int | None
    process_key: str | None
    actor_name: str | None
    namespace: str | None
    actor_id: str | None
    dependencies: tuple[Dependency, ...] = ()


class Unwatched(StrEnum):
    """Why the end of an instance's process is noticed by its beats alone."""

    DESCRIPTORS = "descriptors"
    HIDDEN = "hidden"
    NAMESPACE = "namespace"
    RAY = "ray"
    RELAY = "relay"
    ELSEWHERE = "elsewhere"

    @property
    def problem(self) -> str | None:
        """What is wrong, and what helps; None where it is meant to be so."""
        return _PROBLEMS.get(self)


_PROBLEMS = {
    Unwatched.DESCRIPTORS: "the relay there has no file descriptor left: raise `ulimit -n` before `ray start`",
    Unwatched.HIDDEN: "/proc hides their processes from the relay: mount it without hidepid, or run agents as its user",
    Unwatched.NAMESPACE: (
        "their processes have another PID namespace: share one (shareProcessNamespace), or report from named actors"
    ),
    Unwatched.RAY: "Ray does not answer about their actors: it is asked again",
}


MAX_WATCHED_PER_CALL = 1000


@wire
@dataclass(frozen=True, slots=True)
class Exit:
    """An instance whose process or actor has ended, or a process that it depends on, which `dependency` names. `number`
    grows by one with each that a relay reports.

    Reported again with `is_explained` when the cause becomes better known.
    """

    number: int
    instance_id: str
    cause: Cause
    is_explained: bool = False
    dependency: Dependency | None = None
