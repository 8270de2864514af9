"""The relay's copy of the live agents: it follows the registry once, and serves the processes of its node.

The copy is kept while a process asks for it. Its feed has the registry's stream and versions.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from seedcore.core.answers import InstanceFilter, Listing, Origin
from seedcore.core.clock import Clock
from seedcore.core.feed import Feed, FeedBatch
from seedcore.core.feed_question import FeedQuestion
from seedcore.core.limits import MAX_LISTED, check_kind
from seedcore.core.packing import pack
from seedcore.core.paging import check_limit, decode_cursor, encode_cursor
from seedcore.registry.following.follower import Follower
from seedcore.registry.following.nearby import FeedSource
from seedcore.registry.following.serving import FeedBounds, FeedServer
from seedcore.registry.following.times import FollowTimes

MAX_PROCESSES = 1000
_FEED_CAPACITY = 10_000
_KEPT_S = 60.0
_READY_S = 0.5
TIMES = FollowTimes(wait_s=1.0)
"""A process waits 2 s for an answer and trusts it for 4 s: what the relay knows must not be older than 1 s."""


class NodeCopy:
    """Use it from one event loop."""

    def __init__(
        self,
        registry: FeedSource,
        clock: Clock | None = None,
        times: FollowTimes = TIMES,
        ready_s: float = _READY_S,
        kept_s: float = _KEPT_S,
    ) -> None:
        """A question waits at most `ready_s` seconds for a copy that is loaded first, or again. A copy is kept for
        `kept_s` seconds after the last question."""
        self._registry = registry
        self._clock = clock if clock is not None else Clock()
        self._times = times
        self._ready_s = ready_s
        self._kept_s = kept_s
        self._asked_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._follower, self._server = self._made()

    def _made(self) -> tuple[Follower, FeedServer]:
        feed = Feed("", _FEED_CAPACITY, compacts=True)
        follower = Follower(self._registry, feed=feed, times=self._times, clock=self._clock, is_relay=True)
        return follower, FeedServer(feed, FeedBounds(MAX_PROCESSES), self._loads_after, self._clock)

    def _loads_after(self, number: int, wanted: InstanceFilter) -> tuple[dict[str, float] | None, int]:
        return self._follower.view.loads_after(number, wanted)

    @property
    def is_kept(self) -> bool:
        """Whether the registry is followed now."""
        return self._follower.loop is not None

    @property
    def instances(self) -> int:
        """How many instances the copy has."""
        return len(self._follower.view)

    async def changes(self, question: FeedQuestion) -> FeedBatch:
        """The answer, which says how old the copy is. It is not complete where the copy is not trusted, or has not
        arrived at the question's version yet: then the registry itself has to be asked."""
        if check_kind("question", question, FeedQuestion).validated().loads_after is not None:
            self._follower.want_loads()
        is_ready, feed = await self._is_ready(), self._server.feed
        if not is_ready or (question.stream == feed.stream and question.version > feed.version):
            version = question.version
            return FeedBatch(feed.stream, version, version, feed.epoch, (), complete=False)
        batch = await self._server.changes(question)
        return replace(batch, complete=self._follower.is_current, age_s=self._follower.age_s)

    async def page(self, wanted: InstanceFilter, limit: int = 100, cursor: str | None = None) -> Listing:
        """See RegistryApi.page; packed. Not complete where the copy cannot answer."""
        after = decode_cursor(cursor)
        check_kind("wanted", wanted, InstanceFilter).validated()
        is_ready, view = await self._is_ready(), self._follower.view
        is_known = is_ready and view.knows(wanted)
        rows, has_more = view.page(wanted, after, check_limit(limit, MAX_LISTED)) if is_known else ([], False)
        return Listing(
            items=(),
            source=Origin.SNAPSHOT,
            as_of=view.as_of if view.as_of is not None else self._clock.utc(),
            version=view.version,
            complete=is_known,
            next_cursor=encode_cursor(rows[-1]) if has_more else None,
            stream=view.stream,
            verdicts=view.verdicts_of(rows),
            packed=pack(rows),
        )

    async def close(self) -> None:
        """Follow no longer."""
        if self._timer is not None:
            self._timer.cancel()
        await self._follower.stop()

    def _stop_if_idle(self) -> None:
        self._timer = None
        left_s = self._asked_s + self._kept_s - self._clock.monotonic()
        if left_s > 0:
            self._timer = asyncio.get_running_loop().call_later(left_s, self._stop_if_idle)
        else:
            self._stopping = asyncio.create_task(self._follower.stop(), name="copy-dropped")
            # the memory of the copy is free
            self._follower, self._server = self._made()

    async def _is_ready(self) -> bool:
        self._asked_s = self._clock.monotonic()
        self._follower.start()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._kept_s, self._stop_if_idle)
        return await self._follower.until_current(self._ready_s)
