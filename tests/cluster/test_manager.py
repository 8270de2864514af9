"""Tier0MemoryManager on real Ray: creates, finds, asks, prunes and ends agents."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError

from seedcore.composition import start_registry
from seedcore.core.answers import NotResolved, Origin
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import Registration, new_instance_id
from seedcore.core.circuit import Circuit
from seedcore.core.errors import (
    ActorGoneError,
    AgentCallError,
    CannotKnowError,
    InvalidInputError,
    NotResolvableError,
    RetiredEpochError,
)
from seedcore.core.instances import Instance
from seedcore.registry import RegistryConnection
from seedcore.registry.caller.handle_cache import ActorTable
from seedcore.registry.caller.handles import HandleFinder
from seedcore.registry.ray_support.actors import end_actor
from seedcore.registry.ray_support.directory import RayDirectory
from seedcore.registry.ray_support.lookup import actor_id_of, is_known_gone
from seedcore.registry.server.actor import stop_registry
from seedcore.settings import Mode, Settings
from seedcore.tier0 import Tier0MemoryManager, creation
from seedcore.tier0.answers import AgentSpec
from tests.builders import instance
from tests.cluster.agents import (
    Async,
    Blocking,
    Forgetful,
    Late,
    Mortal,
    Narrow,
    SlowToAnswer,
    SlowToStart,
    Stranger,
    Unmakeable,
    Unstartable,
    Worker,
)
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
    assert len((await registry.describe("one")).instances) == 1


async def test_a_batch_creates_what_it_can_and_names_the_failures(
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


@pytest.mark.parametrize("mode", list(Mode))
async def test_a_task_whose_actor_dies_under_it_runs_again_on_the_restarted_one(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings, tmp_path: Path, mode: Mode
) -> None:
    await manager.create_agent("phoenix", agent_class=Mortal, arguments={"settings": settings})
    caller = Tier0MemoryManager(settings, mode=mode)
    runs = tmp_path / "runs"
    assert await caller.execute_task_on_agent("phoenix", (str(runs), 1)) == 2
    assert len(set(runs.read_text().splitlines())) == 2


async def test_a_task_that_kills_every_actor_is_not_run_for_ever(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings, tmp_path: Path
) -> None:
    await manager.create_agent("victim", agent_class=Mortal, arguments={"settings": settings})
    runs = tmp_path / "runs"
    with pytest.raises(ActorUnavailableError):
        await manager.execute_task_on_agent("victim", (str(runs), 100))
    assert 2 <= len(runs.read_text().splitlines()) <= 3


async def test_a_task_that_must_not_run_twice_does_not(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings, tmp_path: Path
) -> None:
    await manager.create_agent("once", agent_class=Mortal, arguments={"settings": settings})
    runs = tmp_path / "runs"
    with pytest.raises(ActorUnavailableError):
        await manager.execute_task_on_agent("once", (str(runs), 1), retries=False)
    assert len(runs.read_text().splitlines()) == 1


async def test_a_tasks_own_timeout_is_its_own_error(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    await manager.create_agent("late", agent_class=Late, arguments={"settings": settings})
    for timeout_s in (None, 30.0):
        with pytest.raises(TimeoutError, match="the work itself"):
            await manager.execute_task_on_agent("late", "work", timeout_s)
    for call in (manager.execute_task_on_agent("late", "work", float("nan")), manager.collect_heartbeats(-1.0)):
        with pytest.raises(InvalidInputError, match="timeout_s"):
            await call


async def test_reserved_actors_are_no_agents(registry: RegistryConnection, manager: Tier0MemoryManager) -> None:
    ours = "seedcore-registry"
    await manager.discover_and_refresh_agents()
    for call in (
        manager.resolve(ours),
        manager.locate(ours),
        manager.get_agent(ours),
        manager.attach_existing_actor(ours),
        manager.attach_existing_actor("alias", ours),
        manager.execute_task_on_agent(ours, "work"),
        manager.shutdown_agents(["never-was", ours]),
    ):
        with pytest.raises(InvalidInputError, match="seedcore-"):
            await call
    assert manager.list_agents() == ()
    assert (await registry.health()).is_ready


async def test_an_agent_with_a_reserved_actor_name_is_neither_resolved_nor_ended(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    agent = Registration(new_instance_id(), "alias", "seedcore-registry", settings.namespace)
    await registry.register(agent)
    await registry.set_status(agent.instance_id, "alive", seq=2)
    with pytest.raises(NotResolvableError) as refused:
        await manager.resolve("alias")
    assert refused.value.reason is NotResolved.NO_HANDLE
    await manager.discover_and_refresh_agents()
    assert set((await manager.shutdown_agents()).failures) == {"alias"}
    assert (await registry.health()).is_ready


@pytest.mark.parametrize(
    ("details", "field"),
    [
        ({"organ_id": "o" * 256}, "organ_id"),
        ({"metadata": {"n": float("nan")}}, "metadata"),
        ({"metadata": ["m"]}, "metadata"),
        ({"labels": ["k"]}, "labels"),
        ({"agent_class": "foo"}, "agent_class"),
        ({"agent_class": len}, "agent_class"),
        ({"agent_class": Stranger}, "agent_class"),
        ({"agent_class": Narrow}, "agent_class"),
        ({"agent_class": ray.remote(Worker)}, "agent_class"),
        ({"arguments": {"organ_id": "twice"}}, "arguments"),
        ({"arguments": ["a"]}, "arguments"),
    ],
)
async def test_what_cannot_be_an_agent_is_refused_before_there_is_an_actor(
    ray_cluster: None, manager: Tier0MemoryManager, settings: Settings, details: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidInputError) as refused:
        await manager.create_agent("never", **details)
    assert refused.value.field == field
    assert await RayDirectory(settings.namespace).names() == []


async def test_a_cancelled_creation_ends_the_actor_that_it_made_and_no_other(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    directory = RayDirectory(settings.namespace)

    async def has_no(names: set[str]) -> bool:
        return not names & set(await directory.names())

    nowhere = spec("nowhere", settings, resources={"no such thing": 1})
    slow = spec("slow", settings, SlowToStart)
    good = spec("good", settings)
    before = await manager.create_agent("before", agent_class=Worker, arguments={"settings": settings})
    creations = [
        asyncio.create_task(manager.create_agents_batch([nowhere, slow, good])),
        asyncio.create_task(manager.create_agent("before", agent_class=Worker, arguments={"settings": settings})),
    ]

    async def are_made() -> bool:
        has_started = "good" in {agent.logical_id for agent in manager.list_agents()}
        return has_started and {"nowhere", "slow"} <= set(await directory.names())

    await eventually(are_made)
    for under_way in creations:
        under_way.cancel()
    await asyncio.wait(creations)
    assert creations[0].cancelled()
    await eventually(lambda: has_no({"nowhere", "slow"}))
    # its name is free, and who had started goes on
    await manager.create_agent("slow", agent_class=Worker, arguments={"settings": settings})
    assert await before.ping.remote() == "pong"
    assert await (await manager.resolve("good")).ping.remote() == "pong"


async def test_an_agent_that_is_not_detached_lives_as_long_as_the_process_that_made_it(
    registry: RegistryConnection, settings: Settings
) -> None:
    one, other = Tier0MemoryManager(settings), Tier0MemoryManager(settings)
    await one.create_agent("loose", agent_class=Worker, arguments={"settings": settings}, is_detached=False)
    await one.create_agents_batch([spec("batched", settings, is_detached=False)])
    await other.create_agent("loose", agent_class=Worker, arguments={"settings": settings})
    ids = ["loose", "batched"]
    first = {row.logical_id: row.instance_id for row in await registry.list_active()}
    await one.close()
    del one
    gc.collect()
    actor: Any = ray.remote(Worker)
    # Ray ends an actor without handles: the end of this one shows that the others would have ended
    unheld = actor.options(namespace=settings.namespace, num_cpus=0).remote("unheld", settings=settings)
    await unheld.start.remote()
    del unheld

    async def is_ended() -> bool:
        return not (await registry.describe("unheld")).live

    await eventually(is_ended)
    assert {row.logical_id: row.instance_id for row in await registry.list_active()} == first
    for agent_id in ids:
        assert await other.execute_task_on_agent(agent_id, "lives") == "lives"
    # one that was killed and made again is held as well
    ray.kill(await other.resolve("loose"), no_restart=True)
    await other.create_agent("loose", agent_class=Worker, arguments={"settings": settings}, is_detached=False)
    assert creation.kept_alive(settings.namespace) == set(ids)
    ended = await other.shutdown_agents(ids)
    assert ended.results == {"loose": True, "batched": True}


async def test_an_agent_reports_to_the_registry_of_its_manager_whatever_its_nodes_environment(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    # it is given no settings: its worker knows nothing of this namespace
    handle = await manager.create_agent("placed", agent_class=Worker)
    located = await manager.locate("placed")
    assert (located.source, located.instance and located.instance.namespace) == (Origin.REGISTRY, settings.namespace)
    os.kill(await handle.execute_task.remote("pid"), signal.SIGKILL)

    async def is_registered_again() -> bool:
        found = (await registry.resolve(["placed"])).value[0].instance
        return found is not None and located.instance is not None and found.instance_id != located.instance.instance_id

    await eventually(is_registered_again)


@pytest.mark.parametrize("task", ["interrupt", "exit"])
async def test_a_task_that_interrupts_ends_neither_its_agent_nor_other_tasks(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings, task: str
) -> None:
    await manager.create_agent("hardy", agent_class=Worker, arguments={"settings": settings})
    pid = await manager.execute_task_on_agent("hardy", "pid")
    with pytest.raises(AgentCallError, match=r"its task raised (KeyboardInterrupt|SystemExit)"):
        await manager.execute_task_on_agent("hardy", task)
    assert await manager.execute_task_on_agent("hardy", "pid") == pid


async def test_first_mistakes_are_named(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    with pytest.raises(InvalidInputError, match=r"Forgetful\.__init__: does not call super"):
        await manager.create_agent("forgetful", agent_class=Forgetful)
    lock = threading.Lock()

    class Unpicklable(Worker):
        async def handle_task(self, task: Any) -> Any:
            return lock

    with pytest.raises(AgentCallError, match=r"cannot be created: cannot pickle '_thread.lock'"):
        await manager.create_agent("unpicklable", agent_class=Unpicklable)
    assert await RayDirectory(settings.namespace).names() == []
    actor: Any = ray.remote(Blocking)
    nameless = actor.options(num_cpus=0).remote("nameless", settings)
    await nameless.pid.remote()
    with pytest.raises(NotResolvableError, match="its actor has no name: create it with"):
        await manager.resolve("nameless")
    ray.kill(nameless)


async def test_another_actor_of_that_name_is_left_as_it_is(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    actor: Any = ray.remote(Stranger)
    stranger = actor.options(name="taken", namespace=settings.namespace, num_cpus=0).remote()
    assert await stranger.pid.remote()
    with pytest.raises(AgentCallError, match="already and is left as it is"):
        await manager.create_agent("taken", agent_class=Worker, arguments={"settings": settings})
    made = await manager.create_agents_batch([spec("taken", settings), spec("free", settings)])
    assert (set(made.results), set(made.failures)) == ({"free"}, {"taken"})
    assert await stranger.pid.remote()
    ray.kill(stranger)


@pytest.mark.parametrize(
    ("agent_class", "why"), [(Unmakeable, "ValueError: not like this"), (Unstartable, "not today")]
)
async def test_an_actor_that_does_not_start_is_ended_by_its_creator(
    ray_cluster: None, manager: Tier0MemoryManager, settings: Settings, agent_class: type[Any], why: str
) -> None:
    with pytest.raises(AgentCallError, match=why) as failed:
        await manager.create_agent("stillborn", agent_class=agent_class, arguments={"settings": settings})
    assert "\x1b" not in str(failed.value)
    assert await RayDirectory(settings.namespace).names() == []
    # and its name is free
    await manager.create_agent("stillborn", agent_class=Worker, arguments={"settings": settings})


async def test_an_actor_that_the_registry_refuses_is_ended_and_one_that_ran_before_is_not(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    for epoch in ("one", "two"):
        await registry.set_current_epoch(epoch)
    outdated = settings.model_copy(update={"cluster_epoch": "one"})
    with pytest.raises(RetiredEpochError):
        await manager.create_agent("outdated", agent_class=Worker, arguments={"settings": outdated})
    assert await RayDirectory(settings.namespace).names() == []
    actor: Any = ray.remote(Worker)
    before = actor.options(name="outdated", namespace=settings.namespace, num_cpus=0).remote(
        "outdated", settings=outdated
    )
    assert await before.ping.remote() == "pong"
    with pytest.raises(RetiredEpochError):
        await manager.create_agent("outdated", agent_class=Worker, arguments={"settings": settings})
    assert await before.ping.remote() == "pong"
    ray.kill(before)


async def test_an_agent_that_stopped_by_itself_is_replaced(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    arguments = {"settings": settings}
    first = await manager.create_agent("returns", agent_class=Worker, arguments=arguments)
    await first.stop.remote("by its own word")
    many = await asyncio.gather(
        *(manager.create_agent("returns", agent_class=Worker, arguments=arguments) for _ in range(3))
    )
    assert {actor_id_of(handle) for handle in many} == {actor_id_of(many[0])} != {actor_id_of(first)}
    assert await manager.execute_task_on_agent("returns", "works") == "works"
    causes = [row.cause for row in (await registry.describe("returns")).instances]
    assert causes == [None, Cause(CauseKind.AGENT, "by its own word")]


@pytest.mark.parametrize("mode", [Mode.HYBRID, Mode.REGISTRY])
async def test_a_refused_resolution_has_the_cause_of_death(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings, mode: Mode
) -> None:
    handle = await manager.create_agent("late", agent_class=Worker, arguments={"settings": settings})
    await handle.stop.remote("worn out")
    ray.kill(handle, no_restart=True)
    with pytest.raises(NotResolvableError, match="worn out") as refused:
        await Tier0MemoryManager(settings, mode=mode).resolve("late")
    assert refused.value.reason is NotResolved.DIED


async def test_resolution_is_by_the_registry_and_proven(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    await manager.create_agent("a", agent_class=Worker, arguments={"settings": settings}, max_restarts=0)
    located = await Tier0MemoryManager(settings).locate("a")
    assert located.source is Origin.REGISTRY
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
    with pytest.raises(ActorGoneError):
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
    assert (fleet.source, fleet.complete) == (Origin.REGISTRY, True)
    with pytest.raises(NotResolvableError) as refused:
        await manager.resolve("drains")
    assert refused.value.reason is NotResolved.DRAINING
    listing = await manager.discover_from_registry()
    assert [row.logical_id for row in listing] == ["stays"]


async def test_hybrid_finds_agents_that_do_not_report_and_registry_mode_does_not(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    silent = settings.model_copy(update={"registry_enabled": False})
    await manager.create_agent("unreported", agent_class=Worker, arguments={"settings": silent})
    hybrid, strict = Tier0MemoryManager(settings), Tier0MemoryManager(settings, mode=Mode.REGISTRY)
    fleet = await hybrid.discover_and_refresh_agents()
    assert [(agent.logical_id, agent.source) for agent in fleet.agents] == [("unreported", Origin.RAY)]
    assert (await hybrid.locate("unreported")).source is Origin.RAY
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
    assert (listing.source, listing.complete, len(listing)) == (Origin.SNAPSHOT, False, 0)
    await other.shutdown_agents()


async def test_without_a_registry_the_snapshot_and_the_listing_resolve(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    await manager.create_agent("known", agent_class=Worker, arguments={"settings": settings})
    await manager.discover_and_refresh_agents()
    await stop_registry(settings.namespace)
    located = await manager.locate("known")
    assert located.source is Origin.SNAPSHOT
    assert await located.handle.get_id.remote() == "known"
    stranger = Tier0MemoryManager(settings)
    located = await stranger.locate("known")
    assert located.source is Origin.RAY
    fleet = await stranger.discover_and_refresh_agents()
    assert [agent.logical_id for agent in fleet.agents] == ["known"]
    assert not fleet.complete
    assert "the registry is away" in fleet.problems[0]
    with pytest.raises(CannotKnowError):
        await stranger.resolve("never-was")


async def test_one_slow_agent_delays_no_other(
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
    assert {row.cause for row in (await registry.describe("x")).instances} == {Cause(CauseKind.AGENT, "stopped")}


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


async def test_one_call_waits_for_a_silent_registry_and_its_return_is_noticed(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    await manager.create_agent("met", agent_class=Worker, arguments={"settings": settings})
    mine = RegistryConnection(settings.namespace, 2.0)
    # one that follows would answer from its copy
    caller = Tier0MemoryManager(settings.model_copy(update={"follow": False}), connection=mine)
    assert (await caller.locate("met")).source is Origin.REGISTRY
    pid = (await registry.hello()).pid
    os.kill(pid, signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        assert (await caller.locate("met")).source is Origin.SNAPSHOT
        first_s, began_s = time.monotonic() - began_s, time.monotonic()
        for _ in range(10):
            assert (await caller.locate("met")).source is Origin.SNAPSHOT
        assert time.monotonic() - began_s < first_s
    finally:
        os.kill(pid, signal.SIGCONT)

    async def answers_again() -> bool:
        return (await caller.locate("met")).source is Origin.REGISTRY

    await eventually(answers_again)


async def test_known_agents_are_compared_and_healed(
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
    assert (await manager.locate("asked")).source is Origin.SNAPSHOT
    # this manager gets no report of it
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


def own_namespace() -> str:
    return str(ray.get_runtime_context().namespace)


async def test_another_actor_of_an_agents_name_is_neither_ended_nor_taken_for_it(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    agent_class: Any = ray.remote(Worker)
    stranger_class: Any = ray.remote(Stranger)
    agent = agent_class.options(name="twice", namespace=own_namespace(), num_cpus=0).remote("twice", settings=settings)
    await agent.start.remote()
    innocent = stranger_class.options(name="twice", namespace=settings.namespace, num_cpus=0).remote()
    assert await innocent.pid.remote()
    await manager.discover_from_registry()
    assert (await manager.prune()).dropped == ()
    assert set((await manager.collect_heartbeats()).results) == {"twice"}
    # a manager that does not know it asks the registry which actor is meant
    ended = await Tier0MemoryManager(settings).shutdown_agents(["twice"])
    assert ended.results == {"twice": True}
    with pytest.raises(ActorDiedError):
        await agent.ping.remote()
    assert await innocent.pid.remote()
    # and without a registry the one who knew it does not take the other for it
    await stop_registry(settings.namespace)
    assert (await manager.prune()).dropped == ("twice",)
    ray.kill(innocent)


async def test_without_a_registry_an_actor_of_the_same_name_is_not_the_agent_that_is_known(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    arguments = {"settings": settings}
    first = await manager.create_agent("heir", agent_class=Worker, arguments=arguments)
    await manager.discover_and_refresh_agents()
    await stop_registry(settings.namespace)
    ray.kill(first, no_restart=True)
    stranger_class: Any = ray.remote(Stranger)

    async def makes_another() -> Any:
        other = stranger_class.options(name="heir", namespace=settings.namespace, num_cpus=0).remote()
        return other if await other.pid.remote() else None

    stranger = await eventually(makes_another)
    assert set((await manager.collect_heartbeats()).failures) == {"heir"}
    assert (await manager.shutdown_agents(["heir"])).results == {"heir": False}
    assert await stranger.pid.remote()
    ray.kill(stranger)


@pytest.mark.parametrize("mode", [Mode.HYBRID, Mode.REGISTRY])
async def test_a_dead_agent_is_not_resolved_although_its_actor_lives(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings, mode: Mode
) -> None:
    handle = await manager.create_agent("over", agent_class=Worker, arguments={"settings": settings})
    located = Tier0MemoryManager(settings, mode=mode)
    assert (await located.locate("over")).source is Origin.REGISTRY
    await handle.stop.remote("enough")
    assert await handle.ping.remote() == "pong"
    for one in (manager, located, Tier0MemoryManager(settings, mode=mode)):
        with pytest.raises(NotResolvableError, match="enough") as refused:
            await one.resolve("over")
        assert refused.value.reason is NotResolved.DIED
    assert located.list_agents() == ()

    async def is_committed() -> bool:
        return (await registry.health()).pending_changes == 0

    # a registry that was not there then knows it from the database
    await eventually(is_committed)
    await stop_registry(settings.namespace)
    await start_registry(settings)

    async def is_recovered() -> bool:
        # by the connection that managers share: it rests after the silence of the registry before
        return (await manager.connection.health()).is_ready

    await eventually(is_recovered)
    with pytest.raises(NotResolvableError) as refused:
        await Tier0MemoryManager(settings, mode=mode).resolve("over")
    assert refused.value.reason in {NotResolved.DIED, NotResolved.NOT_REGISTERED}


async def test_agents_of_a_retired_epoch_are_not_resolved(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    await manager.create_agent("blue", agent_class=Worker, arguments={"settings": settings})
    assert (await manager.locate("blue")).source is Origin.REGISTRY
    await registry.set_current_epoch("green")

    # first while its actor may still be there, and then for good
    for one in (manager, Tier0MemoryManager(settings)):
        with pytest.raises(NotResolvableError) as refused:
            await one.resolve("blue")
        assert refused.value.reason in {NotResolved.DIED, NotResolved.OTHER_EPOCH}

    async def has_ended() -> bool:
        return not (await registry.describe("blue")).live and await RayDirectory(settings.namespace).names() == []

    await eventually(has_ended)
    with pytest.raises(NotResolvableError) as refused:
        await manager.resolve("blue")
    assert refused.value.reason is NotResolved.DIED


async def test_an_old_handle_is_no_proof_that_an_agent_is_gone_while_rays_table_is_away(
    ray_cluster: None, settings: Settings
) -> None:
    actor: Any = ray.remote(Stranger)
    circuit = Circuit(2.0)
    finder = HandleFinder(settings.namespace, 2.0, table=ActorTable(2.0, circuit=circuit))
    first = actor.options(name="replaced", namespace=settings.namespace, num_cpus=0).remote()
    assert await first.pid.remote()
    before = instance(1, "replaced", actor_name="replaced", namespace=settings.namespace, actor_id=actor_id_of(first))
    await finder.of_instance(before)
    await end_actor(first, 10.0)

    def makes_another() -> Any:
        return actor.options(name="replaced", namespace=settings.namespace, num_cpus=0).remote()

    second = await eventually(makes_another)
    assert await second.pid.remote()
    after = replace(before, actor_id=actor_id_of(second))

    questions: list[Callable[[], Awaitable[Any]]] = [
        lambda: finder.of_instance(before),
        lambda: finder.of_instance(after),
        lambda: finder.of_name("replaced"),
    ]
    for ask in questions:
        circuit.note_silence(time.monotonic())
        with pytest.raises(CannotKnowError, match="Ray's table does not answer"):
            await ask()
    circuit.note_answer()
    with pytest.raises(ActorGoneError):
        await finder.of_instance(before)
    assert actor_id_of(await finder.of_instance(after)) == actor_id_of(second)
    ray.kill(second)


async def located(manager: Tier0MemoryManager, agent_id: str) -> Instance:
    """The instance that it is resolved to."""

    async def found() -> Instance | None:
        return (await manager.locate(agent_id)).instance

    instance_of_it = await eventually(found)
    assert instance_of_it is not None
    return instance_of_it


async def killed(instance_of_it: Instance) -> None:
    assert instance_of_it.pid is not None
    os.kill(instance_of_it.pid, signal.SIGKILL)


async def test_resolution_that_begins_right_after_a_kill_never_returns_the_killed_instance(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    await manager.create_agent("phoenix", agent_class=Worker, arguments={"settings": settings})
    # each question goes to the registry
    caller = Tier0MemoryManager(settings.model_copy(update={"follow": False}))
    for pause_s in (0.0, 0.01, 0.03):
        victim = await located(caller, "phoenix")
        await killed(victim)
        await asyncio.sleep(pause_s)
        try:
            found = (await caller.locate("phoenix")).instance
        except NotResolvableError:
            found = None
        assert found is None or found.instance_id != victim.instance_id

        async def is_another(before: Instance = victim) -> bool:
            return (await located(caller, "phoenix")).instance_id != before.instance_id

        await eventually(is_another)


async def test_instance_is_proven_by_its_own_answer_and_not_by_its_restarted_actors(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    await manager.create_agent("phoenix", agent_class=Worker, arguments={"settings": settings})
    before = await located(manager, "phoenix")
    finder = HandleFinder(settings.namespace, 20.0)
    asked: list[bool] = []

    async def is_registered() -> bool:
        # a registry that has no report of a death
        asked.append(True)
        return True

    assert await finder.of_instance(before, is_registered=is_registered)
    assert not asked
    await killed(before)
    # without a report at the registry it is neither returned nor certain to be gone
    with pytest.raises(NotResolvableError):
        await finder.of_instance(before, is_registered=is_registered)

    async def is_answered_by_another() -> bool:
        with pytest.raises(NotResolvableError) as refused:
            await finder.of_instance(before, is_registered=is_registered)
        return isinstance(refused.value, ActorGoneError) and refused.value.reason is NotResolved.DIED

    await eventually(is_answered_by_another)
    with pytest.raises(ActorGoneError):
        await finder.answering(before)
    # who is to be ended is the actor, whichever instance it is
    assert actor_id_of(await finder.actor_of(before)) == before.actor_id
    assert (await manager.shutdown_agents(["phoenix"])).results == {"phoenix": True}


async def test_actor_that_cannot_say_which_instance_it_is_counts_as_long_as_that_is_registered(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    actor_class: Any = ray.remote(Async)
    options = {"name": "bare", "namespace": settings.namespace, "num_cpus": 0, "max_restarts": -1}
    actor = actor_class.options(**options).remote("bare", settings)
    await actor.begin.remote()
    before = await located(manager, "bare")
    finder = HandleFinder(settings.namespace, 20.0)
    is_known = True

    async def is_registered() -> bool:
        return is_known

    handle = await finder.of_instance(before, is_registered=is_registered)
    is_known = False
    with pytest.raises(ActorGoneError):
        await finder.of_instance(before, is_registered=is_registered)
    await killed(before)
    with pytest.raises(ActorGoneError):
        await finder.of_instance(before, is_registered=is_registered)
    # the restart was not waited for
    assert is_known_gone(handle)
    # nor by a caller without a registry
    with pytest.raises(ActorGoneError):
        await finder.answering(before)
    ray.kill(actor)


async def test_of_a_larger_fleet_a_manager_keeps_what_it_has_resolved_and_drops_what_dies(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    ids = ["one", "two", "three"]
    made = await manager.create_agents_batch([spec(one, settings, max_restarts=0) for one in ids])
    assert not made.failures
    async with Tier0MemoryManager(settings.model_copy(update={"copied_agents": 2})) as caller:
        assert caller.follower is not None
        follower = caller.follower
        # the first resolution starts to follow
        assert await caller.resolve("one") is not None
        assert await follower.until_current(30.0)
        for one in ("one", "two"):
            handle = await caller.resolve(one)
            assert caller.cached(one) is handle
        assert (follower.view.is_whole, len(follower.view)) == (False, 2)
        assert (await caller.locate("one")).source is Origin.SNAPSHOT
        assert {row.logical_id for row in await caller.discover_from_registry()} == set(ids)
        # a third one takes the place of the one that was used the longest time ago, whose handle is dropped
        await caller.resolve("three")
        assert [caller.cached(one) is not None for one in ids] == [True, False, True]
        victim = (await caller.locate("one")).instance
        assert victim is not None
        await killed(victim)
        await eventually(lambda: caller.cached("one") is None and len(follower.view) == 1)
        with pytest.raises(NotResolvableError, match="one"):
            await caller.resolve("one")
        # a wait needs all agents
        await caller.wait_for(ids=["two", "three"], timeout_s=30.0)
        await eventually(lambda: follower.is_current and follower.view.is_whole)
        assert len(follower.view) == 2
