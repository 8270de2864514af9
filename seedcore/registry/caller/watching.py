"""A watch: the changes of agents as events, in order, from the follower's copy of the registry's feed.

A watch keeps a position and nothing else. It reads the feed on the event loop that follows, and is subscribed only
while it waits for a change. A consumer that is slower than the feed finds its position forgotten: the registry's own
feed, which reaches back further, is asked once, and if that does not know it either, the next event is a gap.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from seedcore.core.answers import InstanceFilter
from seedcore.core.clock import Clock
from seedcore.core.errors import CannotKnowError, InvalidInputError, RegistryError
from seedcore.core.events import AgentEvent, EventKind, WatchEndedError, event_of
from seedcore.core.feed import START, Feed, FeedBatch, Position
from seedcore.core.feed_question import FeedQuestion
from seedcore.core.limits import MAX_PAGE, check_key
from seedcore.core.paging import decode_cursor
from seedcore.core.selector import parse_selector
from seedcore.core.timeouts import abandon, on_loop, within
from seedcore.registry.following.follower import Follower
from seedcore.registry.protocol.connection import RegistryConnection

FEED_CAPACITY = 10_000


@dataclass(frozen=True, slots=True)
class WatchTimes:
    """The times of a watch, in seconds. The registry must answer within `start_s` once; each wait for a change ends
    after `tick_s`, and a registry that refuses a question is asked again after `retry_s`."""

    start_s: float = 15.0
    tick_s: float = 2.0
    retry_s: float = 0.1


@dataclass(frozen=True, slots=True)
class Watched:
    """The agents of a watch: those with these ids (None: any) that the filter matches."""

    wanted: InstanceFilter
    ids: frozenset[str] | None = None

    def has(self, logical_id: str) -> bool:
        """Whether the agent is one of them, the filter apart."""
        return self.ids is None or logical_id in self.ids


def check_ids(ids: Sequence[str]) -> tuple[str, ...]:
    """A list of 1 to MAX_PAGE different logical ids, or InvalidInputError."""
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise InvalidInputError("ids", f"must be a list of logical ids, not {type(ids).__name__}")
    if not 1 <= len(ids) <= MAX_PAGE:
        raise InvalidInputError("ids", f"must be 1 to {MAX_PAGE} ids, not {len(ids)}")
    checked = tuple(check_key("ids", logical_id) for logical_id in ids)
    if len(set(checked)) < len(checked):
        twice = next(logical_id for logical_id in checked if checked.count(logical_id) > 1)
        raise InvalidInputError("ids", f"name each agent once, not {twice!r} again")
    return checked


def check_filter(
    ids: Sequence[str] | None, organ_id: str | None, selector: str | None, endpoint: str | None = None
) -> InstanceFilter:
    """Every live instance of the organ that the selector matches and that has this endpoint, or InvalidInputError: also
    where ids are given with one of them."""
    if ids is not None and (organ_id is not None or selector is not None or endpoint is not None):
        raise InvalidInputError("ids", "give ids, or organ_id, selector and endpoint, not both")
    requirements = parse_selector(selector) if selector is not None else ()
    return InstanceFilter(
        statuses=None, organ_id=organ_id, selector=requirements, fresh_only=False, endpoint=endpoint
    ).validated()


def watched(
    ids: Sequence[str] | None, organ_id: str | None, selector: str | None, endpoint: str | None = None
) -> Watched:
    """The agents of a watch; all agents if nothing is given. Raises InvalidInputError."""
    wanted = check_filter(ids, organ_id, selector, endpoint)
    if ids is None:
        return Watched(wanted)
    checked = check_ids(ids)
    if len(checked) == 1:
        return Watched(InstanceFilter(statuses=None, logical_id=checked[0], fresh_only=False))
    return Watched(wanted, frozenset(checked))


class Watch:
    """An asynchronous iterator of events, and an asynchronous context manager that closes it.

    The first event follows what happens after the first `anext`, or after `async with` was entered; `since` the
    position of an earlier event also brings what has happened in between. It is read in one event loop, that of its
    first reading.
    """

    def __init__(
        self,
        follower: Follower,
        connection: RegistryConnection,
        of: Watched,
        since: str | None = None,
        *,
        capacity: int = FEED_CAPACITY,
        times: WatchTimes | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`capacity` is the number of changes of the whole fleet that are kept for consumers that are behind. Raises
        InvalidInputError for a `since` that is neither "start" nor a position."""
        self._follower = follower
        self._connection = connection
        self._of = of
        self._at = None if since is None or since == START else Position.parsed(since, "since")
        self._position = None if self._at is None else str(self._at)
        self._begins_with_state = since == START
        self._capacity = capacity
        self._times = times if times is not None else WatchTimes()
        self._clock = clock if clock is not None else Clock()
        self._pending: deque[AgentEvent] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reading: asyncio.Future[tuple[list[AgentEvent], Position]] | None = None
        self._has_begun = False
        self._is_closed = False

    @property
    def position(self) -> str | None:
        """The position after the last event that was read, or later where nothing has happened since; None before the
        first one."""
        return self._position

    @property
    def is_current(self) -> bool:
        """Whether the registry confirms now that there are no other changes than those that were read or are
        pending."""
        return self._follower.is_current

    async def __aenter__(self) -> Self:
        await self.begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> AgentEvent:
        """The next event. Raises StopAsyncIteration after `close`, CannotKnowError if no registry answers at the start,
        WatchEndedError in another event loop than the one of the first reading, or while another task reads."""
        while not self._pending:
            if self._is_closed:
                raise StopAsyncIteration
            try:
                await self._read_once()
            except WatchEndedError:
                if self._is_closed:
                    raise StopAsyncIteration from None
                raise
        event = self._pending.popleft()
        self._position = event.position
        return event

    async def begin(self) -> None:
        """Begin to watch, unless it has begun. Raises as `anext`."""
        if not self._has_begun:
            await self._read_once()

    async def close(self) -> None:
        """End the iteration. Idempotent."""
        self.end()

    def end(self) -> None:
        """As `close`, from any thread with an event loop."""
        self._is_closed = True
        self._pending.clear()
        reading, loop = self._reading, self._loop
        if reading is not None and loop is not None:
            on_loop(loop, reading.cancel)

    async def _read_once(self) -> None:
        """Read what there is, or wait for it for a while. A cancelled reading is repeated by the next one."""
        here = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = here
        if self._loop is not here:
            raise WatchEndedError("it belongs to another event loop: make a watch in this one, with since=its position")
        if self._reading is not None:
            raise WatchEndedError("another task reads it: make a watch for each task")
        reading = self._reading = asyncio.ensure_future(self._read_there())
        try:
            await asyncio.wait({reading})
        finally:
            self._reading = None
            if not reading.done():
                abandon(reading)
        if reading.cancelled():
            raise WatchEndedError("it was closed")
        events, self._at = reading.result()
        self._has_begun = True
        self._pending.extend(events)
        if not events:
            self._position = str(self._at)

    async def _read_there(self) -> tuple[list[AgentEvent], Position]:
        """As `_read`, on the event loop that follows."""
        self._follower.start()
        loop = self._follower.loop
        if loop is None or loop is asyncio.get_running_loop():
            return await self._read()
        bound_s = self._times.start_s + 2 * self._times.tick_s
        try:
            return await within(asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._read(), loop)), bound_s)
        except TimeoutError:
            # that loop has ended: the follower starts in this one
            if self._at is None:
                raise CannotKnowError("*", "the event loop that follows the registry has ended") from None
            return [], self._at

    async def _read(self) -> tuple[list[AgentEvent], Position]:
        """The events after the position, and the position after them; no events after `tick_s` without any."""
        follower, of, at = self._follower, self._of, self._at
        feed = follower.keep_feed(self._capacity)
        if not self._has_begun:
            if not await follower.until_current(self._times.start_s):
                why = follower.problem if follower.problem is not None else "the registry does not answer"
                raise CannotKnowError("*", f"its change feed was not read within {self._times.start_s:g} s: {why}")
            if at is None:
                at = Position(feed.stream, feed.version)
                return ([self._whole(EventKind.STATE)] if self._begins_with_state else []), at
        assert at is not None
        batch = feed.since(at.stream, at.version, of.wanted)
        if batch.is_reset:
            return await self._beyond_the_feed(feed, at)
        events = self._events_of(batch)
        if not events:
            await self._until_changed(feed)
        return events, Position(batch.stream, batch.version)

    async def _beyond_the_feed(self, feed: Feed, at: Position) -> tuple[list[AgentEvent], Position]:
        """The changes that this process does not remember, from the registry; else a gap."""
        if not await self._follower.until_current(self._times.tick_s):
            return [], at
        if at.stream == feed.stream:
            try:
                batch = await self._connection.changes(FeedQuestion(self._of.wanted, at.stream, at.version))
            except RegistryError:
                # it may be refused at once
                await asyncio.sleep(self._times.retry_s)
                return [], at
            if not batch.is_reset and batch.complete:
                after = Position(batch.stream, batch.version)
                if after == at:
                    # the copy has not read so far yet
                    await self._until_changed(feed)
                return self._events_of(batch), after
        if not self._follower.is_current:
            await asyncio.sleep(self._times.retry_s)
            return [], at
        view = self._follower.view
        gap = self._whole(EventKind.GAP, "earlier changes are no longer available: these are all instances now")
        return [gap], Position(view.stream or "", view.version)

    async def _until_changed(self, feed: Feed) -> None:
        changed = asyncio.Event()
        number = feed.follow(self._of.wanted, changed.set)
        try:
            await within(changed.wait(), self._times.tick_s)
        except TimeoutError:
            return
        finally:
            feed.unfollow(number)

    def _events_of(self, batch: FeedBatch) -> list[AgentEvent]:
        at = self._clock.utc()
        return [event_of(change, batch.stream, at) for change in batch.changes if self._of.has(change.logical_id)]

    def _whole(self, kind: EventKind, why: str | None = None) -> AgentEvent:
        """All instances at the position of the cache."""
        view = self._follower.view
        rows, _ = view.page(self._of.wanted, decode_cursor(None), len(view))
        rows = [row for row in rows if self._of.has(row.logical_id)]
        return AgentEvent(
            kind,
            str(Position(view.stream or "", view.version)),
            self._clock.utc(),
            instances=tuple(rows),
            verdicts=view.verdicts_of(rows),
            why=why,
        )
