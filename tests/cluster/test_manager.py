"""Tier0MemoryManager on real Ray: creates, finds, asks, prunes and ends agents."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError

from seedcore.core.errors import (
    AgentCallError,
    CannotKnowError,
    InvalidInputError,
    NotResolvableError,
)
from seedcore.core.model import Registration, Source, new_instance_id
from seedcore.registry import RegistryConnection
from seedcore.registry.actor import stop_registry
from seedcore.registry.directory import RayDirectory
from seedcore.runtime import start_registry
from seedcore.settings import Mode, Settings
from seedcore.tier0 import Tier0MemoryManager
from seedcore.tier0.answers import AgentSpec
from tests.cluster.agents import SlowToAnswer, Stranger, Worker
from tests.waiting import eventually


def spec(agent_id: str, settings: Settings, agent_class: type[Any] = Worker, **details: Any) -> AgentSpec:
    return AgentSpec(agent_id, agent_class=agent_class, arguments={"settings": settings}, **details)


async def test_creating_an_agent_twice_makes_one_actor(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    handles = await asyncio.gather(
        *(manager.create_agent("one", agent_class=Worker, arguments={"settings": settings}) for _ in range(3))
    )
    again = await Tier0MemoryManager(settings).create_agent("one", agent_class=Worker, arguments={"settings": settings})
    pids = {await handle.execute_task.remote("pid") for handle in [*handles, again]}
    assert len(pids) == 1
    assert len((await registry.describe("one")).history) == 1


async def test_a_batch_creates_whom_it_can_and_names_whom_not(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    made = await manager.create_agents_batch(
        [spec("good", settings), spec("seedcore-bad", settings), spec("worse", settings, Stranger)]
    )
    assert list(made.results) == ["good"]
    assert set(made.failures) == {"seedcore-bad", "worse"}
    assert "seedcore-" in made.failures["seedcore-bad"]
    with pytest.raises(InvalidInputError):
        await manager.create_agents_batch([spec("twin", settings), spec("twin", settings)])


async def test_tasks_run_and_their_errors_arrive(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    await manager.create_agent("w", agent_class=Worker, arguments={"settings": settings})
    assert await manager.execute_task_on_agent("w", {"any": "thing"}) == {"any": "thing"}
    with pytest.raises(KeyError, match="no such thing"):
        await manager.execute_task_on_agent("w", "fail")
    with pytest.raises(AgentCallError, match="no answer within"):
        await manager.execute_task_on_agent("w", "sleep", timeout_s=0.1)
    await manager.create_agent("mortal", agent_class=Worker, arguments={"settings": settings}, max_restarts=0)
    with pytest.raises(ActorDiedError):
        await manager.execute_task_on_agent("mortal", "die", retries=False)


async def test_resolution_is_by_the_registry_and_proven(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    await manager.create_agent("a", agent_class=Worker, arguments={"settings": settings}, max_restarts=0)
    located = await Tier0MemoryManager(settings).locate("a")
    assert located.source is Source.REGISTRY
    assert located.instance is not None
    pid = await located.handle.execute_task.remote("pid")
    assert located.instance.pid == pid
    os.kill(pid, signal.SIGKILL)

    async def is_refused() -> bool:
        with pytest.raises(NotResolvableError):
            await manager.resolve("a")
        return True

    await eventually(is_refused)
    assert await manager.get_agent("a") is None
    with pytest.raises(NotResolvableError):
        await manager.resolve("never-was")


async def test_a_reused_name_is_not_taken_for_the_agent(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    actor: Any = ray.remote(Stranger)
    impostor = actor.options(name="name", namespace=settings.namespace, num_cpus=0).remote()
    assert await impostor.pid.remote()
    # of no node, so that only a caller can find its actor dead
    agent = Registration(new_instance_id(), "name", "name", settings.namespace, actor_id="0" * 32)
    await registry.register(agent)
    await registry.set_status(agent.instance_id, "alive", seq=2)
    with pytest.raises(NotResolvableError, match="belongs to another actor"):
        await manager.resolve("name")
    assert (await registry.describe("name")).live == ()
    ray.kill(impostor)


async def test_a_draining_agent_is_not_found_again_through_the_listing(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    for agent_id in ("stays", "drains"):
        await manager.create_agent(agent_id, agent_class=Worker, arguments={"settings": settings})
    await (await manager.resolve("drains")).drain.remote()
    fleet = await manager.discover_and_refresh_agents()
    assert [agent.logical_id for agent in fleet.agents] == ["stays"]
    assert (fleet.source, fleet.complete) == (Source.REGISTRY, True)
    with pytest.raises(NotResolvableError, match="draining"):
        await manager.resolve("drains")
    listing = await manager.discover_from_registry()
    assert [row.logical_id for row in listing] == ["stays"]


async def test_hybrid_finds_agents_that_do_not_report_and_registry_mode_does_not(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    silent = settings.model_copy(update={"registry_enabled": False})
    await manager.create_agent("unreported", agent_class=Worker, arguments={"settings": silent})
    hybrid, strict = Tier0MemoryManager(settings), Tier0MemoryManager(settings, mode=Mode.REGISTRY)
    fleet = await hybrid.discover_and_refresh_agents()
    assert [(agent.logical_id, agent.source) for agent in fleet.agents] == [("unreported", Source.RAY)]
    assert (await hybrid.locate("unreported")).source is Source.RAY
    assert (await strict.discover_and_refresh_agents()).agents == ()
    with pytest.raises(NotResolvableError):
        await strict.resolve("unreported")


async def test_ray_mode_needs_no_registry(ray_cluster: None, settings: Settings) -> None:
    manager = Tier0MemoryManager(settings, mode=Mode.RAY)
    silent = settings.model_copy(update={"registry_enabled": False})
    await manager.create_agent("plain", agent_class=Worker, arguments={"settings": silent})
    other = Tier0MemoryManager(settings, mode=Mode.RAY)
    assert await other.execute_task_on_agent("plain", "hello") == "hello"
    fleet = await other.discover_and_refresh_agents()
    assert ([agent.logical_id for agent in fleet.agents], fleet.complete) == (["plain"], True)
    summary = await other.get_system_summary()
    assert (summary.registry, summary.registry_problem) == (None, "the mode is ray")
    listing = await other.discover_from_registry()
    assert (listing.source, listing.complete, len(listing)) == (Source.SNAPSHOT, False, 0)
    await other.shutdown_agents()


async def test_without_a_registry_the_snapshot_and_the_listing_resolve(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    await manager.create_agent("known", agent_class=Worker, arguments={"settings": settings})
    await manager.discover_and_refresh_agents()
    await stop_registry(settings.namespace)
    located = await manager.locate("known")
    assert located.source is Source.SNAPSHOT
    assert await located.handle.get_id.remote() == "known"
    stranger = Tier0MemoryManager(settings)
    located = await stranger.locate("known")
    assert located.source is Source.RAY
    fleet = await stranger.discover_and_refresh_agents()
    assert [agent.logical_id for agent in fleet.agents] == ["known"]
    assert not fleet.complete
    assert "the registry is away" in fleet.problems[0]
    with pytest.raises(CannotKnowError):
        await stranger.resolve("nobody")


async def test_one_slow_agent_delays_nobody(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    await manager.create_agents_batch(
        [spec("quick-1", settings), spec("quick-2", settings), spec("slow", settings, SlowToAnswer)]
    )
    began_s = time.monotonic()
    beats = await manager.collect_heartbeats(timeout_s=1.0)
    assert time.monotonic() - began_s < 5
    assert set(beats.results) == {"quick-1", "quick-2"}
    assert beats.results["quick-1"].agent_id == "quick-1"
    assert "no answer within 1 s" in beats.failures["slow"]
    stats = await manager.collect_agent_stats()
    assert set(stats.results) == {"quick-1", "quick-2", "slow"}


async def test_prune_drops_the_dead_and_keeps_the_silent(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    await manager.create_agents_batch([spec(name, settings, max_restarts=0) for name in ("dead", "hung", "well")])
    dead = await (await manager.resolve("dead")).execute_task.remote("pid")
    hung = await (await manager.resolve("hung")).execute_task.remote("pid")
    os.kill(dead, signal.SIGKILL)
    os.kill(hung, signal.SIGSTOP)
    try:

        async def is_noticed() -> bool:
            pruned = await manager.prune()
            return "dead" in pruned.dropped and pruned.silent == ("hung",) and pruned.kept == 2

        await eventually(is_noticed)
    finally:
        os.kill(hung, signal.SIGCONT)
    assert [agent.logical_id for agent in manager.list_agents()] == ["hung", "well"]


async def test_shutdown_really_ends_the_actors(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    await manager.create_agents_batch([spec("x", settings), spec("y", settings)])
    pid = await (await manager.resolve("x")).execute_task.remote("pid")
    ended = await manager.shutdown_agents()
    assert ended.results == {"x": True, "y": True}
    assert manager.list_agents() == ()
    await eventually(lambda: not os.path.exists(f"/proc/{pid}"))
    assert await RayDirectory(settings.namespace).names() == []
    assert {row.cause for row in (await registry.describe("x")).history} == {"stopped"}


async def test_an_existing_actor_is_attached_under_a_logical_id(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    actor: Any = ray.remote(Stranger)
    handle = actor.options(name="its-own-name", namespace=settings.namespace, num_cpus=0).remote()
    assert await handle.pid.remote()
    await manager.attach_existing_actor("adopted", "its-own-name")
    resolved = await manager.resolve("adopted")
    assert await resolved.pid.remote() == await handle.pid.remote()
    with pytest.raises(NotResolvableError):
        await manager.attach_existing_actor("ghost", "no-such-actor")
    ray.kill(handle)


async def test_the_listing_is_never_cut_and_leaves_out_our_own(
    registry: RegistryConnection, settings: Settings
) -> None:
    actor: Any = ray.remote(Stranger)
    # never scheduled: rows in Ray's table alone
    handles = [
        actor.options(
            name=f"name-{n:03}", namespace=settings.namespace, lifetime="detached", resources={"nowhere": 1}
        ).remote()
        for n in range(150)
    ]
    directory = RayDirectory(settings.namespace)
    names = await eventually(lambda: _all_of(directory, 150))
    assert names == [f"name-{n:03}" for n in range(150)]
    for handle in handles:
        ray.kill(handle)


async def _all_of(directory: RayDirectory, count: int) -> list[str] | None:
    names = await directory.names()
    return names if len(names) >= count else None


async def test_the_summary_shows_fleet_and_registry(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    await manager.create_agent("s", agent_class=Worker, arguments={"settings": settings})
    await manager.discover_and_refresh_agents()
    summary = await manager.get_system_summary()
    assert (summary.mode, summary.known_agents, summary.agents_by_source) == (Mode.HYBRID, 1, {"registry": 1})
    assert summary.registry is not None
    assert summary.registry.instances["alive"] == 1


async def test_a_silent_registry_is_waited_for_once_and_heard_again_by_itself(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    await manager.create_agent("met", agent_class=Worker, arguments={"settings": settings})
    mine = RegistryConnection(settings.namespace, 2.0)
    caller = Tier0MemoryManager(settings, connection=mine)
    assert (await caller.locate("met")).source is Source.REGISTRY
    pid = (await registry.hello()).pid
    os.kill(pid, signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        assert (await caller.locate("met")).source is Source.SNAPSHOT
        first_s, began_s = time.monotonic() - began_s, time.monotonic()
        for _ in range(10):
            assert (await caller.locate("met")).source is Source.SNAPSHOT
        assert time.monotonic() - began_s < first_s
    finally:
        os.kill(pid, signal.SIGCONT)

    async def is_heard() -> bool:
        return (await caller.locate("met")).source is Source.REGISTRY

    await eventually(is_heard)


async def test_whom_the_manager_knows_is_compared_and_healed(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    for agent_id in ("stays", "drains", "returns"):
        await manager.create_agent(agent_id, agent_class=Worker, arguments={"settings": settings})
    actor: Any = ray.remote(Stranger)
    stranger = actor.options(name="stranger", namespace=settings.namespace, num_cpus=0).remote()
    assert await stranger.pid.remote()
    await manager.attach_existing_actor("attached", "stranger")
    await manager.discover_and_refresh_agents()
    assert await manager.reconcile() == 0
    before = {agent.logical_id: agent.instance for agent in manager.list_agents()}
    await (await manager.resolve("drains")).drain.remote()
    pid = await manager.execute_task_on_agent("returns", "pid")
    os.kill(pid, signal.SIGKILL)
    ray.kill(stranger)
    other = Tier0MemoryManager(settings)

    async def is_back() -> bool:
        return bool(await other.execute_task_on_agent("returns", "pid") != pid)

    await eventually(is_back)
    healed = await manager.reconcile()
    after = {agent.logical_id: agent.instance for agent in manager.list_agents()}
    assert set(after) == {"stays", "returns"}
    assert after["stays"] is not None
    assert before["returns"] is not None
    assert after["returns"] is not None
    assert after["returns"].instance_id != before["returns"].instance_id
    assert healed == (await manager.get_system_summary()).healed == 3


async def test_a_manager_that_missed_the_registry_compares_when_it_is_back(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    for agent_id in ("asked", "gone"):
        await manager.create_agent(agent_id, agent_class=Worker, arguments={"settings": settings}, max_restarts=0)
    await manager.discover_and_refresh_agents()
    await stop_registry(settings.namespace)
    assert (await manager.locate("asked")).source is Source.SNAPSHOT
    # nobody tells this manager
    await Tier0MemoryManager(settings).shutdown_agents(["gone"])
    await start_registry(settings)

    async def is_known_to_be_dead() -> bool:
        described = await registry.describe("gone")
        return described.complete and not described.live

    await eventually(is_known_to_be_dead)

    async def is_healed() -> bool:
        await manager.get_agent("asked")
        return [agent.logical_id for agent in manager.list_agents()] == ["asked"]

    await eventually(is_healed)
