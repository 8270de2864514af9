"""Whom a manager knows: a bounded memory, brought up to date from the registry and from Ray's listing.

Asks nobody itself. What it held and a source knows better is healed, and counted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime

from seedcore.core.answers import Listing, Origin, Resolution
from seedcore.core.instances import Instance
from seedcore.core.lifecycle import Status
from seedcore.tier0.answers import KnownAgent

_NO_VERSION = 0


class Snapshot:
    """At most `capacity` agents by logical id, or as many as the registry holds; the one known longest makes room for
    another."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._known: dict[str, KnownAgent] = {}
        self.version = _NO_VERSION
        self.discovered_at: datetime | None = None
        self.healed = 0

    def __len__(self) -> int:
        return len(self._known)

    def get(self, logical_id: str) -> KnownAgent | None:
        """The agent, if it is known."""
        return self._known.get(logical_id)

    def agents(self) -> tuple[KnownAgent, ...]:
        """Everybody, by logical id."""
        return tuple(self._known[logical_id] for logical_id in sorted(self._known))

    def remember(self, agent: KnownAgent) -> None:
        """Know an agent from now on, or know it better."""
        if agent.logical_id not in self._known and len(self._known) >= self._capacity:
            self._known.pop(next(iter(self._known)))
        self._known[agent.logical_id] = agent

    def forget(self, logical_id: str) -> None:
        """Know it no more."""
        self._known.pop(logical_id, None)

    def take(self, listing: Listing) -> None:
        """Every live instance as the registry lists them, all pages. A complete listing also says who is gone."""
        if listing.complete:
            seen = {row.logical_id for row in listing.items}
            self._drop(
                agent.logical_id
                for agent in self.agents()
                if agent.source is not Origin.RAY and agent.logical_id not in seen
            )
        # how many there may be is the registry's to say
        self._capacity = max(self._capacity, len(listing.items))
        # alive last: it wins over another instance of the same agent that drains
        for row in sorted(listing.items, key=lambda row: row.status is Status.ALIVE):
            self.remember(as_known(row))
        self.version = listing.version
        self.discovered_at = listing.as_of

    def take_names(self, names: Collection[str], listing: Listing | None) -> None:
        """Ray's listing: add whom only Ray knows, drop whom not even Ray knows any more."""
        spoken_for = {row.actor_name for row in listing.items} if listing is not None else set()
        spoken_for |= {agent.actor_name for agent in self._known.values()}
        self.drop_without_actor(names)
        for name in set(names) - spoken_for:
            self.remember(KnownAgent(name, name, Origin.RAY, None))

    def drop_without_actor(self, names: Collection[str]) -> None:
        """Drop those known by their actor alone that have none of the `names` that Ray lists."""
        self._drop(
            agent.logical_id for agent in self.agents() if agent.source is Origin.RAY and agent.actor_name not in names
        )

    def compare(self, resolutions: Iterable[Resolution]) -> None:
        """What a registry with a complete answer says of agents that we know: a newer incarnation replaces ours, and
        whom it hands out no more is dropped, so that nobody else does either."""
        for found in resolutions:
            held = self._known.get(found.logical_id)
            if held is None:
                continue
            if found.instance is not None:
                if held.instance is not None and held.instance.instance_id != found.instance.instance_id:
                    self.healed += 1
                self.remember(as_known(found.instance))
            elif found.is_known or held.source is not Origin.RAY:
                self._drop([found.logical_id])

    def _drop(self, logical_ids: Iterable[str]) -> None:
        for logical_id in list(logical_ids):
            del self._known[logical_id]
            self.healed += 1


def as_known(instance: Instance) -> KnownAgent:
    """An agent as the registry knows it."""
    return KnownAgent(instance.logical_id, instance.actor_name or instance.logical_id, Origin.REGISTRY, instance)
