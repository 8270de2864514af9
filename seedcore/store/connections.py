"""The way to the server: a pool, and a circuit that opens when the server is lost and closes when it answers again.

Owns connections, and every wait for them. Knows no statement.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import psycopg
from psycopg.pq import TransactionStatus
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from seedcore.core.circuit import Circuit
from seedcore.core.errors import StoreRejectedError, StoreUnavailableError, first_line
from seedcore.core.timeouts import within
from seedcore.store.sessions import (
    READ_ONLY,
    Connection,
    PoolLimits,
    Row,
    answering,
    configure,
    connect,
    connection_parameters,
    explained,
    hang_up,
)

logger = logging.getLogger(__name__)

_RETRY_MIN_S = 0.1
_RETRY_MAX_S = 1.0
_ADDRESSES = 4  # addresses that one DSN may stand for, which are tried one after another
# errors of a session, not of a statement: its end, its rights, what it has prepared or knows of the schema
_OF_A_SESSION = ("08", "0A", "26", "3F", "42", "57P", "XX")
# raised by psycopg for a value before anything is sent
_NOT_SENT = (ValueError, TypeError, OverflowError, RecursionError, struct.error)
# set in each message, since a pooler keeps no setting of a session
_BOUNDS = (
    "select set_config('statement_timeout', '{}', true), set_config('datestyle', 'ISO', true), "
    "set_config('timezone', 'UTC', true)"
)

Pool = AsyncConnectionPool[Connection]


class Connections:
    """Use from one event loop.

    While the server is away one caller tries it, with a growing delay; the others fail at once with the reason. A
    caller that finds it lost drops every connection: a connection that is silently dead, or whose server has become a
    standby, does not recover.
    """

    def __init__(self, dsn: str, limits: PoolLimits, *, read_only: bool) -> None:
        """`dsn` can be parsed. `read_only` is how its sessions are meant to be. No connection is tried yet."""
        self._dsn = dsn
        self._limits = limits
        self._read_only = read_only
        self._begin = f"begin isolation level read committed{' read only' if read_only else ''}"
        self._bounds = _BOUNDS.format(round(limits.statement_timeout_s * 1000))
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
        """The number of busy and idle connections, and of callers that wait for one."""
        stats = {} if self._pool is None else self._pool.get_stats()
        idle = stats.get("pool_available", 0)
        return {
            "busy": stats.get("pool_size", 0) - idle,
            "idle": idle,
            "waiting": stats.get("requests_waiting", 0),
        }

    def open(self) -> None:
        """Allow connections. Idempotent."""
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
        """A connection, which is closed if the server does not answer in time.

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
            if self._is_loss(error):
                self._give_up(pool, explained(error))
            raise
        if self._circuit.note_answer():
            logger.info("the database answers again")

    async def run(self, statements: Sequence[tuple[str, Mapping[str, object]]]) -> list[list[Row]]:
        """Run statements in one transaction, sent as one message; the rows of each.

        A server receives a message whole or not at all, so a connection that is lost leaves no transaction open.
        Nothing depends on the session: a pooler may lend another server to the next transaction. Raises as `one`, and
        StoreRejectedError where a value cannot be sent.
        """
        async with self.one() as connection:
            composed = [_composed(connection, text, parameters) for text, parameters in statements]
            message = ";\n".join([self._begin, self._bounds, *composed, "commit"])
            try:
                cursor = await connection.execute(message.encode())
            except psycopg.Error:
                if connection.info.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
                    await connection.rollback()
                raise
            return (await _all_rows(cursor))[2:-1]

    # The circuit

    async def _reach(self) -> Pool:
        """The pool. A new one is made once the server answers again. Raises StoreUnavailableError."""
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
        """Replace connections that were idle for too long: the pool checks only those that are returned."""
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
        """Connect once without the pool, which would not report why it failed."""
        bound_s = float(_ADDRESSES * self._limits.libpq_connect_s)
        try:
            await within(self._connect_once(), bound_s)
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

    async def _connect_once(self) -> None:
        # in one: a caller that gives up in between leaves no connection open
        connection = await connect(self._dsn, self._limits, read_only=self._read_only)
        await connection.close()

    def _is_loss(self, error: psycopg.Error) -> bool:
        state = error.sqlstate
        if state is None:
            return isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError))
        return state.startswith(_OF_A_SESSION) or (state == READ_ONLY and not self._read_only)

    def _give_up(self, pool: Pool, why: str) -> None:
        """Drop a pool, unless another caller has already."""
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
            # not awaited: it may be connecting to a server that does not answer
            task = asyncio.create_task(pool.close(timeout=self._limits.libpq_connect_s), name="pool-close")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    # Connections

    def _make_pool(self) -> Pool:
        return AsyncConnectionPool(
            self._dsn,
            connection_class=Connection,
            kwargs=connection_parameters(self._dsn, self._limits, read_only=self._read_only),
            min_size=1,
            max_size=self._limits.max_size,
            max_waiting=1000,
            max_lifetime=self._limits.connection_life_s,
            reconnect_timeout=self._limits.connect_timeout_s,
            name="seedcore",
            configure=configure,
            open=False,
        )


def _composed(connection: Connection, text: str, parameters: Mapping[str, object]) -> str:
    """A statement with its parameters as literals. Raises StoreRejectedError for a value that cannot be sent."""
    try:
        return psycopg.AsyncClientCursor(connection).mogrify(text.rstrip("; \n").encode(), parameters)
    except _NOT_SENT as error:
        raise StoreRejectedError(first_line(error)) from error
    except psycopg.ProgrammingError as error:
        if error.sqlstate is None:
            raise StoreRejectedError(first_line(error)) from error
        raise


async def _all_rows(cursor: psycopg.AsyncCursor[Row]) -> list[list[Row]]:
    """The rows of each statement of a message."""
    rows: list[list[Row]] = []
    while True:
        rows.append(await cursor.fetchall() if cursor.description is not None else [])
        if not cursor.nextset():
            return rows
