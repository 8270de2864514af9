"""A manager that follows the registry's feed: a resolution is a look-up, and a changed agent is resolved again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import ray

from seedcore.composition import start_registry
from seedcore.core.answers import NotResolved, Origin
from seedcore.core.errors import NotResolvableError
from seedcore.core.instances import Instance
from seedcore.core.lifecycle import Status
from seedcore.core.selection import Policy
from seedcore.registry.agent.client import RegistryClient
from seedcore.registry.agent.reporter import Reporter
from seedcore.registry.caller.handles import HandleFinder
from seedcore.registry.protocol.connection import RegistryConnection, shared_connection
from seedcore.registry.ray_support.lookup import actor_id_of
from seedcore.registry.server.actor import stop_registry
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from tests.cluster.agents import Worker
from tests.waiting import eventually

pytestmark = pytest.mark.usefixtures("registry")


@pytest_asyncio.fixture
async def caller(settings: Settings) -> AsyncIterator[Tier0MemoryManager]:
    """A manager that made none of the agents."""
    caller = Tier0MemoryManager(settings)
    yield caller
    await caller.close()


async def until_followed(caller: Tier0MemoryManager, name: str) -> None:
    async def is_followed() -> bool:
        return (await caller.locate(name)).source is Origin.SNAPSHOT

    await eventually(is_followed)


async def create(manager: Tier0MemoryManager, settings: Settings, name: str, **options: Any) -> int:
    await manager.create_agent(name, agent_class=Worker, arguments={"settings": settings}, **options)
    pid: int = await manager.execute_task_on_agent(name, "pid")
    return pid


async def test_a_proven_handle_is_cached_until_its_agent_dies(
    manager: Tier0MemoryManager, caller: Tier0MemoryManager, settings: Settings
) -> None:
    pid = await create(manager, settings, "held", max_restarts=0)
    await until_followed(caller, "held")
    handle = await caller.resolve("held")
    # no other process is asked
    registry_pid = (await caller.connection.hello()).pid
    os.kill(registry_pid, signal.SIGSTOP)
    try:
        assert await caller.resolve("held") is handle
    finally:
        os.kill(registry_pid, signal.SIGCONT)
    os.kill(pid, signal.SIGKILL)

    async def is_refused() -> bool:
        try:
            await caller.resolve("held")
        except NotResolvableError:
            return True
        return False

    await eventually(is_refused, every_s=0.005)
    with pytest.raises(NotResolvableError) as refused:
        await caller.resolve("held")
    assert refused.value.reason is NotResolved.DIED


async def test_a_draining_agent_is_not_resolved(
    manager: Tier0MemoryManager, caller: Tier0MemoryManager, settings: Settings
) -> None:
    await create(manager, settings, "drained")
    await until_followed(caller, "drained")
    agent = await caller.resolve("drained")
    await agent.drain.remote("for a while")

    async def is_refused() -> bool:
        try:
            await caller.resolve("drained")
        except NotResolvableError as error:
            return error.reason is NotResolved.DRAINING
        return False

    await eventually(is_refused, every_s=0.005)


async def test_an_agent_that_changes_while_rays_table_is_asked_is_not_resolved(
    manager: Tier0MemoryManager, caller: Tier0MemoryManager, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(manager, settings, "changing")
    await until_followed(caller, "changing")
    agent = await caller.resolve("changing")
    vouched = HandleFinder.vouched

    async def and_meanwhile_it_drains(finder: HandleFinder, instance: Instance) -> Any:
        handle = await vouched(finder, instance)
        assert caller.follower is not None
        view = caller.follower.view
        await agent.drain.remote("meanwhile")
        await eventually(lambda: not view.candidates("changing"))
        return handle

    monkeypatch.setattr(HandleFinder, "vouched", and_meanwhile_it_drains)
    with pytest.raises(NotResolvableError) as refused:
        await caller.locate("changing")
    assert refused.value.reason is NotResolved.DRAINING


@pytest.mark.parametrize("policy", [Policy.NEWEST, Policy.ROUND_ROBIN, Policy.LEAST_LOADED])
async def test_locate_does_not_evict_the_cached_handle(
    manager: Tier0MemoryManager, caller: Tier0MemoryManager, settings: Settings, policy: Policy
) -> None:
    await create(manager, settings, "cached")
    await until_followed(caller, "cached")
    handle = await caller.resolve("cached")
    assert actor_id_of((await caller.locate("cached", policy=policy)).handle) == actor_id_of(handle)
    assert await caller.resolve("cached") is handle


async def test_manager_closes_at_the_end_of_async_with(manager: Tier0MemoryManager, settings: Settings) -> None:
    await create(manager, settings, "entered")
    async with Tier0MemoryManager(settings) as caller:
        await until_followed(caller, "entered")
    assert caller.follower is not None
    assert not caller.follower.is_current


async def test_an_agent_that_hangs_is_not_resolved(
    manager: Tier0MemoryManager, caller: Tier0MemoryManager, settings: Settings
) -> None:
    pid = await create(manager, settings, "hung")
    await until_followed(caller, "hung")
    os.kill(pid, signal.SIGSTOP)
    try:

        async def is_refused() -> bool:
            try:
                await caller.resolve("hung")
            except NotResolvableError:
                return True
            return False

        await eventually(is_refused)
    finally:
        os.kill(pid, signal.SIGCONT)
    handle = await eventually(lambda: caller.resolve("hung"))
    assert await handle.execute_task.remote("pid") == pid


async def test_while_the_registry_is_away_the_cache_is_not_trusted_and_then_is_again(
    registry: RegistryConnection, manager: Tier0MemoryManager, caller: Tier0MemoryManager, settings: Settings
) -> None:
    await create(manager, settings, "met")
    await until_followed(caller, "met")
    assert caller.follower is not None
    resets = caller.follower.resets
    await stop_registry(settings.namespace)
    follower = caller.follower
    await eventually(lambda: not follower.is_current)
    # proven by its own answer, as far as is known
    assert await (await caller.resolve("met")).ping.remote() == "pong"
    await start_registry(settings)

    async def is_followed_again() -> bool:
        return (await caller.locate("met")).source is Origin.SNAPSHOT and follower.is_current

    await eventually(is_followed_again)
    assert follower.resets > resets


async def test_policies_choose_among_several_instances_of_one_agent(
    registry: RegistryConnection, caller: Tier0MemoryManager, settings: Settings
) -> None:
    namespace = settings.namespace
    actors = [
        ray.remote(Worker).options(name=f"many-{n}", namespace=namespace, num_cpus=0).remote(f"self-{n}")
        for n in range(3)
    ]
    await asyncio.gather(*(actor.__ray_ready__.remote() for actor in actors))
    reporters = [Reporter("many", actor_name=f"many-{n}", settings=settings) for n in range(3)]
    for reporter in reporters:
        await reporter.start()
    ids = [reporter.client.instance_id for reporter in reporters]
    names = {actor_id_of(actor): n for n, actor in enumerate(actors)}

    async def chosen(policy: Policy, key: str = "") -> int:
        return names[actor_id_of(await caller.resolve("many", policy=policy, key=key))]

    for _ in range(2):
        assert await chosen(Policy.NEWEST) == 2
        assert sorted([await chosen(Policy.ROUND_ROBIN) for _ in range(3)]) == [0, 1, 2]
        assert len({await chosen(Policy.STICKY, "a key") for _ in range(3)}) == 1
        assert await chosen(Policy.SAME_NODE) == 2
        await registry.beat_many(ids, {ids[0]: 3.0, ids[1]: 1.0, ids[2]: 2.0})
        # of any two, the most loaded is not the less loaded one
        assert 0 not in {await chosen(Policy.LEAST_LOADED) for _ in range(10)}
        assert await chosen(Policy.LEAST_OUTSTANDING) in {0, 1, 2}
        # and the same once it follows
        await until_followed(caller, "many")
    await asyncio.gather(*(reporter.stop() for reporter in reporters))
    with pytest.raises(NotResolvableError):
        await caller.resolve("many", policy=Policy.ROUND_ROBIN)
    for actor in actors:
        ray.kill(actor)


async def test_changes_and_beats_go_through_the_relay_of_the_node_or_past_it_if_it_is_lost(
    registry: RegistryConnection, settings: Settings
) -> None:
    client = RegistryClient("spoken", settings=settings)
    await client.set_status(Status.ALIVE)
    relays = shared_connection(settings.namespace, settings.call_timeout_s)._relays
    assert relays is not None

    async def is_found() -> bool:
        await client.beat()
        return relays.relay is not None

    await eventually(is_found)
    before = (await registry.health()).flush.beats_offered
    await client.beat()
    assert (await client.set_status(Status.DRAINING)).durable
    assert (await registry.health()).flush.beats_offered == before + 1
    ray.kill(relays.relay)
    # in the same call, by the registry itself
    answer = await client.beat()
    assert not answer.unknown
    assert (await client.set_status(Status.ALIVE)).durable
    assert (await registry.health()).flush.beats_offered == before + 2
    await client.set_status(Status.DEAD)
