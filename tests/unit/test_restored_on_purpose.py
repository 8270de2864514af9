"""A backup that is restored to undo changes: the registry of before must have ended (docs/how-to/backup.md)."""

from __future__ import annotations

from functools import partial

import pytest

from seedcore.core.lifecycle import Status
from seedcore.store.memory import MemoryStore, Tables
from tests.builders import START, iid
from tests.local import LocalRegistry
from tests.local import Snapshot as Earlier
from tests.unit.registries import Away, joined_registry
from tests.unit.test_lost_commits import CONFIG, enter, has_mended
from tests.unit.test_registry import NoWitness
from tests.waiting import eventually


@pytest.fixture
def tables() -> Tables:
    return Tables(START)


async def deregistered_by_mistake(registry: LocalRegistry, tables: Tables) -> Earlier:
    """What the backup has: the agent alive."""
    await enter(registry, 1)
    earlier = Earlier(tables)
    await registry.deregister(["agent-1"], "a mistake", "ann")
    assert tables.rows[iid(1)].status is Status.DEAD
    return earlier


async def test_a_registry_that_lives_undoes_the_restore(tables: Tables) -> None:
    async with joined_registry(CONFIG, tables) as registry:
        earlier = await deregistered_by_mistake(registry, tables)
        earlier.restore()
        await eventually(partial(has_mended, registry))
        assert tables.rows[iid(1)].status is Status.DEAD


async def test_a_registry_that_started_without_a_database_takes_the_backup_over(tables: Tables) -> None:
    async with joined_registry(CONFIG, tables) as first:
        earlier = await deregistered_by_mistake(first, tables)
    store = Away(lambda: START, tables)
    store.is_there = False

    async def make_store() -> MemoryStore:
        return store

    # discovery has started it, and it waits
    second = LocalRegistry(CONFIG, make_store, watch_factory=NoWitness)
    second.start()

    async def is_ready() -> bool:
        return (await second.health()).is_ready

    await eventually(lambda: second.writer.problem is not None)
    earlier.restore()
    store.is_there = True
    await eventually(is_ready)
    assert tables.rows[iid(1)].status is Status.ALIVE
    assert (await second.resolve(["agent-1"])).value[0].instance is not None
    assert (await second.health()).losses == 0
    await second.stop()
