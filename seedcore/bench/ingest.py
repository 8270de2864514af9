"""Committed beats per second: the registry end to end, compared with a floor and a ceiling.

All three in one run, on one database and the same rows:

  ours     a process with agents -> registry actor (beat_many, 1,000 ids per call) -> one statement per flush
  floor    one transaction per beat, over a psycopg pool of 10
  ceiling  the bare batched UPDATE ... FROM unnest, one connection, no actor, no guards
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

import ray

from seedcore.bench.bare import ceiling, floor
from seedcore.bench.environment import Bench, Place
from seedcore.bench.report import Figure, Ratio, Result
from seedcore.core.changes import RegisterChange, Registration
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.store.postgres import PostgresStore

IDS_PER_CALL = 1000
LOOPS = 2000


class Feeder:
    """A process that beats for many agents, and sends the next call as soon as the last one is answered."""

    def __init__(self, namespace: str, instance_ids: list[str]) -> None:
        self._connection = RegistryConnection(namespace, 30.0)
        self._ids = instance_ids
        self._calls = [instance_ids[i : i + IDS_PER_CALL] for i in range(0, len(instance_ids), IDS_PER_CALL)]

    async def run(self, seconds: float) -> int:
        """Beat for `seconds` seconds. Returns the number of lost instances, which should be 0."""
        ends_s = time.monotonic() + seconds
        turn = lost = 0
        while time.monotonic() < ends_s:
            answer = await self._connection.beat_many(self._calls[turn % len(self._calls)])
            lost += len(answer.unknown) + len(answer.dead)
            turn += 1
        return lost

    async def run_singly(self, seconds: float) -> float:
        """Beat for one agent a call, from LOOPS loops at once, as agents do that have a loop of their own. Returns the
        beats per second that were answered."""
        return await _rate(lambda number: self._connection.beat(self._ids[number % len(self._ids)]), seconds)

    async def call(self, seconds: float) -> float:
        """Call the registry from LOOPS loops at once. Returns the calls per second that were answered."""
        return await _rate(lambda _: self._connection.hello(), seconds)


async def _rate(work: Callable[[int], Awaitable[object]], seconds: float) -> float:
    ends_s, turns = time.monotonic() + seconds, count()
    done = 0

    async def loop() -> None:
        nonlocal done
        while time.monotonic() < ends_s:
            await work(next(turns))
            done += 1

    await asyncio.gather(*(loop() for _ in range(LOOPS)))
    return done / seconds


async def run(bench: Bench) -> Result:
    """Measure committed beats, floor and ceiling, one after the other, on the same rows."""
    agents, seconds = (5_000, 1.5) if bench.is_quick else (50_000, 8.0)
    dsn = bench.new_database()
    ids = await registered(dsn, agents)
    place = await bench.place("ingest", dsn, flush_interval_s=0.02, lease_s=600.0, max_beats_per_s=1e6)
    try:
        ours = await _ours(place, ids, seconds)
    finally:
        await bench.leave(place)
    updates, hot = place.ask(
        "select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where relname = 'registry_instance'"
    )
    low = await floor(dsn, ids, seconds)
    high = await ceiling(dsn, ids, seconds)
    return Result(
        "ingest",
        [
            Figure("rows of beats committed, end to end", ours["committed"], "/ s"),
            Figure("beats covered by a commit", ours["covered"], "/ s"),
            Figure("beats of one agent a call, from 2,000 loops of a process", ours["singly"], "/ s"),
            Figure("bare: calls of the registry that do nothing, from them", ours["calls"], "/ s"),
            Figure("floor: one transaction per beat", low, "/ s"),
            Figure("ceiling: bare batched update", high, "/ s"),
            Figure("statements per flush", ours["statements"], ""),
            Figure("beats dropped", ours["dropped"], ""),
            Figure("HOT share of updates", hot / updates if updates else 0.0, ""),
        ],
        [
            Ratio("committed / floor", ours["committed"] / low, ">= 15"),
            Ratio("committed / ceiling", ours["committed"] / high, ">= 0.4"),
            Ratio("beats of one agent a call / bare calls", ours["singly"] / ours["calls"], ">= 5"),
        ],
        notes=[f"{agents:,} agents, all three on the same rows; registry, feeder and PostgreSQL share this machine"],
    )


async def registered(dsn: str, agents: int, *, is_alive: bool = False) -> list[str]:
    """Register instances in the database, which are starting or alive, and return their ids."""
    store = PostgresStore(dsn)
    await store.open()
    ids = [str(uuid.uuid4()) for _ in range(agents)]
    for start in range(0, agents, 1000):
        chunk = enumerate(ids[start : start + 1000], start)
        await store.register_many(
            [RegisterChange(Registration(i, f"agent-{n:06}"), 2, is_alive=is_alive) for n, i in chunk]
        )
    await store.close()
    return ids


async def _ours(place: Place, ids: list[str], seconds: float) -> dict[str, float]:
    feeder_class: Any = ray.remote(Feeder)
    feeder = feeder_class.options(num_cpus=0).remote(place.namespace, ids)
    await feeder.run.remote(0.5)  # warm
    before, began_s = (await place.connection.health()).flush, time.monotonic()
    lost = await feeder.run.remote(seconds)
    after, elapsed_s = (await place.connection.health()).flush, time.monotonic() - began_s
    singly, calls = await feeder.run_singly.remote(seconds / 2), await feeder.call.remote(seconds / 4)
    ray.kill(feeder)
    assert lost == 0, f"the registry lost {lost} beats"
    committed = after.beats_committed - before.beats_committed
    return {
        "committed": committed / elapsed_s,
        "covered": (committed + after.beats_coalesced - before.beats_coalesced) / elapsed_s,
        "statements": (after.statements - before.statements) / max(1, after.flushes - before.flushes),
        "dropped": after.beats_dropped,
        "singly": singly,
        "calls": calls,
    }
