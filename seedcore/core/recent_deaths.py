"""The instances that died recently: their causes, the epochs that ended with them, and the last death of each agent.

Owns a bounded memory: the oldest entry makes room for the newest. The database has all deaths.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from seedcore.core.causes import Cause, is_refined_by
from seedcore.core.instances import Instance
from seedcore.core.verdict import Death

K = TypeVar("K")
V = TypeVar("V")

MAX_RECENT_DEATHS = 10_000


@dataclass(frozen=True, slots=True)
class RecentDeath:
    """A death that is remembered. `death` is the result of the truth table; None where the registry did not decide it:
    the agent, an operator or the database did."""

    cause: Cause | None = None
    death: Death | None = None


class RecentDeaths:
    """Remembers at most `capacity` deaths, and as many retired instances and actors. Use it from one event loop."""

    def __init__(self, capacity: int = MAX_RECENT_DEATHS) -> None:
        self._capacity = capacity
        self._deaths: OrderedDict[str, RecentDeath] = OrderedDict()
        self._last_of: OrderedDict[str, str] = OrderedDict()
        self._retired: OrderedDict[str, str] = OrderedDict()
        self._retired_actors: OrderedDict[tuple[str, str], str] = OrderedDict()

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self._deaths

    def get(self, instance_id: str) -> RecentDeath | None:
        """The death of this instance, if it is remembered."""
        return self._deaths.get(instance_id)

    def cause_of(self, instance_id: str) -> Cause | None:
        """The cause of the death of this instance, if it is remembered and has one."""
        known = self._deaths.get(instance_id)
        return None if known is None else known.cause

    def last_of(self, logical_id: str) -> RecentDeath | None:
        """The last death among the instances of an agent. Without a cause where only the fact is remembered."""
        instance_id = self._last_of.get(logical_id)
        return None if instance_id is None else self._deaths.get(instance_id, RecentDeath())

    def note(self, instance: Instance) -> None:
        """Record the death of an instance."""
        self._put(self._deaths, instance.instance_id, RecentDeath(instance.cause))
        self._put(self._last_of, instance.logical_id, instance.instance_id)

    def note_verdict(self, instance_id: str, death: Death) -> None:
        """Record what the truth table returned for an instance that is dead."""
        known = self._deaths.get(instance_id)
        if known is not None:
            self._deaths[instance_id] = replace(known, death=death)

    def refine(self, instance_id: str, cause: Cause) -> None:
        """Replace the cause of a death by a better known one (see core.causes.is_refined_by)."""
        known = self._deaths.get(instance_id)
        if known is not None and is_refined_by(known.cause, cause):
            self._deaths[instance_id] = replace(known, cause=cause)

    # Epochs

    def note_retired(self, instance: Instance) -> None:
        """Record that an instance ended with its epoch: neither it nor its actor registers again in another epoch."""
        self._put(self._retired, instance.instance_id, instance.cluster_epoch)
        if instance.actor_id is not None:
            self._put(self._retired_actors, (instance.logical_id, instance.actor_id), instance.cluster_epoch)

    def retired_epoch_of(self, instance_id: str) -> str | None:
        """The epoch with which this instance ended."""
        return self._retired.get(instance_id)

    def retired_epoch_of_actor(self, logical_id: str, actor_id: str) -> str | None:
        """The epoch with which an instance of this actor ended."""
        return self._retired_actors.get((logical_id, actor_id))

    def defer_to(self, living: Iterable[str]) -> None:
        """Another registry has written since: the database decides who is `living` and who ended with an epoch. Any
        other death is final, and stays known: the database may lose it later."""
        for instance_id in (*self._retired, *living):
            self._deaths.pop(instance_id, None)
        self._retired.clear()
        self._retired_actors.clear()

    def _put(self, entries: OrderedDict[K, V], key: K, value: V) -> None:
        entries[key] = value
        entries.move_to_end(key)
        while len(entries) > self._capacity:
            entries.popitem(last=False)
