"""Why an agent is not ready: a kind, which programs read, and words, which nothing parses; and the error of a wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from seedcore.core.causes import Cause
from seedcore.core.errors import RegistryError
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


class NotReadyError(RegistryError):
    """At the deadline of a wait fewer agents were ready than wanted.

    `missing` has each agent that is not ready and the reason; `others` counts the agents beyond its bound. `about`
    describes the agents that were waited for.
    """

    _NAMED = 20

    def __init__(
        self, waited_s: float, ready: int, wanted: int, about: str, missing: Sequence[MissingAgent], others: int
    ) -> None:
        super().__init__(waited_s, ready, wanted, about, missing, others)
        self.waited_s = waited_s
        self.ready = ready
        self.wanted = wanted
        self.about = about
        self.missing = missing
        self.others = others

    def __str__(self) -> str:
        named = [str(one) for one in self.missing[: self._NAMED]]
        more = len(self.missing) - len(named) + self.others
        reasons = "; ".join([*named, *([f"and {more} more"] if more else [])])
        return f"{self.ready} of {self.wanted} {self.about} ready after {self.waited_s:g} s: {reasons}"
