"""The time from SIGKILL to "not resolvable" in another process, compared with a lease alone; and, for agents that Ray
restarts, whose actor answers again as another instance, the time until the killed instance is no longer returned."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import ray

from seedcore.agents import RayAgent
from seedcore.bench.environment import Bench, percentile
from seedcore.bench.report import Figure, Ratio, Result
from seedcore.core.errors import AgentCallError, CannotKnowError, NotResolvableError
from seedcore.registry.caller.locator import Located
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from seedcore.tier0.answers import AgentSpec

_PREFIX = "bench-death-"
_PATIENCE_S = 60.0
_AT_ONCE = 4
_KILLS, _RESTARTS, _QUICK = 50, 25, 2


class BenchAgent(RayAgent):
    """An agent that returns its process id."""

    async def handle_task(self, task: object) -> int:
        """Return the pid for any task."""
        return os.getpid()


@dataclass(frozen=True, slots=True)
class Replaced:
    """How a killed instance of a restarted actor was resolved: `last_at` is the wall-clock time (seconds since the
    epoch) at which a resolution last returned it, None where none did; `longest_s` is what the longest one took."""

    last_at: float | None
    longest_s: float


class Resolver(Protocol):
    """What a watcher asks: the methods of Tier0MemoryManager that it calls."""

    async def resolve(self, logical_id: str) -> object: ...

    async def locate(self, logical_id: str) -> Located: ...


class Watcher:
    """Resolves an agent in another process until resolution fails."""

    def __init__(self, settings: Settings, resolver: Resolver | None = None) -> None:
        """The default resolver is a manager with these settings."""
        self._resolver: Resolver = resolver if resolver is not None else Tier0MemoryManager(settings)

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

    async def until_replaced(self, logical_id: str, instance_id: str, timeout_s: float) -> Replaced:
        """Resolves the agent until another instance is returned. Raises AgentCallError after `timeout_s` seconds."""
        ends_s = time.monotonic() + timeout_s
        last_at, longest_s = None, 0.0
        while time.monotonic() < ends_s:
            began_s = time.monotonic()
            located = None
            with suppress(NotResolvableError, CannotKnowError):
                located = (await self._resolver.locate(logical_id)).instance
            longest_s = max(longest_s, time.monotonic() - began_s)
            if located is not None and located.instance_id != instance_id:
                return Replaced(last_at, longest_s)
            if located is not None:
                last_at = time.time()
            await asyncio.sleep(0)
        raise AgentCallError(logical_id, f"is not resolvable again {timeout_s:g} s after its death")

    async def _until(self, logical_id: str, timeout_s: float, is_gone: bool) -> float | None:
        ends_s = time.monotonic() + timeout_s
        while time.monotonic() < ends_s:
            try:
                await self._resolver.resolve(logical_id)
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


async def deaths(settings: Settings, kills: int) -> tuple[list[float], list[float]]:
    """Kill `kills` agents with SIGKILL, one after another. Returns the seconds from each kill to "not resolvable" in
    another process, and the seconds that were left of each lease."""
    connection = RegistryConnection(settings.namespace, settings.call_timeout_s)
    found_s: list[float] = []
    lease_s: list[float] = []
    lease = (await connection.health()).lease_s
    async with _stage(settings) as (manager, watcher):
        for start in range(0, kills, _AT_ONCE):
            for agent_id in await _created(manager, settings, start, min(kills, start + _AT_ONCE), max_restarts=0):
                pid: int = await manager.execute_task_on_agent(agent_id, "pid")
                await watcher.until_resolved.remote(agent_id, _PATIENCE_S)
                ask = partial(watcher.until_gone.remote, agent_id, _PATIENCE_S)
                gone = ask()
                # the watcher resolves it by now, again and again
                await asyncio.sleep(0.2)
                silence_s = (await connection.describe(agent_id)).live[0].silence_s
                killed_at = time.time()
                os.kill(pid, signal.SIGKILL)
                found_s.append(await first_refusal_after(killed_at, gone, ask) - killed_at)
                lease_s.append(max(0.0, lease - silence_s))
    return found_s, lease_s


async def restarts(settings: Settings, kills: int) -> tuple[list[float], list[float]]:
    """SIGKILL an agent that Ray restarts `kills` times: the seconds from each kill to the last resolution, in another
    process, that returned the killed instance, and those that the longest resolution after it took."""
    last_s: list[float] = []
    longest_s: list[float] = []
    async with _stage(settings) as (manager, watcher):
        [agent_id] = await _created(manager, settings, 0, 1, max_restarts=-1)
        await watcher.until_resolved.remote(agent_id, _PATIENCE_S)
        for _ in range(kills):
            killed = (await manager.locate(agent_id)).instance
            assert killed is not None
            assert killed.pid is not None
            replaced = watcher.until_replaced.remote(agent_id, killed.instance_id, _PATIENCE_S)
            await asyncio.sleep(0.2)
            killed_at = time.time()
            os.kill(killed.pid, signal.SIGKILL)
            found: Replaced = await replaced
            last_s.append(max(0.0, (found.last_at or killed_at) - killed_at))
            longest_s.append(found.longest_s)
            await _until_located(manager, agent_id, killed.instance_id)
        await manager.shutdown_agents([agent_id])
    return last_s, longest_s


@asynccontextmanager
async def _stage(settings: Settings) -> AsyncIterator[tuple[Tier0MemoryManager, Any]]:
    """A manager, and a watcher in a process of its own."""
    manager = Tier0MemoryManager(settings)
    watcher = ray.remote(Watcher).options(num_cpus=0).remote(settings)
    try:
        yield manager, watcher
    finally:
        ray.kill(watcher)
        await manager.close()


async def _created(
    manager: Tier0MemoryManager, settings: Settings, first: int, end: int, max_restarts: int
) -> list[str]:
    ids = [f"{_PREFIX}{number}{'' if max_restarts == 0 else '-restarted'}" for number in range(first, end)]
    arguments = {"settings": settings}
    specs = [AgentSpec(one, agent_class=BenchAgent, max_restarts=max_restarts, arguments=arguments) for one in ids]
    made = await manager.create_agents_batch(specs)
    for agent_id, why in made.failures.items():
        raise AgentCallError(agent_id, why)
    return ids


async def _until_located(manager: Tier0MemoryManager, agent_id: str, killed_id: str) -> None:
    """Wait until this manager, too, returns another instance: the watcher's cache may be ahead of it."""
    ends_s = time.monotonic() + _PATIENCE_S
    while time.monotonic() < ends_s:
        with suppress(NotResolvableError, CannotKnowError):
            found = (await manager.locate(agent_id)).instance
            if found is not None and found.instance_id != killed_id:
                return
        await asyncio.sleep(0.05)
    raise AgentCallError(agent_id, f"is not resolvable again {_PATIENCE_S:g} s after its death")


def result_of(found_s: list[float], lease_s: list[float], last_s: list[float], longest_s: list[float]) -> Result:
    """Compute the figures and ratios."""
    return Result(
        "death",
        [
            Figure("from SIGKILL to not resolvable, median", statistics.median(found_s), "s"),
            Figure("p99", percentile(found_s, 0.99), "s"),
            Figure("remaining lease at the kill (computed), median", statistics.median(lease_s), "s"),
            Figure("kills", len(found_s), ""),
            Figure(
                "from SIGKILL to the last answer with the killed instance, restarted actor, median", *_median(last_s)
            ),
            Figure("p99 of it", percentile(last_s, 0.99), "s"),
            Figure("the longest resolution after such a kill, median", *_median(longest_s)),
            Figure("p99 of that", percentile(longest_s, 0.99), "s"),
            Figure("kills of a restarted actor", len(last_s), ""),
        ],
        [
            Ratio(
                "remaining lease, median / this registry, p99", statistics.median(lease_s) / percentile(found_s, 0.99)
            ),
            Ratio("p99 / one second", percentile(found_s, 0.99), "<= 1"),
            Ratio("restarted actor: p99 / one second", percentile(last_s, 0.99), "<= 1"),
        ],
    )


def _median(seconds: list[float]) -> tuple[float, str]:
    return statistics.median(seconds), "s"


async def run(bench: Bench) -> Result:
    """Run the benchmark with its own registry."""
    place = await bench.place("death")
    try:
        killed = await deaths(place.settings, _QUICK if bench.is_quick else _KILLS)
        return result_of(*killed, *await restarts(place.settings, _QUICK if bench.is_quick else _RESTARTS))
    finally:
        await bench.leave(place)
