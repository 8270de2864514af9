"""Agents that live and accept no work: those that are not ready, and those whose processes have ended."""

from __future__ import annotations

import time
from statistics import quantiles

import pytest

from seedcore.core.answers import NotResolved, Origin
from seedcore.core.errors import NotResolvableError
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from tests.cluster.agents import Worker
from tests.waiting import eventually

pytestmark = pytest.mark.usefixtures("registry")


async def create(manager: Tier0MemoryManager, settings: Settings, name: str) -> None:
    await manager.create_agent(name, agent_class=Worker, arguments={"settings": settings})

    async def is_followed() -> bool:
        return (await manager.locate(name)).source is Origin.SNAPSHOT

    await eventually(is_followed)


async def refusal(manager: Tier0MemoryManager, name: str) -> NotResolvableError | None:
    """Why the agent is not resolved; None where it is."""
    try:
        await manager.resolve(name)
    except NotResolvableError as error:
        return error
    return None


async def test_an_agent_that_is_not_ready_is_resolved_by_no_process_until_it_is(
    manager: Tier0MemoryManager, settings: Settings
) -> None:
    await create(manager, settings, "loader")
    agent = await manager.resolve("loader")
    assert await agent.set_ready.remote(False, "loading weights")

    async def is_refused() -> bool:
        error = await refusal(manager, "loader")
        return error is not None and error.reason is NotResolved.NOT_READY

    await eventually(is_refused, every_s=0.005)
    with pytest.raises(NotResolvableError, match="not ready: loading weights"):
        await manager.execute_task_on_agent("loader", "pid")
    assert await agent.set_ready.remote(True)

    async def is_resolved() -> bool:
        return await refusal(manager, "loader") is None

    await eventually(is_resolved, every_s=0.005)
    assert await manager.execute_task_on_agent("loader", "done") == "done"


@pytest.mark.slow
async def test_no_caller_gets_an_agent_that_is_not_ready(
    manager: Tier0MemoryManager, registry: RegistryConnection, settings: Settings
) -> None:
    await create(manager, settings, "flipping")
    agent = await manager.resolve("flipping")
    waits_s: list[float] = []

    async def is_resolved() -> bool:
        return await refusal(manager, "flipping") is None

    async def is_refused() -> bool:
        return await refusal(manager, "flipping") is not None

    for _ in range(100):
        began_s = time.monotonic()
        reported = agent.set_ready.remote(False, "loading")
        await eventually(is_refused, every_s=0.001)
        waits_s.append(time.monotonic() - began_s)
        assert await reported
        for _ in range(50):
            error = await refusal(manager, "flipping")
            assert error is not None
            assert error.reason is NotResolved.NOT_READY
            (found,) = (await registry.resolve(["flipping"])).value
            assert found.instance is None
        await agent.set_ready.remote(True)
        await eventually(is_resolved, every_s=0.001)
    p99_s = quantiles(waits_s, n=100)[98]
    print(f"\nset_ready to unresolvable: median {1000 * sorted(waits_s)[50]:.1f} ms, p99 {1000 * p99_s:.1f} ms")  # noqa: T201
    assert p99_s < 1.0
