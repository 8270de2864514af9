"""Waits for agents: returns proven handles as soon as enough agents are ready, or raises why they are not.

A wait is a listener of the follower, so that a change in the cache starts the proof of that agent, and no source is
polled while the cache is current. Where it is not, the ladder of sources is asked again and again, with growing pauses.
Each agent has its own proof: one that hangs delays no other.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from seedcore.core.answers import InstanceFilter, Listing
from seedcore.core.backoff import Backoff
from seedcore.core.clock import Clock
from seedcore.core.errors import CannotKnowError, NotResolvableError, RegistryError
from seedcore.core.instances import Instance, Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_PAGE
from seedcore.core.loops import LoopsEvent
from seedcore.core.not_ready import NotReadyError
from seedcore.core.paging import decode_cursor
from seedcore.core.timeouts import abandon, within
from seedcore.core.view import LiveView
from seedcore.registry.caller.awaited import AwaitedAgents
from seedcore.registry.caller.locator import Located
from seedcore.registry.caller.missing import missing_of
from seedcore.registry.caller.resolver import Resolver
from seedcore.registry.following.follower import Follower

_ROUTABLE = frozenset({Status.ALIVE})


@dataclass(frozen=True, slots=True)
class WaitTimes:
    """The times of a wait, in seconds, and its bounds. Without a current cache an agent is tried again after `retry_s`,
    growing to `retry_longest_s`. With one it is tried at each of its changes, and every `sweep_s` for agents that do
    not report. A proof is not returned if it is older than `stale_s` and no cache confirms it. The reasons at the
    deadline are asked for `reasons_s`. At most `at_once` agents are tried at once."""

    retry_s: float = 0.05
    retry_longest_s: float = 1.0
    sweep_s: float = 10.0
    stale_s: float = 1.0
    reasons_s: float = 2.0
    at_once: int = 64


class Wait:
    """One wait. A listener of the follower, which may run in another event loop."""

    def __init__(
        self,
        of: AwaitedAgents,
        locate: Callable[[str], Awaitable[Located]],
        resolver: Resolver,
        follower: Follower | None,
        *,
        times: WaitTimes | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._of = of
        self._locate = locate
        self._resolver = resolver
        self._follower = follower
        self._times = times if times is not None else WaitTimes()
        self._clock = clock if clock is not None else Clock()
        self._most = 2 * of.count + self._times.at_once
        # the agents that are tried, each with the time of its next try; those of a filter appear ready
        self._due: dict[str, float] = dict.fromkeys(of.ids if of.ids is not None else (), 0.0)
        self._retries: dict[str, Backoff] = {}
        self._trying: dict[str, asyncio.Task[None]] = {}
        self._found: dict[str, tuple[Located, float]] = {}
        self._refusals: dict[str, RegistryError] = {}
        self._lists_at_s = 0.0 if of.ids is None else math.inf
        self._list_retry = Backoff(self._times.retry_s, self._times.retry_longest_s)
        self._not_before_s = -math.inf
        self._round_s = 3 * self._times.stale_s
        self._was_current = False
        self._failure: BaseException | None = None
        self._changed: deque[str | None] = deque()
        self._news = LoopsEvent()

    async def until_ready(self, timeout_s: float) -> list[Located]:
        """Enough proven agents, in the order of the ids. Raises NotReadyError at the deadline."""
        if self._of.ids is None and not self._resolver.records:
            raise CannotKnowError("*", "without a registry (mode ray) only ids can be waited for")
        ends_s = self._clock.monotonic() + timeout_s
        if self._follower is not None:
            self._follower.start()
            self._follower.keep_whole()
            self._follower.listeners.add(self)
        try:
            while True:
                self._news.clear()
                if self._failure is not None:
                    raise self._failure
                self._note_changes()
                await self._list_if_due(ends_s)
                enough = self._enough()
                if enough is not None:
                    return enough
                if self._clock.monotonic() >= ends_s:
                    break
                self._try_due()
                await self._until_news(ends_s)
        finally:
            self._stop()
        missing, others = await missing_of(
            self._of, self._ready(), self._refusals, self._resolver, self._times.reasons_s
        )
        raise NotReadyError(timeout_s, len(self._ready()), self._of.count, self._of.about, missing, others)

    # Listener: on the thread of the follower

    def note_change(self, logical_id: str) -> None:
        """See Listener."""
        if self._of.ids is None or logical_id in self._due:
            self._changed.append(logical_id)
            self._news.set()

    def note_all(self) -> None:
        """See Listener."""
        self._changed.append(None)
        self._news.set()

    # The agents that may be ready

    def _note_changes(self) -> None:
        now_s = self._clock.monotonic()
        view = self._view()
        if self._was_current and view is None:
            # no change wakes this wait until the cache is current again
            self._lists_at_s = now_s if self._of.ids is None else math.inf
            self._due.update(dict.fromkeys(self._due.keys() - self._found.keys(), now_s))
        self._was_current = view is not None
        while self._changed:
            logical_id = self._changed.popleft()
            if logical_id is None:
                self._lists_at_s = now_s if self._of.ids is None else math.inf
                for known in list(self._due):
                    self._try_again(known, now_s)
            elif self._of.ids is not None:
                self._try_again(logical_id, now_s)
            elif view is None:
                self._lists_at_s = now_s
            elif self._appears_ready(view, logical_id):
                if logical_id in self._due or len(self._due) < self._most:
                    self._try_again(logical_id, now_s)
            else:
                self._forget(logical_id)

    def _try_again(self, logical_id: str, now_s: float) -> None:
        """The agent changed: what was found, or is being tried, is of its earlier state."""
        self._found.pop(logical_id, None)
        self._retries.pop(logical_id, None)
        trying = self._trying.pop(logical_id, None)
        if trying is not None:
            abandon(trying)
        self._due[logical_id] = now_s

    def _forget(self, logical_id: str) -> None:
        if logical_id in self._due:
            self._try_again(logical_id, 0.0)
            del self._due[logical_id]
            if len(self._due) < self._of.count:
                # others may have been beyond the bound
                self._lists_at_s = self._clock.monotonic()

    def _appears_ready(self, view: LiveView, logical_id: str) -> bool:
        return any(self._of.wanted.matches(row, view.epoch) for row in view.candidates(logical_id))

    async def _list_if_due(self, ends_s: float) -> None:
        """Of a filter: list the agents that appear ready."""
        now_s = self._clock.monotonic()
        if now_s < self._lists_at_s:
            return
        wanted = replace(self._of.wanted, statuses=_ROUTABLE, verdicts=frozenset({Verdict.FRESH}))
        view = self._view()
        if view is not None:
            self._lists_at_s = math.inf
            self._list_retry.reset()
            rows: Sequence[Instance] | None = view.page(wanted, decode_cursor(None), self._most)[0]
        else:
            rows = await self._listed(wanted, max(self._times.retry_s, ends_s - now_s))
            self._lists_at_s = self._clock.monotonic() + self._list_retry.next_s()
        if rows is None:
            return
        listed = {row.logical_id for row in rows}
        for logical_id in list(self._due.keys() - listed) if len(rows) < self._most else ():
            self._forget(logical_id)
        for logical_id in listed - self._due.keys():
            self._due[logical_id] = now_s

    async def _listed(self, wanted: InstanceFilter, timeout_s: float) -> Sequence[Instance] | None:
        """From the first source that answers; None if none does."""
        try:
            found = await within(self._resolver.page(wanted, min(self._most, MAX_PAGE), None), timeout_s)
        except (RegistryError, TimeoutError):
            return None
        return found.items if isinstance(found, Listing) else None

    # Trying

    def _try_due(self) -> None:
        now_s = self._clock.monotonic()
        for logical_id, due_s in self._due.items():
            if len(self._trying) >= self._times.at_once:
                return
            if due_s <= now_s and logical_id not in self._trying and logical_id not in self._found:
                self._trying[logical_id] = asyncio.create_task(self._try(logical_id), name="wait-tries")

    async def _try(self, logical_id: str) -> None:
        tried_s = self._clock.monotonic()
        try:
            located = await self._locate(logical_id)
            self._require_wanted(located)
        except (NotResolvableError, CannotKnowError) as error:
            self._refusals[logical_id] = error
            self._due[logical_id] = self._clock.monotonic() + self._pause_s(logical_id)
        except Exception as error:  # noqa: BLE001 - raised by the wait itself
            self._failure = error
        else:
            self._found[logical_id] = (located, tried_s)
            self._retries.pop(logical_id, None)
        del self._trying[logical_id]
        self._news.set()

    def _require_wanted(self, located: Located) -> None:
        row = located.instance
        if self._of.ids is None and (row is None or not self._of.wanted.matches(row, row.cluster_epoch)):
            raise CannotKnowError(located.logical_id, "the instance that it resolves to does not match")
        if row is not None and self._is_denied(row):
            # its source knows less than the cache, or the change that is still to come wakes this wait
            raise CannotKnowError(located.logical_id, "the cache does not have it as ready")

    def _pause_s(self, logical_id: str) -> float:
        """The time until the next try. An agent that the current cache has as not ready is tried when it changes."""
        view = self._view()
        if view is not None and not view.candidates(logical_id):
            # at most ten tries per second, however many agents are waited for
            return max(self._times.sweep_s, len(self._due) / 10)
        if logical_id not in self._retries:
            self._retries[logical_id] = Backoff(self._times.retry_s, self._times.retry_longest_s)
        return self._retries[logical_id].next_s()

    async def _until_news(self, ends_s: float) -> None:
        waiting = [due_s for one, due_s in self._due.items() if one not in self._trying and one not in self._found]
        if len(self._trying) >= self._times.at_once:
            waiting = []
        # whether the cache is current is not notified
        next_s = min([ends_s, self._lists_at_s, self._clock.monotonic() + self._times.retry_longest_s, *waiting])
        try:
            await within(self._news.wait(), max(0.0, next_s - self._clock.monotonic()))
        except TimeoutError:
            return

    def _stop(self) -> None:
        if self._follower is not None:
            self._follower.listeners.remove(self)
        for task in self._trying.values():
            abandon(task)

    # What was found

    def _ready(self) -> list[str]:
        order = self._of.ids if self._of.ids is not None else sorted(self._found)
        return [logical_id for logical_id in order if logical_id in self._found]

    def _enough(self) -> list[Located] | None:
        """The result, if enough agents are proven. Each that no cache confirms must be proven a moment ago."""
        ready = self._ready()
        if len(ready) < self._of.count:
            return None
        now_s = self._clock.monotonic()
        is_current = self._current() is not None
        # a cache that is current has told of each change of what it had, and it has no agents that do not report
        unconfirmed = [one for one in ready if not is_current or self._found[one][0].instance is None]
        if unconfirmed:
            if now_s - self._not_before_s > self._round_s:
                self._not_before_s = now_s - self._times.stale_s
                # a round of many slow proofs must not be stale before it has ended
                self._round_s *= 2
            stale = [one for one in unconfirmed if self._found[one][1] < self._not_before_s]
            for logical_id in stale:
                self._try_again(logical_id, now_s)
            if stale:
                return None
        return [self._found[logical_id][0] for logical_id in ready[: self._of.count]]

    def _is_denied(self, instance: Instance) -> bool:
        """Whether the cache is current, and does not have the instance as routable."""
        view = self._current()
        if view is None:
            return False
        candidates = view.candidates(instance.logical_id, allow_late=True)
        return all(row.instance_id != instance.instance_id for row in candidates)

    def _current(self) -> LiveView | None:
        """The cache, while it is current and has all agents."""
        follower = self._follower
        if follower is None:
            return None
        # in this order: the follower may replace it on another thread
        view = follower.view
        return view if view.is_whole and follower.is_current and view is follower.view else None

    def _view(self) -> LiveView | None:
        """As `_current`, and of this event loop."""
        return self._current() if self._follower is not None and self._follower.is_readable_here else None
