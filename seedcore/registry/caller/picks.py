"""Picks: one of an agent's instances by a policy, in memory while the followed cache is current.

Owns what a caller counts for its policies: its turns, and its own calls under way. Any thread may pick.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

from seedcore.core.answers import Origin
from seedcore.core.limits import check_choice
from seedcore.core.selection import Policy
from seedcore.registry.caller.handle_cache import HandleCache
from seedcore.registry.caller.locator import Locator
from seedcore.registry.caller.metrics import CallerMetrics
from seedcore.registry.caller.sources import Choice
from seedcore.registry.following.follower import Follower
from seedcore.registry.ray_support.lookup import ActorHandle

_MAX_TURNS = 10_000

Found: TypeAlias = tuple[ActorHandle, str | None]
"""A proven handle, and the instance that it is of, if that is known."""


class Outstanding:
    """The number of this caller's calls that each instance has under way. It has only instances with calls."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._counts: dict[str, int] = {}

    @property
    def counts(self) -> Mapping[str, int]:
        """The counts by instance id. Other threads change them: look single ids up, and do not iterate."""
        return self._counts

    @contextmanager
    def call(self, instance_id: str | None) -> Iterator[None]:
        """Count a call to an instance while it lasts. A call to an unknown instance (None) is not counted."""
        if instance_id is None:
            yield
            return
        self._add(instance_id, 1)
        try:
            yield
        finally:
            self._add(instance_id, -1)

    def _add(self, instance_id: str, count: int) -> None:
        with self._guard:
            now = self._counts.get(instance_id, 0) + count
            if now:
                self._counts[instance_id] = now
            else:
                del self._counts[instance_id]


class Picks:
    """Makes the choices of one caller. `own_node_id` is asked for SAME_NODE."""

    def __init__(
        self,
        follower: Follower | None,
        cache: HandleCache,
        locator: Locator,
        metrics: CallerMetrics,
        own_node_id: Callable[[], str | None],
    ) -> None:
        self._follower = follower
        self._cache = cache
        self._locator = locator
        self._own_node_id = own_node_id
        self._resolved = metrics.resolved
        self._turns: Counter[str] = Counter()
        self.outstanding = Outstanding()

    def choice(
        self,
        logical_id: str,
        policy: Policy,
        key: str = "",
        *,
        allow_late: bool = False,
    ) -> Choice:
        """How an instance of the agent is chosen now. Counts a turn of ROUND_ROBIN."""
        policy, turn = check_choice("policy", Policy, policy), 0
        if policy is Policy.ROUND_ROBIN:
            if len(self._turns) > _MAX_TURNS:
                self._turns.clear()
            self._turns[logical_id] += 1
            turn = self._turns[logical_id]
        node_id = self._own_node_id() if policy is Policy.SAME_NODE else None
        return Choice(allow_late, policy, key, node_id, turn, self.outstanding.counts)

    async def find(self, logical_id: str, policy: Policy, key: str = "", *, allow_late: bool = False) -> Found:
        """The handle of an instance of the agent, from memory or looked up. Raises as Locator.locate."""
        choice = self.choice(logical_id, policy, key, allow_late=allow_late)
        hit = self.hit(logical_id, choice)
        if hit is not None:
            return hit
        located = await self._locator.locate(logical_id, choice)
        return located.handle, None if located.instance is None else located.instance.instance_id

    def hit(self, logical_id: str, choice: Choice) -> Found | None:
        """The proven handle of a chosen instance, with its instance id. None: the cache is not current, or has no
        routable instance or no handle of the one that it chose; then look the agent up."""
        follower = self._follower
        if follower is None or not follower.is_current:
            return None
        if choice.policy is Policy.NEWEST:
            newest = self._locator.cached(logical_id)
            return None if newest is None else (newest, self._cache.instance_id_of(logical_id))
        view = follower.view
        loads = view.loads
        if choice.policy is Policy.LEAST_LOADED:
            follower.want_loads()
            if loads is None:
                return None
        chosen = choice.of(view.candidates(logical_id), {} if loads is None else loads)
        handle = None if chosen is None else self._cache.of_instance(chosen)
        if chosen is None or handle is None:
            return None
        self._resolved[Origin.SNAPSHOT.value] += 1
        return handle, chosen.instance_id
