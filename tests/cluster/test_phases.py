"""The registry comes to a fleet that lives without it, in three phases and back: docs/adopt.md. Whoever resolves
meanwhile is never refused, and never gets another actor than one of the agent it asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from pydantic import SecretStr

from seedcore.composition import start_registry
from seedcore.core.answers import Origin
from seedcore.core.errors import RegistryError
from seedcore.core.lifecycle import Status
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.server.actor import stop_registry
from seedcore.settings import Mode, Settings
from seedcore.store.maintenance import migrate_database
from seedcore.store.postgres import PostgresStore
from seedcore.tier0 import Tier0MemoryManager
from tests.cluster.agents import Worker
from tests.postgres.dumps import dump_and_restore
from tests.postgres.earlier import make_earlier
from tests.servers import PostgresServer
from tests.waiting import eventually

FLEET = ("eye", "ear")


@dataclass
class Caller:
    """Resolves the fleet all the time, by the manager of its phase. What it got from the one before it still uses for a
    moment, as callers do."""

    manager: Tier0MemoryManager
    resolved: int = 0
    failures: list[str] = field(default_factory=list)
    sources: set[Origin] = field(default_factory=set)

    async def resolve_for_ever(self) -> None:
        while True:
            manager = self.manager
            for name in FLEET:
                try:
                    handle = await manager.resolve(name)
                    if await handle.get_id.remote() != name:
                        self.failures.append(f"{manager.mode}: {name} is another")
                    self.resolved += 1
                except (RegistryError, ray.exceptions.RayError) as error:
                    self.failures.append(f"{manager.mode}: {name}: {type(error).__name__}: {error}")
            await asyncio.sleep(0.01)

    async def some_more(self) -> None:
        """Wait until it has resolved everybody several times."""
        count = self.resolved
        await eventually(lambda: self.resolved > count + 4 * len(FLEET) or self.failures)
        assert self.failures == []

    async def turn_to(self, settings: Settings, mode: Mode) -> None:
        """Roll callers over to another phase."""
        before, self.manager = self.manager, Tier0MemoryManager(settings, mode=mode)
        await self.some_more()
        await before.close()

    async def source_of(self, name: str) -> Origin:
        return (await self.manager.locate(name)).source


@asynccontextmanager
async def calling(manager: Tier0MemoryManager) -> AsyncIterator[Caller]:
    caller = Caller(manager)
    task = asyncio.create_task(caller.resolve_for_ever())
    try:
        yield caller
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await caller.manager.close()


async def bring_up(name: str, actor_name: str, settings: Settings) -> Any:
    """An actor of an agent, started; under its own name it is found by Ray's listing, under another by the registry."""
    actor = (
        ray.remote(Worker)
        .options(name=actor_name, namespace=settings.namespace, num_cpus=0)
        .remote(name, settings=settings)
    )
    await actor.start.remote()
    return actor


async def end(actor: Any) -> None:
    """Say dead, let callers hear of it and finish, then end the process."""
    await actor.stop.remote()
    await asyncio.sleep(0.5)
    ray.kill(actor)


@pytest.mark.parametrize("laps", [1, pytest.param(2, marks=pytest.mark.slow)])
async def test_three_phases_forwards_and_backwards_without_an_interrupted_resolution(
    ray_cluster: None, settings: Settings, laps: int
) -> None:
    disabled = settings.model_copy(update={"registry_enabled": False})
    plain = {name: await bring_up(name, name, disabled) for name in FLEET}
    reporting: dict[str, Any] = {}
    async with calling(Tier0MemoryManager(disabled)) as caller:
        assert caller.manager.mode is Mode.RAY
        await caller.some_more()
        for lap in range(1, laps + 1):
            # 1 to 2: the registry beside Ray's listing; an agent that reports stands in for each that does not
            await start_registry(settings)
            registry = RegistryConnection(settings.namespace, settings.call_timeout_s)
            await eventually(partial(_is_ready, registry))
            await caller.some_more()
            if lap == 1:
                # nobody has ever reported: callers may come first
                await caller.turn_to(settings, Mode.HYBRID)
                assert await caller.source_of("eye") is Origin.RAY
            for name in FLEET:
                reporting[name] = await bring_up(name, f"{name}-reporting-{lap}", settings)
                await caller.some_more()
            if lap > 1:
                await caller.turn_to(settings, Mode.HYBRID)
            await eventually(partial(_alive, registry, len(FLEET)))
            for name in FLEET:
                assert await caller.source_of(name) in (Origin.REGISTRY, Origin.SNAPSHOT)
                await end(plain.pop(name))
                await caller.some_more()

            # 2 to 3, and back again
            await caller.turn_to(settings, Mode.REGISTRY)
            assert await caller.source_of("eye") in (Origin.REGISTRY, Origin.SNAPSHOT)
            await caller.turn_to(settings, Mode.HYBRID)
            await caller.some_more()

            # 2 to 1: those that do not report come first, under the names that Ray's listing knows
            for name in FLEET:
                plain[name] = await bring_up(name, name, disabled)
                await caller.some_more()
            await caller.turn_to(disabled, Mode.RAY)
            assert await caller.source_of("eye") is Origin.RAY
            for name in FLEET:
                await end(reporting.pop(name))
                await caller.some_more()
            history = (await registry.describe("eye")).instances
            assert [row.status for row in history] == [Status.DEAD] * lap
            await stop_registry(settings.namespace)
            await caller.some_more()
        assert caller.failures == []
        assert caller.resolved > 100
    for actor in plain.values():
        ray.kill(actor)


async def test_registry_of_this_cluster_starts_on_a_restored_dump_of_an_adopted_database(
    ray_cluster: None, settings: Settings, postgres18: PostgresServer, tmp_path: Path
) -> None:
    adopted, restored = (postgres18.create_database(template=name) for name in ("template1", "template0"))
    make_earlier(postgres18.dsn(adopted), 50)
    await migrate_database(postgres18.dsn(adopted), adopting=lambda _: None)
    lost = PostgresStore(postgres18.dsn(adopted))
    await lost.open()
    await lost.begin("the lost cluster", None, 15.0)
    await lost.close()
    dump_and_restore(postgres18, adopted, restored, tmp_path, "custom")

    settings = settings.model_copy(update={"pg_dsn": SecretStr(postgres18.dsn(restored))})
    await start_registry(settings)
    registry = RegistryConnection(settings.namespace, settings.call_timeout_s)
    await eventually(partial(_is_ready, registry))
    assert (await registry.health()).epoch == "epoch-3"
    actor = await bring_up("agent-1", "agent-1", settings)
    manager = Tier0MemoryManager(settings)
    assert await (await manager.resolve("agent-1")).get_id.remote() == "agent-1"
    await manager.close()
    before, now = sorted((await registry.describe("agent-1")).instances, key=lambda row: row.status is Status.ALIVE)[
        -2:
    ]
    assert (before.status, now.status, now.cluster_epoch) == (Status.DEAD, Status.ALIVE, "epoch-3")
    await end(actor)
    await stop_registry(settings.namespace)
    for name in (adopted, restored):
        postgres18.drop_database(name)


async def _is_ready(registry: RegistryConnection) -> bool:
    return (await registry.health()).is_ready


async def _alive(registry: RegistryConnection, count: int) -> bool:
    return len(await registry.list_active()) == count
