"""The registry itself: memory in front, one write loop behind. A plain class; `actor.py` puts it on Ray.

Owns the roster and what is asked of it; `flusher.py` owns the batches and the store, `expiry.py` the deaths. The rules
are in core.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import assert_never

from seedcore import __version__
from seedcore.core.answers import (
    Answer,
    BeatAnswer,
    InstanceFilter,
    Listing,
    NotResolved,
    Origin,
    Outcome,
    OutcomeKind,
    Receipt,
    Resolution,
)
from seedcore.core.changes import Change, RegisterChange, Registration, SequencedChange, StatusChange, check_until
from seedcore.core.clock import Clock
from seedcore.core.errors import (
    EpochLimitError,
    FencedError,
    FollowersFullError,
    ForbiddenTransitionError,
    InstanceConflictError,
    InstanceDeadError,
    InvalidInputError,
    NotResolvableError,
    RegistryError,
    RegistryReplacedError,
    RegistryUnavailableError,
    RetiredEpochError,
    StoreRejectedError,
    StoreUnavailableError,
    UnknownInstanceError,
)
from seedcore.core.feed import Feed, FeedBatch
from seedcore.core.instances import Epoch, EpochRecord, Instance, Transition, Verdict
from seedcore.core.lease import BeatRate, LeaseTerms
from seedcore.core.lifecycle import Status, is_allowed
from seedcore.core.limits import (
    MAX_ID_CHARS,
    MAX_PAGE,
    check_beats,
    check_cause,
    check_duration_s,
    check_epoch,
    check_instance_id,
    check_key,
    check_kind,
    check_seq,
    check_status,
    check_text,
    operators_cause,
)
from seedcore.core.paging import check_limit, check_within_s, decode_cursor, decode_death_cursor, encode_cursor
from seedcore.core.places import Places
from seedcore.core.ports import DeathWitness, OnDeath
from seedcore.core.roster import Roster
from seedcore.core.timeouts import end, within
from seedcore.registry.protocol.messages import (
    HISTORY_LIMIT,
    OLDEST_PROTOCOL,
    PROTOCOL,
    STEPS_LIMIT,
    Description,
    Health,
    Hello,
    Observed,
    OperationResult,
)
from seedcore.registry.protocol.outbox import MAX_BEATS_PER_MESSAGE, MAX_CHANGES_PER_MESSAGE
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.expiry import Expiry
from seedcore.registry.server.flusher import StoreFactory, Writer, key_of

logger = logging.getLogger(__name__)

_PAST_S = 2.0
MAX_FEED_WAIT_S = 30.0
_FEED_ANSWERS_PER_S = 1000.0
_FEED_LINGER_MAX_S = 0.5
_PLACE_KEPT_S = 10.0  # the time that a follower may take to list everybody


class Registry:
    """See the module. `start()` and `stop()` are idempotent; every other method may be called at any time."""

    def __init__(
        self,
        config: RegistryConfig,
        store_factory: StoreFactory,
        *,
        watch_factory: Callable[[OnDeath], DeathWitness],
        clock: Clock | None = None,
    ) -> None:
        """Tries no connection, and needs no event loop yet."""
        self._config = config
        self._clock = clock if clock is not None else Clock()
        self._rate = BeatRate(LeaseTerms(config.beat_interval_s, config.lease_s), config.max_beats_per_s)
        self._roster = Roster(
            self._rate.judged,
            config.max_instances,
            Feed(uuid.uuid4().hex, config.feed_capacity),
        )
        self._writer = Writer(config, store_factory, self._roster, self._rate, self._clock)
        self._places = Places(config.max_followers)
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._expiry = Expiry(config, self._clock, self._roster, self._writer, self._rate, watch_factory)
        self._hello = Hello(
            PROTOCOL,
            __version__,
            os.getpid(),
            config.node_id,
            self._clock.utc(),
            oldest_protocol=OLDEST_PROTOCOL,
            agent_call_s=config.agent_call_s,
        )

    # Life

    def start(self) -> None:
        """Serve from memory at once; the database is joined in the background, however long that takes.

        Call it in the event loop that will serve.
        """
        if not self._tasks:
            self._expiry.start()
            self._tasks = [
                asyncio.create_task(self._writer.run(), name="registry-write"),
                asyncio.create_task(self._expiry.run(), name="registry-expiry"),
            ]

    async def stop(self) -> None:
        """Commit what waits, within a deadline, and let go of the database."""
        if self._stopping:
            return
        self._stopping = True
        await end(*self._tasks)
        await self._expiry.stop()
        await self._writer.close()

    async def hello(self) -> Hello:
        """Who answers here."""
        return self._hello

    # Writing

    async def take(self, change: SequencedChange) -> Receipt:
        """See RegistryApi.take."""
        inner = check_kind("change", change, SequencedChange).change
        check_kind("change", inner, (RegisterChange, StatusChange))
        if isinstance(inner, RegisterChange):
            return await self._register(inner)
        if change.after is not None and change.after != self._roster.feed.stream:
            raise RegistryReplacedError("it was restarted between two changes")
        if inner.seq is None:
            raise InvalidInputError("seq", "must be the agent's number of the change")
        return await self._set_status(StatusChange(inner.instance_id, inner.status, inner.seq, inner.cause))

    async def _register(self, change: RegisterChange) -> Receipt:
        registration = check_kind("registration", change.registration, Registration).validated()
        seq = change.seq
        check_seq(seq)
        if not self._writer.is_waiting(key_of(change)):
            self._writer.require_room()
            self._expiry.require_node(registration.node_id)
            known = self._roster.get(registration.instance_id)
            outcome = self._roster.register(change, self._clock.monotonic(), self._clock.utc())
            _raise_refusal(change, outcome)
            # at or below the known number it is a replay; a newer change of the instance may still wait
            if known is not None and seq <= known.seq:
                return self._receipt(known, seq, durable=not self._writer.is_unsettled(known.instance_id))
            self._writer.enqueue(change)
        return await self._receipt_when_settled(change)

    async def _set_status(self, change: StatusChange) -> Receipt:
        instance_id, seq = check_instance_id(change.instance_id), check_seq(change.seq)
        change = check_until(replace(change, status=check_status(change.status), cause=check_cause(change.cause)))
        if instance_id not in self._roster and not self._roster.is_dead(instance_id):
            await self._require_read()
        if not self._writer.is_waiting(key_of(change)):
            self._writer.require_room()
            known = self._roster.get(instance_id)
            outcome = self._roster.set_status(change, self._clock.monotonic(), self._clock.utc())
            _raise_refusal(change, outcome)
            if outcome.kind is OutcomeKind.UNCHANGED and known is not None and (seq is None or seq <= known.seq):
                durable = not self._writer.is_unsettled(instance_id)
                return self._receipt(known, known.seq if seq is None else seq, durable)
            self._writer.enqueue(change)
        return await self._receipt_when_settled(change)

    async def drain(
        self,
        logical_ids: Sequence[str] = (),
        reason: str | None = None,
        by: str | None = None,
        duration_s: float | None = None,
        *,
        instance_ids: Sequence[str] = (),
    ) -> list[OperationResult]:
        """See RegistryApi.drain."""
        cause = operators_cause(reason, by)
        return await self._operate(Status.DRAINING, logical_ids, instance_ids, cause, duration_s)

    async def undrain(
        self,
        logical_ids: Sequence[str] = (),
        reason: str | None = None,
        by: str | None = None,
        *,
        instance_ids: Sequence[str] = (),
    ) -> list[OperationResult]:
        """See RegistryApi.undrain."""
        return await self._operate(Status.ALIVE, logical_ids, instance_ids, operators_cause(reason, by))

    async def deregister(
        self,
        logical_ids: Sequence[str] = (),
        reason: str | None = None,
        by: str | None = None,
        *,
        instance_ids: Sequence[str] = (),
    ) -> list[OperationResult]:
        """See RegistryApi.deregister."""
        return await self._operate(Status.DEAD, logical_ids, instance_ids, operators_cause(reason, by))

    async def _operate(
        self,
        status: Status,
        logical_ids: Sequence[str],
        instance_ids: Sequence[str],
        cause: str,
        duration_s: float | None = None,
    ) -> list[OperationResult]:
        for name, ids in (("logical_ids", logical_ids), ("instance_ids", instance_ids)):
            if not isinstance(ids, (list, tuple)) or len(ids) > MAX_PAGE:
                raise InvalidInputError(name, f"must be a list of at most {MAX_PAGE} ids")
        for logical_id in logical_ids:
            check_key("logical_id", logical_id)
        for instance_id in instance_ids:
            check_instance_id(instance_id)
        until = None if duration_s is None else self._clock.utc() + timedelta(seconds=check_duration_s(duration_s))
        rows = {logical_id: self._roster.instances_of(logical_id) for logical_id in logical_ids}
        if not all(rows.values()) or not all(instance_id in self._roster for instance_id in instance_ids):
            await self._require_read()
            rows = {logical_id: self._roster.instances_of(logical_id) for logical_id in logical_ids}
        results = [
            OperationResult(
                None,
                logical_id,
                error=NotResolvableError(logical_id, NotResolved.NOT_REGISTERED, "no live instance is registered"),
            )
            for logical_id, found in rows.items()
            if not found
        ]
        wanted = [row.instance_id for found in rows.values() for row in _able(found, status)]
        operated = (self._operated(one, status, cause, until) for one in dict.fromkeys([*wanted, *instance_ids]))
        return results + await asyncio.gather(*operated)

    async def _operated(self, instance_id: str, status: Status, cause: str, until: datetime | None) -> OperationResult:
        known = self._roster.get(instance_id)
        logical_id = None if known is None else known.logical_id
        change = StatusChange(instance_id, status, None, cause, self._writer.next_number(), until)
        try:
            if status is Status.ALIVE and known is not None and known.status is Status.STARTING:
                # it reports by itself that it is ready
                raise ForbiddenTransitionError(instance_id, known.status.value, status.value)
            receipt = await self._set_status(change)
        except InvalidInputError:
            raise
        except RegistryError as error:
            return OperationResult(instance_id, logical_id, error=error)
        return OperationResult(instance_id, logical_id, receipt.status, receipt.durable, receipt.why)

    async def deliver(self, changes: Sequence[SequencedChange]) -> list[Receipt | RegistryError]:
        """See RegistryApi.deliver."""
        if not isinstance(changes, (list, tuple)) or len(changes) > MAX_CHANGES_PER_MESSAGE:
            raise InvalidInputError("changes", f"must be a list of at most {MAX_CHANGES_PER_MESSAGE} changes")
        return await asyncio.gather(*(self._taken(change) for change in changes))

    async def _taken(self, change: SequencedChange) -> Receipt | RegistryError:
        try:
            return await self.take(change)
        except RegistryError as error:
            return error
        except Exception as error:
            # one agent's trouble with a fault of ours is not the others'
            logger.exception("a change failed")
            return RegistryUnavailableError(f"it failed inside the actor: {error!r}")

    async def beat_many(self, instance_ids: Sequence[str], loads: Mapping[str, float] | None = None) -> BeatAnswer:
        """Renew many leases in one call, at most MAX_BEATS_PER_MESSAGE. `loads` of some of them, by instance id, in
        whatever unit the agents of a logical id share."""
        told = loads if loads is not None else {}
        check_beats(instance_ids, told, MAX_BEATS_PER_MESSAGE)
        now_s = self._clock.monotonic()
        renewal = self._roster.renew(instance_ids, now_s)
        is_recovering = bool(renewal.unknown) and self._writer.may_know_more
        if renewal.unknown or renewal.dead:
            for instance_id in renewal.unknown:
                check_instance_id(instance_id)
            lost = {*renewal.unknown, *renewal.dead}
            instance_ids = [instance_id for instance_id in instance_ids if instance_id not in lost]
        self._roster.note_loads(told)
        self._writer.offer_beats(instance_ids, now_s)
        return BeatAnswer(
            () if is_recovering else renewal.unknown,
            renewal.dead,
            self._rate.asked.beat_interval_s,
            self._rate.asked.lease_s,
            is_fenced=self._writer.fenced_by is not None,
            relay=self._relay_for(instance_ids),
            is_recovering=is_recovering,
            retired=renewal.retired,
        )

    async def _require_read(self) -> None:
        """Wait a bounded time for the database to be read, as long as it may have who memory does not know; raise
        RegistryUnavailableError where it is not."""
        if self._writer.may_know_more and not await self._writer.until_read():
            raise RegistryUnavailableError(f"it has not read its database yet ({self._writer.problem}); try again")

    def _relay_for(self, instance_ids: Sequence[str]) -> str | None:
        """Who beats in one message lives on one node: its relay may gather what they say from now on."""
        known = self._roster.get(instance_ids[0]) if instance_ids else None
        return None if known is None or known.node_id is None else self._expiry.watch.relay_of(known.node_id)

    async def report_dead_call(self, instance_id: str) -> Verdict:
        """A caller's call found the instance's actor dead: ask Ray, and believe nobody else. The verdict after it.

        Raises InvalidInputError or FencedError.
        """
        check_instance_id(instance_id)
        self._writer.require_room()
        return await self._expiry.check_reported(instance_id)

    async def set_current_epoch(self, epoch: str) -> str:
        """Flip discovery to `epoch` in one step; instances of the epoch before are declared dead after it.

        Raises RetiredEpochError, EpochLimitError, FencedError, or StoreUnavailableError: a flip needs the database.
        """
        check_epoch(epoch)
        self._writer.require_room()
        flipped = await self._writer.store().set_current_epoch(epoch)
        self._roster.set_epoch(flipped.name, flipped.number)
        return flipped.name

    async def stage_epoch(self, epoch: str) -> bool:
        """Name an epoch that agents can register in before it is shown; whether it is new. Raises as a flip."""
        check_epoch(epoch)
        self._writer.require_room()
        return await self._writer.store().stage_epoch(epoch)

    # Reading

    async def list_epochs(self, limit: int = 20) -> list[EpochRecord]:
        """The newest epochs, newest first. Raises StoreUnavailableError."""
        return await self._writer.store().list_epochs(limit)

    async def resolve(self, logical_ids: Sequence[str], *, allow_late: bool = False) -> Answer[list[Resolution]]:
        """The best instance of each agent, or why there is none; at most MAX_PAGE at once. Fresh ones only, unless
        `allow_late` takes one that has missed a beat where nobody is fresh."""
        if not isinstance(logical_ids, (list, tuple)) or not 1 <= len(logical_ids) <= MAX_PAGE:
            raise InvalidInputError("logical_ids", f"must be a list of 1 to {MAX_PAGE} ids")
        for logical_id in logical_ids:
            check_key("logical_id", logical_id)
        now_s, at = self._expiry.attentive_now_s(), self._clock.utc()
        found = []
        for logical_id in logical_ids:
            answer = self._roster.resolve(logical_id, now_s, allow_late=allow_late)
            if answer.instance is not None:
                answer = replace(answer, instance=self._roster.observed(answer.instance, now_s, at))
            found.append(answer)
        return Answer(found, Origin.REGISTRY, at, self._roster.version, complete=self._writer.is_complete)

    async def page(self, wanted: InstanceFilter, limit: int = 100, cursor: str | None = None) -> Listing:
        """See RegistryApi.page."""
        check_kind("wanted", wanted, InstanceFilter).validated()
        if wanted.statuses is not None and Status.DEAD in wanted.statuses:
            if wanted.verdicts is not None:
                raise InvalidInputError("verdict", "the dead have none")
            return await self._writer.store().list_instances(wanted, limit, cursor)
        after = decode_cursor(cursor)
        now_s, at = self._expiry.attentive_now_s(), self._clock.utc()
        rows, has_more = self._roster.page(wanted, after, check_limit(limit), now_s)
        return Listing(
            items=tuple(self._roster.observed(row, now_s, at) for row in rows),
            source=Origin.REGISTRY,
            as_of=at,
            version=self._roster.version,
            complete=self._writer.is_complete,
            next_cursor=encode_cursor(rows[-1]) if has_more else None,
            stream=self._roster.feed.stream,
            verdicts=self._roster.verdicts_told(rows),
            loads=self._roster.loads_of(rows),
        )

    async def changes(
        self, wanted: InstanceFilter, stream: str | None, version: int, wait_s: float = 0.0, follower: str | None = None
    ) -> FeedBatch:
        """See RegistryApi.changes."""
        check_kind("wanted", wanted, InstanceFilter).validated()
        if type(version) is not int or version < 0:
            raise InvalidInputError("version", f"must be a whole number from 0, not {version!r}")
        if type(wait_s) not in {int, float} or not 0 <= wait_s <= MAX_FEED_WAIT_S:
            raise InvalidInputError("wait_s", f"must be from 0 to {MAX_FEED_WAIT_S:g} seconds, not {wait_s!r}")
        feed = self._roster.feed
        # before it lists, or is answered: one that will have to go away is no burden until then
        if follower is not None:
            self._claim_place(check_text("follower", follower, MAX_ID_CHARS), wait_s + _PLACE_KEPT_S)
        batch = feed.since(stream, version, wanted)
        if not batch.is_reset and not batch.changes and wait_s > 0:
            # one without a name has a place only while it waits
            passing = None if follower is not None else uuid.uuid4().hex
            if passing is not None:
                self._claim_place(passing, wait_s + _FEED_LINGER_MAX_S)
            news = asyncio.Event()
            number = feed.follow(wanted, news.set)
            try:
                await within(news.wait(), wait_s)
                # many followers are answered more rarely, with more each time: so many answers a second in all
                await asyncio.sleep(min(_FEED_LINGER_MAX_S, feed.followers / _FEED_ANSWERS_PER_S))
            except TimeoutError:
                pass
            finally:
                feed.unfollow(number)
                if passing is not None:
                    self._places.release(passing)
            batch = feed.since(stream, version, wanted)
        return batch if self._writer.is_complete else replace(batch, complete=False)

    def _claim_place(self, follower: str, duration_s: float) -> None:
        if not self._places.claim(follower, duration_s, self._clock.monotonic()):
            raise FollowersFullError(self._places.limit)

    async def get_instance(self, instance_id: str) -> Answer[Instance]:
        """One instance, dead or alive.

        Raises UnknownInstanceError, or StoreUnavailableError where only the database could tell.
        """
        check_instance_id(instance_id)
        now_s, at = self._expiry.attentive_now_s(), self._clock.utc()
        known = self._roster.get(instance_id)
        if known is not None:
            found = self._roster.observed(known, now_s, at)
            return Answer(found, Origin.REGISTRY, at, self._roster.version, complete=True)
        stored = await self._writer.store().get_instance(instance_id)
        if stored is None:
            raise UnknownInstanceError(instance_id)
        return Answer(stored, Origin.REGISTRY, at, self._roster.version, complete=True)

    async def current_epoch(self) -> Answer[Epoch]:
        """The epoch that listings show. Raises StoreUnavailableError until the database has said it."""
        try:
            epoch = await self._writer.store().current_epoch()
        except StoreUnavailableError:
            if self._roster.epoch == "":
                raise
            # nobody flips one while the database is away
            epoch = self._roster.known_epoch
        return Answer(epoch, Origin.REGISTRY, self._clock.utc(), self._roster.version, complete=True)

    async def transitions(self, logical_id: str, limit: int = 100) -> list[Transition]:
        """The newest steps of an agent's instances, newest first. Raises StoreUnavailableError."""
        check_key("logical_id", logical_id)
        return await self._writer.store().transitions(logical_id, check_limit(limit))

    async def deaths(self, limit: int = 100, cursor: str | None = None, within_s: float | None = None) -> Listing:
        """Who died, of every agent and epoch, the last first; with `within_s` only within that many seconds. Raises
        InvalidInputError or StoreUnavailableError."""
        decode_death_cursor(cursor)
        return await self._writer.store().deaths(check_limit(limit), cursor, check_within_s(within_s))

    async def describe(self, logical_id: str) -> Description:
        """One agent: its live instances from memory, its history from the database if that answers."""
        check_key("logical_id", logical_id)
        history: list[Instance] = []
        steps: list[Transition] = []
        complete = False
        try:
            # who lives is known whatever the database does: nobody waits long for what was
            history, steps = await within(self._past_of(logical_id), _PAST_S)
            complete = True
        except (TimeoutError, StoreUnavailableError) as error:
            logger.debug("history not readable: %s", error)
        now_s, at = self._expiry.attentive_now_s(), self._clock.utc()
        live = tuple(
            Observed(
                self._roster.observed(row, now_s, at),
                self._roster.verdict(row.instance_id, now_s),
                self._roster.silence_s(row.instance_id, now_s),
            )
            for row in self._roster.instances_of(logical_id)
        )
        version = self._roster.version
        return Description(logical_id, live, tuple(history), Origin.REGISTRY, at, version, complete, tuple(steps))

    async def _past_of(self, logical_id: str) -> tuple[list[Instance], list[Transition]]:
        store = self._writer.store()
        return await store.history(logical_id, HISTORY_LIMIT), await store.transitions(logical_id, STEPS_LIMIT)

    async def health(self) -> Health:
        """The registry's own state."""
        return Health(
            hello=self._hello,
            as_of=self._clock.utc(),
            recovered=self._writer.recovered,
            store_problem=self._writer.problem,
            store_kind=self._config.store_kind,
            term=self._writer.term,
            fenced_by=None if self._writer.fenced_by is None else self._writer.fenced_by.in_force,
            epoch=self._roster.epoch or None,
            lease_s=self._roster.terms.lease_s,
            beat_interval_s=self._rate.asked.beat_interval_s,
            instances={status.value: n for status, n in self._roster.count_by_status().items()},
            pending_changes=self._writer.pending_changes,
            pending_beats=self._writer.pending_beats,
            credited_s=self._expiry.credited_s,
            is_frozen=self._expiry.is_frozen,
            deaths_reported=self._expiry.deaths_reported,
            watch_problem=self._expiry.watch.problem,
            relays=self._expiry.watch.relays,
            watched=self._expiry.watch.watched,
            followers=self._places.taken(self._clock.monotonic()),
            silent=self._roster.silent,
            became_silent=self._roster.became_silent,
            healed=self._writer.healed,
            pruned=self._writer.pruned,
            compared_at=self._writer.compared_at,
            flush=self._writer.counts,
            beats_per_s=self._writer.beats_per_s,
            fences=self._writer.fences,
            came_back=self._roster.came_back,
            deaths_declared=self._expiry.deaths_declared,
            notes=self._config.notes,
            unwatched=self._expiry.unwatched,
        )

    # Receipts

    async def _receipt_when_settled(self, change: Change) -> Receipt:
        settled = await self._writer.settled(key_of(change))
        if isinstance(settled, (StoreRejectedError, FencedError)):
            raise settled
        if settled is not None:
            _raise_refusal(change, settled)
        instance_id = change.instance_id
        known = self._roster.get(instance_id)
        status = settled.status if settled is not None and settled.status is not None else _wanted(change)
        return Receipt(
            instance_id=instance_id,
            status=known.status if known is not None else status,
            seq=change.seq or 0,
            durable=settled is not None,
            epoch=known.cluster_epoch if known is not None else None,
            why=None if settled is not None else (self._writer.problem or "the database is slow"),
            registry=self._roster.feed.stream,
            beat_interval_s=self._rate.asked.beat_interval_s,
            lease_s=self._rate.asked.lease_s,
        )

    def _receipt(self, known: Instance, seq: int, durable: bool) -> Receipt:
        why = None if durable else (self._writer.problem or "the database is slow")
        return Receipt(
            instance_id=known.instance_id,
            status=known.status,
            seq=seq,
            durable=durable,
            epoch=known.cluster_epoch or None,
            why=why,
            registry=self._roster.feed.stream,
            beat_interval_s=self._rate.asked.beat_interval_s,
            lease_s=self._rate.asked.lease_s,
        )


def _able(rows: Sequence[Instance], status: Status) -> Sequence[Instance]:
    """Those of an agent's instances that can become `status`; all where none can, so that each is refused."""
    able = [row for row in rows if row.status is status or is_allowed(row.status, status)]
    if status is Status.ALIVE:
        able = [row for row in able if row.status is not Status.STARTING]
    return able or rows


def _wanted(change: Change) -> Status:
    return change.status if isinstance(change, StatusChange) else Status.STARTING


def _raise_refusal(change: Change, outcome: Outcome) -> None:
    """Turn an outcome that changed nothing into its error."""
    instance_id = change.instance_id
    kind = outcome.kind
    if kind is OutcomeKind.APPLIED or kind is OutcomeKind.UNCHANGED:
        return
    if kind is OutcomeKind.UNKNOWN:
        raise UnknownInstanceError(instance_id)
    if kind is OutcomeKind.DEAD:
        raise InstanceDeadError(instance_id, outcome.cause)
    if kind is OutcomeKind.FORBIDDEN:
        raise ForbiddenTransitionError(instance_id, str(outcome.status), str(_wanted(change)))
    if kind is OutcomeKind.CONFLICT:
        assert isinstance(change, RegisterChange)
        raise InstanceConflictError(instance_id, change.registration.logical_id)
    if kind is OutcomeKind.RETIRED_EPOCH:
        raise RetiredEpochError(str(outcome.cluster_epoch))
    if kind is OutcomeKind.EPOCH_LIMIT:
        raise EpochLimitError(str(outcome.cluster_epoch))
    assert_never(kind)
