"""The cost of an agent to the registry (CPU, memory, database) as the fleet grows.

The agents are real reporters, many per process. The process and the node's relay batch their beats.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import psutil
import ray

from seedcore.bench.environment import Bench, Place, percentile
from seedcore.bench.hosts import Meter, hosts_of
from seedcore.bench.report import Figure, Ratio, Result
from seedcore.core.timeouts import end


async def run(bench: Bench) -> Result:
    """Measure each size with its own registry, one after the other."""
    if bench.is_quick:
        return await measure(bench, (400, 1_600), 3.0, beat_s=1.0, hosts=2)
    return await measure(bench, (1_000, 10_000, 100_000), 60.0)


async def measure(
    bench: Bench, sizes: tuple[int, ...], seconds: float, *, beat_s: float = 10.0, hosts: int = 4
) -> Result:
    """Measure each size for `seconds` seconds. The agents beat every `beat_s` seconds, in `hosts` processes."""
    figures: list[Figure] = []
    costs: list[dict[str, float]] = []
    for size in sizes:
        found = await _one(bench, size, seconds, beat_s, hosts)
        costs.append(found)
        figures += [Figure(f"{size:,} agents: {name}", value, _UNITS[name]) for name, value in found.items()]
    large = costs[-1]
    ratios = [
        Ratio("flush p99 / half of the flush interval", large["flush p99"] / 0.5, "<= 1"),
        Ratio("HOT share", large["HOT share"], ">= 0.95"),
    ]
    for (few, less), (many, more) in pairwise(zip(sizes, costs, strict=True)):
        ratios += [
            Ratio(
                f"growth of CPU time, {few:,} to {many:,}", slope(less["of one core"], more["of one core"], few, many)
            ),
            Ratio(f"growth of memory, {few:,} to {many:,}", slope(less["of agents"], more["of agents"], few, many)),
        ]
    if len(sizes) > 1:
        # only the last step has a bound: there the fixed costs of a registry weigh least
        ratios[-2:] = [replace(ratio, bound="<= 1.1") for ratio in ratios[-2:]]
    notes = [f"a beat every {beat_s:g} s for {seconds:g} s; {hosts} processes"]
    return Result("growth", figures, ratios, notes=notes)


def slope(less: float, more: float, few: int, many: int) -> float:
    """Return the growth of a cost: 1 is proportional to the agents; above 1, each agent costs more than before."""
    return math.log(more / less) / math.log(many / few)


_UNITS = {
    "registered": "/ s",
    "beats": "/ s",
    "of one core": "%",
    "per beat": "us",
    "memory": "MiB",
    "of agents": "MiB",
    "per agent": "KiB",
    "beats dropped": "",
    "found late": "",
    "could not report": "",
    "flush p99": "s",
    "HOT share": "",
    "table growth": "x",
}


async def _one(bench: Bench, size: int, seconds: float, beat_s: float, host_count: int) -> dict[str, float]:
    place = await bench.place("growth", beat_interval_s=beat_s, lease_s=3 * beat_s)
    hosts: list[Any] = []
    try:
        process = await place.process()
        empty_bytes = process.memory_info().rss
        hosts = await hosts_of(place, size, host_count, beat_interval_s=beat_s)
        began_s = time.monotonic()
        await asyncio.gather(*(host.start.remote() for host in hosts))
        registered_s = time.monotonic() - began_s
        # until each agent has sent a beat, and the relay batches them
        await asyncio.sleep(1.2 * beat_s)
        return {
            "registered": size / registered_s,
            **await _steady(place, process, size, seconds, empty_bytes),
            "could not report": float(sum(await asyncio.gather(*(host.problems.remote() for host in hosts)))),
        }
    finally:
        for host in hosts:
            ray.kill(host)
        await bench.leave(place)


async def _steady(
    place: Place, process: psutil.Process, size: int, seconds: float, empty_bytes: int
) -> dict[str, float]:
    meter = Meter(place)
    # exclude the registrations from the statistics
    place.ask("select 1 from (select pg_stat_reset()) reset")
    table_bytes = place.ask("select pg_table_size('registry_instance')")[0]
    before, busy_s, began_s = await place.connection.health(), _busy_s(process), time.monotonic()
    sampling = asyncio.create_task(meter.run())
    await asyncio.sleep(seconds)
    await end(sampling)
    after, elapsed_s, busy_s = await place.connection.health(), time.monotonic() - began_s, _busy_s(process) - busy_s
    await asyncio.sleep(1.0)  # PostgreSQL's sessions report their statistics once per second
    updates, hot = place.ask(
        "select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where relname = 'registry_instance'"
    )
    beats = after.flush.beats_offered - before.flush.beats_offered
    memory_bytes = process.memory_info().rss
    return {
        "beats": beats / elapsed_s,
        "of one core": busy_s / elapsed_s * 100,
        "per beat": busy_s / max(1, beats) * 1e6,
        "memory": memory_bytes / 2**20,
        "of agents": (memory_bytes - empty_bytes) / 2**20,
        "per agent": (memory_bytes - empty_bytes) / size / 1024,
        "beats dropped": float(after.flush.beats_dropped),
        "found late": float(after.became_silent - before.became_silent),
        "flush p99": percentile([sample.flush.last_flush_s for sample in meter.samples], 0.99),
        "HOT share": hot / updates if updates else 0.0,
        "table growth": place.ask("select pg_table_size('registry_instance')")[0] / table_bytes,
    }


def _busy_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
