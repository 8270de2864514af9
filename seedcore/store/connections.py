"""The way to the server: a pool, and a circuit that opens when the server is lost and closes when it answers again.

Owns connections, and every wait for them. Knows no statement.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from psycopg import conninfo
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.pq import Format, TransactionStatus
from psycopg.types.json import set_json_loads
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from seedcore.core.circuit import Circuit
from seedcore.core.errors import StoreRejectedError, StoreUnavailableError, first_line
from seedcore.core.limits import NOTHING
from seedcore.core.timeouts import within

logger = logging.getLogger(__name__)

_RETRY_MIN_S = 0.1
_RETRY_MAX_S = 1.0
_ADDRESSES = 4  # that may stand behind one DSN, and are tried one after another
_READ_ONLY = "25006"
_SCHEMA = frozenset({"3F000", "42703", "42704", "42883", "42P01"})
# of a session rather than of a statement: its end, what it is allowed, what it has prepared or remembers of the schema
_OF_A_SESSION = ("08", "0A", "26", "3F", "42", "57P", "XX")
_HINTS = {
    _READ_ONLY: "is it a standby, or is default_transaction_read_only on?",
    "57014": "does somebody hold a lock?",
    **dict.fromkeys(
        _SCHEMA, "our schema is missing or damaged: restore it, or empty the database and run `seedcore migrate`"
    ),
}
# a pooler's own refusals share one SQLSTATE, and are told apart by their text alone
_POOLER_HINTS = {
    "statement pooling mode": "the registry needs transactions: set the pooler to transaction or session mode",
    "unsupported startup parameter": "the pooler passes on no such setting: remove options from the DSN and PGOPTIONS "
    "from the environment, or name the server itself",
}
# what psycopg raises for a value before anything is sent
_NOT_SENT = (ValueError, TypeError, OverflowError, RecursionError, struct.error)
_BOUNDS = "select set_config('statement_timeout', %s, true)"

Row = tuple[Any, ...]
Connection = psycopg.AsyncConnection[Row]
Pool = AsyncConnectionPool[Connection]


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
        """Beyond the server's own statement_timeout: a server that is deaf never answers with one."""
        return self.statement_timeout_s + self.connect_timeout_s

    @property
    def libpq_connect_s(self) -> int:
        """As libpq takes it: whole seconds, two at least."""
        return max(2, round(self.connect_timeout_s))


class _UtcLoader(Loader):
    """Times in UTC: a session's time zone and style of dates are settings that a pooler does not keep."""

    format = Format.BINARY

    def load(self, data: Buffer) -> datetime:
        microseconds: int = _INT8.unpack(data)[0]
        try:
            return _POSTGRES_EPOCH + timedelta(microseconds=microseconds)
        except OverflowError:
            raise psycopg.DataError("a time lies outside the years 1 to 9999") from None


_INT8 = struct.Struct("!q")
_POSTGRES_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


async def _configure(connection: Connection) -> None:
    await require_utf8(connection)
    set_json_loads(_loads, connection)
    connection.adapters.register_loader("timestamptz", _UtcLoader)


def _loads(text: str | bytes) -> Any:
    # most instances have no labels, or no metadata
    return NOTHING if text == b"{}" else json.loads(text)


class Connections:
    """Use from one event loop. While the server is away one caller tries it, ever more rarely; the others hear why at
    once. Whoever finds it lost gives up every connection: those that are silently dead, or whose server has become
    a standby, would not get well by themselves."""

    def __init__(self, dsn: str, limits: PoolLimits, *, read_only: bool) -> None:
        """`dsn` can be parsed. `read_only` is how its sessions are meant to be. No connection is tried yet."""
        self._dsn = dsn
        self._limits = limits
        self._read_only = read_only
        self._begin = f"begin isolation level read committed{' read only' if read_only else ''}"
        self._is_open = False
        self._used_s = time.monotonic()
        self._pool: Pool | None = None
        self._busy: set[Connection] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._trying = asyncio.Lock()
        self._circuit = Circuit(_RETRY_MIN_S, _RETRY_MAX_S)
        self._problem: str | None = None

    @property
    def use(self) -> dict[str, int]:
        """How many connections there are, by what they do: busy or idle; and how many callers wait for one."""
        stats = {} if self._pool is None else self._pool.get_stats()
        idle = stats.get("pool_available", 0)
        return {
            "busy": stats.get("pool_size", 0) - idle,
            "idle": idle,
            "waiting": stats.get("requests_waiting", 0),
        }

    def open(self) -> None:
        """Let connections be made. Idempotent."""
        self._is_open = True

    async def close(self) -> None:
        """End every connection, also those whose server does not answer. Idempotent."""
        self._is_open = False
        for connection in self._busy:
            hang_up(connection)
        self._let_go()
        await asyncio.gather(*self._closing)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[Connection]:
        """A connection whose server answers in time, or is hung up on.

        Raises psycopg.Error as the statements do, or StoreUnavailableError where there is none, or no answer.
        """
        pool = await self._reach()
        await self._renew(pool)
        try:
            async with pool.connection(timeout=self._limits.connect_timeout_s) as connection:
                self._busy.add(connection)
                try:
                    with answering(connection, self._limits.answer_s):
                        yield connection
                finally:
                    self._busy.discard(connection)
        except (PoolTimeout, PoolClosed, TooManyRequests) as error:
            if not self._busy:
                self._give_up(pool, first_line(error))
            why = self._problem or f"all {self._limits.max_size} connections are busy"
            raise StoreUnavailableError(why) from error
        except StoreUnavailableError as error:
            self._give_up(pool, error.why)
            raise
        except psycopg.Error as error:
            if self._tells_of_loss(error):
                self._give_up(pool, explained(error))
            raise
        if self._circuit.note_answer():
            logger.info("the database answers again")

    async def run(self, statements: Sequence[tuple[str, Mapping[str, object]]]) -> list[list[Row]]:
        """Run statements in one transaction, sent in one round trip; the rows of each.

        Nothing depends on the session: a pooler may lend another server to the next transaction. Raises as `one`, and
        StoreRejectedError where a value cannot be sent.
        """
        async with self.one() as connection:
            try:
                async with connection.pipeline():
                    await connection.execute(self._begin)
                    await connection.execute(_BOUNDS, (str(round(self._limits.statement_timeout_s * 1000)),))
                    cursors = [await _sent(connection, text, parameters) for text, parameters in statements]
                    await connection.execute("commit")
            except (psycopg.Error, StoreRejectedError) as error:
                if connection.info.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
                    await connection.rollback()
                raise _first_of(error) from None
            return [await cursor.fetchall() for cursor in cursors]

    # The circuit

    async def _reach(self) -> Pool:
        """The pool, made anew when the server is seen to answer. Raises StoreUnavailableError."""
        if not self._is_open:
            raise StoreUnavailableError("the store is not open")
        if self._pool is not None:
            return self._pool
        known = self._problem
        if known is not None and (self._trying.locked() or not self._circuit.allows(time.monotonic())):
            raise StoreUnavailableError(known)
        async with self._trying:
            if self._pool is None:
                if known is None and self._problem is not None:
                    raise StoreUnavailableError(self._problem)
                await self._try()
                pool = self._make_pool()
                await pool.open()
                self._pool = pool
            return self._pool

    async def _renew(self, pool: Pool) -> None:
        """Replace connections that lay idle for longer than they live: the pool looks at those that are returned."""
        idle_s = time.monotonic() - self._used_s
        self._used_s += idle_s
        if idle_s < self._limits.connection_life_s:
            return
        try:
            await within(pool.check(), self._limits.answer_s)
        except TimeoutError as error:
            self._give_up(pool, f"no answer within {self._limits.answer_s:g} s")
            raise StoreUnavailableError(str(self._problem)) from error

    async def _try(self) -> None:
        """Connect once, by hand: the pool would not say why it could not."""
        bound_s = float(_ADDRESSES * self._limits.libpq_connect_s)
        try:
            connection = await within(connect(self._dsn, self._limits, read_only=self._read_only), bound_s)
            await connection.close()
        except TimeoutError as error:
            self._note_away(f"no connection within {bound_s:g} s")
            raise StoreUnavailableError(str(self._problem)) from error
        except StoreUnavailableError as error:
            self._note_away(error.why)
            raise
        except psycopg.Error as error:
            self._note_away(explained(error))
            raise StoreUnavailableError(str(self._problem)) from error
        self._problem = None

    def _tells_of_loss(self, error: psycopg.Error) -> bool:
        state = error.sqlstate
        if state is None:
            return isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError))
        return state.startswith(_OF_A_SESSION) or (state == _READ_ONLY and not self._read_only)

    def _give_up(self, pool: Pool, why: str) -> None:
        """Let go of a pool, unless another caller has already."""
        if pool is self._pool:
            self._note_away(why)
            self._let_go()

    def _note_away(self, why: str) -> None:
        if not self._circuit.is_open:
            logger.info("the database is away: %s", why)
        self._circuit.note_silence(time.monotonic())
        self._problem = why

    def _let_go(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            # not awaited: it may be connecting to a server that is deaf
            task = asyncio.create_task(pool.close(timeout=self._limits.libpq_connect_s), name="pool-close")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    # Connections

    def _make_pool(self) -> Pool:
        return AsyncConnectionPool(
            self._dsn,
            connection_class=Connection,
            kwargs=_parameters(self._dsn, self._limits, read_only=self._read_only),
            min_size=1,
            max_size=self._limits.max_size,
            max_waiting=1000,
            max_lifetime=self._limits.connection_life_s,
            reconnect_timeout=self._limits.connect_timeout_s,
            name="seedcore",
            configure=_configure,
            open=False,
        )


def tells_of_schema(error: psycopg.Error) -> bool:
    """Whether an error says that something of our schema is not there."""
    return error.sqlstate in _SCHEMA


def explained(error: psycopg.Error) -> str:
    """What an error says in one line, and what an operator may look for."""
    told = first_line(error)
    hint = _HINTS.get(error.sqlstate or "") or next(
        (hint for text, hint in _POOLER_HINTS.items() if text in told), None
    )
    return f"{told} ({hint})" if hint else told


async def connect(dsn: str, limits: PoolLimits, *, read_only: bool = False) -> Connection:
    """A connection of its own, to a server that this code can work with: in UTF-8, and not behind a pooler that
    refuses transactions.

    Raises psycopg.Error or StoreUnavailableError.
    """
    connection: Connection = await Connection.connect(dsn, **_parameters(dsn, limits, read_only=read_only))
    try:
        with answering(connection, limits.answer_s):
            await require_utf8(connection)
            async with connection.transaction():
                """Only a pooler refuses an empty one."""
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


def _first_of(error: psycopg.Error | StoreRejectedError) -> psycopg.Error | StoreRejectedError:
    """What went wrong first: a pipeline that is left after an error may raise another of its own."""
    while isinstance(error, psycopg.Error) and isinstance(error.__context__, (psycopg.Error, StoreRejectedError)):
        error = error.__context__
    return error


async def _sent(connection: Connection, text: str, parameters: Mapping[str, object]) -> psycopg.AsyncCursor[Row]:
    try:
        return await connection.execute(text, parameters, binary=True)
    except _NOT_SENT as error:
        raise StoreRejectedError(first_line(error)) from error
    except psycopg.ProgrammingError as error:
        if error.sqlstate is None:
            raise StoreRejectedError(first_line(error)) from error
        raise


def _parameters(dsn: str, limits: PoolLimits, *, read_only: bool) -> dict[str, Any]:
    """How every connection is made. A server that cannot be reached, or is gone without a word, is noticed."""
    given = conninfo.conninfo_to_dict(dsn)
    defaults = {
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": round(limits.answer_s * 1000),
        # a writer passes by a standby, to another server that the DSN names, or says what this one is
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


@contextmanager
def answering(connection: Connection, deadline_s: float) -> Iterator[None]:
    """Hang up where the block takes longer, and raise StoreUnavailableError.

    A statement that is cancelled waits for the server to say so; a deaf one would keep it, and its connection.
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
    """End a connection under whoever waits on it: they see it closed."""
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as line:
        line.shutdown(socket.SHUT_RDWR)
