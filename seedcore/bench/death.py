"""The time from SIGKILL to "not resolvable" in another process, compared with a lease alone."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from collections.abc import Awaitable, Callable
from functools import partial

import ray

from seedcore.agents import RayAgent
from seedcore.bench.environment import Bench, percentile
from seedcore.bench.report import Figure, Ratio, Result
from seedcore.core.errors import AgentCallError, CannotKnowError, NotResolvableError
from seedcore.registry.connection import RegistryConnection
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from seedcore.tier0.answers import AgentSpec

_PREFIX = "bench-death-"
_PATIENCE_S = 60.0
_AT_ONCE = 4


class BenchAgent(RayAgent):
    """An agent that returns its process id."""

    async def handle_task(self, task: object) -> int:
        """Return the pid for any task."""
        return os.getpid()


class Watcher:
    """Resolves an agent in another process until resolution fails."""

    def __init__(self, settings: Settings) -> None:
        self._manager = Tier0MemoryManager(settings)

    async def until_resolved(self, logical_id: str, timeout_s: float) -> None:
        """Wait until the agent is resolvable from this process. Raises AgentCallError after `timeout_s` seconds."""
        if await self._until(logical_id, timeout_s, is_gone=False) is None:
            raise AgentCallError(logical_id, f"is not resolvable within {timeout_s:g} s of its start")

    async def until_gone(self, logical_id: str, timeout_s: float) -> float:
        """Return the wall-clock time (seconds since 1970) at which the agent was first not resolvable. Raises
        AgentCallError after `timeout_s` seconds."""
        gone_at = await self._until(logical_id, timeout_s, is_gone=True)
        if gone_at is None:
            raise AgentCallError(logical_id, f"is not known to be gone {timeout_s:g} s after its death")
        return gone_at

    async def _until(self, logical_id: str, timeout_s: float, is_gone: bool) -> float | None:
        ends_s = time.monotonic() + timeout_s
        while time.monotonic() < ends_s:
            try:
                await self._manager.resolve(logical_id)
            except NotResolvableError:
                if is_gone:
                    return time.time()
            except CannotKnowError:
                # no statement about the agent: retry
                pass
            else:
                if not is_gone:
                    return time.time()
            # yield to the other tasks of this process
            await asyncio.sleep(0)
        return None


async def first_refusal_after(
    killed_at: float, refusal: Awaitable[float], ask_again: Callable[[], Awaitable[float]]
) -> float:
    """Return the time of the first refusal after the death. A refusal before it does not count; the watcher retries."""
    gone_at = await refusal
    while gone_at < killed_at:
        gone_at = await ask_again()
    return gone_at


async def deaths(settings: Settings, kills: int, on_kill: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Kill `kills` agents with SIGKILL, one after another. Returns the seconds from each kill to "not resolvable" in
    another process, and the seconds that were left of each lease."""
    manager = Tier0MemoryManager(settings)
    connection = RegistryConnection(settings.namespace, settings.call_timeout_s)
    watcher = ray.remote(Watcher).options(num_cpus=0).remote(settings)
    found_s: list[float] = []
    lease_s: list[float] = []
    lease = (await connection.health()).lease_s
    for start in range(0, kills, _AT_ONCE):
        ids = [f"{_PREFIX}{number}" for number in range(start, min(kills, start + _AT_ONCE))]
        made = await manager.create_agents_batch(
            [
                AgentSpec(agent_id, agent_class=BenchAgent, max_restarts=0, arguments={"settings": settings})
                for agent_id in ids
            ]
        )
        for agent_id, why in made.failures.items():
            raise AgentCallError(agent_id, why)
        for agent_id in ids:
            pid: int = await manager.execute_task_on_agent(agent_id, "pid")
            await watcher.until_resolved.remote(agent_id, _PATIENCE_S)
            ask = partial(watcher.until_gone.remote, agent_id, _PATIENCE_S)
            gone = ask()
            # let the watcher begin its loop
            await asyncio.sleep(0.2)
            silence_s = (await connection.describe(agent_id)).live[0].silence_s
            killed_at = time.time()
            os.kill(pid, signal.SIGKILL)
            found_s.append(await first_refusal_after(killed_at, gone, ask) - killed_at)
            lease_s.append(max(0.0, lease - silence_s))
            on_kill()
    ray.kill(watcher)
    await manager.close()
    return found_s, lease_s


def result_of(found_s: list[float], lease_s: list[float]) -> Result:
    """Compute the figures and ratios."""
    return Result(
        "death",
        [
            Figure("from SIGKILL to not resolvable, median", statistics.median(found_s), "s"),
            Figure("p99", percentile(found_s, 0.99), "s"),
            Figure("remaining lease at the kill (computed), median", statistics.median(lease_s), "s"),
            Figure("kills", len(found_s), ""),
        ],
        [
            Ratio(
                "remaining lease, median / this registry, p99", statistics.median(lease_s) / percentile(found_s, 0.99)
            ),
            Ratio("p99 / one second", percentile(found_s, 0.99), "<= 1"),
        ],
    )


async def run(bench: Bench) -> Result:
    """Run the benchmark with its own registry."""
    place = await bench.place("death")
    try:
        return result_of(*await deaths(place.settings, 2 if bench.is_quick else 50, lambda: None))
    finally:
        await bench.leave(place)
