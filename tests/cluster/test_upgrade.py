"""The registry actor is replaced by new code while a fleet lives: nobody and nothing is lost, and nobody is refused."""

from __future__ import annotations

from typing import Any

import ray

from seedcore import __version__
from seedcore.cli.control import upgrade_registry
from seedcore.registry.protocol.connection import REGISTRY_NAME, RegistryConnection
from seedcore.registry.server.actor import stop_registry
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from seedcore.tier0.answers import AgentSpec
from tests.cluster.agents import OldRegistry, Worker
from tests.cluster.traffic import Traffic
from tests.waiting import eventually

FLEET = [f"stays-{number}" for number in range(4)]


async def test_no_agent_no_status_and_no_resolution_is_lost(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    made = await manager.create_agents_batch(
        [AgentSpec(name, agent_class=Worker, arguments={"settings": settings}) for name in FLEET]
    )
    assert not made.failures
    before = {row.logical_id: row.instance_id for row in await registry.list_active()}
    assert set(before) == set(FLEET)
    traffic = Traffic(settings, FLEET)
    await traffic.start()
    await traffic.goes_on()
    old, new = await upgrade_registry(settings, force=True)
    assert old is not None
    assert old.pid != new.pid
    await traffic.goes_on()
    await traffic.stop()
    assert traffic.refused == []

    async def is_whole() -> bool:
        assert {
            row.logical_id: row.instance_id for row in await registry.list_active() if row.logical_id != "turns"
        } == (before)
        return await traffic.is_delivered()

    await eventually(is_whole)
    assert traffic.committed() == traffic.turns
    assert traffic.deaths() == []
    await traffic.end()


async def test_one_of_this_version_is_left_alone_and_one_of_another_protocol_is_replaced(
    ray_cluster: None, settings: Settings
) -> None:
    actor_class: Any = ray.remote(OldRegistry)
    old = actor_class.options(
        name=REGISTRY_NAME, namespace=settings.namespace, lifetime="detached", num_cpus=0
    ).remote()
    await old.__ray_ready__.remote()
    before, after = await upgrade_registry(settings)
    assert before is not None
    assert (before.code_version, after.code_version) == ("0.0.1", __version__)
    again, same = await upgrade_registry(settings)
    assert again is not None
    assert again.pid == same.pid == after.pid
    await stop_registry(settings.namespace)
