"""The registry actor is replaced by new code while a fleet lives: nobody and nothing is lost, and nobody is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import ray

from seedcore import __version__
from seedcore.cli.steering import upgrade_registry
from seedcore.core.errors import RegistryError
from seedcore.core.lifecycle import Status
from seedcore.registry import RegistryClient
from seedcore.registry.actor import stop_registry
from seedcore.registry.connection import REGISTRY_NAME, RegistryConnection
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from seedcore.tier0.answers import AgentSpec
from tests.cluster.agents import OldRegistry, Worker
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
    caller = Tier0MemoryManager(settings)
    turning = RegistryClient("turns", settings=settings)
    await turning.set_status(Status.ALIVE)
    receipts: list[tuple[int, bool]] = []
    resolved: list[str] = []
    refused: list[RegistryError] = []
    is_over = asyncio.Event()

    async def resolve_for_ever() -> None:
        while not is_over.is_set():
            for name in FLEET:
                try:
                    handle = await caller.resolve(name)
                    assert await handle.get_id.remote() == name
                    resolved.append(name)
                except RegistryError as error:
                    refused.append(error)

    async def turn_for_ever() -> None:
        turns = 0
        while not is_over.is_set():
            turns += 1
            receipt = await turning.set_status((Status.ALIVE, Status.DRAINING)[turns % 2], f"turn {turns}")
            receipts.append((turns, receipt.durable))
            await asyncio.sleep(0.02)

    work = [asyncio.create_task(resolve_for_ever()), asyncio.create_task(turn_for_ever())]
    await eventually(lambda: len(resolved) > 20 and len(receipts) > 5)
    old, new = await upgrade_registry(settings, force=True)
    assert old is not None
    assert old.pid != new.pid
    count, turns = len(resolved), len(receipts)
    await eventually(lambda: len(resolved) > count + 20 and len(receipts) > turns + 5)
    is_over.set()
    await asyncio.gather(*work)
    await caller.close()
    assert refused == []

    async def is_whole() -> bool:
        assert {
            row.logical_id: row.instance_id for row in await registry.list_active() if row.logical_id != "turns"
        } == (before)
        await turning.beat()
        return turning.undelivered == 0

    await eventually(is_whole)
    assert settings.pg_dsn is not None
    with psycopg.connect(settings.pg_dsn.get_secret_value()) as connection:
        causes = connection.execute(
            "select cause from registry_transition where logical_id = 'turns' and cause is not null order by id"
        ).fetchall()
        deaths = connection.execute("select count(*) from registry_instance where status = 'dead'").fetchone()
    assert [row[0] for row in causes] == [f"turn {turn}" for turn, _ in receipts]
    assert deaths == (0,)
    await turning.set_status(Status.DEAD)


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
