"""How a cache that does not keep all agents learns single ones: by a listing of the agent and the changes after it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from seedcore.core.answers import InstanceFilter
from seedcore.core.errors import RegistryError
from seedcore.core.limits import MAX_LISTED
from seedcore.core.timeouts import end, within
from seedcore.core.view import LiveView
from seedcore.registry.following.nearby import FeedSource

logger = logging.getLogger(__name__)

_AT_ONCE = 100
_LISTED_S = 1.0


class Learner:
    """Use it on the event loop that changes the cache."""

    def __init__(
        self,
        source: FeedSource,
        wanted: InstanceFilter,
        most: int,
        on_forgotten: Callable[[str], None] | None,
        was_used: Callable[[str], bool] | None,
    ) -> None:
        """Keeps at most `most` agents, those that were used last. `on_forgotten` is called with each other one;
        `was_used` says whether an agent was used since it was asked last."""
        self._source = source
        self._wanted = wanted
        self._most = most
        self._on_forgotten = on_forgotten if on_forgotten is not None else lambda _: None
        self._was_used = was_used if was_used is not None else lambda _: False
        self._under_way: dict[str, asyncio.Task[bool]] = {}

    def begin(self) -> None:
        """The running event loop changes the cache from now on. The questions of an earlier one have no answer."""
        self._under_way = {}

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
            under_way = self._under_way
            asked = under_way[logical_id] = asyncio.create_task(self._listed(view, logical_id), name="agent-learned")
            asked.add_done_callback(lambda _: under_way.pop(logical_id, None))
        # who stops to wait ends no question of others, and an end of the question is no end of who waits
        await asyncio.wait({asked})
        return not asked.cancelled() and asked.result()

    async def close(self) -> None:
        """End every question."""
        await end(*self._under_way.values())

    async def _listed(self, view: LiveView, logical_id: str) -> bool:
        loaded, version = view.loaded, view.version
        view.expect(logical_id)
        try:
            wanted = replace(self._wanted, logical_id=logical_id)
            listed = (await within(self._source.page(wanted, MAX_LISTED, packed=True), _LISTED_S)).unpacked()
            # a load has forgotten what was expected
            is_same = (view.loaded, view.stream) == (loaded, listed.stream)
            is_whole = listed.complete and listed.next_cursor is None and listed.version >= version
            # the next answer is a reset
            is_of_epoch = all(row.cluster_epoch == view.epoch for row in listed.items)
            if not (is_same and is_whole and is_of_epoch):
                return False
            view.learn(logical_id, listed)
        except (RegistryError, TimeoutError):
            return False
        except Exception:
            logger.exception("an agent is not learned")
            return False
        finally:
            view.expect_no_more(logical_id)
        for forgotten in view.forget_beyond(self._most, self._was_used):
            self._on_forgotten(forgotten)
        return True
