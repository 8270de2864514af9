"""The way to the server: a pool, and a circuit that opens when the server is lost and closes when it answers again.

Owns connections, and every wait for them. Knows no statement.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import conninfo
from psycopg.types.json import set_json_loads
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from seedcore.core.circuit import Circuit
from seedcore.core.errors import StoreUnavailableError, first_line
from seedcore.core.model import NOTHING
from seedcore.core.waiting import within

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
    **dict.fromkeys(_SCHEMA, "our schema is missing or damaged: restore it, or empty the database and it is made anew"),
}

Row = tuple[Any, ...]
Connection = psycopg.AsyncConnection[Row]
Pool = AsyncConnectionPool[Connection]


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """Bounds of the pool and of every wait for the database, in connections and seconds."""

    max_size: int = 4
    connect_timeout_s: float = 5.0
    statement_timeout_s: float = 10.0

    @property
    def answer_s(self) -> float:
        """Beyond the server's own statement_timeout: a server that is deaf never answers with one."""
        return self.statement_timeout_s + self.connect_timeout_s

    @property
    def libpq_connect_s(self) -> int:
        """As libpq takes it: whole seconds, two at least."""
        return max(2, round(self.connect_timeout_s))


async def _configure(connection: Connection) -> None:
    set_json_loads(_loads, connection)


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
        self._is_open = False
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

    async def _try(self) -> None:
        """Connect once, by hand: the pool would not say why it could not."""
        bound_s = float(_ADDRESSES * self._limits.libpq_connect_s)
        try:
            connection = await within(Connection.connect(self._dsn, **self._parameters()), bound_s)
            await connection.close()
        except asyncio.TimeoutError as error:
            self._note_away(f"no connection within {bound_s:g} s")
            raise StoreUnavailableError(str(self._problem)) from error
        except psycopg.Error as error:
            self._note_away(first_line(error))
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
            kwargs=self._parameters(),
            min_size=1,
            max_size=self._limits.max_size,
            max_waiting=1000,
            reconnect_timeout=self._limits.connect_timeout_s,
            name="seedcore",
            configure=_configure,
            open=False,
        )

    def _parameters(self) -> dict[str, Any]:
        given = conninfo.conninfo_to_dict(self._dsn)
        options = f"-c statement_timeout={round(self._limits.statement_timeout_s * 1000)} -c timezone=UTC"
        if self._read_only:
            options += " -c default_transaction_read_only=on"
        return {
            **reaching(self._dsn, self._limits),
            "autocommit": True,
            "application_name": "seedcore-reader" if self._read_only else "seedcore-registry",
            "options": f"{options} {given['options']}" if "options" in given else options,
            # a writer passes by a standby, to another server that the DSN names, or says what this one is
            "target_session_attrs": given.get("target_session_attrs", "any" if self._read_only else "read-write"),
        }


def tells_of_schema(error: psycopg.Error) -> bool:
    """Whether an error says that something of our schema is not there."""
    return error.sqlstate in _SCHEMA


def explained(error: psycopg.Error) -> str:
    """What an error says in one line, and what an operator may look for."""
    hint = _HINTS.get(error.sqlstate or "")
    return f"{first_line(error)} ({hint})" if hint else first_line(error)


def reaching(dsn: str, limits: PoolLimits) -> dict[str, Any]:
    """Parameters by which a server that cannot be reached, or is gone without a word, is noticed."""
    given = conninfo.conninfo_to_dict(dsn)
    ours = {
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": round(limits.answer_s * 1000),
    }
    return {
        **{name: value for name, value in ours.items() if name not in given},
        "connect_timeout": limits.libpq_connect_s,
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
