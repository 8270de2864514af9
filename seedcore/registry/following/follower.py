"""Keeps a local cache of the live agents (LiveView) current, by the registry's change feed.

Owns one task. The cache is trusted for at most `max_age_s` after the registry last confirmed it: readers check
`is_current` first.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from datetime import timedelta

from seedcore.core.answers import InstanceFilter, Listing
from seedcore.core.backoff import Backoff, supervise
from seedcore.core.clock import Clock
from seedcore.core.errors import FollowersFullError, RegistryError, RegistryUnavailableError
from seedcore.core.feed import Feed, FeedBatch
from seedcore.core.feed_question import FeedQuestion
from seedcore.core.limits import MAX_LISTED
from seedcore.core.loops import LoopsEvent
from seedcore.core.timeouts import end, is_running, within
from seedcore.core.view import LiveView
from seedcore.registry.following.learning import Learner
from seedcore.registry.following.listeners import Listeners
from seedcore.registry.following.nearby import FeedSource
from seedcore.registry.following.pages import pages_of
from seedcore.registry.following.times import FollowTimes
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.metrics import PERIOD_S

logger = logging.getLogger(__name__)

_LOADS_WANTED_S = 60.0


class Follower:
    """`view` is the cache. The event loop that first started the follower runs it, as long as that loop runs, and only
    that loop may read the cache. A start in a later loop begins with an empty cache."""

    def __init__(
        self,
        source: FeedSource,
        *,
        organ_id: str | None = None,
        labels: Mapping[str, str] | None = None,
        on_change: Callable[[str], None] | None = None,
        on_reset: Callable[[], None] | None = None,
        feed: Feed | None = None,
        export: Callable[[float | None], None] | None = None,
        times: FollowTimes | None = None,
        clock: Clock | None = None,
        is_relay: bool = False,
        most_agents: int | None = None,
        was_used: Callable[[str], bool] | None = None,
    ) -> None:
        """Follows the instances that match organ and labels. `on_change` is called with each logical id whose
        instances, or the verdict on them, changed, or that the cache has forgotten; `on_reset` when all of them may
        have, and in another Ray session. With more than `most_agents` instances the cache has, until `keep_whole`,
        those of the agents that were learned: see Learner, also for `was_used`. `feed` becomes a copy of the registry's
        feed, for others that follow this process. `export` is called every PERIOD_S seconds with the age of the cache
        (None: it was never confirmed). `is_relay`: it follows for the processes of its node. Opens no connection."""
        self._source = source
        wanted = InstanceFilter(
            statuses=None, organ_id=organ_id, labels=labels if labels is not None else {}, fresh_only=False
        )
        # the registry keeps a place for this name from question to question
        self._question = FeedQuestion(wanted, follower=uuid.uuid4().hex, may_compact=True, is_relay=is_relay)
        self._most_agents = most_agents if feed is None else None
        self._learner = None if most_agents is None else Learner(source, wanted, most_agents, on_change, was_used)
        self._on_change = on_change
        self._on_reset = on_reset
        self.feed = feed
        self._export = export
        self._times = times if times is not None else FollowTimes()
        self._clock = clock if clock is not None else Clock()
        self._retry = Backoff(self._times.retry_s, self._times.retry_longest_s)
        self._full = Backoff(self._times.full_s, self._times.full_longest_s)
        self._between_resets = Backoff(2 * self._times.retry_s, self._times.retry_longest_s)
        self._exports_at_s = 0.0
        self._confirmed_s: float | None = None
        self._task: asyncio.Task[None] | None = None
        self._trusted_until_s = 0.0
        self._session: session.Session | None = None
        self._confirmed = LoopsEvent()
        self.view = LiveView()
        self.resets = 0
        self._listed_at = 0
        self.failures = 0
        self._is_after_reset = False
        self.listeners = Listeners()
        self.problem: str | None = None
        self._loads_wanted_until_s = 0.0
        self._next_loads_s = 0.0

    @property
    def is_current(self) -> bool:
        """Whether the registry has confirmed the cache within `max_age_s`, in the current Ray session. Any thread may
        ask."""
        # in this order: a thread that reads while the follower enters another session must not see the new session
        # beside the trust in the old one
        return session.current() is self._session and self._clock.monotonic() < self._trusted_until_s

    def start(self) -> None:
        """Follow from now on, in the running event loop, unless it follows already. Idempotent."""
        if not is_running(self._task):
            self._distrust()
            self.view = LiveView()
            self._confirmed = LoopsEvent()
            if self._learner is not None:
                self._learner.begin()
            following = supervise(self._step, Backoff(self._times.retry_s, self._times.retry_longest_s), "follower")
            self._task = asyncio.create_task(following, name="follower")

    def keep_whole(self) -> None:
        """Have all agents from now on. A cache with a part of them is not current until it has been loaded."""
        self._most_agents = None
        if self.loop is asyncio.get_running_loop():
            self._drop_part()

    async def learn(self, logical_id: str) -> bool:
        """Whether the cache has the agent, after it was learned if necessary. Only for the event loop that follows."""
        return self._learner is None or await self._learner.learn(self.view, logical_id)

    def keep_feed(self, capacity: int) -> Feed:
        """The copy of the registry's feed, with all agents, kept from now on. Only for the event loop that follows."""
        if self.feed is None:
            self.keep_whole()
            self.feed = Feed("", capacity)
            if self.view.stream is not None:
                self.feed.become(self.view.stream, self.view.version, self.view.epoch)
        return self.feed

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that follows, None where none does."""
        task = self._task
        return task.get_loop() if task is not None and is_running(task) else None

    @property
    def is_readable_here(self) -> bool:
        """Whether the cache is current, and the running event loop the one that changes it."""
        task = self._task
        return self.is_current and task is not None and task.get_loop() is asyncio.get_running_loop()

    @property
    def age_s(self) -> float:
        """Seconds since the registry confirmed the cache; infinite where it never did."""
        return math.inf if self._confirmed_s is None else max(0.0, self._clock.monotonic() - self._confirmed_s)

    async def until_current(self, timeout_s: float) -> bool:
        """Wait until the cache is current. Returns whether it is within `timeout_s` seconds."""
        if not self.is_current:
            self._confirmed.clear()
            try:
                await within(self._confirmed.wait(), timeout_s)
            except TimeoutError:
                return False
        return True

    def want_loads(self) -> None:
        """Receive loads from the next answer on, for a minute. Any thread may call it."""
        self._loads_wanted_until_s = self._clock.monotonic() + _LOADS_WANTED_S

    async def stop(self) -> None:
        """Stop following."""
        task, self._task = self._task, None
        self._distrust()
        await end(task)
        if self._learner is not None:
            await self._learner.close()

    async def _step(self) -> float:
        self._export_age()
        try:
            await self._advance()
        except FollowersFullError as error:
            # no retry helps before another follower leaves: callers ask the registry meanwhile
            logger.info("no cache is kept: %s", error)
            self.problem = str(error)
            pause_s = self._full.next_s()
        except RegistryError as error:
            logger.debug("the feed is not read: %s", error)
            self.problem = str(error)
            pause_s = self._retry.next_s()
        except Exception:
            # the cache may be half changed
            self._note_failure()
            self.view = LiveView()
            raise
        else:
            self._retry.reset()
            self._full.reset()
            return 0.0
        self._note_failure()
        return pause_s

    def _note_failure(self) -> None:
        self.failures += 1
        self._distrust()

    async def _advance(self) -> None:
        entered = session.current()
        if entered is not self._session:
            # it may be the registry of another cluster; handles belong to one session in any case
            self._distrust()
            self._session, self.view = entered, LiveView()
            if self._on_reset is not None:
                self._on_reset()
        if self._most_agents is None:
            self._drop_part()
        view = self.view
        wait_s = 0.0 if view.stream is None else self._times.wait_s
        asked_s = self._clock.monotonic()
        batch = await self._asked(view, wait_s, asked_s)
        if batch.has_more:
            asked_s, batch = await self._whole(batch, asked_s)
        if view is not self.view:
            # all agents are wanted now
            return
        if not batch.complete:
            raise RegistryUnavailableError("it is still recovering, or superseded")
        if batch.is_reset:
            await self._pause_between_resets()
            await self._load(batch)
            return
        if batch.version < self._listed_at:
            # it lacks changes that the listing has, and its own ones would take instances back behind them
            raise RegistryUnavailableError("the relay's copy is older than the listing")
        self._is_after_reset = False
        if self.feed is not None:
            self.feed.repeat(batch, view.get, self._listed_at)
        for logical_id in view.apply(batch):
            if self._on_change is not None:
                self._on_change(logical_id)
            for listener in self.listeners:
                listener.note_change(logical_id)
        if view.is_whole and self._is_beyond(len(view)):
            # the fleet has grown
            self._start_over()
            return
        # it was true when it was sent, however late this process reads it
        self._trust(asked_s + batch.waited_s - batch.age_s)

    async def _whole(self, batch: FeedBatch, asked_s: float) -> tuple[float, FeedBatch]:
        """Compacted changes with all that come after them, as one batch, and when the last ones were asked for. Until
        then the copy stays what it was."""
        changes = {change.instance_id: change for change in batch.changes}
        since = batch.since
        while batch.has_more and batch.complete and not batch.is_reset:
            asked_s = self._clock.monotonic()
            batch = await self._changes_after(batch.stream, batch.version, 0.0)
            changes.update((change.instance_id, change) for change in batch.changes)
        return asked_s, replace(batch, since=since, changes=tuple(changes.values()), is_compacted=True)

    async def _asked(self, view: LiveView, wait_s: float, asked_s: float) -> FeedBatch:
        """The registry's answer, with loads if they are wanted and due."""
        follows_loads = asked_s < self._loads_wanted_until_s
        if not follows_loads:
            view.forget_loads()
        if not follows_loads or asked_s < self._next_loads_s:
            wait_s = min(wait_s, self._times.loads_s) if follows_loads else wait_s
            return await self._changes_after(view.stream, view.version, wait_s)
        # so soon an answer comes also where nothing changes
        wait_s = min(wait_s, self._times.loads_s)
        self._next_loads_s = asked_s + self._times.loads_s
        return await self._changes_after(view.stream, view.version, wait_s, view.loads_number)

    async def _changes_after(
        self, stream: str | None, version: int, wait_s: float, loads_after: int | None = None
    ) -> FeedBatch:
        question = replace(self._question, stream=stream, version=version, wait_s=wait_s, loads_after=loads_after)
        return await self._source.changes(question)

    def _export_age(self) -> None:
        now_s = self._clock.monotonic()
        if self._export is None or now_s < self._exports_at_s:
            return
        self._exports_at_s = now_s + PERIOD_S
        try:
            self._export(None if self._confirmed_s is None else now_s - self._confirmed_s)
        except Exception:
            logger.exception("the metrics were not exported; following goes on")

    async def _pause_between_resets(self) -> None:
        """If there are more changes than the feed remembers, every follower lists again and again: not all at once."""
        if self._is_after_reset:
            await asyncio.sleep(self._between_resets.next_s())
        else:
            self._between_resets.reset()
        self._is_after_reset = True

    async def _load(self, reset: FeedBatch) -> None:
        """List all instances. The earlier content stays readable meanwhile, and is not trusted."""
        self._distrust()
        pages: list[Listing] = []
        is_part = False
        page_size = MAX_LISTED if self._most_agents is None else min(MAX_LISTED, self._most_agents + 1)
        async with aclosing(pages_of(self._source, self._question.wanted, page_size)) as found:
            async for page in found:
                if page.stream != reset.stream:
                    raise RegistryUnavailableError("it restarted during the listing")
                if page.version < reset.version:
                    raise RegistryUnavailableError("the relay's copy is older than the registry's answer")
                if not page.complete:
                    raise RegistryUnavailableError("it is still recovering, or superseded")
                pages.append(page)
                is_part = self._is_beyond(sum(len(one.items) for one in pages) + (page.next_cursor is not None))
                if is_part:
                    break
        if is_part:
            self.view.keep_only_learned(reset)
        else:
            self.view.load(reset, pages)
        self._listed_at = reset.version if is_part else max(page.version for page in pages)
        if self.feed is not None:
            self.feed.become(reset.stream, reset.version, reset.epoch)
        self.resets += 1
        if self._on_reset is not None:
            self._on_reset()
        # trusted from the next answer on that has the changes during the listing

    def _trust(self, sent_s: float) -> None:
        was_current = self.is_current
        self._confirmed_s, self.problem = sent_s, None
        self._trusted_until_s = sent_s + self._times.max_age_s
        self.view.as_of = self._clock.utc() - timedelta(seconds=self._clock.monotonic() - sent_s)
        self._confirmed.set()
        if not was_current:
            for listener in self.listeners:
                listener.note_all()

    def _is_beyond(self, instances: int) -> bool:
        most = self._most_agents
        return most is not None and instances > most

    def _drop_part(self) -> None:
        if self.view.is_part:
            self._start_over()

    def _start_over(self) -> None:
        self._distrust()
        self.view = LiveView()

    def _distrust(self) -> None:
        self._trusted_until_s = 0.0
