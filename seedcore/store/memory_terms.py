"""Terms and epochs of tables in memory: which store may write, and which generation of the fleet is current."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from seedcore.core.answers import OutcomeKind
from seedcore.core.changes import Registration
from seedcore.core.errors import EpochLimitError, FencedError, RetiredEpochError
from seedcore.core.instances import Epoch, TermSeen
from seedcore.core.limits import check_epoch, check_lease
from seedcore.core.ports import CommitsLostError
from seedcore.store.memory_reader import MemoryReader
from seedcore.store.tables import Tables


class MemoryTerms(MemoryReader):
    """Implements the part of core.ports.Store that is about terms and epochs."""

    def __init__(self, now: Callable[[], datetime], tables: Tables) -> None:
        super().__init__(now, tables)
        self._term: int | None = None
        self._commits = 0
        self._found_commits = 0
        self._found_own = False
        self._lease_before_s: float | None = None
        self._database_id: str | None = None

    async def begin(
        self,
        ray_cluster: str,
        epoch: str | None,
        lease_s: float,
        seen: TermSeen | None = None,
        new_epoch: str | None = None,
    ) -> Epoch:
        check_lease(lease_s)
        wanted = epoch
        for name in (epoch, new_epoch):
            if name is not None:
                check_epoch(name)
        tables, now = self.tables, self._now()
        is_at_work = seen != self._term_seen()
        was_in_force = (self._term or 0) > tables.term
        is_replaced = self._is_superseded or (ray_cluster in tables.superseded and not was_in_force)
        if is_at_work and (seen is not None or is_replaced):
            raise FencedError(self._term or 0, tables.term)
        is_new = tables.ray_cluster not in {None, ray_cluster}
        row = None if new_epoch is None else tables.epochs.get(new_epoch)
        is_usable = new_epoch is not None and (row is None or row.retired_at is None)
        # in force on a database without a cluster: it has lost every registry that it had
        is_lost = tables.ray_cluster is None and was_in_force and is_usable and new_epoch != tables.current_epoch
        if wanted is None and is_new:
            wanted = new_epoch if is_usable else tables.next_epoch_name()
        elif wanted is None and is_lost:
            wanted = new_epoch
        before = tables.epochs[tables.current_epoch]
        if wanted is not None:
            tables.flip(wanted, now)
        if epoch is None:
            before.continued_by = wanted
        if is_new and tables.ray_cluster is not None:
            tables.superseded.add(tables.ray_cluster)
            tables.superseded.discard(ray_cluster)
        self._lease_before_s = None if tables.ray_cluster is None else tables.lease_s
        tables.ray_cluster = ray_cluster
        tables.lease_s = lease_s
        tables.leases_from = now
        tables.term_seen_at = now
        is_another = was_in_force and tables.commits >= self._commits
        self._found_commits = 0 if is_another else tables.commits
        self._found_own = tables.writer is self and tables.term == self._term
        tables.term = max(tables.term, self._term or 0) + 1
        self._term = tables.term
        tables.writer, tables.commits = self, max(tables.commits, self._commits) + 1
        self._commits = tables.commits
        self._database_id = tables.database_id
        return await self.current_epoch()

    async def term_seen(self) -> TermSeen:
        return self._term_seen()

    def _term_seen(self) -> TermSeen:
        return TermSeen(self.tables.term, self.tables.term_seen_at)

    @property
    def term(self) -> int | None:
        return self._term

    @property
    def database_id(self) -> str | None:
        return self._database_id

    @property
    def lease_before_s(self) -> float | None:
        return self._lease_before_s

    @property
    def commits(self) -> int:
        return self._commits

    @property
    def found_commits(self) -> int:
        return self._found_commits

    @property
    def found_own(self) -> bool:
        return self._found_own

    @property
    def _is_superseded(self) -> bool:
        """Whether this store has begun, and another one since."""
        return self._term is not None and self.tables.term >= self._term and self.tables.writer is not self

    def fence(self, *, counts: bool = True) -> None:
        """Begin a write; `counts`: it is another commit. Raises FencedError once another store has begun, and
        CommitsLostError where the tables have lost commits."""
        tables = self.tables
        if self._term is None:
            return
        if tables.term > self._term or (tables.term == self._term and tables.writer is not self):
            raise FencedError(self._term, tables.term)
        if tables.commits < self._commits:
            raise CommitsLostError(self._commits, tables.commits)
        if tables.term < self._term:
            why = f"another database answers: it has term {tables.term}, and had term {self._term}"
            raise CommitsLostError(self._commits, 0, why)
        tables.commits += counts
        self._commits = tables.commits

    async def renew_term(self, lease_s: float) -> None:
        check_lease(lease_s)
        self.fence(counts=False)
        self.tables.term_seen_at = self._now()
        self.tables.lease_s = lease_s

    async def renew_every_lease(self) -> None:
        self.fence(counts=False)
        self.tables.leases_from = self._now()

    async def set_current_epoch(self, epoch: str, above: int = 0) -> Epoch:
        check_epoch(epoch)
        self.fence()
        self.tables.flip(epoch, self._now(), above)
        return await self.current_epoch()

    async def stage_epoch(self, epoch: str) -> bool:
        check_epoch(epoch)
        self.fence()
        is_new = epoch not in self.tables.epochs
        problem = self.tables.stage(epoch, self._now())
        if problem is OutcomeKind.RETIRED_EPOCH:
            raise RetiredEpochError(epoch)
        if problem is not None:
            raise EpochLimitError(epoch)
        return is_new

    async def epochs_of(self, registrations: Sequence[Registration]) -> list[str | None]:
        self.fence(counts=False)
        return [
            self.tables.continuing(one.started_epoch or self.tables.epoch_of_actor(one.logical_id, one.actor_id))
            for one in registrations
        ]
