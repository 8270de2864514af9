"""The memory of a process that resolves agents of a large fleet: with a copy of all, and of what it has resolved."""

from __future__ import annotations

import asyncio
import gc
from contextlib import suppress
from typing import Any

import psutil
import ray

from seedcore.bench.environment import Bench
from seedcore.bench.ingest import registered
from seedcore.bench.report import Figure, Ratio, Result
from seedcore.registry.caller.live_sources import SnapshotSource
from seedcore.registry.caller.sources import Choice, NoAnswerError
from seedcore.registry.following.follower import Follower
from seedcore.registry.following.nearby import Nearby
from seedcore.registry.protocol.connection import RegistryConnection

RESOLVED = 100
_CURRENT_S = 60.0
_MIB = 1024 * 1024


class Caller:
    """A process that follows the registry, as a manager does."""

    async def grown(self, namespace: str, agents: int, most_agents: int | None) -> tuple[float, int]:
        """Follow, and resolve RESOLVED of the agents. By how much the process has grown, in MiB, and how many instances
        it keeps."""
        connection = RegistryConnection(namespace, 30.0)
        await connection.resolve(["agent-000000"])
        before = _resident()
        follower = Follower(Nearby(connection), most_agents=most_agents)
        source = SnapshotSource(follower)
        follower.start()
        assert await follower.until_current(_CURRENT_S), "the copy is not current"
        for number in range(0, agents, agents // RESOLVED):
            # an answer that came late is not learned
            with suppress(NoAnswerError):
                await source.resolve([f"agent-{number:06}"], Choice())
        await asyncio.sleep(1.0)
        grown, kept = _resident() - before, len(follower.view)
        await follower.stop()
        return grown / _MIB, kept


async def run(bench: Bench) -> Result:
    """Measure a process of each kind, one after the other."""
    agents, most_agents = (10_000, 1_000) if bench.is_quick else (100_000, 5_000)
    dsn = bench.new_database()
    await registered(dsn, agents, is_alive=True)
    place = await bench.place("memory", dsn, lease_s=3600.0)
    try:
        part, learned = await _grown(place.namespace, agents, most_agents)
        whole, copied = await _grown(place.namespace, agents, None)
    finally:
        await bench.leave(place)
    assert copied == agents, f"{copied} agents are copied"
    assert learned <= most_agents, f"{learned} agents are kept"
    return Result(
        "memory",
        [
            Figure(f"a process that copies {agents:,} agents", whole, "MiB"),
            Figure(f"a process that has resolved {RESOLVED} of them", part, "MiB"),
            Figure("agents that it keeps", learned, ""),
        ],
        [Ratio("a part / all", part / whole, "<= 0.2")],
        notes=["beyond what the process has with Ray and a connection to the registry"],
    )


async def _grown(namespace: str, agents: int, most_agents: int | None) -> tuple[float, int]:
    caller_class: Any = ray.remote(Caller)
    caller = caller_class.options(num_cpus=0).remote()
    try:
        found: tuple[float, int] = await caller.grown.remote(namespace, agents, most_agents)
        return found
    finally:
        ray.kill(caller)


def _resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)
