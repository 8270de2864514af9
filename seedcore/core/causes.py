"""Why an instance has its status: a kind, which programs read, and words, which nothing parses."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from seedcore.core.wire import wire


class CauseKind(StrEnum):
    """The kinds of causes."""

    UNKNOWN = "unknown"
    AGENT = "agent"
    """The agent reported the status itself."""
    OPERATOR = "operator"
    """An operator drained, undrained or deregistered it."""
    DRAIN_ENDED = "drain_ended"
    """An operator's drain expired, or Ray drains the node no longer."""
    PROCESS_EXITED = "process_exited"
    PROCESS_KILLED = "process_killed"
    OUT_OF_MEMORY = "out_of_memory"
    START_FAILED = "start_failed"
    ACTOR_DIED = "actor_died"
    NODE_DIED = "node_died"
    LEASE_EXPIRED = "lease_expired"
    EPOCH_RETIRED = "epoch_retired"
    SUPERSEDED = "superseded"
    """It was silent while expiry was frozen, and a newer instance of the same actor sent beats."""
    RESTORED = "restored"
    """The registry wrote it again after the database was restored from a backup."""

    @property
    def is_planned(self) -> bool:
        """Whether the agent or an operator decided on it, so that it is no failure."""
        return self in _PLANNED


_PLANNED = frozenset(
    {
        CauseKind.AGENT,
        CauseKind.OPERATOR,
        CauseKind.DRAIN_ENDED,
        CauseKind.EPOCH_RETIRED,
        CauseKind.SUPERSEDED,
    }
)

# the end of a process was observed, and Ray explains it later; cause_may_become in schema/ is the same
_OBSERVED = frozenset({CauseKind.UNKNOWN, CauseKind.PROCESS_EXITED, CauseKind.PROCESS_KILLED, CauseKind.ACTOR_DIED})
_EXPLAINS = frozenset(
    {
        CauseKind.PROCESS_EXITED,
        CauseKind.PROCESS_KILLED,
        CauseKind.OUT_OF_MEMORY,
        CauseKind.START_FAILED,
        CauseKind.ACTOR_DIED,
        CauseKind.NODE_DIED,
    }
)


@wire
@dataclass(frozen=True, slots=True)
class Cause:
    """Why an instance has its status. `detail` is for people; `by` names the operator."""

    kind: CauseKind
    detail: str | None = None
    by: str | None = None

    def __str__(self) -> str:
        kind = self.kind.value.replace("_", " ")
        by = "" if self.by is None else f" ({self.by})"
        return f"{kind}{by}" if self.detail is None else f"{kind}{by}: {self.detail}"


def may_become(known: CauseKind, better: CauseKind) -> bool:
    """Whether the kind of a death's cause may be refined to another."""
    return known in _OBSERVED and better in _EXPLAINS


def is_refined_by(known: Cause | None, better: Cause) -> bool:
    """Whether `better` may replace the known cause of a death. A cause may replace itself; a decision of the agent, an
    operator or the registry is never replaced."""
    if known is None or known.by is not None:
        return False
    return known == better or may_become(known.kind, better.kind)
