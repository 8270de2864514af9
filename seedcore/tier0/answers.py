"""The values that the manager takes and returns. An answer names its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeVar

from seedcore.core.answers import Origin
from seedcore.core.limits import Json
from seedcore.registry.caller.known_agents import KnownAgent
from seedcore.registry.protocol.messages import Health
from seedcore.settings import Mode

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fleet:
    """The known agents after a discovery. `complete` False: a source did not answer, so there may be more."""

    agents: tuple[KnownAgent, ...]
    source: Origin
    as_of: datetime
    version: int
    complete: bool
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AgentSpec:
    """An agent to create. `agent_class` None means RayAgent; `arguments` go to its constructor by keyword.

    With `epoch` the agent registers in that epoch only, and the epoch is part of its actor's name. Without it, the
    agent belongs to `started_epoch` if that is given, else to the epoch that is current at its first registration.
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
        """Actors of two epochs with one logical id run side by side, and Ray's names are unique."""
        return self.agent_id if self.epoch is None else f"{self.agent_id}@{self.epoch}"


@dataclass(frozen=True, slots=True)
class Gathered(Generic[T]):
    """Results by logical id, and the failure of every agent without a result."""

    results: Mapping[str, T]
    failures: Mapping[str, str]
    source: Origin
    as_of: datetime


@dataclass(frozen=True, slots=True)
class Pruned:
    """The result of a prune: dead agents were dropped, silent ones kept."""

    dropped: tuple[str, ...]
    silent: tuple[str, ...]
    kept: int


@dataclass(frozen=True, slots=True)
class SystemSummary:
    """The manager's view of fleet and registry. `healed` counts the known agents that a source has corrected."""

    mode: Mode
    namespace: str
    as_of: datetime
    known_agents: int
    agents_by_source: Mapping[str, int]
    registry: Health | None
    registry_problem: str | None
    last_discovery_at: datetime | None
    healed: int
