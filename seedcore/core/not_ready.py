"""Why an agent is not ready: a kind, which programs read, and words, which nothing parses."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from seedcore.core.causes import Cause
from seedcore.core.wire import wire


class NotReady(StrEnum):
    """The kinds of reasons why an agent is not ready."""

    NEVER_REGISTERED = "never_registered"
    STARTING = "starting"
    """It has registered, and has not reported alive yet."""
    NOT_READY = "not_ready"
    """It reports that it is not ready: a hold of kind readiness."""
    DRAINING = "draining"
    """An operator drains it, or it reports that it drains."""
    PROCESS = "process"
    """A process that it depends on has ended."""
    NODE = "node"
    """Its node is being drained."""
    LATE = "late"
    SUSPECT = "suspect"
    DEAD = "dead"
    OTHER_EPOCH = "other_epoch"
    NO_HANDLE = "no_handle"
    """It is registered without an actor that callers can use."""
    UNREACHABLE = "unreachable"
    """It appears ready, and its actor did not prove it in time."""
    UNKNOWN = "unknown"
    """No source that could know answers."""


@wire
@dataclass(frozen=True, slots=True)
class MissingAgent:
    """An agent that was waited for and is not ready. `logical_id` None: agents that no source knows. `since` is the
    time from which the reason holds, `cause` the cause of a death or of the status."""

    logical_id: str | None
    reason: NotReady
    detail: str
    since: datetime | None = None
    cause: Cause | None = None

    def __str__(self) -> str:
        return self.detail if self.logical_id is None else f"{self.logical_id!r} {self.detail}"
