"""Agents started per second, each registered and alive and known to be durable, compared with the bare insert.

The agents are real reporters, many per process. The baseline inserts the same rows and their history with one
statement for each 1,000, over one connection, without a registry, before and after.
"""

from __future__ import annotations

import asyncio
import time
from statistics import median
from typing import Any

import ray

from seedcore.bench.bare import inserts
from seedcore.bench.environment import Bench, percentile
from seedcore.bench.hosts import Meter, hosts_of
from seedcore.bench.report import Figure, Ratio, Result
from seedcore.core.timeouts import end

ROUNDS = 3


async def run(bench: Bench) -> Result:
    """Measure ROUNDS fleets, each on a registry of its own, between runs of the baseline."""
    agents, hosts = (2_000, 2) if bench.is_quick else (100_000, 4)
    bare_rates = [inserts(bench.new_database(), agents)]
    fleets = []
    for _ in range(1 if bench.is_quick else ROUNDS):
        fleets.append(await _one(bench, agents, hosts))
        bare_rates.append(inserts(bench.new_database(), agents))
    rate, bare, flush_s = median(one["rate"] for one in fleets), median(bare_rates), max(one["flush"] for one in fleets)
    return Result(
        "starts",
        [
            Figure("agents started", rate, "/ s"),
            Figure(f"all {agents:,} started", agents / rate, "s"),
            Figure("bare inserts with their history", bare, "/ s"),
            Figure("registry, per agent", median(one["busy"] for one in fleets) / agents * 1e6, "us"),
            Figure("flush p99 meanwhile", flush_s, "s"),
            Figure("could not report", sum(one["problems"] for one in fleets), ""),
        ],
        [
            Ratio("started / bare inserts", rate / bare),
            Ratio("flush p99 / half of the flush interval", flush_s / 0.5),
        ],
        notes=[f"{agents:,} agents in {hosts} processes; registry, agents and PostgreSQL share this machine"],
    )


async def _one(bench: Bench, agents: int, host_count: int) -> dict[str, float]:
    place = await bench.place("starts")
    hosts: list[Any] = []
    try:
        process = await place.process()
        hosts = await hosts_of(place, agents, host_count)
        meter = Meter(place)
        busy_s, began_s = sum(process.cpu_times()[:2]), time.monotonic()
        sampling = asyncio.create_task(meter.run())
        await asyncio.gather(*(host.start.remote() for host in hosts))
        took_s, busy_s = time.monotonic() - began_s, sum(process.cpu_times()[:2]) - busy_s
        await end(sampling)
        (alive,) = place.ask("select count(*) from registry_instance where status = 'alive'")
        assert alive == agents // host_count * host_count, f"{alive} agents are alive in the database"
        return {
            "rate": alive / took_s,
            "busy": busy_s,
            "flush": percentile([sample.flush.last_flush_s for sample in meter.samples], 0.99),
            "problems": float(sum(await asyncio.gather(*(host.problems.remote() for host in hosts)))),
        }
    finally:
        for host in hosts:
            ray.kill(host)
        await bench.leave(place)
