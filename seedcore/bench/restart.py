"""The time until a killed registry serves again, compared with a bare read of the same rows."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from statistics import median

import psutil

from seedcore.bench.bare import read_all
from seedcore.bench.environment import READY_S, Bench, Place
from seedcore.bench.ingest import registered
from seedcore.bench.report import Figure, Ratio, Result
from seedcore.core.errors import RegistryUnavailableError

ROUNDS = 3


async def run(bench: Bench) -> Result:
    """Measure the time from the start of the new process to a complete answer, ROUNDS times."""
    agents, rounds = (10_000, 1) if bench.is_quick else (100_000, ROUNDS)
    dsn = bench.new_database()
    await registered(dsn, agents)
    place = await bench.place("restart", dsn, lease_s=600.0)
    kills: list[float] = []
    starts: list[float] = []
    reads: list[float] = []
    try:
        for _ in range(rounds):
            killed = (await place.connection.hello()).pid
            os.kill(killed, signal.SIGKILL)
            killed_at = time.time()
            serves_at, started_at = await _until_complete(place, killed)
            kills.append(serves_at - killed_at)
            starts.append(serves_at - max(started_at, killed_at))
            reads.append(read_all(dsn))
    finally:
        await bench.leave(place)
    return Result(
        "restart",
        [
            Figure("rows", agents, ""),
            Figure("from the kill to a complete answer", median(kills), "s"),
            Figure("part of it: from the start of the actor's process", median(starts), "s"),
            Figure("bare: every row read by psycopg", median(reads), "s"),
        ],
        [
            Ratio("process start to complete / bare read", median(starts) / median(reads), "<= 1.5"),
        ],
        notes=["if Ray used a process that it had started in advance, the time counts from the kill"],
    )


async def _until_complete(place: Place, killed: int) -> tuple[float, float]:
    ends_s = time.monotonic() + READY_S
    while time.monotonic() < ends_s:
        try:
            hello = await place.connection.hello()
            if hello.pid != killed and (await place.connection.resolve(["agent-000000"])).complete:
                return time.time(), psutil.Process(hello.pid).create_time()
        except RegistryUnavailableError:
            pass
        await asyncio.sleep(0.02)
    raise RegistryUnavailableError(f"the registry does not serve within {READY_S:g} s of the kill")
