"""Holds: why an instance is not routable although it reports alive, and the status that follows from them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from seedcore.core.causes import Cause, CauseKind
from seedcore.core.lifecycle import Status
from seedcore.core.wire import wire


class HoldKind(StrEnum):
    """Who or what holds an instance. An instance has at most one hold of a kind."""

    OPERATOR = "operator"
    """An operator drains it."""
    READINESS = "readiness"
    """It reports that it is not ready."""
    PROCESS = "process"
    """A process that it depends on has ended."""
    NODE = "node"
    """Its node is being drained."""


AGENTS_KINDS = frozenset({HoldKind.READINESS, HoldKind.PROCESS})
"""The holds that an agent changes itself, under its own numbers. The registry may place one of kind `process`, too."""
_DRAINING = frozenset({HoldKind.OPERATOR, HoldKind.PROCESS, HoldKind.NODE})


@wire
@dataclass(frozen=True, slots=True)
class Hold:
    """One hold of an instance. The registry releases it at `expires_at`; None: it does not expire."""

    kind: HoldKind
    reason: str | None
    by: str | None
    since: datetime
    expires_at: datetime | None = None

    def is_same(self, other: Hold | None) -> bool:
        """Whether the other holds for the same reason until the same time, whenever it began."""
        return other is not None and (self.kind, self.reason, self.by, self.expires_at) == (
            other.kind,
            other.reason,
            other.by,
            other.expires_at,
        )

    @property
    def cause(self) -> Cause:
        """The cause of the status that the hold leads to."""
        return Cause(_CAUSES[self.kind], self.reason, self.by)


_CAUSES = {
    HoldKind.OPERATOR: CauseKind.OPERATOR,
    HoldKind.READINESS: CauseKind.AGENT,
    HoldKind.PROCESS: CauseKind.PROCESS_EXITED,
    HoldKind.NODE: CauseKind.OPERATOR,
}


def effective_status(reported: Status, kinds: Collection[HoldKind]) -> Status:
    """The status of an instance that reports `reported` and has holds of these kinds. Only `alive` is routable.

    effective_status in schema/ is the same function.
    """
    if reported is Status.DEAD:
        return Status.DEAD
    if reported is Status.DRAINING or not _DRAINING.isdisjoint(kinds):
        return Status.DRAINING
    if reported is Status.STARTING or HoldKind.READINESS in kinds:
        return Status.STARTING
    return Status.ALIVE
