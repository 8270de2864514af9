"""What the HTTP API says: the shapes of its answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from seedcore.core.answers import Answer, Listing, Origin, Receipt, Resolution
from seedcore.core.errors import RegistryError
from seedcore.core.instances import Instance, Transition, Verdict
from seedcore.core.limits import MAX_DRAIN_S, MAX_METADATA_DEPTH, MAX_PAGE, MAX_REASON_CHARS
from seedcore.discovery.ladder import NameListing, RungState
from seedcore.registry.protocol.messages import Description


def _as_texts(labels: Mapping[str, Any]) -> dict[str, str]:
    return {key: value if isinstance(value, str) else _json_text(value) for key, value in labels.items()}


def _without_depths(value: Any, depth_left: int = MAX_METADATA_DEPTH) -> Any:
    if not isinstance(value, (Mapping, list)):
        return value
    if depth_left == 0:
        return _json_text(value)
    if isinstance(value, Mapping):
        return {key: _without_depths(child, depth_left - 1) for key, child in value.items()}
    return [_without_depths(child, depth_left - 1) for child in value]


def _json_text(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "nested too deeply to be shown"


# the database may hold rows by other hands, from before it refused such values: no answer fails for them
Labels = Annotated[dict[str, str], BeforeValidator(_as_texts)]
Metadata = Annotated[dict[str, Any], BeforeValidator(_without_depths)]


class Stamp(BaseModel):
    """What an answer is worth."""

    source: str = Field(description="registry, snapshot, postgres or ray: who gave the answer")
    as_of: datetime
    version: int = Field(
        description="grows with every change its source has seen, begins again with its stream; 0: not of one"
    )
    complete: bool = Field(description="false: the source knows that it may be missing something")


class InstanceOut(BaseModel):
    """One incarnation of an agent. Where only Ray's listing answers, just its names are known. `verdict` is what its
    beats say (fresh, late, suspect), where the source listens to them; a snapshot does, and knows no time of a beat."""

    model_config = ConfigDict(from_attributes=True)

    logical_id: str
    instance_id: str | None = None
    status: str | None = None
    verdict: str | None = None
    cluster_epoch: str | None = None
    organ_id: str | None = None
    actor_name: str | None = None
    namespace: str | None = None
    actor_id: str | None = None
    serve_route: str | None = None
    labels: Labels = {}
    metadata: Metadata = {}
    node_id: str | None = None
    ip_address: str | None = None
    pid: int | None = None
    started_at: datetime | None = None
    status_changed_at: datetime | None = None
    last_heartbeat: datetime | None = None
    stopped_at: datetime | None = None
    cause: str | None = Field(None, description="why it is what it is: why it drains, or died")
    drain_until: datetime | None = Field(None, description="when its draining ends by itself; null: not by itself")
    held: str | None = Field(
        None, description="it drains by another hand than its own: what it says itself, and is again after that"
    )


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
    allow_late: bool = Field(False, description="also an agent that has missed a beat, where nobody is fresh")


class ResolutionOut(BaseModel):
    """The best instance of an agent, or why there is none."""

    logical_id: str
    instance: InstanceOut | None
    why: str | None


class ResolveAnswer(Stamp):
    """One resolution for each agent asked for, in that order."""

    results: list[ResolutionOut]


class LiveOut(BaseModel):
    """A live instance with what its beats say of it."""

    instance: InstanceOut
    verdict: str
    silence_s: float


class TransitionOut(BaseModel):
    """A step of an instance's life. `from_status` null: it was registered; `seq` null: not by the agent itself."""

    model_config = ConfigDict(from_attributes=True)

    instance_id: str
    from_status: str | None
    to_status: str
    seq: int | None
    cause: str | None
    at: datetime
    until: datetime | None = Field(description="when the draining that begins here ends by itself")


class AgentAnswer(Stamp):
    """One agent: its live instances, its newest ones dead or alive, and their newest steps, newest first."""

    logical_id: str
    live: list[LiveOut]
    history: list[InstanceOut]
    transitions: list[TransitionOut] = []


class HistoryAnswer(Stamp):
    """The steps of an agent's instances, newest first."""

    logical_id: str
    transitions: list[TransitionOut]


class ReasonRequest(BaseModel):
    """What an operator wants to be remembered."""

    model_config = ConfigDict(extra="forbid")

    reason: str | None = Field(None, min_length=1, max_length=MAX_REASON_CHARS)


class DrainRequest(ReasonRequest):
    """Take an agent out of discovery, for a while or until it is undrained."""

    duration_s: float | None = Field(
        None,
        gt=0,
        le=MAX_DRAIN_S,
        strict=True,
        description="seconds until it is what it says itself again; null: until it is undrained",
    )


class TurnedOut(BaseModel):
    """What became of one instance. `durable` false: taken, and not in the database yet, `why` says what keeps it; a
    `status` of null: refused, `why` says so."""

    instance_id: str
    status: str | None
    durable: bool
    why: str | None


class TurnedAnswer(Stamp):
    """What an operator's change did to each instance."""

    logical_id: str
    results: list[TurnedOut]


class EpochAnswer(Stamp):
    """The current epoch."""

    epoch: str
    number: int


class RungsOut(BaseModel):
    """Who answers now: "ok", or what is wrong."""

    registry: str
    postgres: str
    ray: str


class ServiceOut(BaseModel):
    """This deployment."""

    version: str
    mode: str
    namespace: str


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


class EpochOut(BaseModel):
    """A fleet generation."""

    name: str
    number: int


class OverviewAnswer(Stamp):
    """The fleet at a glance. `by_organ` has the largest ones, "" for those of none; what cannot be told is empty.
    `registry` is the actor's report, null while it does not answer; `as_of_registry` is when it did last."""

    service: ServiceOut
    rungs: RungsOut
    instances: int
    by_status: dict[str, int]
    by_verdict: dict[str, int]
    by_organ: dict[str, int]
    epoch: EpochOut | None
    registry: RegistryOut | None
    registry_problem: str | None
    as_of_registry: datetime | None


class ReadyAnswer(BaseModel):
    """Whether anything can be answered, and by whom."""

    ready: bool
    rungs: RungsOut | None = Field(description="null: whoever asks may not read")


class HealthAnswer(BaseModel):
    """This replica is up; the registry's own report, or why there is none."""

    status: str
    version: str
    mode: str
    registry: dict[str, Any] | None = None
    registry_problem: str | None = None


class AccessAnswer(BaseModel):
    """What whoever asks may do: none, read or write; `problem` is what is wrong with the token that was shown."""

    right: str
    name: str | None
    problem: str | None
    anonymous: str = Field(description="what who shows no token may do")


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


def rungs_out(rungs: RungState) -> RungsOut:
    """Who answers, as the API shows it."""
    return RungsOut(registry=rungs.registry or "ok", postgres=rungs.postgres or "ok", ray=rungs.ray or "ok")


def stamp_of(answer: Answer[Any] | Listing | NameListing | Description) -> dict[str, Any]:
    """The fields of a Stamp."""
    return {
        "source": answer.source.value,
        "as_of": answer.as_of,
        "version": answer.version,
        "complete": answer.complete,
    }


def instance_out(instance: Instance) -> InstanceOut:
    """One instance as the API shows it."""
    return InstanceOut.model_validate(instance)


def listed_out(instance: Instance, listing: Listing) -> InstanceOut:
    """One instance of a page as the API shows it."""
    shown = instance_out(instance)
    if listing.source is not Origin.POSTGRES:
        shown.verdict = listing.verdicts.get(instance.instance_id, Verdict.FRESH).value
    if listing.source is Origin.SNAPSHOT:
        shown.last_heartbeat = None
    return shown


def page_of(listing: Listing | NameListing) -> InstancePage:
    """A page as the API shows it."""
    if isinstance(listing, NameListing):
        items = [InstanceOut(logical_id=name, actor_name=name) for name in listing.names]
    else:
        items = [listed_out(instance, listing) for instance in listing.items]
    stream = listing.stream if isinstance(listing, Listing) else None
    return InstancePage(items=items, next_cursor=listing.next_cursor, stream=stream, **stamp_of(listing))


def resolution_out(found: Resolution) -> ResolutionOut:
    """One resolution as the API shows it."""
    shown = None if found.instance is None else instance_out(found.instance)
    return ResolutionOut(logical_id=found.logical_id, instance=shown, why=found.why)


def resolve_by_name(logical_ids: Sequence[str], listing: NameListing) -> ResolveAnswer:
    """What Ray's listing alone can say of agents."""
    results = [
        ResolutionOut(
            logical_id=logical_id,
            instance=InstanceOut(logical_id=logical_id, actor_name=logical_id) if logical_id in listing.names else None,
            why=None if logical_id in listing.names else "Ray's listing has no actor of that name",
        )
        for logical_id in logical_ids
    ]
    return ResolveAnswer(results=results, **stamp_of(listing))


def transitions_out(steps: Sequence[Transition]) -> list[TransitionOut]:
    """Steps as the API shows them."""
    return [TransitionOut.model_validate(step) for step in steps]


def turned_answer(logical_id: str, turned: Mapping[str, Receipt | RegistryError], as_of: datetime) -> TurnedAnswer:
    """An operator's change as the API shows it."""
    results = [
        TurnedOut(instance_id=instance_id, status=outcome.status.value, durable=outcome.durable, why=outcome.why)
        if isinstance(outcome, Receipt)
        else TurnedOut(instance_id=instance_id, status=None, durable=False, why=str(outcome))
        for instance_id, outcome in turned.items()
    ]
    is_complete = all(isinstance(outcome, Receipt) for outcome in turned.values())
    return TurnedAnswer(
        logical_id=logical_id,
        results=results,
        source=Origin.REGISTRY.value,
        as_of=as_of,
        version=0,
        complete=is_complete,
    )


def agent_answer(described: Description) -> AgentAnswer:
    """An agent as the API shows it."""
    return AgentAnswer(
        logical_id=described.logical_id,
        live=[
            LiveOut(
                instance=instance_out(observed.instance),
                verdict=observed.verdict.value,
                silence_s=round(observed.silence_s, 3),
            )
            for observed in described.live
        ],
        history=[instance_out(instance) for instance in described.history],
        transitions=transitions_out(described.steps),
        **stamp_of(described),
    )
