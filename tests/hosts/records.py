"""What a run observes, as values: calls, nodes, rows, instances that answered. They cross the caller's pipe as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from seedcore.core.causes import CauseKind
from seedcore.core.lifecycle import Status


@dataclass(frozen=True)
class Call:
    """One resolution, and the call of what it returned. `instance_id` is the instance that was resolved, where the way
    names one; `answered_by` the instance whose process answered. Times of the wall clock in seconds."""

    agent_id: str
    way: str
    began_at: float
    resolved_at: float | None = None
    source: str | None = None
    instance_id: str | None = None
    node_id: str | None = None
    answered_at: float | None = None
    answered_by: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Ended:
    """A call that was given to Ray, however long it takes. `work_s` is the time that its work takes."""

    agent_id: str
    began_at: float
    ended_at: float | None
    work_s: float
    problem: str | None


@dataclass(frozen=True)
class Node:
    """A change in Ray's node table, at the time that a caller saw it."""

    at: float
    node_id: str
    address: str
    is_alive: bool


@dataclass(frozen=True)
class Look:
    """What the registry and Ray have, and the instance whose process answers for each agent."""

    problem: str | None
    is_store_away: bool
    listed: dict[str, str]
    in_ray: list[str]
    answered_by: dict[str, str]
    alive_nodes: int


@dataclass(frozen=True)
class Row:
    """An instance as the database has it."""

    instance_id: str
    agent_id: str
    status: Status
    cause: CauseKind | None
    node_id: str | None
    process_key: str | None
    stopped_at: datetime | None

    @property
    def died_at(self) -> float | None:
        """When it was declared dead, by the wall clock in seconds."""
        return None if self.stopped_at is None else self.stopped_at.timestamp()
