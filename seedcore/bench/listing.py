"""A listing of every agent, and a look-up of one, at the registry: beside a bare read of the rows and a bare call."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any

import ray

from seedcore.bench.bare import read_all
from seedcore.bench.environment import Bench, percentile
from seedcore.bench.ingest import registered
from seedcore.bench.report import Figure, Ratio, Result
from seedcore.registry.caller.listing import every_page

ROUNDS = 5
LOOKUPS = 200


class Echo:
    """An actor with one method, which does nothing. As the registry, it is asynchronous."""

    async def echo(self, value: object) -> object:
        """The value."""
        return value


async def run(bench: Bench) -> Result:
    """Measure ROUNDS of each, in turn."""
    agents, rounds = (2_000, 1) if bench.is_quick else (20_000, ROUNDS)
    dsn = bench.new_database()
    await registered(dsn, agents)
    place = await bench.place("listing", dsn, lease_s=600.0)
    echo_class: Any = ray.remote(Echo)
    echo = echo_class.options(num_cpus=0, max_concurrency=100).remote()
    listings: list[float] = []
    reads: list[float] = []
    lookups: list[float] = []
    calls: list[float] = []
    try:
        await echo.__ray_ready__.remote()
        for _ in range(rounds):
            began_s = time.perf_counter()
            listed = await every_page(place.connection, statuses=None)
            listings.append(time.perf_counter() - began_s)
            assert len(listed) == agents, f"{len(listed)} agents are listed"
            reads.append(read_all(dsn))
            for number in range(LOOKUPS // rounds):
                names = [f"agent-{number:06}"]
                lookups.append(await timed(lambda: place.connection.resolve(names)))  # noqa: B023
                calls.append(await timed(lambda: echo.echo.remote(names)))  # noqa: B023
    finally:
        ray.kill(echo)
        await bench.leave(place)
    return Result(
        "listing",
        [
            Figure(f"all {agents:,} agents listed", median(listings), "s"),
            Figure("bare: every row read by psycopg", median(reads), "s"),
            Figure("look-up at the registry, median", median(lookups) * 1000, "ms"),
            Figure("p99", percentile(lookups, 0.99) * 1000, "ms"),
            Figure("bare: a call of an actor that does nothing, median", median(calls) * 1000, "ms"),
        ],
        [
            Ratio("listing / bare read", median(listings) / median(reads), "<= 1"),
            Ratio("look-up / bare call", median(lookups) / median(calls), "<= 1.5"),
        ],
    )


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    """The seconds that it takes."""
    began_s = time.perf_counter()
    await work()
    return time.perf_counter() - began_s
