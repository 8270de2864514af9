"""What is done to a database as a whole: look at it, migrate it, and give a role its rights."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial

import psycopg

from seedcore.core.errors import SchemaError, StoreUnavailableError, first_line
from seedcore.core.timeouts import within
from seedcore.store.adoption.adopt import Adoption, end_old_calls
from seedcore.store.adoption.recognize import is_earlier_database
from seedcore.store.dsn import checked_dsn
from seedcore.store.migrations import Migration, compare, is_made, is_up_to_date, known_migrations, migrate
from seedcore.store.replication import Durability, durability
from seedcore.store.roles import check_grant, check_role, grant, grant_again
from seedcore.store.sessions import Connection, PoolLimits, answering, connect, explained

_MIGRATION_S = 3600.0
_EMPTIED = (
    "the database is empty, although this registry has worked with it before, so no tables are created: restore a "
    "backup, or run `seedcore migrate` to begin with an empty one"
)


@dataclass(frozen=True, slots=True)
class ServerState:
    """The state of a database. `missing`: migrations that it lacks; `unknown`: migrations that this code does not know;
    `is_earlier`: it is a database of the earlier SeedCore, to be adopted. `schema_problem`: why the role could not read
    which migrations the database has; then the lists are empty."""

    version: str
    version_number: int
    now: datetime
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    is_earlier: bool
    durability: Durability
    schema_problem: str | None = None


@asynccontextmanager
async def _one_session(dsn: str, limits: PoolLimits | None, *, read_only: bool = False) -> AsyncIterator[Connection]:
    """A connection for one query, which must return in time."""
    limits = limits if limits is not None else PoolLimits()
    connection = await connect(checked_dsn(dsn), limits, read_only=read_only)
    async with connection:
        with answering(connection, limits.answer_s):
            yield connection


async def inspect_database(dsn: str) -> ServerState:
    """Look at a database without changing it. Raises ConfigurationError, StoreUnavailableError, or SchemaError where
    the tables of another program have our names."""
    try:
        async with _one_session(dsn, PoolLimits(connect_timeout_s=5.0), read_only=True) as connection:
            cursor = await connection.execute(
                "select current_setting('server_version'), current_setting('server_version_num')::int, "
                "clock_timestamp()"
            )
            version, number, now = (await cursor.fetchall())[0]
            kept = await durability(connection)
            try:
                missing, unknown = await compare(connection)
                is_earlier = bool(missing) and await is_earlier_database(connection)
            except psycopg.errors.InsufficientPrivilege as error:
                return ServerState(version, number, now, (), (), False, kept, first_line(error))
    except psycopg.Error as error:
        raise StoreUnavailableError(explained(error)) from error
    return ServerState(version, number, now, tuple(missing), tuple(unknown), is_earlier, kept)


async def migrate_database(
    dsn: str,
    limits: PoolLimits | None = None,
    *,
    adopting: Callable[[str], None] | None = None,
    makes_schema: bool = True,
    migrations: list[Migration] | None = None,
) -> list[str]:
    """Bring the database behind `dsn` up to date; the names of what was applied.

    Uses a connection of its own, because a migration may take longer than a statement of the hot path. A database of
    the earlier SeedCore is adopted only where `adopting` is given; it is called with each progress message. An empty
    database stays empty unless `makes_schema`. `migrations`: the files to apply; those of this code unless given.

    Raises ConfigurationError, StoreUnavailableError or SchemaError.
    """
    checked_dsn(dsn)
    # a caller that is cancelled does not wait for a server that does not answer
    limits = limits if limits is not None else PoolLimits()
    migrations = migrations if migrations is not None else known_migrations()
    return await within(_migrate_database(dsn, limits, adopting, migrations, makes_schema=makes_schema), None)


async def end_old_calls_of_database(dsn: str, limits: PoolLimits | None = None) -> bool:
    """Drop the functions that an adoption kept for clients of the earlier SeedCore. Returns whether there were any.
    Raises as `migrate_database`."""
    try:
        async with _one_session(dsn, limits) as connection:
            return await end_old_calls(connection)
    except psycopg.OperationalError as error:
        raise StoreUnavailableError(explained(error)) from error
    except psycopg.Error as error:
        raise SchemaError(f"the old calls could not be dropped: {first_line(error)}") from error


async def _migrate_database(
    dsn: str,
    limits: PoolLimits,
    adopting: Callable[[str], None] | None,
    migrations: list[Migration],
    *,
    makes_schema: bool,
) -> list[str]:
    try:
        connection = await connect(dsn, limits)
        async with connection:
            with answering(connection, limits.answer_s):
                is_current = await is_up_to_date(connection, migrations)
                is_earlier = not is_current and await is_earlier_database(connection)
                if not (makes_schema or is_earlier or await is_made(connection)):
                    raise StoreUnavailableError(_EMPTIED)
            if is_earlier:
                if adopting is None:
                    raise SchemaError(
                        "this is a database of the earlier SeedCore: run `seedcore migrate`, which adopts it"
                    )
                await Adoption(connection, adopting).run()
                return [migration.name for migration in migrations]
            if adopting is not None:
                await Adoption(connection, adopting).finish_if_interrupted()
            if is_current:
                return []
            with answering(connection, _MIGRATION_S):
                return await migrate(connection, migrations, also=partial(grant_again, migrations=migrations))
    except (psycopg.OperationalError, psycopg.errors.ReadOnlySqlTransaction) as error:
        raise StoreUnavailableError(explained(error)) from error
    except psycopg.errors.InsufficientPrivilege as error:
        raise SchemaError(
            f"the schema is not up to date, and this role may not change it ({first_line(error)}): run "
            "`seedcore migrate` as the owner, with --grant for this role"
        ) from error
    except psycopg.Error as error:
        raise SchemaError(f"the schema could not be brought up to date: {first_line(error)}") from error


async def check_grant_on_database(
    dsn: str, role: str, *, with_password: bool, limits: PoolLimits | None = None
) -> None:
    """Check, before a migration, that the owner behind `dsn` may grant a role the rights of a registry. Changes
    nothing. Raises as `grant_on_database`."""
    check_role(role)
    try:
        async with _one_session(dsn, limits) as connection:
            await check_grant(connection, role, with_password=with_password)
    except psycopg.Error as error:
        raise StoreUnavailableError(explained(error)) from error


async def grant_on_database(dsn: str, role: str, password: str | None, limits: PoolLimits | None = None) -> bool:
    """Grant a role the rights of a registry, as the owner behind `dsn`. Returns whether the role was created. Raises
    ConfigurationError, InvalidInputError, StoreUnavailableError or SchemaError; then nothing has changed."""
    check_role(role)
    try:
        async with _one_session(dsn, limits) as connection:
            return await grant(connection, role, password)
    except psycopg.OperationalError as error:
        raise StoreUnavailableError(explained(error)) from error
    except psycopg.Error as error:
        raise SchemaError(f"role {role} could not be given its rights: {first_line(error)}") from error
