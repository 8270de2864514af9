"""Answers those who follow a feed: at once where there are changes, else as soon as there is one.

Owns the places of those who wait: relays, which follow for the processes of their nodes, have their own.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace

from seedcore.core.answers import InstanceFilter
from seedcore.core.clock import Clock
from seedcore.core.errors import FollowersFullError
from seedcore.core.feed import Feed, FeedBatch
from seedcore.core.feed_question import FeedQuestion
from seedcore.core.places import Places
from seedcore.core.timeouts import within

LoadsAfter = Callable[[int, InstanceFilter], tuple[dict[str, float] | None, int]]
"""The loads of matching instances that have changed since a number (None: none were received), and the number after
them."""

_ANSWER_S = 0.001
"""What an answer costs: many followers are answered one after another, each more rarely, with more each time."""
_TURN_MAX_S = 0.5


@dataclass(frozen=True, slots=True)
class FeedBounds:
    """At most `followers` and `relays` have a place; each keeps it for `place_kept_s` seconds after an answer."""

    followers: int
    relays: int = 0
    place_kept_s: float = 10.0


class FeedServer:
    """Use it from one event loop."""

    def __init__(self, feed: Feed, bounds: FeedBounds, loads: LoadsAfter, clock: Clock) -> None:
        self.feed = feed
        self._places = Places(bounds.followers)
        self._relays = Places(bounds.relays)
        self._place_kept_s = bounds.place_kept_s
        self._loads = loads
        self._clock = clock
        self._next_turn_s = 0.0

    @property
    def followers(self) -> int:
        """How many places are taken, those of relays too."""
        now_s = self._clock.monotonic()
        return self._places.taken(now_s) + self._relays.taken(now_s)

    def is_among(self, follower: str | None, first: int) -> bool:
        """Whether fewer than so many others, which are no relays, have a place."""
        return self._places.is_among(follower, first, self._clock.monotonic())

    def leave(self, follower: str | None) -> None:
        """A follower follows another server from now on."""
        if follower is not None:
            self._places.release(follower)

    async def changes(self, question: FeedQuestion) -> FeedBatch:
        """The answer to a valid question, with the time that it waited. Raises FollowersFullError."""
        follower, wait_s = question.follower, question.wait_s
        places = self._relays if question.is_relay else self._places
        asked_s = self._clock.monotonic()
        # before it lists, or is answered: one that will be refused is no burden until then
        if follower is not None:
            self._claim(places, follower, wait_s + self._place_kept_s)
        batch = self._answer(question)
        if not batch.is_reset and not batch.changes and not batch.has_more and wait_s > 0:
            # one without a name has a place only while it waits
            passing = None if follower is not None else uuid.uuid4().hex
            if passing is not None:
                self._claim(places, passing, wait_s + _TURN_MAX_S)
            try:
                await self._until_news(question.wanted, wait_s)
            finally:
                if passing is not None:
                    places.release(passing)
            batch = self._answer(question)
        if question.loads_after is not None and not batch.is_reset:
            loads, number = self._loads(question.loads_after, question.wanted)
            batch = replace(batch, loads=loads, loads_number=number)
        return replace(batch, waited_s=self._clock.monotonic() - asked_s)

    def _answer(self, question: FeedQuestion) -> FeedBatch:
        return self.feed.since(question.stream, question.version, question.wanted, may_compact=question.may_compact)

    async def _until_news(self, wanted: InstanceFilter, wait_s: float) -> None:
        news = asyncio.Event()
        number = self.feed.follow(wanted, news.set)
        try:
            await within(news.wait(), wait_s)
            await asyncio.sleep(self._until_turn_s())
        except TimeoutError:
            """Nothing has changed."""
        finally:
            self.feed.unfollow(number)

    def _until_turn_s(self) -> float:
        """Seconds until this follower is answered; at once where no other has been just now."""
        now_s = self._clock.monotonic()
        turn_s = min(max(self._next_turn_s, now_s), now_s + _TURN_MAX_S)
        self._next_turn_s = turn_s + _ANSWER_S
        return turn_s - now_s

    def _claim(self, places: Places, follower: str, duration_s: float) -> None:
        if not places.claim(follower, duration_s, self._clock.monotonic()):
            raise FollowersFullError(places.limit)
