"""Events of agents, as a watch has them: what changed, and the state after it.

Events that are applied in order give the state of the registry at the position of the last one: `instance` replaces the
instance with its id, None removes it, and the `instances` of a state or a gap replace all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from seedcore.core.causes import Cause
from seedcore.core.errors import ExplainedError
from seedcore.core.feed import FeedChange, Position
from seedcore.core.instances import Instance, Verdict
from seedcore.core.lifecycle import Status

READY_VERDICTS = frozenset({Verdict.FRESH, Verdict.LATE})
"""The verdicts with which an alive instance stays where callers are routed: one missed beat is no reason to leave."""


class EventKind(StrEnum):
    """The kinds of events."""

    STATE = "state"
    """All instances at the start of the watch, where it asked for them."""
    JOINED = "joined"
    """An instance has registered, or matches the filter now. It may not be ready yet."""
    CHANGED = "changed"
    """An instance has changed, and is ready."""
    NOT_READY = "not_ready"
    """An instance has changed, and is not ready: its status, its holds and its verdict are the reason."""
    DIED = "died"
    """An instance is dead, and neither the agent nor an operator decided it."""
    LEFT = "left"
    """An instance has ended by a decision of its agent or an operator, or does not match the filter any more."""
    GAP = "gap"
    """Earlier changes are not available: all instances as they are now."""


@dataclass(frozen=True, slots=True)
class AgentEvent:
    """One event. `position` is the position after it, where a later watch can go on (`since`), and `at` the time when
    this process read it.

    `instance` is the state of the instance after the change, None if it died or left; `cause` is then the cause, if
    there is one. `instances` are all that match, for the kinds state and gap, and `verdicts` those of them that are not
    fresh; `why` says what the gap comes from.
    """

    kind: EventKind
    position: str
    at: datetime
    logical_id: str | None = None
    instance_id: str | None = None
    instance: Instance | None = None
    verdict: Verdict = Verdict.FRESH
    cause: Cause | None = None
    instances: tuple[Instance, ...] = ()
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    why: str | None = None

    @property
    def is_ready(self) -> bool:
        """Whether callers are routed to the instance after the change."""
        return self.instance is not None and _is_ready(self.instance, self.verdict)

    @property
    def is_whole(self) -> bool:
        """Whether `instances` replaces everything that earlier events said."""
        return self.kind in {EventKind.STATE, EventKind.GAP}


def kind_of(change: FeedChange) -> EventKind:
    """The kind of event that a change is."""
    if change.instance is None:
        # a registry of an earlier version sends a cause, and no is_end
        if not change.is_end and change.cause is None:
            return EventKind.LEFT
        is_planned = change.cause is not None and change.cause.kind.is_planned
        return EventKind.LEFT if is_planned else EventKind.DIED
    if change.is_new:
        return EventKind.JOINED
    return EventKind.CHANGED if _is_ready(change.instance, change.verdict) else EventKind.NOT_READY


def event_of(change: FeedChange, stream: str, at: datetime) -> AgentEvent:
    """A change of a stream as an event."""
    instance = change.instance
    return AgentEvent(
        kind_of(change),
        str(Position(stream, change.version)),
        at,
        change.logical_id,
        change.instance_id,
        instance,
        change.verdict,
        change.cause if instance is None else instance.cause,
    )


def _is_ready(instance: Instance, verdict: Verdict) -> bool:
    return instance.status is Status.ALIVE and verdict in READY_VERDICTS


class WatchEndedError(ExplainedError):
    """A watch cannot be read any more. A new watch with `since` continues from its position."""

    _text = "the watch has ended: {why}"
