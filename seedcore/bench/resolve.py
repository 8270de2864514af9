"""The cost of a resolution, compared with Ray's own look-ups: a hit (the manager has a proven handle), a pick (a hit
that chooses among several instances of one agent), and a miss (the process has not looked up the agent before, as with
`ray.get_actor`)."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import ray
import ray.util
from ray.exceptions import RayError
from ray.util import state

from seedcore.agents import RayAgent
from seedcore.bench.environment import Bench
from seedcore.bench.report import Figure, Ratio, Result
from seedcore.core.answers import Origin
from seedcore.core.errors import RegistryUnavailableError
from seedcore.core.selection import Policy
from seedcore.registry.ray_support.lookup import ActorHandle, actor_id_of
from seedcore.settings import Settings, use_namespace
from seedcore.tier0 import BlockingManager, Tier0MemoryManager, get_actor
from seedcore.tier0.answers import AgentSpec

HITS = 20_000
THREADS = 8
WARM = 2
REPLICATED = "bench-replicated"
REPLICAS = 4


class Caller:
    """A new process, without any earlier look-ups."""

    def __init__(self, settings: Any) -> None:
        self._namespace = settings.namespace
        self._manager = Tier0MemoryManager(settings)

    async def measure(self, names: Sequence[str], turn: int) -> dict[str, list[float]]:
        """Return the measured seconds by kind. The turn decides which half of the names each kind uses."""
        warm, names = names[:WARM], names[WARM:]
        # warm up: the first look-up of a process loads the actor's class
        ray.get_actor(warm[0], namespace=self._namespace)
        await self._until_followed(warm[1])
        ours, theirs = names[turn % 2 :: 2], names[(turn + 1) % 2 :: 2]
        found: dict[str, list[float]] = {"miss": [], "get_actor": [], "again": []}
        for own, other in zip(ours, theirs, strict=True):
            found["miss"].append(await _timed(partial(self._manager.locate, own)))
            found["get_actor"].append(_timed_sync(partial(ray.get_actor, other, namespace=self._namespace)))
            found["again"].append(_timed_sync(partial(ray.get_actor, other, namespace=self._namespace)))
        for name in names:
            await self._manager.resolve(name)
        # the manager proves the handles in the background
        await asyncio.sleep(0.5)
        began_s = time.perf_counter()
        for number in range(HITS):
            await self._manager.resolve(names[number % len(names)])
        found["hit"] = [(time.perf_counter() - began_s) / HITS]
        found["blocking"] = [await asyncio.to_thread(self._blocking_hits, names, 1)]
        found["threads"] = [await asyncio.to_thread(self._blocking_hits, names, THREADS)]
        for policy in (Policy.LEAST_LOADED, Policy.LEAST_OUTSTANDING):
            found[policy.value] = [await self._picked(policy)]
        connection = self._manager.connection
        found["registry"] = [await _timed(partial(connection.resolve, [name])) for name in names]
        await self._manager.close()
        return found

    def _blocking_hits(self, names: Sequence[str], threads: int) -> float:
        """The seconds of a hit of `seedcore.get_actor`, which so many threads call at once."""
        use_namespace(self._namespace)
        for name in names:
            while BlockingManager().cached(name) is None:
                get_actor(name)
                time.sleep(0.01)

        def call() -> None:
            for number in range(HITS // threads):
                get_actor(names[number % len(names)])

        with ThreadPoolExecutor(threads) as pool:
            began_s = time.perf_counter()
            for done in [pool.submit(call) for _ in range(threads)]:
                done.result()
            return (time.perf_counter() - began_s) / HITS

    async def _picked(self, policy: Policy) -> float:
        """Seconds per pick, once the loads and the handle of each instance are there."""
        follower, seen = self._manager.follower, set[str]()
        assert follower is not None
        while len(seen) < REPLICAS or (policy is Policy.LEAST_LOADED and follower.view.loads is None):
            seen.add(actor_id_of(await self._manager.resolve(REPLICATED, policy=policy)))
            await asyncio.sleep(0.02)
        for _ in range(10 * REPLICAS):
            await self._manager.resolve(REPLICATED, policy=policy)
        began_s = time.perf_counter()
        for _ in range(HITS):
            await self._manager.resolve(REPLICATED, policy=policy)
        return (time.perf_counter() - began_s) / HITS

    async def _until_followed(self, name: str, within_s: float = 30.0) -> None:
        ends_s = time.monotonic() + within_s
        while (await self._manager.locate(name)).source is not Origin.SNAPSHOT:
            if time.monotonic() > ends_s:
                raise RegistryUnavailableError("the manager does not follow the registry")
            await asyncio.sleep(0.1)


async def run(bench: Bench) -> Result:
    """Measure all kinds on the same agents. They alternate, so that load on the machine affects all alike."""
    agents, turns = (4, 1) if bench.is_quick else (20, 8)
    place = await bench.place("resolve")
    manager = Tier0MemoryManager(place.settings)
    found: dict[str, list[float]] = {}
    replicas: list[ActorHandle] = []
    caller_class: Any = ray.remote(Caller)
    try:
        names = [f"bench-{number}" for number in range(WARM + agents)]
        made = await manager.create_agents_batch(
            [AgentSpec(name, arguments={"settings": place.settings}) for name in names]
        )
        assert not made.failures, made.failures
        replicas = await _replicas(place.settings)
        for turn in range(turns):
            caller = caller_class.options(num_cpus=0).remote(place.settings)
            for kind, seconds in (await caller.measure.remote(names, turn)).items():
                found.setdefault(kind, []).extend(seconds)
            ray.kill(caller)
        figures, notes = _listings(turns)
    finally:
        for replica in replicas:
            ray.kill(replica)
        await manager.shutdown_agents()
        await manager.close()
        await bench.leave(place)
    median_s = {kind: statistics.median(seconds) for kind, seconds in found.items()}
    return Result(
        "resolve",
        [
            Figure("hit: resolve", median_s["hit"] * 1e6, "us"),
            Figure("hit: seedcore.get_actor, from a plain thread", median_s["blocking"] * 1e6, "us"),
            Figure(f"the same, {THREADS} threads at once", median_s["threads"] * 1e6, "us"),
            Figure("pick: resolve by LEAST_LOADED", median_s["least_loaded"] * 1e6, "us"),
            Figure("pick: resolve by LEAST_OUTSTANDING", median_s["least_outstanding"] * 1e6, "us"),
            Figure("miss: locate", median_s["miss"] * 1e6, "us"),
            Figure("ray.get_actor, first look-up of a name", median_s["get_actor"] * 1e6, "us"),
            Figure("ray.get_actor again, from Ray's own cache", median_s["again"] * 1e6, "us"),
            Figure("a call to the registry", median_s["registry"] * 1e6, "us"),
            *figures,
        ],
        [
            Ratio("get_actor, first look-up / hit", median_s["get_actor"] / median_s["hit"], ">= 100"),
            Ratio("blocking hit / hit", median_s["blocking"] / median_s["hit"], "<= 3"),
            Ratio(f"blocking hit of {THREADS} threads / hit", median_s["threads"] / median_s["hit"]),
            Ratio("get_actor, from Ray's cache / hit", median_s["again"] / median_s["hit"]),
            Ratio("miss / get_actor, first look-up", median_s["miss"] / median_s["get_actor"], "<= 2"),
            Ratio("pick by LEAST_LOADED / hit", median_s["least_loaded"] / median_s["hit"], "<= 10"),
        ],
        notes=[f"medians; {agents} agents, looked up for the first time in each of {turns} processes", *notes],
    )


async def _replicas(settings: Settings) -> list[ActorHandle]:
    """Instances of one agent, each an actor of its own."""
    agent_class: Any = ray.remote(RayAgent)
    made: list[ActorHandle] = [
        agent_class.options(name=f"{REPLICATED}-{number}", namespace=settings.namespace, num_cpus=0).remote(
            REPLICATED, settings=settings
        )
        for number in range(REPLICAS)
    ]
    await asyncio.gather(*(actor.start.remote() for actor in made))
    return made


def _listings(turns: int) -> tuple[list[Figure], list[str]]:
    """Measure Ray's own listings, in a process that has called them before."""
    names_s = [_timed_sync(partial(ray.util.list_named_actors, all_namespaces=True)) for _ in range(5 * turns)]
    figures = [Figure("list_named_actors", statistics.median(names_s) * 1e6, "us")]
    address = ray.get_runtime_context().gcs_address
    try:
        states_s = [_timed_sync(partial(state.list_actors, address=address, limit=10_000)) for _ in range(3)]
    except (RayError, ConnectionError, RuntimeError) as error:
        return figures, [f"the State API did not answer: {type(error).__name__}"]
    return [*figures, Figure("State API list_actors", statistics.median(states_s) * 1e6, "us")], []


async def _timed(work: Callable[[], Awaitable[object]]) -> float:
    began_s = time.perf_counter()
    await work()
    return time.perf_counter() - began_s


def _timed_sync(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s
