"""Processes of a node that follow its relay: the registry has few followers, and none lists again after its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio
import ray

from seedcore.composition import start_registry
from seedcore.core.answers import InstanceFilter
from seedcore.core.lifecycle import Status
from seedcore.core.paging import decode_cursor
from seedcore.registry.agent.client import RegistryClient
from seedcore.registry.following.follower import Follower
from seedcore.registry.following.nearby import Nearby
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.server.actor import stop_registry
from seedcore.settings import Settings
from tests.cluster.sharing import running
from tests.waiting import eventually

PROCESSES = 3


class Caller:
    """A process that follows, and asks through its relay once the registry names it."""

    def __init__(self, namespace: str) -> None:
        self._connection = RegistryConnection(namespace, by_relay=True)
        self._source = Nearby(self._connection)
        self._follower = Follower(self._source)

    async def start(self) -> None:
        """Follow, and wait until the copy is trusted."""
        self._follower.start()
        assert await self._follower.until_current(30.0)

    async def held(self) -> dict[str, Status]:
        """The status of each agent."""
        rows, _ = self._follower.view.page(InstanceFilter(statuses=None), decode_cursor(None), 100)
        return {row.logical_id: row.status for row in rows}

    async def state(self) -> tuple[bool, int]:
        """Whether it uses the relay, and how often it has listed."""
        return self._source.uses_relay, self._follower.resets


@pytest_asyncio.fixture
async def place(ray_cluster: None, settings: Settings) -> AsyncIterator[RegistryConnection]:
    """A registry that has too many followers as soon as it has one."""
    await start_registry(settings.model_copy(update={"direct_followers": 0}))
    await running(settings)
    yield RegistryConnection(settings.namespace, settings.call_timeout_s)
    await stop_registry(settings.namespace)


async def test_processes_follow_the_relay_of_their_node_and_survive_its_end(
    place: RegistryConnection, settings: Settings
) -> None:
    async with RegistryClient("agent", settings=settings) as agent:
        await agent.set_status(Status.ALIVE)
        await eventually(lambda: _has_relays(place))
        made: Any = ray.remote(Caller)
        callers = [made.options(num_cpus=0).remote(settings.namespace) for _ in range(PROCESSES)]
        await asyncio.gather(*(caller.start.remote() for caller in callers))

        async def states() -> list[tuple[bool, int]]:
            return list(await asyncio.gather(*(caller.state.remote() for caller in callers)))

        async def all_hold(status: Status) -> bool:
            return all(held == {"agent": status} for held in await asyncio.gather(*(c.held.remote() for c in callers)))

        async def are_relayed() -> bool:
            return all(uses_relay for uses_relay, _ in await states())

        await eventually(are_relayed)
        await agent.set_status(Status.DRAINING)
        await eventually(lambda: all_hold(Status.DRAINING), every_s=0.01)
        (relay,) = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if "relay" in one["name"]]
        ray.kill(ray.get_actor(relay, namespace=settings.namespace))
        await agent.set_status(Status.ALIVE)
        await eventually(lambda: all_hold(Status.ALIVE), every_s=0.01)
        # the registry makes another one, which they use again; no copy was listed again meanwhile
        await eventually(are_relayed)
        assert {resets for _, resets in await states()} == {1}
        await eventually(lambda: _follows_alone(place))
        for caller in callers:
            ray.kill(caller)


async def _has_relays(place: RegistryConnection) -> bool:
    return (await place.health()).relays == 1


async def _follows_alone(place: RegistryConnection) -> bool:
    return (await place.health()).followers == 1
