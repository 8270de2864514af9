"""A real Ray cluster, a registry and a database for each test that asks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from itertools import count

import pytest
import pytest_asyncio
import ray
from pydantic import SecretStr

from seedcore.composition import start_registry
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.server.actor import stop_registry
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from tests.servers import PostgresServer
from tests.waiting import eventually

_serial = count(1)


@pytest.fixture(scope="package")
def _shared_cluster_ends() -> Iterator[None]:
    # other folders test what happens without Ray, in the same worker
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def ray_cluster(_shared_cluster_ends: None) -> Iterator[None]:
    """A cluster of one node, without a dashboard, that modules share; no named actor of one is there for the next."""
    if not ray.is_initialized():
        start_cluster()
    yield
    for named in ray.util.list_named_actors(all_namespaces=True):
        # one that ends by itself is gone by now
        with suppress(ValueError):
            ray.kill(ray.get_actor(named["name"], namespace=named["namespace"]))


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[None]:
    """The same, for a module alone."""
    ray.shutdown()
    start_cluster()
    yield
    ray.shutdown()


def start_cluster() -> None:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")


@pytest.fixture
def settings(postgres18: PostgresServer) -> Iterator[Settings]:
    """A namespace and a database of its own; quick beats, so that tests need not wait for them."""
    database = postgres18.create_database()
    yield Settings(
        namespace=f"test-{next(_serial)}",
        pg_dsn=SecretStr(postgres18.dsn(database)),
        beat_interval_s=1.0,
        lease_s=3.0,
        flush_interval_s=0.2,
    )
    postgres18.drop_database(database)


@pytest_asyncio.fixture
async def registry(ray_cluster: None, settings: Settings) -> AsyncIterator[RegistryConnection]:
    """A registry actor that has joined its database."""
    await start_registry(settings)
    connection = RegistryConnection(settings.namespace, settings.call_timeout_s)

    async def is_ready() -> bool:
        health = await connection.health()
        assert health.is_ready, health
        return True

    await eventually(is_ready)
    yield connection
    await stop_registry(settings.namespace)


@pytest_asyncio.fixture
async def manager(ray_cluster: None, settings: Settings) -> AsyncIterator[Tier0MemoryManager]:
    """A manager whose agents end with the test."""
    manager = Tier0MemoryManager(settings)
    yield manager
    await manager.discover_and_refresh_agents()
    await manager.shutdown_agents(timeout_s=5)
