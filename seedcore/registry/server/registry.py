"""The registry itself: memory in front, one write loop behind. A plain class; `actor.py` puts it on Ray.

Owns its life, and what agents and operators change: registrations, statuses, beats, epochs. `queries` answers the
questions; the rules are in core.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

from seedcore import __version__
from seedcore.core.answers import BeatAnswer, OutcomeKind, Receipt
from seedcore.core.changes import RegisterChange, Registration, SequencedChange, StatusChange, check_until
from seedcore.core.clock import Clock
from seedcore.core.errors import (
    ForbiddenTransitionError,
    InvalidInputError,
    NotResolvableError,
    RegistryError,
    RegistryReplacedError,
    RegistryUnavailableError,
)
from seedcore.core.feed import Feed
from seedcore.core.instances import Verdict
from seedcore.core.lease import BeatRate, LeaseTerms
from seedcore.core.lifecycle import Status, is_allowed
from seedcore.core.limits import (
    check_beats,
    check_cause,
    check_duration_s,
    check_epoch,
    check_instance_id,
    check_key,
    check_kind,
    check_seq,
    check_status,
)
from seedcore.core.members import Members
from seedcore.core.ports import DeathWitness, OnDeath
from seedcore.core.timeouts import end
from seedcore.registry.protocol.messages import OLDEST_PROTOCOL, PROTOCOL, Hello
from seedcore.registry.protocol.outbox import MAX_BEATS_PER_MESSAGE, MAX_CHANGES_PER_MESSAGE
from seedcore.registry.server.backlog import key_of
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.database import StoreFactory
from seedcore.registry.server.expiry import Expiry
from seedcore.registry.server.queries import Queries
from seedcore.registry.server.receipts import Receipts, raise_refusal
from seedcore.registry.server.writer import Writer

logger = logging.getLogger(__name__)


class Registry(Queries):
    """See the module. `start()` and `stop()` are idempotent; every other method may be called at any time."""

    def __init__(
        self,
        config: RegistryConfig,
        store_factory: StoreFactory,
        *,
        watch_factory: Callable[[OnDeath], DeathWitness],
        clock: Clock | None = None,
    ) -> None:
        """Opens no connection, and needs no event loop yet."""
        clock = clock if clock is not None else Clock()
        rate = BeatRate(LeaseTerms(config.beat_interval_s, config.lease_s), config.max_beats_per_s)
        members = Members(rate.judged, config.max_instances, Feed(uuid.uuid4().hex, config.feed_capacity))
        writer = Writer(config, store_factory, members, rate, clock)
        expiry = Expiry(config, clock, members, writer, rate, watch_factory)
        hello = Hello(
            PROTOCOL,
            __version__,
            os.getpid(),
            config.node_id,
            clock.utc(),
            oldest_protocol=OLDEST_PROTOCOL,
            agent_call_s=config.agent_call_s,
        )
        super().__init__(config, clock, members, writer, expiry, rate, hello)
        self._receipts = Receipts(members, writer, rate)
        self._tasks: list[asyncio.Task[None]] = []
        self._is_stopping = False

    # Life

    def start(self) -> None:
        """Serve from memory at once; the database is joined in the background, however long that takes.

        Call it in the event loop that will serve.
        """
        if not self._tasks:
            self.expiry.start()
            self._tasks = [
                asyncio.create_task(self.writer.run(), name="registry-write"),
                asyncio.create_task(self.expiry.run(), name="registry-expiry"),
            ]

    async def stop(self) -> None:
        """Commit what waits, within a deadline, and release the database."""
        if self._is_stopping:
            return
        self._is_stopping = True
        await end(*self._tasks)
        await self.expiry.stop()
        await self.writer.close()

    # Changes

    async def register(self, registration: Registration, seq: int = 1) -> Receipt:
        """Register an instance, or refresh one that is registered.

        Raises InvalidInputError, InstanceDeadError, InstanceConflictError, RetiredEpochError, EpochLimitError,
        BacklogFullError, RegistryFullError, FencedError, or NodeDeadError for a node that Ray has declared dead; then
        nothing has changed.
        """
        check_kind("registration", registration, Registration).validated()
        check_seq(seq)
        change = RegisterChange(registration, seq)
        backlog = self.writer.backlog
        if not backlog.is_waiting(key_of(change)):
            backlog.require_room()
            self.expiry.require_node(registration.node_id)
            known = self.members.get(registration.instance_id)
            outcome = self.members.register(change, self._clock.monotonic(), self._clock.utc())
            raise_refusal(change, outcome)
            # at or below the known number it is a replay; a newer change of the instance may still wait
            if known is not None and seq <= known.seq:
                return self._receipts.of_replay(known, seq)
            backlog.offer(change)
        return await self._receipts.when_settled(change)

    async def set_status(
        self,
        instance_id: str,
        status: Status | str,
        seq: int | None = None,
        cause: str | None = None,
        *,
        after: str | None = None,
        duration_s: float | None = None,
    ) -> Receipt:
        """Change an instance's status. `seq` is the agent's own number of the change; others leave it out. `after` is
        the `registry` of the receipt of the change before it, where that may not be durable. A draining that is to end
        by itself does so after `duration_s` seconds, and the instance is alive again; a second call replaces the end.

        Raises InvalidInputError, UnknownInstanceError, InstanceDeadError, ForbiddenTransitionError, BacklogFullError,
        FencedError, RegistryUnavailableError where the instance is not known yet, or RegistryReplacedError where
        another registry took the change before; then nothing has changed.
        """
        check_instance_id(instance_id)
        if after is not None and after != self.members.feed.stream:
            raise RegistryReplacedError("it was restarted between two changes")
        backlog = self.writer.backlog
        number = backlog.next_number() if seq is None else None
        until = None if duration_s is None else self._clock.utc() + timedelta(seconds=check_duration_s(duration_s))
        change = check_until(
            StatusChange(instance_id, check_status(status), check_seq(seq), check_cause(cause), number, until)
        )
        if instance_id not in self.members and instance_id not in self.members.deaths:
            await self._require_read()
        if not backlog.is_waiting(key_of(change)):
            backlog.require_room()
            known = self.members.get(instance_id)
            outcome = self.members.set_status(change, self._clock.monotonic(), self._clock.utc())
            raise_refusal(change, outcome)
            if outcome.kind is OutcomeKind.UNCHANGED and known is not None and (seq is None or seq <= known.seq):
                return self._receipts.of_replay(known, known.seq if seq is None else seq)
            backlog.offer(change)
        return await self._receipts.when_settled(change)

    async def turn_agent(
        self, logical_id: str, status: Status | str, cause: str | None = None, *, duration_s: float | None = None
    ) -> dict[str, Receipt | RegistryError]:
        """An operator's change of every instance of an agent that can become `status`, as `set_status` makes it: each
        one's receipt, or its refusal, by instance id.

        Raises InvalidInputError, NotResolvableError where no instance lives, ForbiddenTransitionError where none of
        them can become that, RegistryUnavailableError where it is not known yet whether any does.
        """
        check_key("logical_id", logical_id)
        wanted = check_status(status)
        if not self.members.instances_of(logical_id):
            await self._require_read()
        rows = self.members.instances_of(logical_id)
        if not rows:
            raise NotResolvableError(logical_id, "no live instance is registered")
        able = [row for row in rows if row.status is wanted or is_allowed(row.status, wanted)]
        if wanted is Status.ALIVE:
            # an agent that starts reports by itself that it is ready
            able = [row for row in able if row.status is not Status.STARTING]
        if not able:
            now = ", ".join(sorted({row.status.value for row in rows}))
            raise ForbiddenTransitionError(rows[0].instance_id, now, wanted.value)
        ids = [row.instance_id for row in able]
        turned = await asyncio.gather(*(self._turned(instance_id, wanted, cause, duration_s) for instance_id in ids))
        return dict(zip(ids, turned, strict=True))

    async def _turned(
        self, instance_id: str, status: Status, cause: str | None, duration_s: float | None
    ) -> Receipt | RegistryError:
        try:
            return await self.set_status(instance_id, status, None, cause, duration_s=duration_s)
        except InvalidInputError:
            raise
        except RegistryError as error:
            return error

    async def deliver(self, changes: Sequence[SequencedChange]) -> list[Receipt | RegistryError]:
        """Many agents' registrations and status changes, at most MAX_CHANGES_PER_MESSAGE: each one's receipt, or its
        refusal, in their order. Changes of one instance must not be in one message."""
        if not isinstance(changes, (list, tuple)) or len(changes) > MAX_CHANGES_PER_MESSAGE:
            raise InvalidInputError("changes", f"must be a list of at most {MAX_CHANGES_PER_MESSAGE} changes")
        return await asyncio.gather(*(self._taken(change) for change in changes))

    async def _taken(self, sequenced: SequencedChange) -> Receipt | RegistryError:
        try:
            change = check_kind("change", sequenced, SequencedChange).change
            check_kind("change", change, (RegisterChange, StatusChange))
            if isinstance(change, RegisterChange):
                return await self.register(change.registration, change.seq)
            return await self.set_status(
                change.instance_id, change.status, change.seq, change.cause, after=sequenced.after
            )
        except RegistryError as error:
            return error
        except Exception as error:
            # a fault of ours in one agent's change must not fail the others'
            logger.exception("a change failed")
            return RegistryUnavailableError(f"it failed inside the actor: {error!r}")

    async def _require_read(self) -> None:
        """Wait a bounded time for the database to be read, as long as it may have instances that memory does not have.
        Raises RegistryUnavailableError where it is not read by then."""
        database = self.writer.database
        if database.may_know_more and not await database.until_read():
            raise RegistryUnavailableError(f"it has not read its database yet ({self.writer.problem}); try again")

    # Beats

    async def beat(self, instance_id: str) -> BeatAnswer:
        """Renew one lease."""
        return await self.beat_many([instance_id])

    async def beat_many(self, instance_ids: Sequence[str], loads: Mapping[str, float] | None = None) -> BeatAnswer:
        """Renew many leases in one call, at most MAX_BEATS_PER_MESSAGE. `loads` of some of them, by instance id, in a
        unit that the agents of a logical id share."""
        loads = loads if loads is not None else {}
        check_beats(instance_ids, loads, MAX_BEATS_PER_MESSAGE)
        now_s = self._clock.monotonic()
        database = self.writer.database
        renewal = self.members.renew(instance_ids, now_s)
        is_recovering = bool(renewal.unknown) and database.may_know_more
        if renewal.unknown or renewal.dead:
            for instance_id in renewal.unknown:
                check_instance_id(instance_id)
            lost = {*renewal.unknown, *renewal.dead}
            instance_ids = [instance_id for instance_id in instance_ids if instance_id not in lost]
        self.members.note_loads(loads)
        self.writer.backlog.offer_beats(instance_ids, now_s)
        return BeatAnswer(
            () if is_recovering else renewal.unknown,
            renewal.dead,
            self._rate.asked.beat_interval_s,
            self._rate.asked.lease_s,
            is_fenced=database.fenced_by is not None,
            relay=self._relay_for(instance_ids),
            is_recovering=is_recovering,
            retired=renewal.retired,
        )

    def _relay_for(self, instance_ids: Sequence[str]) -> str | None:
        """The relay that the sender of a message may use from now on: its instances are all on one node."""
        known = self.members.get(instance_ids[0]) if instance_ids else None
        return None if known is None or known.node_id is None else self.expiry.watch.relay_of(known.node_id)

    async def report_dead_call(self, instance_id: str) -> Verdict:
        """A caller's call found the instance's actor dead: ask Ray, which decides. Returns the verdict after it.

        Raises InvalidInputError or FencedError.
        """
        check_instance_id(instance_id)
        self.writer.backlog.require_open()
        return await self.expiry.check_reported(instance_id)

    # Epochs

    async def set_current_epoch(self, epoch: str) -> str:
        """Flip discovery to `epoch` in one step; instances of the epoch before are declared dead after it.

        Raises RetiredEpochError, EpochLimitError, FencedError, or StoreUnavailableError: a flip needs the database.
        """
        check_epoch(epoch)
        self.writer.backlog.require_open()
        flipped = await self.writer.database.readable().set_current_epoch(epoch)
        self.members.set_epoch(flipped.name, flipped.number)
        return flipped.name

    async def stage_epoch(self, epoch: str) -> bool:
        """Name an epoch that agents can register in before it is shown. Returns whether it is new. Raises as a flip."""
        check_epoch(epoch)
        self.writer.backlog.require_open()
        return await self.writer.database.readable().stage_epoch(epoch)
