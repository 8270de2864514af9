"""How many beats a second become durable: the registry end to end, beside its floor and its ceiling.

In one run, on one database and the same rows:

  ours     agents' processes -> registry actor (beat_many, 1,000 ids a call) -> one statement a flush
  floor    one transaction per beat, over a psycopg pool of 10
  ceiling  the bare batched UPDATE ... FROM unnest, one connection, no actor, no guards

    python tests/bench/ingest.py [--agents 20000] [--seconds 8] [--dsn DSN] [--json FILE]

Without a DSN an embedded PostgreSQL runs in a temporary folder. Figures depend on the machine; the ratios
are what the project promises.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import psycopg
import ray
from psycopg_pool import AsyncConnectionPool

from seedcore.core.model import RegisterChange, Registration
from seedcore.core.ports import Store
from seedcore.registry.actor import ensure_registry, stop_registry
from seedcore.registry.config import RegistryConfig
from seedcore.registry.connection import RegistryConnection
from seedcore.store.embedded import EmbeddedPostgres
from seedcore.store.postgres import PostgresStore

NAMESPACE = "bench"
IDS_A_CALL = 1000
FEEDERS = 1
IN_FLIGHT = 1


@dataclass(frozen=True)
class Figures:
    """Rates are rows a second."""

    agents: int
    ours_committed: float
    ours_covered: float
    ours_statements_per_flush: float
    ours_dropped: int
    floor_transaction_per_beat: float
    ceiling_bare_batches: float
    hot_share: float

    @property
    def times_floor(self) -> float:
        return self.ours_committed / self.floor_transaction_per_beat

    @property
    def of_ceiling(self) -> float:
        return self.ours_committed / self.ceiling_bare_batches


class Feeder:
    """A process that hosts many logical agents and beats for all of them as fast as it is answered."""

    def __init__(self, instance_ids: list[str]) -> None:
        self._calls = [instance_ids[i : i + IDS_A_CALL] for i in range(0, len(instance_ids), IDS_A_CALL)]

    async def run(self, seconds: float) -> int:
        connection = RegistryConnection(NAMESPACE, 30.0)
        ends_s = time.monotonic() + seconds
        sent = 0

        async def lane(offset: int) -> None:
            nonlocal sent
            turn = offset
            while time.monotonic() < ends_s:
                call = self._calls[turn % len(self._calls)]
                answer = await connection.beat_many(call)
                assert not answer.unknown, "the registry lost instances"
                sent += len(call)
                turn += IN_FLIGHT

        await asyncio.gather(*(lane(offset) for offset in range(IN_FLIGHT)))
        return sent


class OpenStore:
    """Gives the actor a store; picklable."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn

    async def __call__(self) -> Store:
        return PostgresStore(self._dsn)


async def register(dsn: str, agents: int) -> list[str]:
    store = PostgresStore(dsn)
    await store.open()
    ids = [str(uuid.uuid4()) for _ in range(agents)]
    for start in range(0, agents, 1000):
        chunk = ids[start : start + 1000]
        await store.register_many([RegisterChange(Registration(i, f"agent-{i}"), 1) for i in chunk])
    await store.close()
    return ids


async def floor(dsn: str, ids: list[str], seconds: float) -> float:
    done = 0
    async with AsyncConnectionPool(dsn, min_size=10, max_size=10, kwargs={"autocommit": True}) as pool:
        await pool.wait()
        ends_s = time.monotonic() + seconds
        began_s = time.monotonic()

        async def lane(offset: int) -> None:
            nonlocal done
            turn = offset
            while time.monotonic() < ends_s:
                async with pool.connection() as connection:
                    await connection.execute(
                        "update registry_instance set last_heartbeat = now() where instance_id = %s",
                        (ids[turn % len(ids)],),
                    )
                done += 1
                turn += 10

        await asyncio.gather(*(lane(offset) for offset in range(10)))
        return done / (time.monotonic() - began_s)


async def ceiling(dsn: str, ids: list[str], seconds: float) -> float:
    done = 0
    connection = await psycopg.AsyncConnection.connect(dsn, autocommit=True)
    async with connection:
        began_s = time.monotonic()
        while time.monotonic() < began_s + seconds:
            await connection.execute(
                "update registry_instance r set last_heartbeat = now() "
                "from unnest(%s::uuid[]) as b (id) where r.instance_id = b.id",
                (ids,),
            )
            done += len(ids)
        return done / (time.monotonic() - began_s)


async def ours(dsn: str, ids: list[str], seconds: float) -> dict[str, float]:
    config = RegistryConfig(
        ray_cluster=ray.get_runtime_context().get_session_name(),
        flush_interval_s=0.02,
        lease_s=600,
        beat_interval_s=5,
    )
    await ensure_registry(config, OpenStore(dsn), NAMESPACE)
    connection = RegistryConnection(NAMESPACE, 30.0)
    for _ in range(600):
        if (await connection.health()).is_ready:
            break
        await asyncio.sleep(0.05)
    feeder_class: Any = ray.remote(Feeder)
    feeders = [feeder_class.options(num_cpus=0).remote(ids[n::FEEDERS]) for n in range(FEEDERS)]
    await asyncio.gather(*(feeder.run.remote(0.5) for feeder in feeders))  # warm
    before, began_s = (await connection.health()).flush, time.monotonic()
    await asyncio.gather(*(feeder.run.remote(seconds) for feeder in feeders))
    after, elapsed_s = (await connection.health()).flush, time.monotonic() - began_s
    health = await connection.health()
    await stop_registry(NAMESPACE)
    committed = after.beats_committed - before.beats_committed
    covered = committed + after.beats_coalesced - before.beats_coalesced
    return {
        "committed": committed / elapsed_s,
        "covered": covered / elapsed_s,
        "statements": (after.statements - before.statements) / max(1, after.flushes - before.flushes),
        "dropped": health.flush.beats_dropped,
    }


def hot_share(dsn: str) -> float:
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(
            "select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where relname = 'registry_instance'"
        ).fetchone()
    return row[1] / row[0] if row and row[0] else 0.0


def measure(dsn: str, agents: int, seconds: float) -> Figures:
    """All three, one after the other, on the same rows. Ray must not be running in this process."""
    ids = asyncio.run(register(dsn, agents))
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        mine = asyncio.run(ours(dsn, ids, seconds))
    finally:
        ray.shutdown()
    share = hot_share(dsn)
    low = asyncio.run(floor(dsn, ids, seconds))
    high = asyncio.run(ceiling(dsn, ids, seconds))
    return Figures(
        agents, mine["committed"], mine["covered"], mine["statements"], int(mine["dropped"]), low, high, share
    )


def show(figures: Figures) -> None:
    rows = [
        ("ours: rows of beats committed / s", figures.ours_committed),
        ("ours: beats covered by a commit / s", figures.ours_covered),
        ("floor: one transaction per beat / s", figures.floor_transaction_per_beat),
        ("ceiling: bare batched update / s", figures.ceiling_bare_batches),
    ]
    for name, rate in rows:
        print(f"{name:<40}{rate:>12,.0f}")
    print(f"{'ours / floor':<40}{figures.times_floor:>11.1f}x")
    print(f"{'ours / ceiling':<40}{figures.of_ceiling:>12.2f}")
    print(f"{'statements per flush':<40}{figures.ours_statements_per_flush:>12.2f}")
    print(f"{'beats dropped':<40}{figures.ours_dropped:>12}")
    print(f"{'HOT share of updates':<40}{figures.hot_share:>12.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--agents", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--dsn", help="an empty database to use; it is written to")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="seedcore-bench-") as folder:
        embedded = None
        if chosen.dsn is None:
            Path(folder).chmod(0o755)
            embedded = EmbeddedPostgres(Path(folder) / "data")
        dsn = chosen.dsn if embedded is None else embedded.hold()
        try:
            figures = measure(dsn, chosen.agents, chosen.seconds)
        finally:
            if embedded is not None:
                embedded.release()
    show(figures)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps({**asdict(figures), "times_floor": figures.times_floor}, indent=2))


if __name__ == "__main__":
    main()
