"""Answers those who follow a feed: at once where there are changes, else as soon as there is one.

Owns the places of those who wait.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, replace

from seedcore.core.answers import InstanceFilter
from seedcore.core.clock import Clock
from seedcore.core.errors import FollowersFullError, InvalidInputError
from seedcore.core.feed import Feed, FeedBatch
from seedcore.core.limits import MAX_ID_CHARS, check_kind, check_text
from seedcore.core.places import Places
from seedcore.core.timeouts import within
from seedcore.core.wire import wire

MAX_FEED_WAIT_S = 30.0
_ANSWER_S = 0.001
"""What an answer costs: many followers are answered one after another, each more rarely, with more each time."""
_TURN_MAX_S = 0.5


@wire
@dataclass(frozen=True, slots=True)
class FeedQuestion:
    """What a follower asks a feed for; without loads. See RegistryApi.changes."""

    wanted: InstanceFilter
    stream: str | None
    version: int
    wait_s: float = 0.0
    follower: str | None = None
    may_compact: bool = False

    def validated(self) -> FeedQuestion:
        """The same, or InvalidInputError."""
        check_kind("wanted", self.wanted, InstanceFilter).validated()
        if type(self.version) is not int or self.version < 0:
            raise InvalidInputError("version", f"must be a whole number from 0, not {self.version!r}")
        if type(self.wait_s) not in {int, float} or not 0 <= self.wait_s <= MAX_FEED_WAIT_S:
            raise InvalidInputError("wait_s", f"must be from 0 to {MAX_FEED_WAIT_S:g} seconds, not {self.wait_s!r}")
        if self.follower is not None:
            check_text("follower", self.follower, MAX_ID_CHARS)
        check_kind("may_compact", self.may_compact, bool)
        return self


class FeedServer:
    """Use it from one event loop."""

    def __init__(self, feed: Feed, max_followers: int, place_kept_s: float, clock: Clock) -> None:
        """At most `max_followers` have a place; each keeps it for `place_kept_s` seconds after an answer."""
        self.feed = feed
        self._places = Places(max_followers)
        self._place_kept_s = place_kept_s
        self._clock = clock
        self._next_turn_s = 0.0

    @property
    def followers(self) -> int:
        """How many places are taken."""
        return self._places.taken(self._clock.monotonic())

    async def changes(self, question: FeedQuestion) -> FeedBatch:
        """The answer, with the time that it waited. Raises InvalidInputError, or FollowersFullError."""
        follower, wait_s = question.validated().follower, question.wait_s
        asked_s = self._clock.monotonic()
        # before it lists, or is answered: one that will be refused is no burden until then
        if follower is not None:
            self._claim_place(follower, wait_s + self._place_kept_s)
        batch = self._answer(question)
        if not batch.is_reset and not batch.changes and not batch.has_more and wait_s > 0:
            # one without a name has a place only while it waits
            passing = None if follower is not None else uuid.uuid4().hex
            if passing is not None:
                self._claim_place(passing, wait_s + _TURN_MAX_S)
            try:
                await self._until_news(question.wanted, wait_s)
            finally:
                if passing is not None:
                    self._places.release(passing)
            batch = self._answer(question)
        return replace(batch, waited_s=self._clock.monotonic() - asked_s)

    def not_now(self, question: FeedQuestion) -> FeedBatch:
        """The answer of one that cannot answer now: it changes nothing, and is not complete."""
        version = question.version
        return FeedBatch(self.feed.stream, version, version, self.feed.epoch, (), complete=False)

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

    def _claim_place(self, follower: str, duration_s: float) -> None:
        if not self._places.claim(follower, duration_s, self._clock.monotonic()):
            raise FollowersFullError(self._places.limit)
