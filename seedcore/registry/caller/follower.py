"""Keeps a copy of who lives up to date by the registry's feed, and knows how old it is.

Owns one task. Whoever reads the copy asks `is_current` first: it is never trusted for longer than MAX_AGE_S after the
registry last confirmed it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Callable, Mapping

from seedcore.core.answers import InstanceFilter, Listing
from seedcore.core.clock import utc_now
from seedcore.core.errors import FollowersFullError, RegistryError, RegistryUnavailableError
from seedcore.core.feed import Feed, FeedBatch
from seedcore.core.instances import Instance
from seedcore.core.limits import MAX_PAGE
from seedcore.core.loops import LoopsEvent
from seedcore.core.timeouts import end, is_running, within
from seedcore.core.view import LiveView
from seedcore.registry.caller.metrics import CallerMetrics
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.metrics import PERIOD_S

logger = logging.getLogger(__name__)

MAX_AGE_S = 4.0
_WAIT_S = 2.0
_CALL_S = 1.0
_RETRY_S, _RETRY_MAX_S = 0.1, 2.0
_FULL_S, _FULL_MAX_S = 2.0, 30.0


class Follower:
    """`view` is the copy. It is followed in the event loop that started it first, as long as that runs: only there is
    the copy read. Started in a later loop it begins anew."""

    def __init__(
        self,
        connection: RegistryConnection,
        *,
        organ_id: str | None = None,
        labels: Mapping[str, str] | None = None,
        on_change: Callable[[str], None] | None = None,
        on_reset: Callable[[], None] | None = None,
        feed: Feed | None = None,
        metrics: CallerMetrics | None = None,
    ) -> None:
        """Follows whom organ and labels select. `on_change` is called with each logical id whose instances, or the
        verdict on them, changed; `on_reset` when everything may have. `feed` becomes a copy of the registry's feed, for
        followers of this process. `metrics` are told as long as it follows. Tries no connection."""
        self._connection = connection
        # the registry keeps its place by this, from question to question
        self._name = uuid.uuid4().hex
        self._wanted = InstanceFilter(
            statuses=None, organ_id=organ_id, labels=labels if labels is not None else {}, fresh_only=False
        )
        self._on_change = on_change
        self._on_reset = on_reset
        self.feed = feed
        self._metrics = metrics
        self._next_told_s = 0.0
        self._confirmed_s: float | None = None
        self._task: asyncio.Task[None] | None = None
        self._trusted_until_s = 0.0
        self._session: session.Session | None = None
        self._confirmed = LoopsEvent()
        self.view = LiveView()
        self.resets = 0
        self._consecutive_resets = 0

    @property
    def is_current(self) -> bool:
        """Whether the registry has confirmed the copy within MAX_AGE_S, in the Ray session of now."""
        return time.monotonic() < self._trusted_until_s and session.current() is self._session

    def start(self) -> None:
        """Follow from now on, in the running event loop, unless it is followed already. Idempotent."""
        if not is_running(self._task):
            self._doubt()
            self.view = LiveView()
            self._confirmed = LoopsEvent()
            self._task = asyncio.create_task(self._follow(), name="follower")

    @property
    def is_readable_here(self) -> bool:
        """Whether the copy is up to date, and the running event loop the one that changes it."""
        task = self._task
        return self.is_current and task is not None and task.get_loop() is asyncio.get_running_loop()

    async def until_current(self, timeout_s: float) -> bool:
        """Wait for the copy to be up to date; whether it is within `timeout_s` seconds of it."""
        if not self.is_current:
            self._confirmed.clear()
            try:
                await within(self._confirmed.wait(), timeout_s)
            except TimeoutError:
                return False
        return True

    async def stop(self) -> None:
        """Follow no more."""
        task, self._task = self._task, None
        self._doubt()
        await end(task)

    async def _follow(self) -> None:
        pause_s, most_s = _RETRY_S, _RETRY_MAX_S
        while True:
            self._tell_metrics()
            try:
                await self._step()
                pause_s = _RETRY_S
                continue
            except FollowersFullError as error:
                # until another one goes no asking helps: callers ask the registry meanwhile
                logger.info("no copy is kept: %s", error)
                pause_s, most_s = max(pause_s, _FULL_S), _FULL_MAX_S
            except RegistryError as error:
                logger.debug("the feed is not read: %s", error)
                most_s = _RETRY_MAX_S
            except Exception:
                logger.exception("following failed; beginning anew")
                self.view = LiveView()
            self._doubt()
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(most_s, pause_s * 2)

    async def _step(self) -> None:
        entered = session.current()
        if entered is not self._session:
            # another cluster's registry, perhaps, and handles are of one session in any case
            self._doubt()
            self._session, self.view = entered, LiveView()
        view = self.view
        wait_s = 0.0 if view.stream is None else _WAIT_S
        asked_s = time.monotonic()
        batch = await self._connection.changes(self._wanted, view.stream, view.version, wait_s, self._name)
        if not batch.complete:
            raise RegistryUnavailableError("it is still recovering, or superseded")
        if batch.is_reset:
            await self._pause_between_resets()
            await self._load(batch)
            return
        self._consecutive_resets = 0
        if self.feed is not None:
            self._retell(self.feed, batch)
        for logical_id in view.apply(batch):
            if self._on_change is not None:
                self._on_change(logical_id)
        # it was true when it was said: no later than its wait allows, whenever we came to read it
        self._trust(min(time.monotonic(), asked_s + wait_s + _CALL_S))

    def _tell_metrics(self) -> None:
        now_s = time.monotonic()
        if self._metrics is None or now_s < self._next_told_s:
            return
        self._next_told_s = now_s + PERIOD_S
        try:
            self._metrics.tell(None if self._confirmed_s is None else now_s - self._confirmed_s)
        except Exception:
            logger.exception("metrics were not told; going on")

    def _retell(self, feed: Feed, batch: FeedBatch) -> None:
        # several of one instance may be in a batch: what each of them left is what the next one changes
        seen: dict[str, Instance | None] = {}
        for change in batch.changes:
            before = seen.get(change.instance_id, self.view.get(change.instance_id))
            seen[change.instance_id] = change.instance
            if before is not None or change.instance is not None:
                feed.append(before, change.instance, change.verdict, change.cause, change.version)
        feed.version = batch.version

    async def _pause_between_resets(self) -> None:
        """With more changes than the feed remembers everybody lists anew, again and again: not all at once."""
        if self._consecutive_resets:
            pause_s = min(_RETRY_MAX_S, _RETRY_S * 2**self._consecutive_resets)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
        self._consecutive_resets += 1

    async def _load(self, reset: FeedBatch) -> None:
        """List everybody. What it had stays readable meanwhile, and is not trusted."""
        self._doubt()
        pages: list[Listing] = []
        cursor: str | None = None
        while not pages or cursor is not None:
            page = await self._connection.page(self._wanted, MAX_PAGE, cursor)
            if page.stream != reset.stream:
                raise RegistryUnavailableError("it was restarted while it listed everybody")
            if not page.complete:
                raise RegistryUnavailableError("it is still recovering, or superseded")
            pages.append(page)
            cursor = page.next_cursor
        self.view.load(reset, pages)
        if self.feed is not None:
            self.feed.become(reset.stream, reset.version, reset.epoch)
        self.resets += 1
        if self._on_reset is not None:
            self._on_reset()
        # trusted with the next answer: it tells what changed while we listed

    def _trust(self, said_s: float) -> None:
        self._confirmed_s = said_s
        self._trusted_until_s = said_s + MAX_AGE_S
        self.view.as_of = utc_now()
        self._confirmed.set()

    def _doubt(self) -> None:
        self._trusted_until_s = 0.0
