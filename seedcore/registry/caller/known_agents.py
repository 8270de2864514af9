"""The agents that a manager knows: a bounded memory, refreshed from the registry and from Ray's listing.

It asks no source itself. An entry that a source corrects is healed, and counted. The memory belongs to one Ray cluster:
in another cluster it starts empty.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime

from seedcore.core.answers import Listing, Origin, Resolution
from seedcore.core.errors import SessionError
from seedcore.core.instances import Instance
from seedcore.core.lifecycle import Status
from seedcore.registry.ray_support import session


@dataclass(frozen=True, slots=True)
class KnownAgent:
    """An agent that the manager knows. `instance` is None if only its actor is known."""

    logical_id: str
    actor_name: str
    source: Origin
    instance: Instance | None

    @classmethod
    def registered(cls, instance: Instance) -> KnownAgent:
        """An agent as the registry knows it."""
        return cls(instance.logical_id, instance.actor_name or instance.logical_id, Origin.REGISTRY, instance)


@dataclass(slots=True)
class _Memory:
    capacity: int
    agents: dict[str, KnownAgent] = field(default_factory=dict)
    version: int = 0
    discovered_at: datetime | None = None
    healed: int = 0


class KnownAgents:
    """At most `capacity` agents by logical id, or as many as the registry lists. When it is full, a new agent replaces
    the one that has been known longest."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._last = _Memory(capacity)
        self._session: session.Session | None = None
        self._cluster: str | None = None

    def __len__(self) -> int:
        return len(self._memory.agents)

    @property
    def version(self) -> int:
        """The version of the registry's last listing."""
        return self._memory.version

    @property
    def discovered_at(self) -> datetime | None:
        """The time of the registry's last listing."""
        return self._memory.discovered_at

    @property
    def healed(self) -> int:
        """The number of entries that a source has corrected."""
        return self._memory.healed

    def get(self, logical_id: str) -> KnownAgent | None:
        """The agent, if it is known."""
        return self._memory.agents.get(logical_id)

    def agents(self) -> tuple[KnownAgent, ...]:
        """All known agents, by logical id."""
        # copied at once: another thread may add one meanwhile
        agents = self._memory.agents.copy()
        return tuple(agents[logical_id] for logical_id in sorted(agents))

    def remember(self, agent: KnownAgent) -> None:
        """Add an agent, or replace its entry."""
        memory = self._memory
        if agent.logical_id not in memory.agents and len(memory.agents) >= memory.capacity:
            memory.agents.pop(next(iter(memory.agents)))
        memory.agents[agent.logical_id] = agent

    def forget(self, logical_id: str) -> None:
        """Remove an agent."""
        self._memory.agents.pop(logical_id, None)

    def take(self, listing: Listing) -> None:
        """Add every live instance of a registry's listing, all pages. A complete listing also removes the agents that
        it does not contain."""
        memory = self._memory
        if listing.complete:
            seen = {row.logical_id for row in listing.items}
            self._drop(
                agent.logical_id
                for agent in self.agents()
                if agent.source is not Origin.RAY and agent.logical_id not in seen
            )
        # the registry decides how many agents there may be
        memory.capacity = max(memory.capacity, len(listing.items))
        # alive last: it replaces another instance of the same agent that is draining
        for row in sorted(listing.items, key=lambda row: row.status is Status.ALIVE):
            self.remember(KnownAgent.registered(row))
        memory.version = listing.version
        memory.discovered_at = listing.as_of

    def take_names(self, names: Collection[str], listing: Listing | None) -> None:
        """Ray's listing: add the agents that only Ray knows, remove those that Ray lists no more."""
        registered = {row.actor_name for row in listing.items} if listing is not None else set()
        registered |= {agent.actor_name for agent in self.agents()}
        self.drop_without_actor(names)
        for name in set(names) - registered:
            self.remember(KnownAgent(name, name, Origin.RAY, None))

    def drop_without_actor(self, names: Collection[str]) -> None:
        """Remove the agents that are known by their actor alone and have none of the `names` that Ray lists."""
        self._drop(
            agent.logical_id for agent in self.agents() if agent.source is Origin.RAY and agent.actor_name not in names
        )

    def compare(self, resolutions: Iterable[Resolution]) -> None:
        """Apply a registry's complete answer about known agents: a newer incarnation replaces the known one, and an
        agent that is not resolved is removed."""
        memory = self._memory
        for found in resolutions:
            known = memory.agents.get(found.logical_id)
            if known is None:
                continue
            if found.instance is not None:
                if known.instance is not None and known.instance.instance_id != found.instance.instance_id:
                    memory.healed += 1
                self.remember(KnownAgent.registered(found.instance))
            elif found.is_known or known.source is not Origin.RAY:
                self._drop([found.logical_id])

    @property
    def _memory(self) -> _Memory:
        """The memory of the cluster that this process is in, or was in last."""
        entered = session.current()
        if entered is not None and entered is not self._session:
            with suppress(SessionError):
                cluster = session.cluster_name()
                if self._cluster not in {None, cluster}:
                    self._last = _Memory(self._capacity)
                self._session, self._cluster = entered, cluster
        return self._last

    def _drop(self, logical_ids: Iterable[str]) -> None:
        memory = self._memory
        for logical_id in list(logical_ids):
            del memory.agents[logical_id]
            memory.healed += 1
