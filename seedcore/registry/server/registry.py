"""The registry itself: memory in front, one write loop behind. A plain class; `actor.py` puts it on Ray.

Owns its life, and what agents change: registrations, statuses, beats; and the epochs. `operations` has what operators
change, `queries` answers the questions; the rules are in core.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from seedcore import __version__
from seedcore.core.answers import BeatAnswer, KnownBefore, Outcome, Receipt
from seedcore.core.changes import Change, HoldChange, RegisterChange, Registration, SequencedChange, StatusChange
from seedcore.core.clock import Clock
from seedcore.core.errors import (
    InvalidInputError,
    RegistryError,
    RegistryFullError,
    RegistryReplacedError,
    RegistryUnavailableError,
)
from seedcore.core.feed import Feed
from seedcore.core.holds import AGENTS_KINDS, Hold
from seedcore.core.instances import Verdict
from seedcore.core.lease import BeatRate, LeaseTerms
from seedcore.core.limits import (
    check_beats,
    check_cause,
    check_epoch,
    check_instance_id,
    check_kind,
    check_seq,
    check_status,
)
from seedcore.core.members import Members
from seedcore.core.memory_bound import MemoryBound
from seedcore.core.ports import DeathWitness, OnDeath
from seedcore.core.timeouts import end
from seedcore.registry.protocol.messages import OLDEST_PROTOCOL, PROTOCOL, Hello
from seedcore.registry.protocol.outbox import MAX_BEATS_PER_MESSAGE, MAX_CHANGES_PER_MESSAGE
from seedcore.registry.server.backlog import key_of
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.database import StoreFactory
from seedcore.registry.server.expiry import Expiry
from seedcore.registry.server.journal import EpochStep
from seedcore.registry.server.operations import Operations
from seedcore.registry.server.receipts import raise_refusal
from seedcore.registry.server.writer import Writer

logger = logging.getLogger(__name__)


class Registry(Operations):
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
        feed = Feed(uuid.uuid4().hex, config.feed_capacity, compacts=True)
        memory = MemoryBound(config.max_instance_bytes)
        members = Members(rate.judged, config.max_instances, feed, memory=memory)
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

    async def take(self, change: SequencedChange) -> Receipt:
        """See RegistryApi.take."""
        (answer,) = await self._answers([change])
        if isinstance(answer, RegistryError):
            raise answer
        return answer

    async def deliver(self, changes: Sequence[SequencedChange]) -> list[Receipt | RegistryError]:
        """See RegistryApi.deliver."""
        if not isinstance(changes, (list, tuple)) or len(changes) > MAX_CHANGES_PER_MESSAGE:
            raise InvalidInputError("changes", f"must be a list of at most {MAX_CHANGES_PER_MESSAGE} changes")
        return await self._answers(changes)

    async def _answers(self, changes: Sequence[SequencedChange]) -> list[Receipt | RegistryError]:
        """Apply changes in their order, and wait for all of them together."""
        unread: RegistryError | None = None
        taken: list[Change | Receipt | RegistryError] = []
        for change in changes:
            try:
                inner = self._as_received(change)
                if unread is None and self._may_be_unread(inner):
                    unread = await self._why_unread()
                taken.append(unread if unread is not None and self._may_be_unread(inner) else self._taken(inner))
            except RegistryError as error:
                taken.append(error)
            except Exception as error:
                # one agent's trouble with a fault of ours is not the others'
                logger.exception("a change failed")
                taken.append(RegistryUnavailableError(f"it failed inside the actor: {error!r}"))
        answers = await self._receipts.when_settled(taken)
        return [
            self._brought_alive(change, answer) if isinstance(change, RegisterChange) and change.is_alive else answer
            for change, answer in zip(taken, answers, strict=True)
        ]

    async def _why_unread(self) -> RegistryUnavailableError | None:
        """Wait a bounded time for the database to be read. Returns why it is not."""
        try:
            await self.writer.require_read()
        except RegistryUnavailableError as error:
            return error
        return None

    def _may_be_unread(self, change: Change) -> bool:
        """Whether only the database may know the instance, and is to be read first. A registration needs no reading."""
        if isinstance(change, RegisterChange) and not change.is_update:
            return False
        return change.instance_id not in self.members and change.instance_id not in self.members.deaths

    def _taken(self, change: Change) -> Change | Receipt:
        """Apply a change to memory and queue it. Returns it, or the receipt of a replay."""
        if isinstance(change, RegisterChange):
            return self._register(change)
        return self._change(change)

    def _register(self, change: RegisterChange) -> Change | Receipt:
        registration, seq = change.registration, change.seq
        if not self.writer.backlog.is_waiting(key_of(change)):
            self.writer.backlog.require_room()
            self.expiry.require_node(registration.node_id)
            known = self.members.get(registration.instance_id)
            outcome = self._enter(change.alone())
            raise_refusal(change, outcome)
            # at or below the known number it is a replay; a newer change of the instance may still wait
            if known is not None and seq <= known.seq:
                return self._receipts.of_replay(known, seq)
            self.writer.backlog.offer(change)
            self.expiry.drains.place(registration.instance_id)
            self.expiry.processes.settle(registration.instance_id)
        return change

    def _brought_alive(self, change: RegisterChange, answer: Receipt | RegistryError) -> Receipt | RegistryError:
        """The answer to a registration that is alive: without a database it does not wait for its epoch."""
        if isinstance(answer, RegistryError) or answer.durable:
            return answer
        self.members.set_status(change.status_change(), self._clock.monotonic(), self._clock.utc())
        known = self.members.get(change.instance_id)
        return answer if known is None else replace(answer, status=known.status)

    def _enter(self, change: RegisterChange) -> Outcome:
        """Apply a registration to memory. Raises RegistryFullError."""
        try:
            outcome = self.members.register(change, self._clock.monotonic(), self._clock.utc())
        except RegistryFullError as error:
            self.fullness.note_refused(error)
            raise
        self.fullness.look()
        return outcome

    def _as_received(self, sent: SequencedChange) -> Change:
        """An agent's change with nothing but what an agent decides. Its hold begins now."""
        change = check_kind("change", sent, SequencedChange).change
        if not isinstance(change, (RegisterChange, StatusChange, HoldChange)):
            raise InvalidInputError("change", f"must be of an agent, not of type {type(change).__name__}")
        if sent.after is not None and sent.after != self.members.feed.stream:
            raise RegistryReplacedError("it was restarted between two changes")
        if isinstance(change, RegisterChange):
            check_kind("registration", change.registration, Registration).validated()
            check_seq(change.seq - 1 if change.is_alive else change.seq)
            return change
        check_instance_id(change.instance_id)
        if isinstance(change, HoldChange) and change.validated().kind not in AGENTS_KINDS:
            agents = " or ".join(sorted(AGENTS_KINDS))
            raise InvalidInputError("kind", f"must be one that an agent changes, {agents}, not {change.kind}")
        if change.seq is None:
            raise InvalidInputError("seq", "must be the agent's number of the change")
        check_seq(change.seq)
        if isinstance(change, StatusChange):
            return StatusChange(change.instance_id, check_status(change.status), change.seq, check_cause(change.cause))
        hold = None if change.hold is None else Hold(change.kind, change.hold.reason, None, self._clock.utc())
        return HoldChange(change.instance_id, change.kind, hold, cause=change.cause, seq=change.seq)

    def _change(self, change: StatusChange | HoldChange) -> Change | Receipt:
        instance_id = change.instance_id
        if not self.writer.backlog.is_waiting(key_of(change)):
            self.writer.backlog.require_room()
            known = self.members.get(instance_id)
            now_s, at = self._clock.monotonic(), self._clock.utc()
            if isinstance(change, HoldChange):
                outcome = self.members.hold(change, at, now_s)
            else:
                outcome = self.members.set_status(change, now_s, at)
            raise_refusal(change, outcome)
            # unchanged by a newer number: it was reported under a hold, or is held for this already
            if known is not None and change.seq is not None and change.seq <= known.seq:
                return self._receipts.of_replay(known, change.seq)
            self.writer.backlog.offer(change)
            self.expiry.processes.settle(instance_id)
        return change

    # Beats

    async def beat_many(
        self, instance_ids: Sequence[str], loads: Mapping[str, float] | None = None, known: KnownBefore | None = None
    ) -> BeatAnswer:
        """See RelayApi.beat_many."""
        loads = loads if loads is not None else {}
        check_beats(instance_ids, loads, MAX_BEATS_PER_MESSAGE)
        if known is not None:
            check_kind("known", known, KnownBefore).validated(instance_ids)
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
            behind=() if known is None else self._compare_known(known),
            registry=self.members.feed.stream,
            database=database.database_id,
            epoch=self.members.shown.confirmed if database.recovered else None,
        )

    def _compare_known(self, known: KnownBefore) -> tuple[str, ...]:
        """Note what agents know from a registry before. Returns the instances of which they know later changes."""
        if known.database not in {None, self.writer.database.database_id}:
            return ()
        if known.epoch is not None and self.writer.database.is_complete:
            self.members.shown.note_known_before(known.epoch)
        return self.agents_ahead.compare(known.seqs)

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
        store = self.writer.database.readable()
        flipped = await store.set_current_epoch(epoch, above=self.members.shown.above)
        self.writer.journal.note(store.commits, [EpochStep(epoch, is_current=True, number=flipped.number)])
        self.members.set_epoch(flipped.name, flipped.number)
        return flipped.name

    async def stage_epoch(self, epoch: str) -> bool:
        """Name an epoch that agents can register in before it is shown. Returns whether it is new. Raises as a flip."""
        check_epoch(epoch)
        self.writer.backlog.require_open()
        store = self.writer.database.readable()
        is_new = await store.stage_epoch(epoch)
        self.writer.journal.note(store.commits, [EpochStep(epoch, is_current=False)])
        return is_new
