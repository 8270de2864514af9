"""Sends the statements of adoption.sql by name."""

from __future__ import annotations

from collections.abc import Mapping

import psycopg

from seedcore.store.queries import queries
from seedcore.store.sessions import Connection, Row, answering

ANSWER_S = 3600.0  # for one statement


async def send(
    connection: Connection, name: str, parameters: Mapping[str, object] | None = None
) -> psycopg.AsyncCursor[Row]:
    """Execute a statement. Raises psycopg.Error or StoreUnavailableError."""
    with answering(connection, ANSWER_S):
        # never prepared: a generic plan would read the whole table for each batch
        return await connection.execute(queries("adoption.sql")[name], parameters, prepare=False)


async def all_rows(connection: Connection, name: str, parameters: Mapping[str, object] | None = None) -> list[Row]:
    """Execute a statement; its rows. Raises as `send`."""
    return await (await send(connection, name, parameters)).fetchall()
