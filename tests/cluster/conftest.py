"""A real Ray cluster, a registry and a database for each test that asks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from unittest import mock

import pytest
import pytest_asyncio
import ray
from ray._private.node import Node

from seedcore.composition import start_registry
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.server.actor import stop_registry
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from tests.cluster.sharing import Sharing, running, with_short_leases
from tests.servers import PostgresServer

# Ray starts as many processes in advance, and the actors of the tests ask for no CPU
CPUS = 2
# the same cluster as start_cluster() makes, for ray.cluster_utils
HEAD = {"num_cpus": CPUS, "include_dashboard": False, "include_log_monitor": False, "no_monitor": True}


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
    # every process of a log monitor or an autoscaler takes seconds of a core, and no test has a use for them
    with mock.patch.multiple(Node, start_log_monitor=_start_nothing, start_monitor=_start_nothing):
        ray.init(address="local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False, logging_level="error")


def _start_nothing(_node: Node) -> None:
    """Instead of a process."""


@pytest.fixture(scope="module")
def sharing(postgres18: PostgresServer) -> Iterator[Sharing]:
    """What the tests of a module share: a registry, while it is as new."""
    sharing = Sharing(postgres18)
    yield sharing
    sharing.end()


@pytest.fixture
def fresh_registry() -> None:
    """Asked for by a test whose registry must not have served another one."""


@pytest.fixture
def short_leases() -> None:
    """Asked for by a test that waits for the end of a lease."""


@pytest.fixture
def settings(request: pytest.FixtureRequest, sharing: Sharing) -> Iterator[Settings]:
    """A namespace and a database of its own, or those of the registry that tests share."""
    wanted = set(request.fixturenames)
    if "short_leases" in wanted:
        yield with_short_leases(sharing.settings(is_shared=False), 1.0)
    else:
        yield sharing.settings(is_shared="registry" in wanted and "fresh_registry" not in wanted)
    sharing.release()


@pytest_asyncio.fixture
async def registry(ray_cluster: None, sharing: Sharing, settings: Settings) -> AsyncIterator[RegistryConnection]:
    """A registry actor that has joined its database, and knows no agent."""
    runs = sharing.take(settings)
    if runs is None:
        await stop_registry(settings.namespace)
        await start_registry(settings, epoch_check_s=0.5)
        runs = await running(settings)
    yield RegistryConnection(settings.namespace, settings.call_timeout_s)
    if not await sharing.keep(runs):
        await stop_registry(settings.namespace)


@pytest_asyncio.fixture
async def manager(ray_cluster: None, settings: Settings) -> AsyncIterator[Tier0MemoryManager]:
    """A manager whose agents end with the test."""
    manager = Tier0MemoryManager(settings)
    yield manager
    await manager.discover_and_refresh_agents()
    await manager.shutdown_agents(timeout_s=5)
