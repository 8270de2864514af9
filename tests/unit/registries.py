"""A registry over the memory store, in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from seedcore.core.ports import DeathWitness, OnDeath
from seedcore.registry.server.config import RegistryConfig
from seedcore.store.memory import MemoryStore, Tables
from tests.builders import START
from tests.local import LocalRegistry as Registry
from tests.unit.test_registry import NoWitness
from tests.waiting import eventually


@asynccontextmanager
async def joined_registry(
    config: RegistryConfig,
    tables: Tables,
    watch_factory: Callable[[OnDeath], DeathWitness] = NoWitness,
    store: MemoryStore | None = None,
) -> AsyncIterator[Registry]:
    """One that has joined its store."""

    async def make_store() -> MemoryStore:
        return store if store is not None else MemoryStore(lambda: START, tables)

    registry = Registry(config, make_store, watch_factory=watch_factory)
    registry.start()

    async def is_ready() -> bool:
        return (await registry.health()).is_ready

    await eventually(is_ready)
    yield registry
    await registry.stop()
