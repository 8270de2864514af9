"""One session with the server: how it is opened, how it loads values, and how long the server may take to answer.

Knows no statement.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg import conninfo
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.types.json import set_json_loads
from psycopg.types.string import TextLoader

from seedcore.core.errors import StoreUnavailableError, first_line
from seedcore.core.limits import NOTHING

READ_ONLY = "25006"
_SCHEMA = frozenset({"3F000", "42703", "42704", "42883", "42P01"})
_HINTS = {
    READ_ONLY: "is it a standby, or is default_transaction_read_only on?",
    "53100": "free some space on its disk: the registry then commits what waits",
    "58030": "its disk fails: see the kernel's log of that machine",
    "57P05": "the registry needs an idle_session_timeout of 10 s or more, or none",
    "57014": "another session holds a lock, or a commit waits for a synchronous standby that is away: see "
    "`seedcore doctor`",
    **dict.fromkeys(
        _SCHEMA, "our schema is missing or damaged: restore it, or empty the database and run `seedcore migrate`"
    ),
}
# refusals that have no SQLSTATE of their own
_HINTS_BY_TEXT = {
    "password authentication failed": "was it changed? write the new one to the file that passfile= in the DSN names, "
    "or start the registry again with a new DSN",
    "certificate verify failed": "renew the server's certificate, or the file that sslrootcert= in the DSN names",
    "statement pooling mode": "the registry needs transactions: set the pooler to transaction or session mode",
    "unsupported startup parameter": "the pooler passes on no such setting: remove options from the DSN and PGOPTIONS "
    "from the environment, or name the server itself",
}

# a transaction of several messages holds its locks no longer than this when its client is gone without a word
_ABANDONED = "select set_config('idle_in_transaction_session_timeout', '60000', true)"

Row = tuple[Any, ...]
Connection = psycopg.AsyncConnection[Row]


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """Bounds of the pool and of every wait for the database, in connections and seconds.

    `connection_life_s`: a connection is replaced after this time, and follows a DNS name that has moved.
    """

    max_size: int = 4
    connect_timeout_s: float = 5.0
    statement_timeout_s: float = 10.0
    connection_life_s: float = 60.0

    @property
    def answer_s(self) -> float:
        """Longer than the server's own statement_timeout, which a server that does not answer never sends."""
        return self.statement_timeout_s + self.connect_timeout_s

    @property
    def libpq_connect_s(self) -> int:
        """As libpq takes it: whole seconds, two at least."""
        return max(2, round(self.connect_timeout_s))


class _UtcLoader(Loader):
    """Times in UTC, as the settings of each message write them."""

    def load(self, data: Buffer) -> datetime:
        try:
            return datetime.fromisoformat(bytes(data).decode())
        except ValueError:
            raise psycopg.DataError("a time lies outside the years 1 to 9999") from None


async def configure(connection: Connection) -> None:
    """Prepare a connection of the pool. Raises StoreUnavailableError where it cannot be used."""
    await require_utf8(connection)
    set_json_loads(_loads, connection)
    connection.adapters.register_loader("timestamptz", _UtcLoader)
    # ids as text, as the values have them
    connection.adapters.register_loader("uuid", TextLoader)


def _loads(text: str | bytes) -> Any:
    # most instances have no labels, no metadata, no dependencies
    if text == b"{}":
        return NOTHING
    return () if text == b"[]" else json.loads(text)


def is_of_schema(error: psycopg.Error) -> bool:
    """Whether an error means that a part of our schema is missing."""
    return error.sqlstate in _SCHEMA


def explained(error: psycopg.Error) -> str:
    """The message of an error in one line, with a hint for the operator."""
    message = first_line(error)
    hint = _HINTS.get(error.sqlstate or "") or next(
        (hint for text, hint in _HINTS_BY_TEXT.items() if text in message), None
    )
    return f"{message} ({hint})" if hint else message


async def connect(dsn: str, limits: PoolLimits, *, read_only: bool = False) -> Connection:
    """A connection to a server that this code can work with: in UTF-8, and not behind a pooler that refuses
    transactions.

    Raises psycopg.Error or StoreUnavailableError.
    """
    connection: Connection = await Connection.connect(dsn, **connection_parameters(dsn, limits, read_only=read_only))
    try:
        with answering(connection, limits.answer_s):
            await require_utf8(connection)
            async with connection.transaction():
                """Only a pooler refuses an empty transaction."""
    except BaseException:
        await connection.close()
        raise
    return connection


async def require_utf8(connection: Connection) -> None:
    """Raise StoreUnavailableError where the database cannot hold every text."""
    encoding = connection.info.parameter_status("server_encoding")
    if encoding is None:
        cursor = await connection.execute("show server_encoding")
        ((encoding,),) = await cursor.fetchall()
    if encoding != "UTF8":
        raise StoreUnavailableError(
            f"the encoding of database {connection.info.dbname} is {encoding}, and the registry needs UTF8: make "
            "another database with `createdb --encoding=UTF8 --template=template0` and name it in SEEDCORE_PG_DSN"
        )


async def is_pooled(connection: Connection) -> bool:
    """Whether a pooler stands before the server: it names processes of its own."""
    cursor = await connection.execute("select pg_backend_pid()")
    ((pid,),) = await cursor.fetchall()
    return bool(pid != connection.info.backend_pid)


def connection_parameters(dsn: str, limits: PoolLimits, *, read_only: bool) -> dict[str, Any]:
    """The parameters of every connection. They notice a server that cannot be reached or has vanished."""
    given = conninfo.conninfo_to_dict(dsn)
    defaults = {
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": round(limits.answer_s * 1000),
        # a writer skips a standby for another server that the DSN names
        "target_session_attrs": "any" if read_only else "read-write",
    }
    return {
        **{name: value for name, value in defaults.items() if name not in given},
        "connect_timeout": limits.libpq_connect_s,
        "application_name": "seedcore-reader" if read_only else "seedcore-registry",
        "autocommit": True,
        # neither PGCLIENTENCODING nor the DSN changes what can be sent
        "client_encoding": "utf8",
        # behind a pooler a statement that is prepared on one server is not there on the next
        "prepare_threshold": None,
    }


@asynccontextmanager
async def transaction(connection: Connection) -> AsyncIterator[None]:
    """A transaction of several messages. The server ends it if no message arrives for a minute."""
    async with connection.transaction():
        await connection.execute(_ABANDONED)
        yield


@contextmanager
def answering(connection: Connection, deadline_s: float) -> Iterator[None]:
    """Close the connection if the block takes longer, and raise StoreUnavailableError.

    A cancelled statement waits for the server to confirm; a server that does not answer would keep it, and its
    connection.
    """
    is_late = False

    def give_up() -> None:
        nonlocal is_late
        is_late = True
        hang_up(connection)

    timer = asyncio.get_running_loop().call_later(deadline_s, give_up)
    try:
        yield
    except psycopg.OperationalError as error:
        if is_late:
            raise StoreUnavailableError(f"no answer within {deadline_s:g} s") from error
        raise
    finally:
        timer.cancel()


def hang_up(connection: Connection) -> None:
    """Close a connection under the caller that waits on it, which sees it closed."""
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as line:
        line.shutdown(socket.SHUT_RDWR)
