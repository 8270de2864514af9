"""The registry's session with its database: joined as the writer of a term, away, or taken over by a newer registry.

    unread ----- join -------> writing ----- an error -----> failing
                                ^ |  ^------ an answer --------- |
          written again: a join | | the database has lost commits
                                | v
                             restoring

    superseded <--- newer term ---- writing, or a join that is repeated
    superseded ---- the newer registry is gone ----> writing

While `restoring`, memory is complete as before: it has what the database lost. Only reads and writes of the database
wait.

Owns the store, and what is known of it. It commits no changes: the flusher does.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

from seedcore.core.clock import Clock
from seedcore.core.errors import FencedError, RetiredEpochError, StoreUnavailableError, first_line
from seedcore.core.instances import Epoch, TermSeen
from seedcore.core.lease import BeatRate
from seedcore.core.members import Members
from seedcore.core.ports import CommitsLostError, Store
from seedcore.core.timeouts import within
from seedcore.registry.server.backlog import Backlog
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.journal import Journal
from seedcore.registry.server.restoration import Restoration

logger = logging.getLogger(__name__)

StoreFactory: TypeAlias = Callable[[], Awaitable[Store]]


class DatabaseSession:
    """Use it from one event loop. `on_answer` is called each time that the database answers after it was unread or
    away."""

    def __init__(
        self,
        config: RegistryConfig,
        store_factory: StoreFactory,
        members: Members,
        backlog: Backlog,
        rate: BeatRate,
        journal: Journal,
        clock: Clock,
    ) -> None:
        """Opens no connection."""
        self._config = config
        self._store_factory = store_factory
        self._members = members
        self._backlog = backlog
        self._rate = rate
        self._journal = journal
        self._clock = clock
        self._joined_in: str | None = None
        self._shows: str | None = None
        """The database whose epoch is shown."""
        self.restoration = Restoration(config, members, backlog, journal, clock)
        self._lost_after: int | None = None
        self._lost_the_other = False
        self._known_before_loss = 0
        self._is_ours = True
        """Whether all commits that the database has since a loss are of this registry."""
        self._store: Store | None = None
        self._is_read = asyncio.Event()
        self._is_joined = False
        self._unread_since_s = clock.monotonic()
        self._holder: TermSeen | None = None
        self._holder_since_s = 0.0
        """Since when the newer registry has not been seen at work, by this process's clock."""
        self.recovered_s = 0.0
        self._problem: str | None = "not connected to the database yet"
        self.is_failing = False
        self.failures = 0
        self.fenced_by: FencedError | None = None
        self.fences = 0
        self.on_answer: Callable[[], None] = _ignore

    # What is known

    @property
    def problem(self) -> str | None:
        """Why the database cannot be written to, or what is written again after a loss; None while all is well."""
        return self.restoration.progress or self._problem

    @property
    def recovered(self) -> bool:
        """Whether the database has been read, once."""
        return self._is_read.is_set()

    @property
    def is_joined(self) -> bool:
        """Whether the database has all that this registry has committed, as far as is known, and accepts its writes."""
        return self._is_joined and self.fenced_by is None

    @property
    def is_complete(self) -> bool:
        """Whether memory has every live instance: the database has been read, and no newer registry writes to it."""
        return self.recovered and self.fenced_by is None

    @property
    def may_know_more(self) -> bool:
        """Whether the database may have instances that memory does not have: it is still to be read, or a newer
        registry writes to it. One that has been away for a whole lease does not count: agents must register again, so
        that memory has them."""
        if self.fenced_by is not None:
            return True
        unread_s = self._clock.monotonic() - self._unread_since_s
        return not self.recovered and not (self.is_failing and unread_s > self._members.silence.terms.lease_s)

    @property
    def patience_s(self) -> float:
        """How long a caller waits for the database: hardly at all while it is known to be away."""
        return self._config.linger_s if self.is_failing else self._config.durable_wait_s

    async def until_read(self) -> bool:
        """Wait up to `patience_s` until the database has been read. Returns whether it has."""
        try:
            await within(self._is_read.wait(), self.patience_s)
        except TimeoutError:
            return False
        return True

    @property
    def term(self) -> int | None:
        """The term of this registry; None before it has joined the database."""
        return self._store.term if self._store is not None else None

    @property
    def database_id(self) -> str | None:
        """Identifies the database that this registry has joined last."""
        return None if self._store is None else self._store.database_id

    @property
    def pool(self) -> Mapping[str, int]:
        """The store's connections by their state."""
        return {} if self._store is None else self._store.pool

    def readable(self) -> Store:
        """The store. Raises StoreUnavailableError at once while it is known to be away, or to lack what it had."""
        if self._store is None or not self._is_joined or self.is_failing:
            raise StoreUnavailableError(self.problem or "still recovering")
        return self._store

    @property
    def writable(self) -> Store:
        """The store, for the write loop after `prepare`."""
        assert self._store is not None
        return self._store

    # What happens to it

    async def prepare(self) -> None:
        """Make the store writable: join the database, reconnect, or wait for the term. Raises RegistryError."""
        if self.fenced_by is not None:
            await self._claim_the_term()
        elif not self._is_joined:
            await self._join()
            self.note_answer()
        elif self.is_failing:
            await self.writable.open()

    def note_problem(self, error: Exception) -> None:
        """Record that a round of the write loop failed."""
        if not self.is_failing:
            logger.warning("the registry goes on from memory: %s", error)
        self.failures += 1
        self.is_failing = True
        self._holder = None
        self._problem = error.why if isinstance(error, StoreUnavailableError) else first_line(error)

    def note_answer(self) -> None:
        """Record that the database answers."""
        if self.is_failing:
            logger.info("the database answers again", extra={"pending_changes": self._backlog.pending_changes})
            self.on_answer()
        self.is_failing = False
        self._problem = None

    def note_fenced(self, error: FencedError) -> None:
        """Record that the database refused our term."""
        if self.fenced_by is not None:
            # it answers: what was wrong with it before is over
            self.note_answer()
        else:
            self._give_way(error)

    def note_lost(self, error: CommitsLostError) -> None:
        """Record that the database has lost commits of ours: the next round joins it again and writes them again."""
        logger.error("%s; this registry joins it again and writes what it had acknowledged", error.why)
        self._note_found(error.known, error.found)
        self._is_joined = False
        self._problem = error.why

    async def close(self) -> None:
        """Release the store."""
        if self._store is not None:
            await self._store.close()

    def _give_way(self, error: FencedError) -> None:
        """A newer registry writes to the database."""
        logger.error("%s", error, extra={"pending_changes": self._backlog.pending_changes})
        self.fenced_by = error
        self.fences += 1
        if self._lost_after is not None:
            # what it writes comes on top of the loss
            self.restoration.note_abandoned(self._known_before_loss - self._lost_after)
            self._lost_after, self._known_before_loss = None, 0
        self._holder = None
        self._problem = None
        self.is_failing = False
        self._backlog.close(error)

    async def _claim_the_term(self) -> None:
        """Superseded: take the next term once the registry that took over is no longer seen at work.

        It may be of the same Ray cluster, replaced by Ray and started late, or of another cluster that has ended.
        It is at work where what the database shows of it changes, and has the time for that: while a database is away
        no registry is seen at work in it, and the clock of the database may jump. Raises FencedError while it is.
        """
        await asyncio.sleep(self._config.epoch_check_s)
        await self.writable.open()
        asked_s, seen = self._clock.monotonic(), await self.writable.term_seen()
        if seen != self._holder:
            self._holder, self._holder_since_s = seen, self._clock.monotonic()
        if asked_s - self._holder_since_s < self._config.term_idle_s:
            raise FencedError(self.term or 0, seen.term)
        await self._join(seen)
        logger.warning("the newer registry is gone; this one writes again", extra={"term": self.term})
        self.fenced_by = None
        self._backlog.reopen()

    def _note_found(self, known: int, found: int) -> None:
        if found < known:
            self._known_before_loss = max(known, self._known_before_loss)
            self._lost_after = found if self._lost_after is None else min(found, self._lost_after)

    async def _join(self, seen: TermSeen | None = None) -> None:
        """Join the database: take a term and the epoch, then read every live instance; or, where the database has lost
        commits of ours, write them again."""
        if self._store is None:
            self._store = await self._store_factory()
        store = self._store
        await store.open()
        known, is_first = store.commits, store.term is None
        epoch = await self._begin(store, seen)
        if self._joined_in is None or self.fenced_by is not None:
            self._joined_in = epoch.name
        self._note_found(known, store.found_commits)
        # where the term was not ours, another registry may have written: its commits have the numbers of those lost
        self._is_ours = self._is_ours and (is_first or store.found_own)
        if self.fenced_by is not None:
            await self._take_back(store, self.fenced_by)
        elif self._lost_after is not None and self.recovered:
            await self.restoration.restore(store, self._known_before_loss, self._lost_after, is_all_ours=self._is_ours)
            epoch = await store.current_epoch()
            self._members.set_epoch(epoch.name, epoch.number, is_reset=True)
        else:
            await self._load(store, epoch)
            if self._lost_after is not None:
                # lost while this registry started: it had acknowledged nothing, and the one before is gone
                self.restoration.note_abandoned(self._known_before_loss - self._lost_after)
        self._lost_after, self._known_before_loss, self._lost_the_other = None, 0, False
        self._is_ours = True
        self._shows = store.database_id
        self.on_answer()
        self._is_joined = True
        self._is_read.set()
        self.recovered_s = self._clock.monotonic()
        logger.info(
            "registry recovered from the database",
            extra={"instances": len(self._members), "epoch": epoch.name, "epoch_number": epoch.number},
        )

    async def _begin(self, store: Store, seen: TermSeen | None) -> Epoch:
        """Take a term. The configured epoch is for the first join of a fleet: one that has been flipped away since does
        not keep the registry from its database."""
        config = self._config
        if config.epoch is not None and store.term is None:
            try:
                return await store.begin(config.ray_cluster, config.epoch, config.lease_s, seen)
            except RetiredEpochError as error:
                logger.warning("%s; the registry keeps the epoch that the database has", error)
        # where the database is from before this cluster, the cluster gets the epoch again that its agents have
        again = None if self.fenced_by is not None else self._joined_in
        return await store.begin(config.ray_cluster, None, config.lease_s, seen, again)

    async def _take_back(self, store: Store, fenced_by: FencedError) -> None:
        """Read what the newer registry has left. Where the database has lost that it took over, it is as this registry
        knew it, or was before: then the journal is written again, and agents repeat what the other one had."""
        # terms only grow, but for a loss
        self._lost_the_other |= store.term is not None and store.term <= fenced_by.in_force
        if self._lost_after is not None:
            await self.restoration.replay(store, self._known_before_loss, self._lost_after)
        else:
            self._journal.clear()
        known, epoch = self._members.shown.known, await store.current_epoch()
        await self._load(store, epoch, is_taken_back=True)
        if known.number > epoch.number and self._shows == store.database_id:
            # a flip is lost. Nothing was answered since the load: callers get none of the epoch that it had left
            self._members.shown.note_known_before(known)
        if self._lost_after is None and self._lost_the_other:
            self.restoration.note_abandoned(1)

    async def _load(self, store: Store, epoch: Epoch, *, is_taken_back: bool = False) -> None:
        """Read every live instance. What agents reported meanwhile stays."""
        while await store.expire_old_epochs(self._config.sweep_limit):
            pass
        self._journal.begin(store.commits)
        loaded = [instance async for instance in store.load_live()]
        self._members.set_epoch(epoch.name, epoch.number, is_reset=True)
        # an agent whose call was under way when the last registry ended may notice it that much later
        seen_s = self._clock.monotonic() + self._config.reconnect_grace_s
        if is_taken_back:
            # another registry may have changed what memory has, or it never was committed
            self._members.forget_all(instance.instance_id for instance in loaded)
            # as a registry that has started: agents repeat what it may lack, and callers list again
            feed = self._members.feed
            feed.become(uuid.uuid4().hex, feed.version + 1, feed.epoch)
        # a registry that reads its database has told followers to list again: they need no change of each
        with self._members.feed.as_one_reset():
            for instance in loaded:
                self._members.adopt(instance, seen_s)
        self._rate.remember(store.lease_before_s, seen_s)
        # instances that were seen before must not stand out among them as silent
        self._members.silence.credit(math.inf, seen_s)


def _ignore() -> None:
    """The default of a callback."""
