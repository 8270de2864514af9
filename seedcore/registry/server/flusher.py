"""The write loop: joins the database, commits what the registry took, and corrects its memory where the
database knows better.

Owns the store and both batches. Takes changes that the roster has accepted already.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from itertools import islice
from typing import TypeAlias, TypeVar

from seedcore.core.answers import LostBeat, Outcome, OutcomeKind
from seedcore.core.batch import BeatBatch, ChangeBatch
from seedcore.core.changes import Change, RegisterChange, StatusChange
from seedcore.core.clock import Clock
from seedcore.core.errors import FencedError, RegistryError, StoreRejectedError, StoreUnavailableError, first_line
from seedcore.core.instances import Beat, LiveState
from seedcore.core.lease import BeatRate
from seedcore.core.lifecycle import Status
from seedcore.core.paging import decode_cursor
from seedcore.core.ports import Store, StoreDoubtError
from seedcore.core.roster import Roster
from seedcore.core.timeouts import within
from seedcore.registry.protocol.messages import FlushCounts
from seedcore.registry.server.config import RegistryConfig

logger = logging.getLogger(__name__)

StoreFactory: TypeAlias = Callable[[], Awaitable[Store]]
Key: TypeAlias = tuple[str, int]
Settled: TypeAlias = Outcome | StoreRejectedError | FencedError
T = TypeVar("T")
R = TypeVar("R")
C = TypeVar("C", RegisterChange, StatusChange)

_COMPARE_PAGE = 1000
_RATE_S = 10.0
_ONLY_LOOK_S = 1e9
_MAX_REFUSED_BEATS = 100
# what stands for a cause that the database refuses: a death is not lost for its words
_CAUSE_REFUSED = "its cause could not be stored"


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A change that is taken and not committed, since a monotonic second."""

    settled: asyncio.Future[Settled]
    since_s: float


@dataclass(slots=True)
class _Commit:
    """What became of a batch so far. `doubts` are changes that were refused for what may not be their own fault."""

    statements: int = 0
    applied: int = 0
    doubts: list[tuple[Change, StoreDoubtError]] = field(default_factory=list)

    @property
    def doubted(self) -> list[Change]:
        return [change for change, _ in self.doubts]


class Writer:
    """One flush in flight at a time. `run()` is the loop; it ends only by cancellation."""

    def __init__(
        self, config: RegistryConfig, store_factory: StoreFactory, roster: Roster, rate: BeatRate, clock: Clock
    ) -> None:
        self._config = config
        self._clock = clock
        self._store_factory = store_factory
        self._roster = roster
        self._rate = rate
        self._store: Store | None = None
        self._beats = BeatBatch(config.max_instances)
        self._changes = ChangeBatch(config.change_capacity)
        self._waiting: dict[Key, _Waiting] = {}
        self._unsettled: Counter[str] = Counter()
        self._numbers = 0
        self._explanations: dict[str, str] = {}
        self._wake = asyncio.Event()
        self._next_beat_flush_s = 0.0
        self._next_epoch_check_s = 0.0
        self._next_compare_s = 0.0
        self._next_prune_s = 0.0
        self.pruned = 0
        self.healed = 0
        self.compared_at: datetime | None = None
        self._counts = FlushCounts()
        self._offered: deque[tuple[float, int]] = deque([(clock.monotonic(), 0)])
        self._is_read = asyncio.Event()
        self._unread_since_s = clock.monotonic()
        self.recovered_s = 0.0
        self._owes_grace = False
        self._problem: str | None = "not connected to the database yet"
        self.is_failing = False
        self.fenced_by: FencedError | None = None
        self.fences = 0
        self.on_flush: Callable[[float, int], None] = _ignore
        self._fenced_tries = 0
        self._refused_since_s: float | None = None

    # Taking work

    def require_room(self) -> None:
        """Raise BacklogFullError unless another change fits, FencedError where none is taken any more."""
        if self.fenced_by is not None:
            raise self.fenced_by
        self._changes.require_room()

    def enqueue(self, change: Change) -> Key:
        """Take a change; the key it can be awaited under."""
        key = key_of(change)
        self._changes.offer(change)
        self._waiting[key] = _Waiting(asyncio.get_running_loop().create_future(), self._clock.monotonic())
        self._unsettled[change.instance_id] += 1
        self._wake.set()
        return key

    def next_number(self) -> int:
        """A number for a change that has none of its agent's."""
        self._numbers += 1
        return self._numbers

    def is_waiting(self, key: Key) -> bool:
        """Whether the change under `key` is taken and not committed."""
        return key in self._waiting

    def is_unsettled(self, instance_id: str) -> bool:
        """Whether any change of this instance is not committed."""
        return instance_id in self._unsettled

    def offer_beats(self, instance_ids: Sequence[str], now_s: float) -> None:
        """Take beats; a fenced writer has no use for them."""
        if self.fenced_by is None:
            self._beats.offer_all(instance_ids, now_s)

    def explain(self, instance_id: str, cause: str) -> None:
        """Note that more is known of a death: the cause, and more. Told as soon as the database takes it, unless too
        many wait for that."""
        self._roster.explain(instance_id, cause)
        if self.fenced_by is None and len(self._explanations) < self._config.change_capacity:
            self._explanations[instance_id] = cause
            self._wake.set()

    def owe_grace(self) -> None:
        """Note an absence of ours: the leases in the database start again before the next flush."""
        self._owes_grace = True

    async def settled(self, key: Key) -> Settled | None:
        """What became of a change, or None where that is not known within the bounded wait."""
        waiting = self._waiting.get(key)
        if waiting is None:
            return None
        done, _ = await asyncio.wait([waiting.settled], timeout=self._wait_s)
        return waiting.settled.result() if done else None

    @property
    def _wait_s(self) -> float:
        # a database known to be away is not waited for: the caller hears so at once
        return self._config.linger_s if self.is_failing else self._config.durable_wait_s

    @property
    def problem(self) -> str | None:
        """What keeps changes from becoming durable, in one line; None where nothing does.

        A database that only says nothing is seen by the change that has waited longest, before the store gives it up.
        """
        oldest = next(iter(self._waiting.values()), None)
        if self._problem is None and oldest is not None:
            waited_s = self._clock.monotonic() - oldest.since_s
            if waited_s >= self._config.durable_wait_s:
                return f"the database is slow: a change has waited {waited_s:.0f} s for it"
        return self._problem

    @property
    def recovered(self) -> bool:
        """Whether we have read the database."""
        return self._is_read.is_set()

    @property
    def may_know_more(self) -> bool:
        """Whether the database may have instances that our memory does not: it is still to be read, or a newer registry
        writes it. One that has been away for a whole lease is not counted on: agents have to register again, so that
        memory knows them."""
        if self.fenced_by is not None:
            return True
        unread_s = self._clock.monotonic() - self._unread_since_s
        return not self.recovered and not (self.is_failing and unread_s > self._roster.terms.lease_s)

    async def until_read(self) -> bool:
        """Wait a bounded time for the database to be read; whether it is."""
        try:
            await within(self._is_read.wait(), self._wait_s)
        except TimeoutError:
            return False
        return True

    @property
    def is_complete(self) -> bool:
        """Whether our memory is the whole truth: we have read the database, and nobody newer writes it."""
        return self.recovered and self.fenced_by is None

    @property
    def pool(self) -> Mapping[str, int]:
        """The store's connections by what they do."""
        return {} if self._store is None else self._store.pool

    @property
    def counts(self) -> FlushCounts:
        """Totals since the start."""
        beats = self._beats.counts
        return replace(
            self._counts,
            beats_offered=beats.offered,
            beats_coalesced=beats.coalesced,
            beats_dropped=beats.dropped,
        )

    @property
    def term(self) -> int | None:
        """Our number among the writers of this database; None before we joined it."""
        return self._store.term if self._store is not None else None

    @property
    def pending_changes(self) -> int:
        """Changes that are not committed."""
        return len(self._waiting)

    @property
    def pending_beats(self) -> int:
        """Beats that are not committed."""
        return len(self._beats)

    def store(self) -> Store:
        """The store while it can be read; StoreUnavailableError at once while it is known to be away."""
        if self._store is None or not self.recovered or self.is_failing:
            raise StoreUnavailableError(self.problem or "still recovering")
        return self._store

    # The loop

    async def run(self) -> None:
        """Recover, then flush; on failure back off and go on, for ever. While fenced, only wait for the term."""
        attempt = 0
        while True:
            try:
                if self.fenced_by is not None:
                    await self._take_the_term_back()
                elif not self.recovered:
                    await self._recover()
                    self._note_back()
                elif self.is_failing and self._store is not None:
                    await self._store.open()
                await self._wait_for_work()
                await self._check_epoch_due()
                await self._give_grace()
                await self._flush_due()
                await self._compare_due()
                await self._prune_due()
            except FencedError as error:
                if self.fenced_by is None and self.recovered and error.in_force < error.term:
                    # nobody newer writes: the database was made anew, or restored from before our term
                    logger.warning("the database has forgotten term %d; joining it again", error.term)
                    self._is_read.clear()
                    self._unread_since_s = self._clock.monotonic()
                elif self.fenced_by is None:
                    self._give_way(error)
                else:
                    # it answers: what was wrong with it before is over
                    self._note_back()
                    if self._refused_since_s is None:
                        self._refused_since_s = self._clock.monotonic()
                continue
            except RegistryError as error:
                self._refused_since_s = None
                self._note_problem(error)
            except Exception as error:
                logger.exception("the write loop failed and goes on")
                self._note_problem(error)
            else:
                self._note_back()
                attempt = 0
                continue
            attempt += 1
            delay_s = min(self._config.retry_max_s, 0.1 * 2 ** min(attempt, 10))
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))

    async def close(self) -> None:
        """Commit what waits, within the stop deadline, and let go of the database. Call when `run` has ended."""
        if self._store is None:
            return
        if self.recovered and self.fenced_by is None:
            try:
                await within(self._flush(beats_due=True), self._config.stop_deadline_s)
            except (TimeoutError, RegistryError) as error:
                logger.warning(
                    "stopped with changes that are not in the database: %s",
                    error,
                    extra={"pending_changes": self.pending_changes},
                )
        await self._store.close()

    def _give_way(self, error: FencedError) -> None:
        """A newer registry writes. What waits was never acknowledged as durable: its agents keep it."""
        logger.error("%s", error, extra={"pending_changes": self.pending_changes})
        self.fenced_by = error
        self.fences += 1
        self._fenced_tries = 0
        self._refused_since_s = None
        self._problem = None
        self.is_failing = False
        self._changes.clear()
        self._beats.take(len(self._beats))
        self._explanations.clear()
        for waiting in self._waiting.values():
            if not waiting.settled.done():
                waiting.settled.set_result(error)
        self._waiting.clear()
        self._unsettled.clear()

    async def _take_the_term_back(self) -> None:
        """Fenced: take the next term once the registry that took ours over is seen at work no more.

        One of our own cluster, that Ray had replaced, may have started late; another cluster's may have ended. Raises
        FencedError while we are superseded.
        """
        # ever more rarely, since the database logs each refusal
        self._fenced_tries += 1
        period_s = self._config.epoch_check_s * min(4, self._fenced_tries)
        await asyncio.sleep(period_s * random.uniform(0.9, 1.1))
        # while a database is away nobody is seen at work in it: its holder gets the time to be seen again
        idle_s = self._config.term_idle_s
        refused_s = 0.0 if self._refused_since_s is None else self._clock.monotonic() - self._refused_since_s
        await self._recover(idle_s=idle_s if refused_s >= idle_s else _ONLY_LOOK_S)
        logger.warning("the newer registry is gone; this one writes again", extra={"term": self.term})
        self.fenced_by = None

    async def _give_grace(self) -> None:
        if self._owes_grace:
            assert self._store is not None
            await self._store.renew_every_lease()
            self._owes_grace = False

    def _note_problem(self, error: BaseException) -> None:
        if not self.is_failing:
            logger.warning("the registry goes on from memory: %s", error)
        self._counts = replace(self._counts, failures=self._counts.failures + 1)
        self.is_failing = True
        self._problem = error.why if isinstance(error, StoreUnavailableError) else first_line(error)

    def _note_back(self) -> None:
        if self.is_failing:
            logger.info("the database answers again", extra={"pending_changes": self.pending_changes})
            self._next_compare_s = 0.0
        self.is_failing = False
        self._problem = None

    async def _recover(self, idle_s: float | None = None) -> None:
        """Join the database: take our epoch, then everything alive. What agents told us meanwhile stays."""
        if self._store is None:
            self._store = await self._store_factory()
        store = self._store
        await store.open()
        epoch = await store.begin(self._config.ray_cluster, self._config.epoch, self._config.lease_s, idle_s)
        while await store.expire_old_epochs(self._config.sweep_limit):
            pass
        loaded = [instance async for instance in store.load_live()]
        self._roster.set_epoch(epoch.name, epoch.number, is_reset=True)
        # an agent whose call was under way when the last registry ended may be that long in noticing
        heard_s = self._clock.monotonic() + self._config.reconnect_grace_s
        if self.fenced_by is not None:
            # what we held and another may have changed, or never was committed, is worth nothing any more
            self._roster.forget_everybody()
        for instance in loaded:
            self._roster.adopt(instance, heard_s)
        self._rate.remember(store.lease_before_s, heard_s)
        # nor must those who were heard before stand out as silent among them
        self._roster.credit(math.inf, heard_s)
        self._next_compare_s = 0.0
        self._is_read.set()
        self.recovered_s = self._clock.monotonic()
        logger.info(
            "registry recovered from the database",
            extra={"instances": len(loaded), "epoch": epoch.name, "epoch_number": epoch.number},
        )

    async def _wait_for_work(self) -> None:
        """Until a change waits or the next beat flush is due; changes linger a little to share a commit."""
        if not self._changes:
            self._wake.clear()
            wait_s = max(0.0, self._next_beat_flush_s - self._clock.monotonic())
            try:
                await within(self._wake.wait(), wait_s)
            except TimeoutError:
                return
        await asyncio.sleep(self._config.linger_s)

    async def _check_epoch_due(self) -> None:
        """Notice a flip made by another hand, and end the instances of retired epochs.

        Also the probe that tells an idle registry, or one whose last flush failed, how the database is.
        """
        now_s = self._clock.monotonic()
        if now_s < self._next_epoch_check_s and not self.is_failing:
            return
        self._next_epoch_check_s = now_s + self._config.epoch_check_s
        assert self._store is not None
        await self._store.renew_term(self._roster.terms.lease_s)
        epoch = await self._store.current_epoch()
        self._roster.set_epoch(epoch.name, epoch.number)
        for instance_id in await self._store.expire_old_epochs(self._config.sweep_limit):
            self._roster.retire(instance_id)

    async def _flush_due(self) -> None:
        now_s = self._clock.monotonic()
        beats_due = now_s >= self._next_beat_flush_s
        if beats_due:
            self._next_beat_flush_s = now_s + self._config.flush_interval_s
            self._note_rate(now_s)
        await self._flush(beats_due)

    @property
    def beats_per_s(self) -> float | None:
        """Beats offered a second, over the last _RATE_S seconds; None before anything can be said."""
        (first_s, first), (last_s, last) = self._offered[0], self._offered[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else None

    def _note_rate(self, now_s: float) -> None:
        self._offered.append((now_s, self._beats.counts.offered))
        while now_s - self._offered[0][0] > _RATE_S:
            self._offered.popleft()

    async def _flush(self, beats_due: bool) -> None:
        """Commit every waiting change, then the beats if due. A failed batch goes back to its place."""
        started_s = self._clock.monotonic()
        before = self._counts
        statements = 0
        doubt: StoreDoubtError | None = None
        while doubt is None and (changes := self._changes.take(self._config.batch_limit)):
            try:
                statements += await self._commit_changes(changes)
            except StoreDoubtError as error:
                # explanations and beats do not wait for it
                doubt = error
        statements += await self._commit_explanations()
        # only the beats that are here now: those that come meanwhile must not keep changes waiting
        waiting = len(self._beats) if beats_due else 0
        while waiting > 0 and (heard := self._beats.take(self._config.beat_batch_limit)):
            await self._commit_beats(heard)
            waiting -= len(heard)
            statements += 1
        if statements:
            self._counts = replace(
                self._counts,
                flushes=self._counts.flushes + 1,
                statements=self._counts.statements + statements,
                last_flush_s=self._clock.monotonic() - started_s,
            )
            counts = self._counts
            rows = counts.changes_committed + counts.beats_committed - before.changes_committed - before.beats_committed
            self.on_flush(counts.last_flush_s, rows)
        if doubt is not None:
            raise doubt

    async def _commit_explanations(self) -> int:
        """Tell the database what became known of deaths, whose changes it has by now."""
        if not self._explanations:
            return 0
        assert self._store is not None
        told = dict(islice(self._explanations.items(), self._config.batch_limit))
        statements = 0
        async for part, answer in _in_parts(list(told.items()), self._explain_many):
            statements += 1
            if isinstance(answer, (StoreRejectedError, StoreDoubtError)):
                logger.warning("the database refused what is known of a death: %s", answer)
            for instance_id, cause in part:
                if self._explanations.get(instance_id) == cause:
                    del self._explanations[instance_id]
        return statements

    async def _explain_many(self, causes: Sequence[tuple[str, str]]) -> list[str]:
        assert self._store is not None
        return await self._store.refine_causes(dict(causes))

    # Changes

    async def _commit_changes(self, changes: list[Change]) -> int:
        """Commit a run of changes. Raises StoreDoubtError for those that the database refuses while it takes no other;
        one that it refuses beside others is at fault itself."""
        assert self._store is not None
        registrations = [change for change in changes if isinstance(change, RegisterChange)]
        now_s = self._clock.monotonic()
        statuses = [self._aged(change, now_s) for change in changes if isinstance(change, StatusChange)]
        commit = _Commit()
        left: list[Change] = [*registrations, *statuses]
        try:
            await self._commit_batch(registrations, partial(self._register_placed, commit), commit)
            waiting = {change.instance_id for change in commit.doubted}
            # a status waits for its registration
            later = [change for change in statuses if change.instance_id in waiting]
            statuses = [change for change in statuses if change.instance_id not in waiting]
            left = [*commit.doubted, *later, *statuses]
            await self._commit_batch(statuses, self._store.set_status_many, commit)
            left = [*commit.doubted, *later]
            if commit.doubts and not commit.applied:
                raise commit.doubts[0][1]
            for change, error in commit.doubts:
                await self._refuse(change, StoreRejectedError(error.why), commit)
            left = [*later]
        finally:
            # what was not committed returns to the front in its order, whatever went wrong; replaying a part
            # that was is harmless
            self._changes.put_back(left)
        return commit.statements

    async def _register_placed(self, commit: _Commit, changes: Sequence[RegisterChange]) -> list[Outcome]:
        assert self._store is not None
        placed, looks = await self._placed(changes)
        commit.statements += looks
        return await self._store.register_many(placed)

    async def _placed(self, changes: Sequence[RegisterChange]) -> tuple[list[RegisterChange], int]:
        """The registrations, each with the epoch that it belongs to, which the store refuses where that is retired; and
        how many statements that took."""
        assert self._store is not None
        placed: dict[Key, str | None] = {
            key_of(change): change.registration.started_epoch
            for change in changes
            if change.registration.started_epoch == self._roster.epoch
        }
        open_ones = [change for change in changes if key_of(change) not in placed and _may_belong_elsewhere(change)]
        if open_ones:
            epochs = await self._store.epochs_of([change.registration for change in open_ones])
            placed.update(zip(map(key_of, open_ones), epochs, strict=True))
        return [_in_epoch(change, placed.get(key_of(change))) for change in changes], bool(open_ones)

    def _aged(self, change: StatusChange, now_s: float) -> StatusChange:
        """The change as it is told now: the history has when it happened, and not when the database could be told."""
        waiting = self._waiting.get(key_of(change))
        return change if waiting is None else replace(change, age_s=max(0.0, now_s - waiting.since_s))

    async def _commit_batch(
        self, batch: Sequence[C], write: Callable[[Sequence[C]], Awaitable[list[Outcome]]], commit: _Commit
    ) -> None:
        """Commit a batch but for those that the database refuses, and note what became of it."""
        async for part, answer in _in_parts(batch, write):
            commit.statements += 1
            if isinstance(answer, StoreDoubtError):
                commit.doubts.append((part[0], answer))
            elif isinstance(answer, StoreRejectedError):
                await self._refuse(part[0], answer, commit)
            else:
                await self._take_outcomes(part, answer)
                commit.applied += sum(outcome.kind is OutcomeKind.APPLIED for outcome in answer)

    async def _take_outcomes(self, changes: Sequence[Change], outcomes: list[Outcome]) -> None:
        for change, outcome in zip(changes, outcomes, strict=True):
            if outcome.kind is OutcomeKind.APPLIED and outcome.cluster_epoch is not None:
                self._roster.move(change.instance_id, outcome.cluster_epoch)
            if self._contradicts(change, outcome):
                await self._correct(change.instance_id)
        # only now: an outage while correcting puts the whole batch back with its waiters
        for change, outcome in zip(changes, outcomes, strict=True):
            self._settle(change, outcome)
        self._counts = replace(self._counts, changes_committed=self._counts.changes_committed + len(changes))

    async def _refuse(self, change: Change, error: StoreRejectedError, commit: _Commit) -> None:
        """Give up a change that the database refuses; of a death only its cause."""
        logger.warning("the database refused a change for good: %s", error, extra={"instance_id": change.instance_id})
        if isinstance(change, StatusChange) and change.status is Status.DEAD:
            assert self._store is not None
            if change.cause not in (None, _CAUSE_REFUSED):
                plain = replace(change, cause=_CAUSE_REFUSED)
                await self._commit_batch([plain], self._store.set_status_many, commit)
                return
        if change.instance_id in self._roster:
            await self._correct(change.instance_id)
        self._settle(change, error)

    def _contradicts(self, change: Change, outcome: Outcome) -> bool:
        """Whether the database's answer shows that our memory of the instance is wrong."""
        known = self._roster.get(change.instance_id)
        if known is None:
            return False
        if outcome.kind is OutcomeKind.APPLIED or outcome.kind is OutcomeKind.UNCHANGED:
            # with more of it under way, memory is ahead
            return known.status is not outcome.status and self._unsettled[known.instance_id] == 1
        return True

    async def _correct(self, instance_id: str) -> None:
        """Take the database's word for an instance, unless it was changed while that was asked for."""
        assert self._store is not None
        before = self._roster.get(instance_id), self._unsettled[instance_id]
        row = await self._store.get_instance(instance_id)
        known, under_way = self._roster.get(instance_id), self._unsettled[instance_id]
        if known is not before[0] or under_way != before[1]:
            # what changed it settles it
            return
        if row is None:
            self._roster.forget(instance_id)
        else:
            self._roster.overwrite(row, self._clock.monotonic())

    def _settle(self, change: Change, outcome: Outcome | StoreRejectedError) -> None:
        waiting = self._waiting.pop(key_of(change), None)
        if waiting is None:
            return
        if not waiting.settled.done():
            waiting.settled.set_result(outcome)
        self._unsettled[change.instance_id] -= 1
        if self._unsettled[change.instance_id] <= 0:
            del self._unsettled[change.instance_id]

    # Anti-entropy

    async def _compare_due(self) -> None:
        now_s = self._clock.monotonic()
        if now_s < self._next_compare_s:
            return
        self._next_compare_s = now_s + self._config.compare_s
        before = self.healed
        await self._compare()
        self.compared_at = self._clock.utc()
        if self.healed > before:
            logger.warning("memory and database differed and were healed", extra={"instances": self.healed - before})

    async def _compare(self) -> None:
        """Look for instances that memory and database know differently, and heal them. Those with a change under
        way are left alone: it settles them."""
        assert self._store is not None
        held = {instance_id for instance_id in self._roster.ids() if instance_id not in self._unsettled}
        after = decode_cursor(None)
        while True:
            page = await self._store.live_states(after, _COMPARE_PAGE)
            for state in page:
                held.discard(state.instance_id)
                await self._heal(state)
            if len(page) < _COMPARE_PAGE:
                break
            after = page[-1][:2]
            await self._flush_due()
        for instance_id in islice(held, self._config.sweep_limit):
            if instance_id in self._roster and instance_id not in self._unsettled:
                await self._correct(instance_id)
                self.healed += 1

    async def _heal(self, state: LiveState) -> None:
        instance_id = state.instance_id
        if instance_id in self._unsettled:
            return
        known = self._roster.get(instance_id)
        if known is not None and (known.status, known.seq, known.cluster_epoch) == state[2:]:
            return
        self.healed += 1
        if known is None and self._roster.is_dead(instance_id):
            # dead is final, also where a database restored from a backup has forgotten it
            self.enqueue(
                StatusChange(
                    instance_id,
                    Status.DEAD,
                    cause="was dead already; the database had lost it",
                    number=self.next_number(),
                )
            )
        elif known is not None and known.seq > state.seq:
            if known.held is not None:
                hold = StatusChange(instance_id, known.status, None, known.cause, self.next_number(), known.drain_until)
                self.enqueue(hold)
            said = known.held or known.status
            self.enqueue(StatusChange(instance_id, said, known.seq, known.cause))
        else:
            await self._correct(instance_id)

    # Housekeeping

    async def _prune_due(self) -> None:
        """Forget what ended long ago, a little at a time: the next look comes at once where there is more."""
        now_s = self._clock.monotonic()
        if now_s < self._next_prune_s:
            return
        assert self._store is not None
        pruned = await self._store.prune_history(self._config.keep_history_s, self._config.prune_limit)
        is_done = pruned < self._config.prune_limit
        self._next_prune_s = now_s + (self._config.prune_s if is_done else self._config.flush_interval_s)
        self.pruned += pruned

    # Beats

    async def _commit_beats(self, heard: dict[str, float]) -> None:
        assert self._store is not None
        now_s = self._clock.monotonic()
        beats = [Beat(instance_id, now_s - heard_s) for instance_id, heard_s in heard.items()]
        lost: list[LostBeat] = []
        refused: list[RegistryError] = []
        taken = 0
        try:
            async for part, answer in _in_parts(beats, self._store.beat_many):
                if isinstance(answer, (StoreRejectedError, StoreDoubtError)):
                    refused.append(answer)
                else:
                    lost += answer
                    taken += len(part)
                if len(refused) == _MAX_REFUSED_BEATS:
                    break
        except BaseException:
            self._beats.put_back(heard)
            raise
        if refused and taken == 0 and isinstance(refused[0], StoreDoubtError):
            self._beats.put_back(heard)
            raise refused[0]
        if refused:
            # the rest of a batch that is refused again and again is not looked through
            logger.warning("the database refused beats: %s", refused[0], extra={"beats": len(beats) - taken})
            self._beats.counts.dropped += len(beats) - taken
        for beat in lost:
            # registered in memory, not yet in the database: its turn comes
            if not self.is_unsettled(beat.instance_id) and beat.instance_id in self._roster:
                await self._correct(beat.instance_id)
        self._counts = replace(self._counts, beats_committed=self._counts.beats_committed + taken - len(lost))


async def _in_parts(
    batch: Sequence[T], write: Callable[[Sequence[T]], Awaitable[R]]
) -> AsyncIterator[tuple[Sequence[T], R | StoreRejectedError | StoreDoubtError]]:
    """Write a batch: its parts as they are taken, each with the answer; alone, found by halving, each value that is
    refused, with the refusal."""
    if not batch:
        return
    try:
        answer = await write(batch)
    except (StoreRejectedError, StoreDoubtError) as error:
        if len(batch) == 1:
            yield batch, error
            return
    else:
        yield batch, answer
        return
    middle = len(batch) // 2
    for half in (batch[:middle], batch[middle:]):
        async for part in _in_parts(half, write):
            yield part


def _ignore(_seconds: float, _rows: int) -> None:
    """Nobody measures."""


def _may_belong_elsewhere(change: RegisterChange) -> bool:
    """Whether only the store knows its epoch: it was started in one that is not shown, or Ray may have restarted it."""
    registration = change.registration
    has_past = registration.started_epoch is not None or registration.actor_id is not None
    return registration.cluster_epoch is None and has_past


def _in_epoch(change: RegisterChange, epoch: str | None) -> RegisterChange:
    if change.registration.cluster_epoch is not None or epoch is None:
        return change
    return replace(change, registration=replace(change.registration, cluster_epoch=epoch))


def key_of(change: Change) -> Key:
    """What a change waits under: its agent's number for it, or, for one that has none, ours, below zero."""
    if change.seq is not None:
        return (change.instance_id, change.seq)
    assert isinstance(change, StatusChange)
    assert change.number is not None
    return (change.instance_id, -change.number)
