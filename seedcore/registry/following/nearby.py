"""Where a follower asks: the registry, or, where that has many followers, the relay of its node.

The relay follows for all processes of its node.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from seedcore.core.answers import InstanceFilter, Listing
from seedcore.core.backoff import Backoff
from seedcore.core.clock import Clock
from seedcore.core.errors import RegistryError
from seedcore.core.feed import FeedBatch
from seedcore.core.feed_question import FeedQuestion
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.ray_support.session import own_node_id

_REST_S = 0.25
_REST_LONGEST_S = 2.0
"""Well below the time for which a copy is trusted: while a relay is not used, the registry answers so often."""


class FeedSource(Protocol):
    """What a follower asks: see RegistryApi."""

    async def changes(self, question: FeedQuestion) -> FeedBatch:
        """The changes after the question's version."""
        ...

    async def page(
        self, wanted: InstanceFilter, limit: int = 100, cursor: str | None = None, packed: bool = False
    ) -> Listing:
        """A page of the instances."""
        ...


class Nearby:
    """Implements FeedSource. The registry names the relay in its answers, instead of keeping a place for this process.
    One that is silent, that has no copy that it trusts, or whose copy is older than the follower's, is passed over for
    a while, and the registry asked."""

    def __init__(
        self,
        connection: RegistryConnection,
        node_id: Callable[[], str | None] = own_node_id,
        clock: Clock | None = None,
    ) -> None:
        """`node_id` is the node of this process."""
        self._connection = connection
        self._node_id = node_id
        self._clock = clock if clock is not None else Clock()
        self._rests = Backoff(_REST_S, _REST_LONGEST_S)
        self._rests_until_s = 0.0
        self._has_more = False
        self._lists_at_relay = False
        self.uses_relay = False

    async def changes(self, question: FeedQuestion) -> FeedBatch:
        """See RegistryApi.changes."""
        began_s = self._clock.monotonic()
        # what one server has more of, another one may have less of
        copied = await self._copied(question) if self.uses_relay and not self._has_more else None
        if copied is not None and not (copied.is_reset and question.stream is not None):
            self._lists_at_relay = copied.is_reset
            return copied
        # a relay that is new does not reach back to where its processes are, and the registry may
        wait_s = 0.0 if copied is not None else question.wait_s
        node_id = self._node_id() if self._connection.is_by_relay else None
        asked_s = self._clock.monotonic()
        batch = await self._connection.changes(replace(question, wait_s=wait_s, node_id=node_id))
        self._has_more = batch.has_more
        self.uses_relay = batch.relay is not None
        if batch.relay is not None:
            await self._connection.use_relay(batch.relay)
        # if that is not so, the relay has all of it
        self._lists_at_relay = copied is not None and batch.is_reset and batch.stream == copied.stream
        if copied is not None and self._lists_at_relay:
            return copied
        return replace(batch, waited_s=batch.waited_s + asked_s - began_s)

    async def page(
        self, wanted: InstanceFilter, limit: int = 100, cursor: str | None = None, packed: bool = False
    ) -> Listing:
        """See RegistryApi.page."""
        if self._lists_at_relay or (self.uses_relay and wanted.logical_id is not None):
            copied: Listing | None = await self._ask_relay("page", 0.0, wanted, limit, cursor)
            if copied is not None and copied.complete:
                return copied if packed else copied.unpacked()
        return await self._connection.page(wanted, limit, cursor, packed)

    async def _copied(self, question: FeedQuestion) -> FeedBatch | None:
        """The relay's answer, if it has one. Waits while the relay is passed over, so that the registry, which keeps no
        place for this process, is not asked all the time."""
        left_s = self._rests_until_s - self._clock.monotonic()
        slept_s = max(0.0, min(left_s, question.wait_s))
        if slept_s > 0:
            await asyncio.sleep(slept_s)
        if left_s > slept_s:
            return None
        wait_s = question.wait_s - slept_s
        batch: FeedBatch | None = await self._ask_relay("changes", wait_s, replace(question, wait_s=wait_s))
        if batch is None or not batch.complete:
            self._rests_until_s = self._clock.monotonic() + self._rests.next_s()
            return None
        self._rests.reset()
        return replace(batch, waited_s=slept_s + batch.waited_s)

    async def _ask_relay(self, method: str, waits_s: float, *args: object) -> Any:
        try:
            return await self._connection.ask_relay(method, *args, waits_s=waits_s)
        except RegistryError:
            # it has no place, or keeps no copy
            return None
