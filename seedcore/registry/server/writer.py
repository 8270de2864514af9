"""The write loop: one round after another joins the database, commits what is due, and keeps the two in step.

Owns the order of the work and its retries; the parts do it.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from seedcore.core.backoff import Backoff, supervise
from seedcore.core.clock import Clock
from seedcore.core.errors import FencedError, RegistryError, RegistryUnavailableError
from seedcore.core.lease import BeatRate
from seedcore.core.members import Members
from seedcore.core.ports import CommitsLostError
from seedcore.core.timeouts import within
from seedcore.registry.protocol.messages import FlushCounts
from seedcore.registry.server.backlog import Backlog
from seedcore.registry.server.comparison import Comparison
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.database import DatabaseSession, StoreFactory
from seedcore.registry.server.flusher import Flusher
from seedcore.registry.server.housekeeping import Housekeeping
from seedcore.registry.server.journal import Journal

logger = logging.getLogger(__name__)

_RETRY_S = 0.2


class Writer:
    """`run()` is the loop; it ends only by cancellation."""

    def __init__(
        self, config: RegistryConfig, store_factory: StoreFactory, members: Members, rate: BeatRate, clock: Clock
    ) -> None:
        self._config = config
        self.backlog = Backlog(config.change_capacity, config.max_instances, clock, members.memory)
        self.journal = Journal(config.journal_capacity, clock)
        self.database = DatabaseSession(config, store_factory, members, self.backlog, rate, self.journal, clock)
        self.comparison = Comparison(config, members, self.backlog, self.database, clock)
        self.housekeeping = Housekeeping(config, members, self.database, clock)
        self.flusher = Flusher(config, members, self.backlog, self.database, self.comparison, self.journal, clock)
        self.database.on_answer = self.comparison.request
        self._retries = Backoff(_RETRY_S, config.retry_max_s)

    @property
    def problem(self) -> str | None:
        """Why changes do not become durable, in one line, or None.

        A database that does not answer shows in the change that has waited longest, before the store gives up.
        """
        known = self.database.problem
        waited_s = self.backlog.oldest_wait_s
        if known is None and self.backlog.pending_changes and waited_s >= self._config.durable_wait_s:
            return f"the database is slow: a change has waited {waited_s:.0f} s for it"
        return known

    async def require_read(self) -> None:
        """Wait a bounded time for the database to be read, as long as it may have instances that memory does not have.
        Raises RegistryUnavailableError if it is not read by then."""
        if self.database.may_know_more and not await self.database.until_read():
            raise RegistryUnavailableError(f"it has not read its database yet ({self.problem}); try again")

    @property
    def counts(self) -> FlushCounts:
        """Totals since the start."""
        return replace(self.flusher.counts, failures=self.database.failures)

    async def run(self) -> None:
        """Join the database, then commit what is due, round after round. While superseded, only wait for the term."""
        unexpected = Backoff(_RETRY_S, self._config.retry_max_s)
        await supervise(self._round, unexpected, "the write loop", on_failure=self.database.note_problem)

    async def _round(self) -> float:
        try:
            await self.database.prepare()
            await self._work()
        except FencedError as error:
            self.database.note_fenced(error)
            return 0.0
        except CommitsLostError as error:
            self.database.note_lost(error)
            return 0.0
        except RegistryError as error:
            self.database.note_problem(error)
            return self._retries.next_s()
        self.database.note_answer()
        self._retries.reset()
        return 0.0

    async def _work(self) -> None:
        if await self.backlog.wait_for_work(self.flusher.until_beats_s) and self.backlog.pending_changes > 1:
            # of many changes more are on their way: they share a commit
            await asyncio.sleep(self._config.linger_s)
        await self.housekeeping.check_epoch_if_due()
        await self.housekeeping.give_grace()
        await self.flusher.flush_due()
        await self.comparison.compare_if_due(self.flusher.flush_due)
        await self.housekeeping.prune_if_due()

    async def close(self) -> None:
        """Commit what waits, within the stop deadline, and release the database. Call it when `run` has ended."""
        if self.database.is_joined:
            try:
                await within(self.flusher.flush(beats_due=True), self._config.stop_deadline_s)
            except (TimeoutError, RegistryError) as error:
                logger.warning(
                    "stopped with changes that are not in the database: %s",
                    error,
                    extra={"pending_changes": self.backlog.pending_changes},
                )
        await self.database.close()
