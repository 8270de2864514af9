"""What a resolution costs: a hit (a handle that is proven), a miss (one to be found), beside what Ray offers itself."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import ray
import ray.util
from ray.exceptions import RayError
from ray.util import state

from seedcore.bench.environment import Bench, Place
from seedcore.bench.report import Figure, Ratio, Result
from seedcore.core.errors import RegistryUnavailableError
from seedcore.core.model import Source
from seedcore.tier0 import Tier0MemoryManager
from seedcore.tier0.answers import AgentSpec

HITS = 20_000


async def run(bench: Bench) -> Result:
    """All on the same agents, in turns, so that nobody has the better moment."""
    agents, rounds = (6, 20) if bench.is_quick else (20, 50)
    place = await bench.place("resolve")
    manager = Tier0MemoryManager(place.settings)
    try:
        names = [f"bench-{number}" for number in range(agents)]
        made = await manager.create_agents_batch(
            [AgentSpec(name, arguments={"settings": place.settings}) for name in names]
        )
        assert not made.failures, made.failures
        await _until_followed(manager, names)
        figures, ratios, notes = await _measure(place, manager, names, rounds)
    finally:
        await manager.shutdown_agents()
        await manager.close()
        await bench.leave(place)
    return Result("resolve", figures, ratios, notes=[f"{agents} agents", *notes])


async def _measure(
    place: Place, manager: Tier0MemoryManager, names: Sequence[str], rounds: int
) -> tuple[list[Figure], list[Ratio], list[str]]:
    misses: list[float] = []
    theirs: list[float] = []
    for _ in range(rounds):
        for name in names:
            misses.append(await _timed(partial(manager.locate, name)))
            theirs.append(_timed_sync(partial(ray.get_actor, name, namespace=place.namespace)))
    for name in names:
        await manager.resolve(name)
    # proven in the background
    await asyncio.sleep(0.5)
    began_s = time.perf_counter()
    for turn in range(HITS):
        await manager.resolve(names[turn % len(names)])
    hit_s = (time.perf_counter() - began_s) / HITS
    listing = [_timed_sync(lambda: ray.util.list_named_actors(all_namespaces=True)) for _ in range(rounds)]
    registry = [await _timed(lambda: manager._connection.resolve([names[0]])) for _ in range(rounds)]
    figures = [
        Figure("hit: resolve", hit_s * 1e6, "us"),
        Figure("miss: locate, median", statistics.median(misses) * 1e6, "us"),
        Figure("ray.get_actor, median", statistics.median(theirs) * 1e6, "us"),
        Figure("the registry asked itself, median", statistics.median(registry) * 1e6, "us"),
        Figure("list_named_actors, median", statistics.median(listing) * 1e6, "us"),
    ]
    notes = []
    try:
        listed = [
            _timed_sync(lambda: state.list_actors(address=ray.get_runtime_context().gcs_address, limit=10_000))
            for _ in range(3)
        ]
        figures.append(Figure("State API list_actors, median", statistics.median(listed) * 1e6, "us"))
    except (RayError, ConnectionError, RuntimeError) as error:
        notes.append(f"the State API was not reached: {type(error).__name__}")
    their_s = statistics.median(theirs)
    ratios = [
        Ratio("get_actor / hit", their_s / hit_s, ">= 100"),
        Ratio("miss / get_actor", statistics.median(misses) / their_s, "<= 2"),
    ]
    return figures, ratios, notes


async def _until_followed(manager: Tier0MemoryManager, names: Sequence[str], within_s: float = 30.0) -> None:
    ends_s = time.monotonic() + within_s
    while True:
        located = [(await manager.locate(name)).source for name in names]
        if set(located) == {Source.SNAPSHOT}:
            return
        if time.monotonic() > ends_s:
            raise RegistryUnavailableError("the manager does not follow it")
        await asyncio.sleep(0.1)


async def _timed(work: Callable[[], Awaitable[object]]) -> float:
    began_s = time.perf_counter()
    await work()
    return time.perf_counter() - began_s


def _timed_sync(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s
