"""Applies schema/NNNN_name.sql: in order, each in one transaction, recorded, safe beside other starters."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import LiteralString

import psycopg
from psycopg.pq import TransactionStatus

from seedcore.core.errors import SchemaError, StoreUnavailableError
from seedcore.store.sessions import Connection, is_pooled, transaction

logger = logging.getLogger(__name__)

_NAME = re.compile(r"^(?P<number>\d{4})_[a-z0-9_]+\.sql$")
_CONTRACT = re.compile(r"^\d{4}_contract_")  # takes away what older code uses
STARTER_LOCK = 0x5EED_C0DE
"""The advisory lock of every starter of this project."""

_CREATE = """
create table if not exists schema_migration (
    number      integer primary key,
    name        text not null,
    sha256      text not null,
    applied_at  timestamptz not null default now()
)
"""


@dataclass(frozen=True, slots=True)
class Waits:
    """How long a migration waits: for another starter, for a table, and between its attempts to lock that table."""

    starter_s: float = 30.0
    table_s: float = 1.0
    pause_s: float = 1.0
    attempts: int = 30


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered file."""

    number: int
    name: str
    sql: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def schema_folder() -> Path:
    """Where the files are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "schema"
    return packaged if packaged.is_dir() else package.parent / "schema"


def known_migrations(folder: Path | None = None) -> list[Migration]:
    """Every migration this code ships, in order. Raises SchemaError for a gap or a stray name."""
    folder = folder if folder is not None else schema_folder()
    found: list[Migration] = []
    for entry in sorted(folder.glob("*.sql")):
        match = _NAME.match(entry.name)
        if match is None:
            raise SchemaError(f"schema file {entry.name} is not named NNNN_name.sql")
        found.append(Migration(int(match["number"]), entry.name, entry.read_text(encoding="utf-8")))
    if [m.number for m in found] != list(range(1, len(found) + 1)):
        raise SchemaError("schema files must be numbered 0001, 0002, ... without a gap")
    return found


async def migrate(
    connection: Connection,
    migrations: list[Migration] | None = None,
    *,
    also: Callable[[Connection], Awaitable[None]] | None = None,
    waits: Waits | None = None,
) -> list[str]:
    """Bring the database up to date. Returns the names of the files applied. `also` runs in each step's transaction.

    A database to which a newer version has added files is left as it is. Raises SchemaError where a newer version has
    taken something away (a file named NNNN_contract_...), or where an applied file has changed; StoreUnavailableError
    where a table is always in use.
    """
    waits = waits if waits is not None else Waits()
    migrations = migrations if migrations is not None else known_migrations()
    applied: list[str] = []
    while True:
        step = await _apply_next(connection, migrations, also, waits)
        if step is None:
            return applied
        applied.append(step.name)


async def _apply_next(
    connection: Connection,
    migrations: list[Migration],
    also: Callable[[Connection], Awaitable[None]] | None,
    waits: Waits,
) -> Migration | None:
    """Apply one step; None where nothing is left.

    Other sessions queue behind a step that waits for a table's lock. So it waits for a moment only, and lets them pass
    before it tries again.
    """
    attempts_left = waits.attempts
    while True:
        is_our_turn = False
        try:
            async with transaction(connection):
                await _wait_for_locks(connection, waits.starter_s)
                await connection.execute("select pg_advisory_xact_lock(%s)", (STARTER_LOCK,))
                is_our_turn = True
                step = await _next_step(connection, migrations)
                if step is None:
                    return None
                logger.info("applying schema migration %s", step.name)
                await _wait_for_locks(connection, waits.table_s)
                await connection.execute(step.sql)
                await _record(connection, step)
                if also is not None:
                    await also(connection)
                return step
        except psycopg.errors.LockNotAvailable as error:
            if not is_our_turn:
                raise
            attempts_left -= 1
            if attempts_left == 0:
                raise StoreUnavailableError(
                    "a table that a schema migration changes is always in use: look for long transactions in "
                    "pg_stat_activity, and start it again"
                ) from error
            logger.info("a table that a schema migration changes is in use; trying again")
        await asyncio.sleep(waits.pause_s)


async def _wait_for_locks(connection: Connection, timeout_s: float) -> None:
    await connection.execute("select set_config('lock_timeout', %s, true)", (f"{timeout_s * 1000:.0f}",))


@asynccontextmanager
async def hold_starters(connection: Connection) -> AsyncIterator[None]:
    """Keep every other starter out over several transactions. Raises StoreUnavailableError where one is at work, or
    where a pooler shares the session.

    The lock also ends with the connection, which no other code may use, but some time after it is closed.
    """
    if await is_pooled(connection):
        raise StoreUnavailableError(
            "an adoption takes several transactions of one session, and a pooler stands before the server: name the "
            "server itself in SEEDCORE_PG_DSN"
        )
    await _try_lock(connection, "select pg_try_advisory_lock(%s)")
    try:
        yield
    finally:
        if connection.info.transaction_status is TransactionStatus.IDLE:
            await connection.execute("select pg_advisory_unlock(%s)", (STARTER_LOCK,))


@asynccontextmanager
async def one_starter(connection: Connection) -> AsyncIterator[None]:
    """A transaction that keeps every other starter out. Raises StoreUnavailableError where one is at work."""
    async with transaction(connection):
        await _try_lock(connection, "select pg_try_advisory_xact_lock(%s)")
        yield


async def _try_lock(connection: Connection, statement: LiteralString) -> None:
    cursor = await connection.execute(statement, (STARTER_LOCK,))
    row = await cursor.fetchone()
    if row is None or not row[0]:
        raise StoreUnavailableError("another process brings this database up to date now")


async def make_whole(connection: Connection, migrations: list[Migration], text_of: Callable[[Migration], str]) -> None:
    """Apply and record every migration in the caller's transaction, in the form of `text_of`."""
    await connection.execute(_CREATE)
    for step in migrations:
        await connection.execute(text_of(step))
        await _record(connection, step)


async def is_recorded_whole(connection: Connection, migrations: list[Migration]) -> bool:
    """Whether exactly these migrations are recorded."""
    recorded = await _recorded(connection) or []
    return [sha256 for _, _, sha256 in recorded] == [migration.sha256 for migration in migrations]


async def _record(connection: Connection, step: Migration) -> None:
    await connection.execute(
        "insert into schema_migration (number, name, sha256) values (%s, %s, %s)", (step.number, step.name, step.sha256)
    )


async def is_up_to_date(connection: Connection, migrations: list[Migration]) -> bool:
    """Whether nothing is left to apply. Does not wait for other starters. Raises SchemaError as `migrate` does."""
    recorded = await _recorded(connection)
    return recorded is not None and _step_after(recorded, migrations) is None


async def is_made(connection: Connection) -> bool:
    """Whether any migration was ever applied."""
    return bool(await _recorded(connection))


async def compare(connection: Connection) -> tuple[list[str], list[str]]:
    """The migrations of this code that the database lacks, and those of the database that this code does not know."""
    recorded = await _recorded(connection) or []
    names = [migration.name for migration in known_migrations()]
    return names[len(recorded) :], [name for _, name, _ in recorded[len(names) :]]


async def _next_step(connection: Connection, migrations: list[Migration]) -> Migration | None:
    recorded = await _recorded(connection)
    if recorded is None:
        await connection.execute(_CREATE)
        # another starter may have created and filled it during the wait for the lock
        recorded = await _read(connection)
    return _step_after(recorded, migrations)


async def _recorded(connection: Connection) -> list[tuple[int, str, str]] | None:
    """What was applied; None for a database that has never seen a migration."""
    cursor = await connection.execute("select to_regclass('schema_migration') is not null")
    row = await cursor.fetchone()
    return await _read(connection) if row is not None and row[0] else None


async def _read(connection: Connection) -> list[tuple[int, str, str]]:
    """Number, name and checksum of what was applied, in order."""
    cursor = await connection.execute("select number, name, sha256 from schema_migration order by number")
    return await cursor.fetchall()


def _step_after(recorded: list[tuple[int, str, str]], migrations: list[Migration]) -> Migration | None:
    newer = [name for _, name, _ in recorded[len(migrations) :]]
    gone = next((name for name in newer if _CONTRACT.match(name)), None)
    if gone is not None:
        raise SchemaError(
            f"the database has schema {gone}, which this code is too old for (it knows up to "
            f"{migrations[-1].name if migrations else 'none'}): install the newer version of seedcore"
        )
    for (_, name, sha256), migration in zip(recorded, migrations, strict=False):
        if sha256 != migration.sha256:
            raise SchemaError(
                f"the database was made by another {name} than this code's {migration.name}: "
                "applied files never change, add a new one"
            )
    return migrations[len(recorded)] if len(recorded) < len(migrations) else None
