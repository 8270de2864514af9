"""Adopts a database of the earlier SeedCore: its rows come into the shape of ours while its clients go on calling.

The new shape is made beside the old one by the same files as ever, rows are copied in batches, what changes meanwhile
is noted by a trigger and copied again, and one short transaction swaps the two. Owns what is said and tried, and in
which order; the statements are in adoption.sql. docs/decisions/0018-adopting-old-databases.md says why.
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
_TELL_EVERY = 20
_FEW = 500  # changes that are copied under the lock: some hundredths of a second
_LOCK_WAIT_MS = 200
_ATTEMPTS = 200
_PAUSE_S = (0.05, 0.4)
_ANSWER_S = 3600.0  # of one statement
_LATE_CALLS_S = 10.0

# the new table takes the type that is there: clients may have prepared statements that name it
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
    """Whether this is a database of the earlier SeedCore, by the names that are ours too: not where they are free, or
    our own migrations made them. Raises SchemaError where they are taken by something else."""
    rows = await _all(connection, "traces")
    if not rows or "schema_migration" in {name for _, name, _ in rows}:
        return False
    problem = _difference([(str(kind), str(name), str(told)) for kind, name, told in rows])
    if problem is None:
        return True
    names = ", ".join(sorted(str(name) for _, name, _ in rows))
    raise SchemaError(
        f"the schema could not be brought up to date: the database has names of ours ({names}), but neither our schema "
        f"nor that of the earlier SeedCore: {problem}. Nothing was changed"
    )


def _difference(rows: list[tuple[str, str, str]]) -> str | None:
    """What differs first from the earlier SeedCore's database; None where nothing does."""
    found = {name: (kind, told) for kind, name, told in rows}
    for table, columns in _COLUMNS.items():
        kind, told = found.get(table, ("", ""))
        if kind != "table":
            return f"there is no table {table}"
        there = {name: _plain(type_) for name, _, type_ in (column.partition(" ") for column in told.split(", "))}
        if there != columns:
            wrong = sorted(set(there.items()) ^ set(columns.items()))
            return f"table {table} is not as it was there ({', '.join(' '.join(column) for column in wrong)})"
    for view in _VIEWS:
        if found.get(view, ("nothing", ""))[0] != "view":
            return f"there is no view {view}"
    for call, results in _CALLS.items():
        told = found.get(call, ("", "missing"))[1]
        if told not in results:
            return f"function {call} is missing" if told == "missing" else f"function {call} answers {told}"
    if found.get("instancestatus", ("", ""))[1] != _STATUSES:
        return f"type instancestatus is not ({_STATUSES})"
    more = sorted(set(found) - set(_COLUMNS) - set(_VIEWS) - set(_CALLS) - {"instancestatus"})
    return f"there is also {', '.join(more)}" if more else None


def _plain(type_: str) -> str:
    """A column's type, without differences that do not matter."""
    if type_.startswith("character varying"):
        return "text"
    return {"smallint": "integer", "bigint": "integer"}.get(type_, type_.rpartition(".")[2])


async def adopt(connection: Connection, report: Report) -> None:
    """Bring a database of the EARLIER shape into ours, or go on where that was interrupted.

    Raises SchemaError, before anything has changed, for what cannot be kept, and StoreUnavailableError where it is to
    be started again: the tables were never free, or another does it now.
    """
    async with hold_starters(connection):
        with answering(connection, _ANSWER_S):
            await _require_fit(connection)
        sizes = (await _all(connection, "sizes"))[0]
        report(
            f"this is a database of the earlier SeedCore, with {sizes[1]:,} instances. It is adopted: the rows are "
            "copied into new tables beside the old ones, which are then swapped. Its clients may go on calling"
        )
        await _prepare(connection, report)
        await _copy(connection, report)
        await _swap(connection, report)
        await _finish(connection, report)


async def finish_if_interrupted(connection: Connection, report: Report) -> None:
    """Drop what an adoption left that was interrupted after its swap."""
    if (await _all(connection, "has_leftovers"))[0][0]:
        async with hold_starters(connection):
            await _finish(connection, report)


async def end_old_calls(connection: Connection) -> bool:
    """Drop the calls that were kept for old clients, and make ours as in a new database; whether there were any."""
    async with one_starter(connection):
        if not (await _all(connection, "has_kept_calls"))[0][0]:
            return False
        await _make_new_shape(connection, known_migrations())
        await _do(connection, "drop_calls")
        await _do(connection, "take_own_calls")
    return True


async def _require_fit(connection: Connection) -> None:
    """Raise SchemaError for what cannot be kept."""
    strangers = [str(name) for (name,) in await _all(connection, "strangers")]
    if strangers:
        raise SchemaError(
            f"not adopted, nothing was changed: on the old tables depends what is not ours: {', '.join(strangers)}. "
            "Drop it, and make it again afterwards"
        )
    if not (await _all(connection, "has_key"))[0][0]:
        raise SchemaError("not adopted, nothing was changed: registry_instance has no unique index on instance_id")
    epochs = (await _all(connection, "sizes"))[0][0]
    if epochs > 1:
        raise SchemaError(
            f"not adopted, nothing was changed: cluster_metadata has {epochs} rows, and which epoch is current is not "
            "certain: delete all but one"
        )
    await _require_fit_rows(connection)


async def _require_fit_rows(connection: Connection) -> None:
    unfit = [
        f"{count} with {problem} (one is {example})" for problem, count, example in await _all(connection, "unfit_rows")
    ]
    if unfit:
        raise SchemaError(
            f"not adopted: registry_instance has rows that cannot be kept as they are: {'; '.join(unfit)}. Correct or "
            "delete them; the old tables are as they were"
        )


async def _prepare(connection: Connection, report: Report) -> None:
    """The new shape stands beside the old one, and changes are noted."""
    migrations = known_migrations()
    if (await _all(connection, "has_leftovers"))[0][0]:
        async with connection.transaction(), _new_shape_first(connection):
            is_same = await is_recorded_whole(connection, migrations)
        if is_same:
            report("an adoption was interrupted: it goes on")
        else:
            report("an adoption by another version was interrupted: it begins again")

            async def begin_again(_locked_at_s: float) -> None:
                await _do(connection, "drop_schemas")

            await _locked(connection, report, begin_again)
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
    """A new database's schema, in one of its own, in the caller's transaction."""
    await _do(connection, "prepare_shape")
    async with _new_shape_first(connection):
        await make_whole(connection, migrations, lambda migration: migration.sql.replace(_TYPE, "", 1))


@asynccontextmanager
async def _new_shape_first(connection: Connection) -> AsyncIterator[None]:
    """Names mean the new shape's, in the caller's transaction."""
    cursor = await connection.execute("select current_setting('search_path'), current_schema()")
    ((before, home),) = await cursor.fetchall()
    path = "select set_config('search_path', 'seedcore_adopting, ' || quote_ident(%s), true)"
    await connection.execute(path, (home,))
    # where it fails, the transaction ends with it
    yield
    await connection.execute("select set_config('search_path', %s, true)", (before,))


async def _copy(connection: Connection, report: Report) -> None:
    """Every row is in the new table, as are the changes up to now, and the history is told."""
    copied_to, copied, is_copied, is_told, _ = (await _all(connection, "progress"))[0]
    began_s = time.monotonic()
    batches = 0
    while not is_copied:
        copied_to, count = await _copy_batch(connection, copied_to)
        is_copied = count < _BATCH
        copied += count
        batches += 1
        if batches % _TELL_EVERY == 0 or is_copied:
            report(f"copied {copied:,} instances in {time.monotonic() - began_s:.0f} s")
    await _catch_up(connection, 1000)
    if not is_told:
        await _do(connection, "tell_history")
    await _catch_up(connection, 1000)
    await _do(connection, "date_epochs")
    await _do(connection, "analyze")
    await _catch_up(connection, 1000)
    differences = (await _all(connection, "differences"))[0][0]
    if differences:
        raise SchemaError(
            f"not adopted: {differences} rows differ between the old table and its copy; the old one is in use"
        )
    report("every instance is copied; what changes is copied again")


async def _copy_batch(connection: Connection, after: UUID | None) -> tuple[UUID | None, int]:
    try:
        last, count = (await _all(connection, "copy_batch", {"after": after, "limit": _BATCH}))[0]
    except psycopg.IntegrityError:
        # registered since it was looked at
        await _require_fit_rows(connection)
        raise
    return (last if last is not None else after), count


async def _catch_up(connection: Connection, until_few: int) -> None:
    """Copy again what changed, until fewer than so many changes wait."""
    while True:
        async with connection.transaction():
            count = await _copy_again(connection)
        if count < until_few:
            return


async def _copy_again(connection: Connection) -> int:
    """Copy the rows that changed first again, in the caller's transaction; how many changes that were."""
    ids, count = (await _all(connection, "take_changes", {"limit": _BATCH}))[0]
    if ids:
        try:
            await _do(connection, "forget_deleted", {"ids": ids})
            await _do(connection, "copy_again", {"ids": ids})
        except psycopg.IntegrityError as error:
            raise SchemaError(
                "not adopted: a row that cannot be kept was written meanwhile; the old tables are as they were. "
                f"Run it again, and it says which: {str(error).splitlines()[0]}"
            ) from error
    return int(count)


async def _swap(connection: Connection, report: Report) -> None:
    """The new shape takes the place of the old one, in one short transaction."""
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
    """Wait for calls that began before the swap, and drop the old shape."""
    transactions = (await _all(connection, "at_work"))[0][0]
    deadline_s = time.monotonic() + _LATE_CALLS_S
    while time.monotonic() < deadline_s:
        if not (await _all(connection, "still_at_work", {"transactions": transactions}))[0][0]:
            break
        await asyncio.sleep(0.05)
    for name in ("end_help", "end_help_of_epochs"):
        await _briefly(connection, report, name)
    await _briefly(connection, report, "drop_schemas")
    report("the old tables are dropped; the calls of old clients are kept")


async def _briefly(connection: Connection, report: Report, name: str) -> None:
    """A statement that locks one table for a moment, tried until it is free."""
    for _ in range(_ATTEMPTS):
        try:
            async with connection.transaction():
                await _set_lock_wait(connection)
                await _do(connection, name)
        except psycopg.errors.LockNotAvailable:
            await asyncio.sleep(random.uniform(*_PAUSE_S))
        else:
            return
    raise StoreUnavailableError(f"the tables were in use all the time ({name}): run it again")


async def _locked(
    connection: Connection,
    report: Report,
    work: Callable[[float], Awaitable[None]],
    *,
    catch_up: bool = False,
) -> None:
    """Do something while nobody uses the old tables, in one transaction. Waits for them a moment at a time, so that
    those who queue behind wait no longer, and tries again. `work` hears when it had the lock."""
    for attempt in range(_ATTEMPTS):
        if catch_up:
            await _catch_up(connection, _FEW)
        try:
            async with connection.transaction():
                if catch_up:
                    # before the old ones: those who call would wait for autovacuum
                    await _do(connection, "lock_new")
                await _set_lock_wait(connection)
                await _do(connection, "lock_instances")
                locked_at_s = time.monotonic()
                await _do(connection, "lock_others")
                await work(locked_at_s)
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            if attempt % 20 == 19:
                holders = (await _all(connection, "holders"))[0][0]
                report(f"the old tables are in use by the server's processes {holders}; trying on")
            await asyncio.sleep(random.uniform(*_PAUSE_S))
        else:
            return
    holders = (await _all(connection, "holders"))[0][0]
    raise StoreUnavailableError(
        f"the old tables were in use all the time, now by the server's processes {holders}: end those, and run it again"
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
        # never prepared: a plan for any batch would read the whole table
        return await connection.execute(queries("adoption.sql")[name], parameters, prepare=False)
