"""`seedcore bench`: what the registry does, measured on the machine that runs it, beside a baseline of the same run."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import ray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from seedcore.agents import RayAgent
from seedcore.cli.cluster import join_or_start_cluster
from seedcore.core.errors import AgentCallError, CannotKnowError, NotResolvableError
from seedcore.registry.connection import RegistryConnection
from seedcore.runtime import start_registry
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from seedcore.tier0.answers import AgentSpec

_PREFIX = "bench-death-"
_PATIENCE_S = 60.0
_AT_ONCE = 4


class BenchAgent(RayAgent):
    """Tells its process id."""

    async def handle_task(self, task: object) -> int:
        """The pid, whatever the task."""
        return os.getpid()


class Watcher:
    """Another process that resolves an agent until it cannot."""

    def __init__(self, settings: Settings) -> None:
        self._manager = Tier0MemoryManager(settings)

    async def until_resolved(self, logical_id: str, timeout_s: float) -> None:
        """Returns once the agent is resolvable from here. Raises AgentCallError after `timeout_s` seconds."""
        if await self._until(logical_id, timeout_s, is_gone=False) is None:
            raise AgentCallError(logical_id, f"is not resolvable within {timeout_s:g} s of its start")

    async def until_gone(self, logical_id: str, timeout_s: float) -> float:
        """The wall-clock time (seconds since the epoch) at which the agent was first known not to be resolvable."""
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
                # says nothing of the agent: ask again
                pass
            else:
                if not is_gone:
                    return time.time()
            # its own turn for whoever else waits in this process
            await asyncio.sleep(0)
        return None


async def first_refusal_after(
    killed_at: float, refusal: Awaitable[float], ask_again: Callable[[], Awaitable[float]]
) -> float:
    """When the agent was first refused after its death: what was refused before it says nothing of it."""
    gone_at = await refusal
    while gone_at < killed_at:
        gone_at = await ask_again()
    return gone_at


async def deaths(settings: Settings, console: Console, kills: int) -> list[float]:
    """SIGKILL `kills` agents, one after another; seconds from each kill to "not resolvable" in another process.

    Printed beside what the lease alone gives: the rest of it at the moment of each kill.
    """
    join_or_start_cluster(settings, console)
    await start_registry(settings)
    manager = Tier0MemoryManager(settings)
    connection = RegistryConnection(settings.namespace, settings.call_timeout_s)
    watcher = ray.remote(Watcher).options(num_cpus=0).remote(settings)
    found_s: list[float] = []
    lease_s: list[float] = []
    lease = (await connection.health()).lease_s
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("killing agents", total=kills)
        for start in range(0, kills, _AT_ONCE):
            ids = [f"{_PREFIX}{number}" for number in range(start, min(kills, start + _AT_ONCE))]
            made = await manager.create_agents_batch(
                [AgentSpec(agent_id, agent_class=BenchAgent, max_restarts=0) for agent_id in ids]
            )
            for agent_id, why in made.failures.items():
                raise AgentCallError(agent_id, why)
            for agent_id in ids:
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
                progress.advance(bar)
    ray.kill(watcher)
    _show(console, found_s, lease_s, lease)
    return found_s


def _show(console: Console, found_s: Sequence[float], lease_s: Sequence[float], lease: float) -> None:
    table = Table("FROM SIGKILL TO NOT RESOLVABLE", "P50", "P99", "MAX", "KILLS", box=None, pad_edge=False)
    for name, values in (("this registry", found_s), (f"a lease of {lease:g} s alone (computed)", lease_s)):
        table.add_row(
            name,
            f"{statistics.median(values):.3f} s",
            f"{percentile(values, 0.99):.3f} s",
            f"{max(values):.3f} s",
            str(len(values)),
        )
    console.print(table)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
