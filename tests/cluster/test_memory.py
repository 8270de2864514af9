"""An agent that Ray kills because its node runs low on memory: the cause shows it.

A cluster of its own, whose memory monitor finds little enough to be too much.
"""

from __future__ import annotations

import asyncio
from typing import Any

import psutil
import pytest
import ray

from seedcore.agents import RayAgent
from seedcore.cli.why import reason_of
from seedcore.composition import start_registry
from seedcore.core.causes import CauseKind
from seedcore.discovery.rendering import agent_answer
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.server.actor import stop_registry
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from tests.waiting import eventually

_GIB = 1024**3
_ROOM = 2 * _GIB
_EATEN = 3 * _GIB
_BITE = 8 * 1024**2


class Hungry(RayAgent):
    """Allocates memory in its task."""

    async def handle_task(self, task: Any) -> Any:
        eaten: list[bytes] = []
        while len(eaten) * _BITE < _EATEN:
            # not zeros: those are not there until they are changed
            eaten.append(b"x" * _BITE)
            await asyncio.sleep(0.005)
        await asyncio.sleep(60)
        return len(eaten)


async def test_cause_of_an_agent_that_ray_kills_for_memory_names_the_memory(settings: Settings) -> None:
    memory = psutil.virtual_memory()
    if memory.available < _EATEN + 2 * _GIB:
        pytest.skip("there is not enough memory to eat here")
    ray.shutdown()
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        _system_config={
            "memory_usage_threshold": (memory.total - memory.available + _ROOM) / memory.total,
            "memory_monitor_refresh_ms": 100,
        },
    )
    try:
        await start_registry(settings)
        registry = RegistryConnection(settings.namespace, settings.call_timeout_s)
        manager = Tier0MemoryManager(settings)
        handle = await manager.create_agent(
            "hungry", agent_class=Hungry, arguments={"settings": settings}, max_restarts=0
        )

        async def is_watched() -> bool:
            return (await registry.health()).watched == 1

        await eventually(is_watched)
        # its answer never comes
        handle.execute_task.remote("eat")

        async def is_explained() -> bool:
            reason = reason_of(agent_answer(await registry.describe("hungry")))
            assert reason.cause is not None
            assert reason.cause.kind is CauseKind.OUT_OF_MEMORY, reason
            return reason.state == "dead"

        await eventually(is_explained, within_s=60)
        await stop_registry(settings.namespace)
    finally:
        ray.shutdown()
