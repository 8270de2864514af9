"""The baselines: bare statements of psycopg, without a registry, on the rows that the registry works on."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any, LiteralString

import psycopg
from psycopg import conninfo, sql
from psycopg_pool import AsyncConnectionPool

LANES = 10
_TABLES = """
    create table instance (
        instance_id uuid primary key, logical_id text collate "C" not null, epoch text not null, status text not null,
        actor_name text, namespace text, actor_id text, organ_id text, labels jsonb, metadata jsonb, node_id text,
        ip_address inet, pid integer, process_key text, started_at timestamptz not null default now(),
        changed_at timestamptz not null default now(), beaten_at timestamptz not null default now(), seq bigint,
        version bigint generated always as identity
    ) with (fillfactor = 50);
    create index on instance (logical_id, started_at desc);
    create index on instance (logical_id, instance_id) where status <> 'dead';
    create index on instance (epoch) where status <> 'dead';
    create table transition (
        id bigint generated always as identity primary key, instance_id uuid not null,
        logical_id text collate "C" not null, status text not null, at timestamptz not null default now()
    );
    create index on transition (logical_id, id);
"""
_INSERT = """
    with made as (
        insert into instance (
            instance_id, logical_id, epoch, status, actor_name, namespace, actor_id, organ_id, labels, metadata,
            node_id, ip_address, pid, process_key, seq)
        select g.id, g.name, 'epoch-1', 'alive', g.name, 'namespace', md5(g.name), 'organ-1', '{}', '{}', md5('node'),
               '10.0.0.1', 4711, md5('process'), 1
          from unnest(%s::uuid[], %s::text[]) as g (id, name)
        returning instance_id, logical_id, status
    )
    insert into transition (instance_id, logical_id, status) select instance_id, logical_id, status from made
"""


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


def commits(dsn: str, count: int, pause_s: float) -> list[float]:
    """Measure the seconds of each of `count` commits of one row, with a pause between them."""
    found = []
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("create table if not exists lone (id int primary key, n int not null)")
        connection.execute("insert into lone values (1, 1) on conflict do nothing")
        for _ in range(count):
            began_s = time.perf_counter()
            connection.execute("update lone set n = n + 1 where id = 1")
            found.append(time.perf_counter() - began_s)
            time.sleep(pause_s)
    return found


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


def inserts(dsn: str, rows: int, per_statement: int = 1000) -> float:
    """Create the two tables and measure rows per second of bare inserts of instances with their history."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(_TABLES)
        began_s = time.monotonic()
        for first in range(0, rows, per_statement):
            numbers = range(first, min(rows, first + per_statement))
            ids = [str(uuid.uuid4()) for _ in numbers]
            connection.execute(_INSERT, (ids, [f"agent-{number:06}" for number in numbers]))
        return rows / (time.monotonic() - began_s)
