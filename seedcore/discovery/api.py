"""The shapes of the HTTP API: what its requests and answers contain."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from seedcore.core.answers import NotResolved
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.holds import HoldKind
from seedcore.core.limits import MAX_DRAIN_S, MAX_PAGE, MAX_REASON_CHARS
from seedcore.discovery.stored_json import Labels, Metadata


class CauseOut(BaseModel):
    """Why an instance has its status. A client reads `kind`; `detail` is for people and may change. `by` names the
    operator."""

    model_config = ConfigDict(from_attributes=True)

    kind: CauseKind
    detail: str | None
    by: str | None

    def __str__(self) -> str:
        return str(Cause(self.kind, self.detail, self.by))


class HoldOut(BaseModel):
    """Why an instance is not resolved although it reports alive. It has at most one hold of a kind."""

    model_config = ConfigDict(from_attributes=True)

    kind: HoldKind
    reason: str | None
    by: str | None = Field(description="the operator")
    since: datetime
    expires_at: datetime | None = Field(description="when the registry releases the hold; null: it does not expire")


class Stamp(BaseModel):
    """The source, time and completeness of an answer."""

    source: str = Field(description="the source of the answer: registry, snapshot, postgres or ray")
    as_of: datetime
    version: int = Field(
        description="increases with every change of its source, and restarts with its stream; 0: no stream"
    )
    complete: bool = Field(description="false: the source may be missing something")


class InstanceOut(BaseModel):
    """One incarnation of an agent. Ray's listing knows only its names. `status` follows from `reported_status` and
    `holds`. `verdict` (fresh, late, suspect) is known if the source receives beats. A snapshot has verdicts, and no
    times of beats."""

    model_config = ConfigDict(from_attributes=True)

    logical_id: str
    instance_id: str | None = None
    status: str | None = None
    reported_status: str | None = Field(None, description="the status that the agent reported last")
    verdict: str | None = None
    cluster_epoch: str | None = None
    organ_id: str | None = None
    actor_name: str | None = None
    namespace: str | None = None
    actor_id: str | None = None
    serve_route: str | None = None
    labels: Labels = {}
    metadata: Metadata = {}
    endpoints: dict[str, str] = Field({}, description="URLs by name")
    node_id: str | None = None
    ip_address: str | None = None
    pid: int | None = None
    started_at: datetime | None = None
    status_changed_at: datetime | None = None
    last_heartbeat: datetime | None = None
    stopped_at: datetime | None = None
    cause: CauseOut | None = Field(None, description="the cause of the last change of its status or of a hold")
    holds: list[HoldOut] = Field([], description="sorted by kind")


class InstanceAnswer(Stamp):
    """One instance."""

    instance: InstanceOut


class InstancePage(Stamp):
    """A page of instances."""

    stream: str | None = Field(
        None, description="with `version`, where /v1/watch and `since` go on from: STREAM:VERSION"
    )
    items: list[InstanceOut]
    next_cursor: str | None = Field(description="pass as `cursor` for the next page; null on the last one")


class ResolveRequest(BaseModel):
    """Which agents to resolve."""

    model_config = ConfigDict(extra="forbid")

    logical_ids: list[str] = Field(min_length=1, max_length=MAX_PAGE)
    allow_late: bool = Field(False, description="also an instance that missed one beat, if none is fresh")


class ResolutionOut(BaseModel):
    """The best instance of an agent, or why there is none."""

    logical_id: str
    instance: InstanceOut | None
    reason: NotResolved | None = Field(
        description="why there is no instance; null: there is one, or the source cannot know now"
    )
    detail: str | None = Field(description="the same for people")


class ResolveAnswer(Stamp):
    """One resolution for each agent asked for, in that order."""

    results: list[ResolutionOut]


class LiveOut(BaseModel):
    """A live instance with its verdict and the time since its last beat."""

    instance: InstanceOut
    verdict: str
    silence_s: float


class TransitionOut(BaseModel):
    """A change of an instance's status or of one of its holds, where both statuses may be the same. `from_status` null:
    it was registered; `seq` null: not by the agent itself."""

    model_config = ConfigDict(from_attributes=True)

    instance_id: str
    from_status: str | None
    to_status: str
    seq: int | None
    cause: CauseOut | None
    at: datetime
    hold: HoldKind | None = Field(description="the kind of the hold that was placed or released")
    expires_at: datetime | None = Field(description="when the hold that was placed expires; null: released, or no end")


class AgentAnswer(Stamp):
    """One agent: its live instances, its newest instances, dead or alive, and their newest transitions."""

    logical_id: str
    live: list[LiveOut]
    instances: list[InstanceOut]
    transitions: list[TransitionOut] = []


class HistoryAnswer(Stamp):
    """The transitions of an agent's instances, newest first."""

    logical_id: str
    transitions: list[TransitionOut]


class ReasonRequest(BaseModel):
    """The reason of an operator's change, which is recorded."""

    model_config = ConfigDict(extra="forbid")

    reason: str | None = Field(None, min_length=1, max_length=MAX_REASON_CHARS)


class DrainRequest(ReasonRequest):
    """A drain, for a time or until the agent is undrained."""

    duration_s: float | None = Field(
        None,
        gt=0,
        le=MAX_DRAIN_S,
        strict=True,
        description="seconds until the drain expires; null: until the agent is undrained",
    )


class OperationOut(BaseModel):
    """The result for one instance. `durable` false: accepted, and not in the database yet; `status` null: refused.
    `why` explains both."""

    instance_id: str
    status: str | None
    durable: bool
    why: str | None


class OperationAnswer(Stamp):
    """The results of an operator's change."""

    logical_id: str
    results: list[OperationOut]


class EpochAnswer(Stamp):
    """The current epoch."""

    epoch: str
    number: int


class SourcesOut(BaseModel):
    """Which sources answer now: "ok", or the problem."""

    registry: str
    postgres: str
    ray: str


class ServiceOut(BaseModel):
    """This deployment."""

    version: str
    mode: str
    namespace: str


class LossOut(BaseModel):
    """Lost commits, noticed at `at`: what this registry had acknowledged was written again, but for what the database
    `refused`. `has_whole_history` false: the oldest of the lost transitions are missing."""

    model_config = ConfigDict(from_attributes=True)

    at: datetime
    commits: int
    written_again: int
    refused: int
    has_whole_history: bool


class RegistryOut(BaseModel):
    """The registry actor's own report. Times in seconds."""

    pid: int
    node_id: str
    started_at: datetime
    code_version: str
    recovered: bool
    store_kind: str
    store_problem: str | None
    term: int | None
    fenced_by: int | None
    beat_interval_s: float
    lease_s: float
    beats_per_s: float | None
    flush_s: float
    pending_changes: int
    pending_beats: int
    beats_dropped: int
    is_frozen: bool
    silent: int
    credited_s: float
    relays: int
    watched: int
    watch_problem: str | None
    followers: int
    healed: int
    compared_at: datetime | None
    notes: list[str]
    unwatched: dict[str, int]
    last_loss: LossOut | None = None
    agents_ahead: int = Field(0, description="instances of which agents knew later changes than the database")
    agents_ahead_at: datetime | None = None
    epoch_problem: str | None = Field(None, description="a flip is lost: what an operator must do")
    capacity_problem: str | None = Field(None, description="the registry is nearly full: what an operator must do")


class EpochOut(BaseModel):
    """A fleet generation."""

    name: str
    number: int


class OverviewAnswer(Stamp):
    """A summary of the fleet. `by_organ` has the largest organs, "" for agents without one; a count that the source
    does not know is empty. `registry` is the actor's report, null without one; `as_of_registry` is its last time."""

    service: ServiceOut
    sources: SourcesOut
    instances: int
    by_status: dict[str, int]
    by_verdict: dict[str, int]
    by_organ: dict[str, int]
    epoch: EpochOut | None
    registry: RegistryOut | None
    registry_problem: str | None
    as_of_registry: datetime | None


class ReadyAnswer(BaseModel):
    """Whether any source answers, and which ones."""

    ready: bool
    sources: SourcesOut | None = Field(description="null: the caller has no right to read")


class HealthAnswer(BaseModel):
    """This replica is up; the registry's own report, or why there is none."""

    status: str
    version: str
    mode: str
    registry: dict[str, Any] | None = None
    registry_problem: str | None = None


class AccessAnswer(BaseModel):
    """The caller's right (none, read or write); `problem` is what is wrong with the token that it sent."""

    right: str
    name: str | None
    problem: str | None
    anonymous: str = Field(description="the right of a caller without a token")
