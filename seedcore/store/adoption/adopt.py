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
from uuid import UUID

import psycopg

from seedcore.core.errors import SchemaError, StoreUnavailableError
from seedcore.store.connections import Connection, Row, answering
from seedcore.store.migrations import (
    Migration,
    hold_starters,
    is_recorded_whole,
    known_migrations,
    make_whole,
    one_starter,
)
from seedcore.store.queries import queries

logger = logging.getLogger(__name__)

Report = Callable[[str], None]

_BATCH = 5000
_REPORT_EVERY = 20
_FEW = 500  # changes left to copy under the lock, which takes some hundredths of a second
_LOCK_WAIT_MS = 200
_ATTEMPTS = 200
_PAUSE_S = (0.05, 0.4)
_ANSWER_S = 3600.0  # for one statement
_LATE_CALLS_S = 10.0

# the new table uses the existing type: prepared statements of clients may refer to it
_TYPE = "create type instancestatus as enum ('starting', 'alive', 'draining', 'dead');"
_STATUSES = "starting, alive, draining, dead"

_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "cluster_metadata": {"id": "integer", "current_epoch": "uuid", "updated_at": "timestamp with time zone"},
    "registry_instance": {
        "instance_id": "uuid",
        "logical_id": "text",
        "cluster_epoch": "uuid",
        "status": "instancestatus",
        "actor_name": "text",
        "serve_route": "text",
        "node_id": "text",
        "ip_address": "inet",
        "pid": "integer",
        "started_at": "timestamp with time zone",
        "stopped_at": "timestamp with time zone",
        "last_heartbeat": "timestamp with time zone",
    },
}
_VIEWS = ("active_instance", "active_instances")
_CALLS: Mapping[str, tuple[str, ...]] = {
    "beat(uuid)": ("void",),
    "expire_old_epoch_instances()": ("integer", "bigint"),
    "expire_stale_instances(integer)": ("integer", "bigint"),
    "register_instance(uuid, text, uuid, text, text, text, inet, integer)": ("void",),
    "set_current_epoch(uuid)": ("void",),
    "set_instance_status(uuid, instancestatus)": ("void",),
}


async def is_earlier_database(connection: Connection) -> bool:
    """Whether this is a database of the earlier SeedCore. False if none of its names exist, or if our migrations
    created them. Raises SchemaError if other objects have these names."""
    rows = await _all(connection, "traces")
    if not rows or "schema_migration" in {name for _, name, _ in rows}:
        return False
    problem = _difference([(str(kind), str(name), str(shape)) for kind, name, shape in rows])
    if problem is None:
        return True
    names = ", ".join(sorted(str(name) for _, name, _ in rows))
    raise SchemaError(
        f"the schema could not be brought up to date: the database contains objects with our names ({names}), but "
        f"neither our schema nor that of the earlier SeedCore: {problem}. Nothing was changed"
    )


def _difference(rows: list[tuple[str, str, str]]) -> str | None:
    """The first difference from the schema of the earlier SeedCore; None if there is none."""
    found = {name: (kind, shape) for kind, name, shape in rows}
    for table, columns in _COLUMNS.items():
        kind, shape = found.get(table, ("", ""))
        if kind != "table":
            return f"there is no table {table}"
        actual = {name: _plain(type_) for name, _, type_ in (column.partition(" ") for column in shape.split(", "))}
        if actual != columns:
            wrong = sorted(set(actual.items()) ^ set(columns.items()))
            return f"table {table} has other columns ({', '.join(' '.join(column) for column in wrong)})"
    for view in _VIEWS:
        if found.get(view, ("nothing", ""))[0] != "view":
            return f"there is no view {view}"
    for call, results in _CALLS.items():
        result = found.get(call, ("", "missing"))[1]
        if result not in results:
            return f"function {call} is missing" if result == "missing" else f"function {call} answers {result}"
    if found.get("instancestatus", ("", ""))[1] != _STATUSES:
        return f"type instancestatus is not ({_STATUSES})"
    more = sorted(set(found) - set(_COLUMNS) - set(_VIEWS) - set(_CALLS) - {"instancestatus"})
    return f"there is also {', '.join(more)}" if more else None


def _plain(type_: str) -> str:
    """A column's type, with equivalent types mapped to one name."""
    if type_.startswith("character varying"):
        return "text"
    return {"smallint": "integer", "bigint": "integer"}.get(type_, type_.rpartition(".")[2])


async def adopt(connection: Connection, report: Report) -> None:
    """Migrate a database of the earlier SeedCore, or resume an interrupted adoption.

    Raises SchemaError for content that cannot be kept, before anything changes. Raises StoreUnavailableError if the
    adoption must be started again: the tables were always in use, or another process adopts the database now.
    """
    async with hold_starters(connection):
        with answering(connection, _ANSWER_S):
            await _require_fit(connection)
        sizes = (await _all(connection, "sizes"))[0]
        report(
            f"this is a database of the earlier SeedCore, with {sizes[1]:,} instances. Adopting it: the rows are "
            "copied into new tables beside the old ones, then the tables are swapped. Clients may keep calling"
        )
        await _prepare(connection, report)
        await _copy(connection, report)
        await _swap(connection, report)
        await _finish(connection, report)


async def finish_if_interrupted(connection: Connection, report: Report) -> None:
    """Drop the old tables if an adoption was interrupted after its swap."""
    if (await _all(connection, "has_leftovers"))[0][0]:
        async with hold_starters(connection):
            await _finish(connection, report)


async def end_old_calls(connection: Connection) -> bool:
    """Drop the functions kept for old clients, and create ours as in a new database. Returns whether there were any."""
    async with one_starter(connection):
        if not (await _all(connection, "has_kept_calls"))[0][0]:
            return False
        await _make_new_shape(connection, known_migrations())
        await _do(connection, "drop_calls")
        await _do(connection, "take_own_calls")
    return True


async def _require_fit(connection: Connection) -> None:
    """Raise SchemaError for content that cannot be kept."""
    dependents = [str(name) for (name,) in await _all(connection, "foreign_dependents")]
    if dependents:
        raise SchemaError(
            f"not adopted, nothing was changed: other objects depend on the old tables: {', '.join(dependents)}. "
            "Drop them, and create them again afterwards"
        )
    if not (await _all(connection, "has_key"))[0][0]:
        raise SchemaError("not adopted, nothing was changed: registry_instance has no unique index on instance_id")
    epochs = (await _all(connection, "sizes"))[0][0]
    if epochs > 1:
        raise SchemaError(
            f"not adopted, nothing was changed: cluster_metadata has {epochs} rows, so the current epoch is ambiguous: "
            "delete all rows but one"
        )
    await _require_fit_rows(connection)


async def _require_fit_rows(connection: Connection) -> None:
    unfit = [
        f"{count} with {problem} (one is {example})" for problem, count, example in await _all(connection, "unfit_rows")
    ]
    if unfit:
        raise SchemaError(
            f"not adopted: registry_instance has rows that cannot be kept: {'; '.join(unfit)}. Correct or delete them. "
            "The old tables are unchanged"
        )


async def _prepare(connection: Connection, report: Report) -> None:
    """Create the new tables beside the old ones, and record changes from now on."""
    migrations = known_migrations()
    if (await _all(connection, "has_leftovers"))[0][0]:
        async with connection.transaction(), _new_shape_first(connection):
            is_same = await is_recorded_whole(connection, migrations)
        if is_same:
            report("an adoption was interrupted: it goes on")
        else:
            report("an adoption by another version was interrupted: it starts again")

            async def start_again(_locked_at_s: float) -> None:
                await _do(connection, "drop_schemas")

            await _locked(connection, report, start_again)
    if not (await _all(connection, "has_leftovers"))[0][0]:
        async with connection.transaction():
            await _do(connection, "prepare")
            await _make_new_shape(connection, migrations)
            await _do(connection, "quiet")
    if not (await _all(connection, "progress"))[0][4]:

        async def note_changes(_locked_at_s: float) -> None:
            await _do(connection, "note_changes")

        await _locked(connection, report, note_changes)


async def _make_new_shape(connection: Connection, migrations: list[Migration]) -> None:
    """Create the schema of a new database, under the name seedcore_adopting, in the caller's transaction."""
    await _do(connection, "prepare_shape")
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


async def _copy(connection: Connection, report: Report) -> None:
    """Copy every row and the changes so far, and write the history."""
    copied_to, copied, is_copied, has_history, _ = (await _all(connection, "progress"))[0]
    began_s = time.monotonic()
    batches = 0
    while not is_copied:
        copied_to, count = await _copy_batch(connection, copied_to)
        is_copied = count < _BATCH
        copied += count
        batches += 1
        if batches % _REPORT_EVERY == 0 or is_copied:
            report(f"copied {copied:,} instances in {time.monotonic() - began_s:.0f} s")
    await _catch_up(connection, 1000)
    if not has_history:
        await _do(connection, "tell_history")
    await _catch_up(connection, 1000)
    await _do(connection, "date_epochs")
    await _do(connection, "analyze")
    await _catch_up(connection, 1000)
    differences = (await _all(connection, "differences"))[0][0]
    if differences:
        raise SchemaError(
            f"not adopted: {differences} rows differ between the old table and its copy; the old table stays in use"
        )
    report("all instances are copied; later changes are copied again")


async def _copy_batch(connection: Connection, after: UUID | None) -> tuple[UUID | None, int]:
    try:
        last, count = (await _all(connection, "copy_batch", {"after": after, "limit": _BATCH}))[0]
    except psycopg.IntegrityError:
        # an old client wrote an unfit row after the check
        await _require_fit_rows(connection)
        raise
    return (last if last is not None else after), count


async def _catch_up(connection: Connection, until_few: int) -> None:
    """Copy changed rows again, until fewer than `until_few` changes wait."""
    while True:
        async with connection.transaction():
            count = await _copy_again(connection)
        if count < until_few:
            return


async def _copy_again(connection: Connection) -> int:
    """Copy the rows of the oldest changes again, in the caller's transaction. Returns the number of these changes."""
    ids, count = (await _all(connection, "take_changes", {"limit": _BATCH}))[0]
    if ids:
        try:
            await _do(connection, "forget_deleted", {"ids": ids})
            await _do(connection, "copy_again", {"ids": ids})
        except psycopg.IntegrityError as error:
            raise SchemaError(
                "not adopted: a client wrote a row that cannot be kept; the old tables are unchanged. Run the command "
                f"again, and it names the row: {str(error).splitlines()[0]}"
            ) from error
    return int(count)


async def _swap(connection: Connection, report: Report) -> None:
    """Replace the old tables by the new ones, in one short transaction."""
    took_s = 0.0

    async def swap(locked_at_s: float) -> None:
        nonlocal took_s
        while await _copy_again(connection):
            pass
        logger.debug("the last changes took %.3f s", time.monotonic() - locked_at_s)
        for name in ("settle_epochs", "swap", "keep_calls", "keep_grants", "help_late_calls"):
            began_s = time.monotonic()
            await _do(connection, name)
            logger.debug("%s took %.3f s", name, time.monotonic() - began_s)
        took_s = time.monotonic() - locked_at_s

    await _locked(connection, report, swap, catch_up=True)
    report(f"swapped: the old tables were locked for {took_s * 1000:.0f} ms")


async def _finish(connection: Connection, report: Report) -> None:
    """Wait for calls that began before the swap, and drop the old tables."""
    transactions = (await _all(connection, "at_work"))[0][0]
    deadline_s = time.monotonic() + _LATE_CALLS_S
    while time.monotonic() < deadline_s:
        if not (await _all(connection, "still_at_work", {"transactions": transactions}))[0][0]:
            break
        await asyncio.sleep(0.05)
    for name in ("end_help", "end_help_of_epochs"):
        await _briefly(connection, report, name)
    await _briefly(connection, report, "drop_schemas")
    report("the old tables are dropped; the functions for old clients are kept")


async def _briefly(connection: Connection, report: Report, name: str) -> None:
    """Execute a statement that locks one table briefly. Retry while the table is in use."""
    for _ in range(_ATTEMPTS):
        try:
            async with connection.transaction():
                await _set_lock_wait(connection)
                await _do(connection, name)
        except psycopg.errors.LockNotAvailable:
            await asyncio.sleep(random.uniform(*_PAUSE_S))
        else:
            return
    raise StoreUnavailableError(f"the tables were in use all the time ({name}): run the command again")


async def _locked(
    connection: Connection,
    report: Report,
    work: Callable[[float], Awaitable[None]],
    *,
    catch_up: bool = False,
) -> None:
    """Do `work` in one transaction that locks the old tables. Waits for the lock for _LOCK_WAIT_MS at a time, because
    other sessions queue behind it, and retries. `work` receives the monotonic time at which the lock was acquired."""
    for attempt in range(_ATTEMPTS):
        if catch_up:
            await _catch_up(connection, _FEW)
        try:
            async with connection.transaction():
                if catch_up:
                    # before the old tables, so that clients do not wait while autovacuum holds the new ones
                    await _do(connection, "lock_new")
                await _set_lock_wait(connection)
                await _do(connection, "lock_instances")
                locked_at_s = time.monotonic()
                await _do(connection, "lock_others")
                await work(locked_at_s)
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            if attempt % 20 == 19:
                holders = (await _all(connection, "holders"))[0][0]
                report(f"the old tables are in use by the server's processes {holders}; still trying")
            await asyncio.sleep(random.uniform(*_PAUSE_S))
        else:
            return
    holders = (await _all(connection, "holders"))[0][0]
    raise StoreUnavailableError(
        f"the old tables were in use all the time, now by the server's processes {holders}: end them, and run the "
        "command again"
    )


async def _set_lock_wait(connection: Connection) -> None:
    await connection.execute("select set_config('lock_timeout', %s, true)", (str(_LOCK_WAIT_MS),))


async def _all(connection: Connection, name: str, parameters: Mapping[str, object] | None = None) -> list[Row]:
    cursor = await _sent(connection, name, parameters)
    return await cursor.fetchall()


async def _do(connection: Connection, name: str, parameters: Mapping[str, object] | None = None) -> None:
    await _sent(connection, name, parameters)


async def _sent(connection: Connection, name: str, parameters: Mapping[str, object] | None) -> psycopg.AsyncCursor[Row]:
    with answering(connection, _ANSWER_S):
        # never prepared: a generic plan would read the whole table for each batch
        return await connection.execute(queries("adoption.sql")[name], parameters, prepare=False)
