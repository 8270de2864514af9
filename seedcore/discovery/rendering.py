"""From the registry's values to the shapes of `api`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from seedcore.core.answers import Answer, Listing, Origin, Resolution
from seedcore.core.causes import Cause
from seedcore.core.instances import Instance, Transition, Verdict
from seedcore.discovery.api import (
    AgentAnswer,
    CauseOut,
    InstanceOut,
    InstancePage,
    LiveOut,
    OperationAnswer,
    OperationOut,
    ResolutionOut,
    ResolveAnswer,
    SourcesOut,
    TransitionOut,
)
from seedcore.discovery.reader import SourceStates
from seedcore.registry.caller.sources import NameListing
from seedcore.registry.protocol.messages import Description, OperationResult


def sources_out(states: SourceStates) -> SourcesOut:
    """Which sources answer."""
    return SourcesOut(registry=states.registry or "ok", postgres=states.postgres or "ok", ray=states.ray or "ok")


def cause_out(cause: Cause | None) -> CauseOut | None:
    """A cause."""
    return None if cause is None else CauseOut.model_validate(cause)


def stamp_of(answer: Answer[Any] | Listing | NameListing | Description) -> dict[str, Any]:
    """The fields of a Stamp."""
    return {
        "source": answer.source.value,
        "as_of": answer.as_of,
        "version": answer.version,
        "complete": answer.complete,
    }


def instance_out(instance: Instance) -> InstanceOut:
    """One instance."""
    return InstanceOut.model_validate(instance)


def copied_out(instance: Instance, verdict: Verdict) -> InstanceOut:
    """One instance of the local copy, which has verdicts and no times of beats."""
    shown = instance_out(instance)
    shown.verdict = verdict.value
    shown.last_heartbeat = None
    return shown


def listed_out(instance: Instance, listing: Listing) -> InstanceOut:
    """One instance of a page."""
    verdict = listing.verdicts.get(instance.instance_id, Verdict.FRESH)
    if listing.source is Origin.SNAPSHOT:
        return copied_out(instance, verdict)
    shown = instance_out(instance)
    if listing.source is not Origin.POSTGRES:
        shown.verdict = verdict.value
    return shown


def page_of(listing: Listing | NameListing) -> InstancePage:
    """A page."""
    if isinstance(listing, NameListing):
        items = [InstanceOut(logical_id=name, actor_name=name) for name in listing.names]
    else:
        items = [listed_out(instance, listing) for instance in listing.items]
    stream = listing.stream if isinstance(listing, Listing) else None
    return InstancePage(items=items, next_cursor=listing.next_cursor, stream=stream, **stamp_of(listing))


def resolution_out(found: Resolution, source: Origin) -> ResolutionOut:
    """One resolution by a source."""
    shown = None
    if found.instance is not None and source is Origin.SNAPSHOT:
        shown = copied_out(found.instance, found.verdict)
    elif found.instance is not None:
        shown = instance_out(found.instance)
        shown.verdict = None if found.verdict is Verdict.UNKNOWN else found.verdict.value
    return ResolutionOut(logical_id=found.logical_id, instance=shown, reason=found.reason, detail=found.detail)


def resolve_by_name(logical_ids: Sequence[str], listing: NameListing) -> ResolveAnswer:
    """Resolutions from Ray's listing alone. It cannot know why an agent has no actor of its name."""
    results = [
        ResolutionOut(
            logical_id=logical_id,
            instance=InstanceOut(logical_id=logical_id, actor_name=logical_id) if logical_id in listing.names else None,
            reason=None,
            detail=None if logical_id in listing.names else "Ray's listing has no actor of that name",
        )
        for logical_id in logical_ids
    ]
    return ResolveAnswer(results=results, **stamp_of(listing))


def transitions_out(transitions: Sequence[Transition]) -> list[TransitionOut]:
    """Transitions."""
    return [TransitionOut.model_validate(transition) for transition in transitions]


def operation_answer(logical_id: str, results: Sequence[OperationResult], as_of: datetime) -> OperationAnswer:
    """An operator's change."""
    return OperationAnswer(
        logical_id=logical_id,
        results=[
            OperationOut(
                instance_id=result.instance_id or "",
                status=None if result.status is None else result.status.value,
                durable=result.durable,
                why=result.why if result.error is None else str(result.error),
            )
            for result in results
        ],
        source=Origin.REGISTRY.value,
        as_of=as_of,
        version=0,
        complete=all(result.error is None for result in results),
    )


def agent_answer(described: Description) -> AgentAnswer:
    """An agent."""
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
        instances=[instance_out(instance) for instance in described.instances],
        transitions=transitions_out(described.transitions),
        **stamp_of(described),
    )
