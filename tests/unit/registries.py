"""A registry over the memory store, in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from seedcore.core.answers import Outcome
from seedcore.core.changes import HoldChange, RegisterChange, StatusChange
from seedcore.core.errors import StoreUnavailableError
from seedcore.core.ports import DeathWitness, OnDeath
from seedcore.registry.server.config import RegistryConfig
from seedcore.store.memory import MemoryStore, Tables
from tests.builders import START
from tests.local import LocalRegistry as Registry
from tests.unit.test_registry import NoWitness
from tests.waiting import eventually


class Away(MemoryStore):
    """A database that can be away, from the start too."""

    is_there = True

    async def open(self) -> None:
        self._require()
        await super().open()

    async def register_many(self, changes: Sequence[RegisterChange]) -> list[Outcome]:
        self._require()
        return await super().register_many(changes)

    async def set_status_many(self, changes: Sequence[StatusChange]) -> list[Outcome]:
        self._require()
        return await super().set_status_many(changes)

    async def hold_many(self, changes: Sequence[HoldChange]) -> list[Outcome]:
        self._require()
        return await super().hold_many(changes)

    async def renew_term(self, lease_s: float) -> None:
        self._require()
        await super().renew_term(lease_s)

    def _require(self) -> None:
        if not self.is_there:
            raise StoreUnavailableError("away for the test")


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
