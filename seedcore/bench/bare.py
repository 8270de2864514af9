"""The baselines: bare statements of psycopg, without a registry, on the rows that the registry works on."""

from __future__ import annotations

import asyncio
import time
from typing import Any, LiteralString

import psycopg
from psycopg import conninfo, sql
from psycopg_pool import AsyncConnectionPool

LANES = 10


def new_database(dsn: str, name: str) -> str:
    """Create an empty database and return its DSN."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    return conninfo.make_conninfo(dsn, dbname=name)


def first_row(dsn: str, query: LiteralString) -> tuple[Any, ...]:
    """Execute a query and return its first row."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(sql.SQL(query)).fetchone()
    assert row is not None
    return row


def read_all(dsn: str) -> float:
    """Measure the seconds that a read of every living instance takes."""
    began_s = time.monotonic()
    with psycopg.connect(dsn) as connection:
        connection.execute("select * from registry_instance where status <> 'dead'").fetchall()
    return time.monotonic() - began_s


async def floor(dsn: str, ids: list[str], seconds: float) -> float:
    """Measure beats per second with one transaction each."""
    done = 0
    async with AsyncConnectionPool(dsn, min_size=LANES, max_size=LANES, kwargs={"autocommit": True}) as pool:
        await pool.wait()
        began_s = time.monotonic()

        async def lane(offset: int) -> None:
            nonlocal done
            turn = offset
            while time.monotonic() < began_s + seconds:
                async with pool.connection() as connection:
                    await connection.execute(
                        "update registry_instance set last_heartbeat = now() where instance_id = %s",
                        (ids[turn % len(ids)],),
                    )
                done += 1
                turn += LANES

        await asyncio.gather(*(lane(offset) for offset in range(LANES)))
        return done / (time.monotonic() - began_s)


async def ceiling(dsn: str, ids: list[str], seconds: float) -> float:
    """Measure rows per second of bare batched updates in PostgreSQL."""
    done = 0
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        began_s = time.monotonic()
        while time.monotonic() < began_s + seconds:
            await connection.execute(
                "update registry_instance r set last_heartbeat = now() "
                "from unnest(%s::uuid[]) as b (id) where r.instance_id = b.id",
                (ids,),
            )
            done += len(ids)
        return done / (time.monotonic() - began_s)
