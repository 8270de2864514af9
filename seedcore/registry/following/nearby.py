"""Where a follower asks: the registry, or, where that has many followers, the relay of its node.

The relay follows for all processes of its node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from seedcore.core.answers import InstanceFilter, Listing
from seedcore.core.feed import FeedBatch
from seedcore.registry.following.serving import FeedQuestion
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.ray_support.session import own_node_id


class FeedSource(Protocol):
    """What a follower asks: see RegistryApi."""

    async def changes(
        self,
        wanted: InstanceFilter,
        stream: str | None,
        version: int,
        wait_s: float = 0.0,
        follower: str | None = None,
        loads_after: int | None = None,
        may_compact: bool = False,
    ) -> FeedBatch:
        """The changes after `version`."""
        ...

    async def page(
        self, wanted: InstanceFilter, limit: int = 100, cursor: str | None = None, packed: bool = False
    ) -> Listing:
        """A page of the instances."""
        ...


class Nearby:
    """Implements FeedSource. The registry names the relay in its answers. One that is silent, that has no copy that it
    trusts, or whose copy is older than the follower's, is passed over, and the registry asked."""

    def __init__(self, connection: RegistryConnection, node_id: Callable[[], str | None] = own_node_id) -> None:
        """`node_id` is the node of this process."""
        self._connection = connection
        self._node_id = node_id
        self.uses_relay = False

    async def changes(
        self,
        wanted: InstanceFilter,
        stream: str | None,
        version: int,
        wait_s: float = 0.0,
        follower: str | None = None,
        loads_after: int | None = None,
        may_compact: bool = False,
    ) -> FeedBatch:
        """See RegistryApi.changes. Loads come from the registry only."""
        copied: FeedBatch | None = None
        if self.uses_relay and loads_after is None:
            question = FeedQuestion(wanted, stream, version, wait_s, follower, may_compact)
            copied = await self._connection.ask_relay("changes", question, waits_s=wait_s)
            # a relay that is new does not reach back to where its processes are, and the registry may
            if copied is not None and copied.complete and not (copied.is_reset and copied.stream == stream):
                return copied
        batch = await self._connection.changes(
            wanted, stream, version, wait_s, follower, loads_after, may_compact, self._node_id()
        )
        self.uses_relay = batch.relay is not None
        if batch.relay is not None:
            await self._connection.use_relay(batch.relay)
        # not complete: it has no place for another follower
        return copied if copied is not None and copied.complete and not batch.complete else batch

    async def page(
        self, wanted: InstanceFilter, limit: int = 100, cursor: str | None = None, packed: bool = False
    ) -> Listing:
        """See RegistryApi.page."""
        if self.uses_relay:
            copied: Listing | None = await self._connection.ask_relay("page", wanted, limit, cursor)
            if copied is not None and copied.complete:
                return copied if packed else copied.unpacked()
        return await self._connection.page(wanted, limit, cursor, packed)
