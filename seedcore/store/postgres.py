"""The store over PostgreSQL. Knows no rules: they are in schema/*.sql, and named statements send every change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import datetime

from seedcore.core.answers import BeatOutcome, LostBeat, Outcome
from seedcore.core.causes import Cause
from seedcore.core.changes import HoldChange, RegisterChange, Registration, StatusChange
from seedcore.core.instances import Beat, Epoch, Instance, LiveState, TermSeen
from seedcore.core.limits import check_epoch, check_instance_id, check_lease
from seedcore.core.paging import check_limit, decode_cursor
from seedcore.core.timeouts import abandon
from seedcore.store.dsn import checked_dsn
from seedcore.store.maintenance import migrate_database
from seedcore.store.reader import PostgresReader
from seedcore.store.rows import holds, instance_of, live_state_of, outcome_of, refined, registrations, statuses
from seedcore.store.sessions import PoolLimits, Row
from seedcore.store.statements import Statements

logger = logging.getLogger(__name__)

_FIRST_KEY = decode_cursor(None)
_ROWS_AT_ONCE = 250


class PostgresStore(PostgresReader):
    """Implements core.ports.Store."""

    def __init__(
        self,
        dsn: str,
        limits: PoolLimits | None = None,
        *,
        read_only: bool = False,
        makes_schema: bool = True,
        ensure_server: Callable[[], Awaitable[object]] | None = None,
        claim: Callable[[str], None] | None = None,
        load_page: int = 5000,
    ) -> None:
        """No connection is tried yet.

        `read_only`: never migrate or write; for readers beside the registry. `makes_schema`: create the schema in an
        empty database. After the first `begin()` no schema is created, because then the database was emptied, and a
        backup could not be restored over new tables. `ensure_server` runs at each `open()` and starts an embedded
        server. `claim` is called with the Ray cluster before each `begin()`, and raises StoreUnavailableError where the
        database belongs to another cluster. `load_page`: rows per page of `load_live`.

        Raises ConfigurationError where the DSN cannot be parsed.
        """
        self._limits = limits if limits is not None else PoolLimits()
        self._dsn = checked_dsn(dsn)
        super().__init__(Statements(self._dsn, self._limits, read_only=read_only))
        self._read_only = read_only
        self._makes_schema = makes_schema
        self._ensure_server = ensure_server
        self._claim = claim
        self._load_page = load_page
        self._opening = asyncio.Lock()
        self._lease_before_s: float | None = None
        self._found_commits = 0
        self._found_own = False
        self._database_id: str | None = None

    async def open(self) -> None:
        async with self._opening:
            if self._ensure_server is not None:
                await self._ensure_server()
            self._statements.connections.open()
            if not self._statements.is_schema_known and not self._read_only:
                for name in await migrate_database(self._dsn, self._limits, makes_schema=self._makes_schema):
                    logger.info("schema migration applied", extra={"migration": name})
                self._statements.is_schema_known = True

    async def close(self) -> None:
        async with self._opening:
            await super().close()

    # Epochs and terms

    async def begin(
        self,
        ray_cluster: str,
        epoch: str | None,
        lease_s: float,
        seen: TermSeen | None = None,
        new_epoch: str | None = None,
    ) -> Epoch:
        check_lease(lease_s)
        for name in (epoch, new_epoch):
            if name is not None:
                check_epoch(name)
        if self._claim is not None:
            self._claim(ray_cluster)
        statements = self._statements
        rows = await statements.run(
            "begin_registry",
            {
                "ray_cluster": ray_cluster,
                "epoch": epoch,
                "lease_s": lease_s,
                "seen_term": None if seen is None else seen.term,
                "seen_at": None if seen is None else seen.at,
                "new_epoch": new_epoch,
                "writer_id": statements.writer_id,
                "term": statements.term,
                "commits": statements.commits,
            },
        )
        name, number, statements.term, self._lease_before_s, statements.commits, *found, self._database_id = rows[0]
        self._found_commits, self._found_own = found
        self._makes_schema = False
        return Epoch(name=name, number=number)

    async def term_seen(self) -> TermSeen:
        [(term, at)] = await self._statements.run("term_seen", {})
        return TermSeen(term, at)

    @property
    def term(self) -> int | None:
        return self._statements.term

    @property
    def commits(self) -> int:
        return self._statements.commits

    @property
    def found_commits(self) -> int:
        return self._found_commits

    @property
    def found_own(self) -> bool:
        return self._found_own

    @property
    def database_id(self) -> str | None:
        return self._database_id

    @property
    def lease_before_s(self) -> float | None:
        return self._lease_before_s

    async def renew_term(self, lease_s: float) -> None:
        await self._statements.as_writer("renew_term", {"lease_s": check_lease(lease_s)})

    async def renew_every_lease(self) -> None:
        await self._statements.as_writer("renew_every_lease", {})

    async def set_current_epoch(self, epoch: str, above: int = 0) -> Epoch:
        rows = await self._statements.as_writer("set_current_epoch", {"epoch": check_epoch(epoch), "above": above})
        return Epoch(name=epoch, number=rows[0][0])

    async def stage_epoch(self, epoch: str) -> bool:
        rows = await self._statements.as_writer("stage_epoch", {"epoch": check_epoch(epoch)})
        return bool(rows[0][0])

    async def epochs_of(self, registrations: Sequence[Registration]) -> list[str | None]:
        rows = await self._statements.as_writer(
            "epochs_of",
            {
                "logical_ids": [registration.logical_id for registration in registrations],
                "actor_ids": [registration.actor_id for registration in registrations],
                "epochs": [registration.started_epoch for registration in registrations],
            },
        )
        found: dict[int, str] = {row[0]: row[1] for row in rows}
        return [found.get(ord) for ord in range(1, len(registrations) + 1)]

    # Changes

    async def register_many(self, changes: Sequence[RegisterChange]) -> list[Outcome]:
        rows = await self._statements.as_writer("register_many", registrations(changes))
        return [outcome_of(row) for row in rows]

    async def set_status_many(self, changes: Sequence[StatusChange]) -> list[Outcome]:
        parameters = {**statuses(changes), "writer_id": self._statements.writer_id}
        return [outcome_of(row) for row in await self._statements.as_writer("set_status_many", parameters)]

    async def hold_many(self, changes: Sequence[HoldChange]) -> list[Outcome]:
        parameters = {**holds(changes), "writer_id": self._statements.writer_id}
        return [outcome_of(row) for row in await self._statements.as_writer("hold_many", parameters)]

    async def refine_causes(self, causes: Mapping[str, Cause]) -> list[str]:
        return [row[0] for row in await self._statements.as_writer("refine_causes", refined(causes))]

    async def beat_many(self, beats: Sequence[Beat]) -> list[LostBeat]:
        # one literal takes a third of the time that a list of ids does
        ids = "{" + ",".join([beat.instance_id for beat in beats]) + "}"
        ages_s = "{" + ",".join([repr(beat.age_s) for beat in beats]) + "}"
        rows = await self._statements.as_writer("beat_many", {"ids": ids, "ages_s": ages_s})
        return [LostBeat(row[0], BeatOutcome(row[1])) for row in rows]

    async def expire_stale(self, lease_s: float | None, limit: int) -> list[str]:
        rows = await self._statements.as_writer("expire_stale", {"lease_s": lease_s, "limit": check_limit(limit)})
        return [row[0] for row in rows]

    async def expire_old_epochs(self, limit: int) -> list[str]:
        rows = await self._statements.as_writer("expire_old_epochs", {"limit": check_limit(limit)})
        return [row[0] for row in rows]

    async def prune_history(self, keep_s: float, limit: int) -> int:
        rows = await self._statements.as_writer("prune_history", {"keep_s": keep_s, "limit": limit})
        return int(rows[0][0])

    # What the registry has in memory

    async def load_live(self) -> AsyncIterator[Instance]:
        asked: asyncio.Task[list[Row]] | None = self._ask_live(_FIRST_KEY)
        try:
            while asked is not None:
                rows, asked = await asked, None
                if len(rows) == self._load_page:
                    # the server reads the next page while this one is read here
                    last = instance_of(rows[-1])
                    asked = self._ask_live((last.logical_id, last.instance_id))
                for number, row in enumerate(rows):
                    if number % _ROWS_AT_ONCE == 0:
                        # what waits for the event loop goes on, the next page too
                        await asyncio.sleep(0)
                    yield instance_of(row)
        finally:
            if asked is not None:
                abandon(asked)

    def _ask_live(self, after: tuple[str, str]) -> asyncio.Task[list[Row]]:
        page = {"after_logical_id": after[0], "after_instance_id": after[1], "limit": self._load_page}
        return asyncio.create_task(self._statements.run("load_live", page), name="live-instances-read")

    async def read_instance(self, instance_id: str) -> Instance | None:
        rows = await self._statements.as_writer("get_instance", {"instance_id": check_instance_id(instance_id)})
        return instance_of(rows[0]) if rows else None

    async def live_states(self, after: tuple[str, str], limit: int) -> list[LiveState]:
        rows = await self._statements.as_writer(
            "live_states",
            {"after_logical_id": after[0], "after_instance_id": after[1], "limit": check_limit(limit)},
        )
        return [live_state_of(row) for row in rows]

    async def last_beats(self, instance_ids: Sequence[str]) -> dict[str, datetime]:
        rows = await self._statements.run("last_beats", {"ids": list(instance_ids)})
        return {row[0]: row[1] for row in rows}
