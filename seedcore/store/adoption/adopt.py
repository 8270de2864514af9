"""Adopts a database of the earlier SeedCore: migrates its rows to the new schema while its clients keep calling.

The schema files create the new tables beside the old ones. Rows are copied in batches. A trigger records the rows that
change meanwhile, and they are copied again. One short transaction swaps the tables. This module controls the order of
the steps, the retries and the messages; the statements are in adoption.sql. Reasons:
docs/decisions/0018-adopting-old-databases.md.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import UUID

import psycopg

from seedcore.core.errors import SchemaError, StoreUnavailableError
from seedcore.store.adoption.sending import ANSWER_S, all_rows, send
from seedcore.store.migrations import (
    Migration,
    hold_starters,
    is_recorded_whole,
    known_migrations,
    make_whole,
    one_starter,
)
from seedcore.store.sessions import Connection, Row, answering, transaction

logger = logging.getLogger(__name__)

Report = Callable[[str], None]
Parameters = Mapping[str, object] | None
Observer = Callable[[Connection, str, Parameters], Awaitable[None]]

_REPORT_EVERY = 20
_PAUSE_S = (0.05, 0.4)

# the new table uses the existing type: prepared statements of clients may refer to it
_TYPE = "create type instancestatus as enum ('starting', 'alive', 'draining', 'dead');"


@dataclass(frozen=True, slots=True)
class Pace:
    """How much is done at a time. `few`: changes left to copy under the lock, which takes some hundredths of a second.
    `lock_wait_ms`: how long other sessions may queue behind one attempt to lock the old tables."""

    batch: int = 5000
    few: int = 500
    lock_wait_ms: int = 200
    attempts: int = 200
    late_calls_s: float = 10.0


class Adoption:
    """One run of the adoption over a connection of its own. Each step can be repeated after an interruption."""

    def __init__(
        self, connection: Connection, report: Report, pace: Pace | None = None, observer: Observer | None = None
    ) -> None:
        """`observer` is awaited before each statement, with the connection, its name and its parameters."""
        self._connection = connection
        self._report = report
        self._pace = pace if pace is not None else Pace()
        self._observer = observer

    async def run(self) -> None:
        """Migrate the database, or resume an interrupted adoption.

        Raises SchemaError for content that cannot be kept, before anything changes. Raises StoreUnavailableError if the
        adoption must be started again: the tables were always in use, or another process adopts the database now.
        """
        async with hold_starters(self._connection):
            with answering(self._connection, ANSWER_S):
                await self._require_fit()
            sizes = (await self._all("sizes"))[0]
            self._report(
                f"this is a database of the earlier SeedCore, with {sizes[1]:,} instances. Adopting it: the rows are "
                "copied into new tables beside the old ones, then the tables are swapped. Clients may keep calling"
            )
            await self._prepare()
            await self._copy()
            await self._swap()
            await self._finish()

    async def finish_if_interrupted(self) -> None:
        """Drop the old tables if an adoption was interrupted after its swap."""
        if (await self._all("has_leftovers"))[0][0]:
            async with hold_starters(self._connection):
                await self._finish()

    async def _require_fit(self) -> None:
        """Raise SchemaError for content that cannot be kept."""
        dependents = [str(name) for (name,) in await self._all("foreign_dependents")]
        if dependents:
            raise SchemaError(
                f"not adopted, nothing was changed: other objects depend on the old tables: {', '.join(dependents)}. "
                "Drop them, and create them again afterwards"
            )
        if not (await self._all("has_key"))[0][0]:
            raise SchemaError("not adopted, nothing was changed: registry_instance has no unique index on instance_id")
        epochs = (await self._all("sizes"))[0][0]
        if epochs > 1:
            raise SchemaError(
                f"not adopted, nothing was changed: cluster_metadata has {epochs} rows, so the current epoch is "
                "ambiguous: delete all rows but one"
            )
        await self._require_fit_rows()

    async def _require_fit_rows(self) -> None:
        unfit = [
            f"{count} with {problem} (one is {example})" for problem, count, example in await self._all("unfit_rows")
        ]
        if unfit:
            raise SchemaError(
                f"not adopted: registry_instance has rows that cannot be kept: {'; '.join(unfit)}. Correct or delete "
                "them. The old tables are unchanged"
            )

    async def _prepare(self) -> None:
        """Create the new tables beside the old ones, and record changes from now on."""
        migrations = known_migrations()
        if (await self._all("has_leftovers"))[0][0]:
            async with transaction(self._connection), _new_shape_first(self._connection):
                is_same = await is_recorded_whole(self._connection, migrations)
            if is_same:
                self._report("an adoption was interrupted: it goes on")
            else:
                self._report("an adoption by another version was interrupted: it starts again")

                async def start_again(_locked_at_s: float) -> None:
                    await self._do("drop_schemas")

                await self._locked(start_again)
        if not (await self._all("has_leftovers"))[0][0]:
            async with transaction(self._connection):
                await self._do("prepare")
                await _make_new_shape(self._connection, migrations)
                await self._do("quiet")
        if not (await self._all("progress"))[0][4]:

            async def note_changes(_locked_at_s: float) -> None:
                await self._do("note_changes")

            await self._locked(note_changes)

    async def _copy(self) -> None:
        """Copy every row and the changes so far, and write the history."""
        copied_to, copied, is_copied, has_history, _ = (await self._all("progress"))[0]
        began_s = time.monotonic()
        batches = 0
        while not is_copied:
            copied_to, count = await self._copy_batch(copied_to)
            is_copied = count < self._pace.batch
            copied += count
            batches += 1
            if batches % _REPORT_EVERY == 0 or is_copied:
                self._report(f"copied {copied:,} instances in {time.monotonic() - began_s:.0f} s")
        await self._catch_up(1000)
        if not has_history:
            await self._do("write_history")
        await self._catch_up(1000)
        await self._do("date_epochs")
        await self._do("analyze")
        await self._catch_up(1000)
        differences = (await self._all("differences"))[0][0]
        if differences:
            raise SchemaError(
                f"not adopted: {differences} rows differ between the old table and its copy; the old table stays in use"
            )
        self._report("all instances are copied; later changes are copied again")

    async def _copy_batch(self, after: UUID | None) -> tuple[UUID | None, int]:
        try:
            last, count = (await self._all("copy_batch", {"after": after, "limit": self._pace.batch}))[0]
        except psycopg.IntegrityError:
            # an old client wrote an unfit row after the check
            await self._require_fit_rows()
            raise
        return (last if last is not None else after), count

    async def _catch_up(self, until_few: int) -> None:
        """Copy changed rows again, until fewer than `until_few` changes wait."""
        while True:
            async with transaction(self._connection):
                count = await self._copy_again()
            if count < until_few:
                return

    async def _copy_again(self) -> int:
        """Copy the rows of the oldest changes again, in the caller's transaction. Returns how many changes."""
        ids, count = (await self._all("take_changes", {"limit": self._pace.batch}))[0]
        if ids:
            try:
                await self._do("forget_deleted", {"ids": ids})
                await self._do("copy_again", {"ids": ids})
            except psycopg.IntegrityError as error:
                raise SchemaError(
                    "not adopted: a client wrote a row that cannot be kept; the old tables are unchanged. Run the "
                    f"command again, and it names the row: {str(error).splitlines()[0]}"
                ) from error
        return int(count)

    async def _swap(self) -> None:
        """Replace the old tables by the new ones, in one short transaction."""
        took_s = 0.0

        async def swap(locked_at_s: float) -> None:
            nonlocal took_s
            while await self._copy_again():
                pass
            logger.debug("the last changes took %.3f s", time.monotonic() - locked_at_s)
            for name in ("settle_epochs", "swap", "keep_calls", "keep_grants", "help_late_calls"):
                began_s = time.monotonic()
                await self._do(name)
                logger.debug("%s took %.3f s", name, time.monotonic() - began_s)
            took_s = time.monotonic() - locked_at_s

        await self._locked(swap, catch_up=True)
        self._report(f"swapped: the old tables were locked for {took_s * 1000:.0f} ms")

    async def _finish(self) -> None:
        """Wait for calls that began before the swap, and drop the old tables."""
        transactions = (await self._all("at_work"))[0][0]
        deadline_s = time.monotonic() + self._pace.late_calls_s
        while time.monotonic() < deadline_s:
            if not (await self._all("still_at_work", {"transactions": transactions}))[0][0]:
                break
            await asyncio.sleep(0.05)
        for name in ("end_help", "end_help_of_epochs", "drop_schemas"):
            await self._briefly(name)
        self._report("the old tables are dropped; the functions for old clients are kept")

    async def _briefly(self, name: str) -> None:
        """Execute a statement that locks one table briefly. Retry while the table is in use."""
        for _ in range(self._pace.attempts):
            try:
                async with transaction(self._connection):
                    await self._set_lock_wait()
                    await self._do(name)
            except psycopg.errors.LockNotAvailable:
                await asyncio.sleep(random.uniform(*_PAUSE_S))
            else:
                return
        raise StoreUnavailableError(f"the tables were in use all the time ({name}): run the command again")

    async def _locked(self, work: Callable[[float], Awaitable[None]], *, catch_up: bool = False) -> None:
        """Do `work` in one transaction that locks the old tables. `work` receives the monotonic time of the lock.

        Waits for the lock for a moment at a time, because other sessions queue behind it, and retries.
        """
        for attempt in range(self._pace.attempts):
            if catch_up:
                await self._catch_up(self._pace.few)
            try:
                async with transaction(self._connection):
                    if catch_up:
                        # before the old tables, so that clients do not wait while autovacuum holds the new ones
                        await self._do("lock_new")
                    await self._set_lock_wait()
                    await self._do("lock_instances")
                    locked_at_s = time.monotonic()
                    await self._do("lock_others")
                    await work(locked_at_s)
            except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
                if attempt % 20 == 19:
                    holders = (await self._all("holders"))[0][0]
                    self._report(f"the old tables are in use by the server's processes {holders}; still trying")
                await asyncio.sleep(random.uniform(*_PAUSE_S))
            else:
                return
        holders = (await self._all("holders"))[0][0]
        raise StoreUnavailableError(
            f"the old tables were in use all the time, now by the server's processes {holders}: end them, and run the "
            "command again"
        )

    async def _set_lock_wait(self) -> None:
        await self._connection.execute("select set_config('lock_timeout', %s, true)", (str(self._pace.lock_wait_ms),))

    async def _all(self, name: str, parameters: Parameters = None) -> list[Row]:
        if self._observer is not None:
            await self._observer(self._connection, name, parameters)
        return await all_rows(self._connection, name, parameters)

    async def _do(self, name: str, parameters: Parameters = None) -> None:
        if self._observer is not None:
            await self._observer(self._connection, name, parameters)
        await send(self._connection, name, parameters)


async def end_old_calls(connection: Connection) -> bool:
    """Drop the functions kept for old clients, and create ours as in a new database. Returns whether there were any."""
    async with one_starter(connection):
        if not (await all_rows(connection, "has_kept_calls"))[0][0]:
            return False
        await _make_new_shape(connection, known_migrations())
        await send(connection, "drop_calls")
        await send(connection, "take_own_calls")
    return True


async def _make_new_shape(connection: Connection, migrations: list[Migration]) -> None:
    """Create the schema of a new database, under the name seedcore_adopting, in the caller's transaction."""
    await send(connection, "prepare_shape")
    async with _new_shape_first(connection):
        await make_whole(connection, migrations, lambda migration: migration.sql.replace(_TYPE, "", 1))


@asynccontextmanager
async def _new_shape_first(connection: Connection) -> AsyncIterator[None]:
    """Put the new schema first in the search path, in the caller's transaction."""
    cursor = await connection.execute("select current_setting('search_path'), current_schema()")
    ((before, home),) = await cursor.fetchall()
    path = "select set_config('search_path', 'seedcore_adopting, ' || quote_ident(%s), true)"
    await connection.execute(path, (home,))
    # no finally: after an error the transaction ends anyway
    yield
    await connection.execute("select set_config('search_path', %s, true)", (before,))
