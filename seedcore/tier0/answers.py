"""What the manager answers. Each says where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeVar

from seedcore.core.answers import Origin
from seedcore.core.instances import Instance
from seedcore.core.limits import Json
from seedcore.registry.protocol.messages import Health
from seedcore.registry.ray_support.lookup import ActorHandle
from seedcore.settings import Mode

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Located:
    """A proven handle and who named it. `instance` is None where only Ray's listing knows the actor."""

    logical_id: str
    handle: ActorHandle
    source: Origin
    as_of: datetime
    instance: Instance | None


@dataclass(frozen=True, slots=True)
class KnownAgent:
    """An agent the manager knows of."""

    logical_id: str
    actor_name: str
    source: Origin
    instance: Instance | None


@dataclass(frozen=True, slots=True)
class Fleet:
    """Agents known after a discovery. `complete` False: a source was away, there may be more."""

    agents: tuple[KnownAgent, ...]
    source: Origin
    as_of: datetime
    version: int
    complete: bool
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AgentSpec:
    """An agent to create. `agent_class` None means RayAgent; `arguments` go to its constructor by keyword.

    `epoch` is one that it insists on, and part of its actor's name then; one that insists on none belongs to
    `started_epoch`, where that is given, and else to the epoch that is current when it first registers.
    """

    agent_id: str
    organ_id: str | None = None
    agent_class: type[Any] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Json] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    num_cpus: float = 0
    resources: Mapping[str, float] = field(default_factory=dict)
    max_restarts: int = -1
    is_detached: bool = True
    epoch: str | None = None
    started_epoch: str | None = None

    @property
    def actor_name(self) -> str:
        """Blue and green of one logical id live side by side, and Ray's names are unique."""
        return self.agent_id if self.epoch is None else f"{self.agent_id}@{self.epoch}"


@dataclass(frozen=True, slots=True)
class Gathered(Generic[T]):
    """Results by logical id, and for every agent that gave none the reason."""

    results: Mapping[str, T]
    failures: Mapping[str, str]
    source: Origin
    as_of: datetime


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a prune found: dead agents were dropped, silent ones kept."""

    dropped: tuple[str, ...]
    silent: tuple[str, ...]
    kept: int


@dataclass(frozen=True, slots=True)
class SystemSummary:
    """The manager's view of fleet and registry. `healed` counts agents that it knew and a source knew better."""

    mode: Mode
    namespace: str
    as_of: datetime
    known_agents: int
    agents_by_source: Mapping[str, int]
    registry: Health | None
    registry_problem: str | None
    last_discovery_at: datetime | None
    healed: int
