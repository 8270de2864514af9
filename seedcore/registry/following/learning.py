"""How a cache that does not keep all agents learns single ones: by a listing of the agent and the changes after it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from seedcore.core.answers import InstanceFilter
from seedcore.core.errors import RegistryError
from seedcore.core.limits import MAX_PAGE
from seedcore.core.timeouts import end, within
from seedcore.core.view import LiveView
from seedcore.registry.following.nearby import FeedSource

_AT_ONCE = 100
_LISTED_S = 1.0


class Learner:
    """Use it on the event loop that changes the cache."""

    def __init__(
        self, source: FeedSource, wanted: InstanceFilter, most: int, on_forgotten: Callable[[str], None] | None
    ) -> None:
        """Keeps at most `most` agents, those that were used last. `on_forgotten` is called with each other one."""
        self._source = source
        self._wanted = wanted
        self._most = most
        self._on_forgotten = on_forgotten
        self._under_way: dict[str, asyncio.Task[bool]] = {}

    async def learn(self, view: LiveView, logical_id: str) -> bool:
        """Whether the cache has the agent, after it was listed if necessary. Callers that ask for the same agent share
        one question."""
        if view.has(logical_id):
            view.note_use(logical_id)
            return True
        asked = self._under_way.get(logical_id)
        if asked is None:
            if len(self._under_way) >= _AT_ONCE:
                return False
            asked = asyncio.create_task(self._listed(view, logical_id), name="agent-learned")
            self._under_way[logical_id] = asked
            asked.add_done_callback(lambda _: self._under_way.pop(logical_id, None))
        return await asyncio.shield(asked)

    async def close(self) -> None:
        """End every question."""
        await end(*self._under_way.values())

    async def _listed(self, view: LiveView, logical_id: str) -> bool:
        begun = view.loaded, view.version
        view.expect(logical_id)
        try:
            listed = await within(self._source.page(replace(self._wanted, logical_id=logical_id), MAX_PAGE), _LISTED_S)
        except (RegistryError, TimeoutError):
            view.expect_no_more(logical_id)
            return False
        # a load has forgotten what was expected
        is_same = view.loaded == begun[0] and listed.stream == view.stream
        if not is_same or not listed.complete or listed.next_cursor is not None or listed.version < begun[1]:
            view.expect_no_more(logical_id)
            return False
        view.learn(logical_id, listed)
        for forgotten in view.forget_beyond(self._most):
            if self._on_forgotten is not None:
                self._on_forgotten(forgotten)
        return True
