"""Owns Ray's nodes: the relays that the registry creates on them, and what those see of the node's processes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError

from seedcore.core.causes import Cause, CauseKind
from seedcore.core.errors import DirectoryUnavailableError, RegistryError
from seedcore.registry.following.times import FollowTimes
from seedcore.registry.node.copy import NodeCopy
from seedcore.registry.node.process_watch import OnExit
from seedcore.registry.node.relay import Relay
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.protocol.messages import Watched
from seedcore.registry.ray_support import session
from tests.faults.simulated.ray import SimActor, SimDirectory, as_raised_there, lose
from tests.faults.simulated.virtual import COMPONENT
from tests.faults.simulated.world import BEAT_S, CALL_TIMEOUT_S, NAMESPACE, World

COPY = FollowTimes(max_age_s=2.0, wait_s=0.5)
"""A copy of a relay, as much faster as its followers are (caller_laws.FOLLOW)."""


class SimWatch:
    """Sees the processes of one node end."""

    def __init__(self, world: World, on_exit: OnExit) -> None:
        self._world = world
        self._on_exit = on_exit
        self._watched: dict[str, str] = {}

    async def add(self, watched: Watched) -> bool:
        assert watched.process_key is not None
        self._watched[watched.instance_id] = watched.process_key
        process = next(one for one in self._world.processes if one.key == watched.process_key)
        if process.ended_s is not None:
            self.ended(process.key)
        return True

    def discard(self, instance_id: str) -> None:
        self._watched.pop(instance_id, None)

    def ended(self, key: str) -> None:
        for instance_id in [one for one, its in self._watched.items() if its == key]:
            del self._watched[instance_id]
            self._on_exit(instance_id, Cause(CauseKind.PROCESS_EXITED, "simulated"), key)

    async def close(self) -> None:
        self._watched.clear()


class SimRelay(SimActor):
    """A relay's process, and its handle: the real relay over simulated processes."""

    METHODS = frozenset(
        {"watch", "unwatch", "why_unwatched", "exits", "beat_many", "deliver", "changes", "page", "__ray_ready__"}
    )

    def __init__(self, world: World, directory: SimDirectory, node_id: str, actor_name: str) -> None:
        self._world = world
        self._directory = directory
        self.node_id = node_id
        self.actor_name = actor_name
        self.name = f"relay-{node_id}-{len(world.relays)}"
        self.is_up = world.nodes.get(node_id, False) and world.has_relays
        self.watch_of_node: SimWatch | None = None
        self._ready_s = world.now_s + world.random.uniform(0.1, 0.6)
        self._relay: Relay | None = None

    def _make(self, on_exit: OnExit) -> SimWatch:
        self.watch_of_node = SimWatch(self._world, on_exit)
        return self.watch_of_node

    async def call(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        world, caller = self._world, COMPONENT.get()
        await asyncio.sleep(world.random.uniform(0.001, 0.01))
        if self.is_up and world.is_cut(caller):
            await lose(world, caller)
        if not self.is_up:
            await asyncio.sleep(world.random.uniform(0.0, 0.2))
            raise ActorDiedError
        await asyncio.sleep(max(0.0, self._ready_s - world.now_s))
        result = await world.loop.run_in(self.name, self._answer(method, args, kwargs))
        if not self.is_up:
            raise ActorDiedError
        if world.happens(world.lost_share):
            raise ActorUnavailableError("simulated", None)
        return result

    async def _answer(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if method == "__ray_ready__":
            return None
        if self._relay is None:
            connection = RegistryConnection(
                NAMESPACE, CALL_TIMEOUT_S, clock=self._world.clock, find=self._directory.find_actor
            )
            copy = NodeCopy(connection, self._world.clock, COPY, COPY.wait_s)
            self._relay = Relay((self._make,), connection, BEAT_S / 20, copy=copy)
        try:
            return await getattr(self._relay, method)(*args, **kwargs)
        except RegistryError as error:
            raise as_raised_there(method, error) from None

    def kill(self) -> None:
        self.is_up = False
        self._world.loop.kill(self.name)


class SimCluster:
    """What the death watch needs of Ray (server.ray_cluster.Cluster)."""

    def __init__(self, world: World, directory: SimDirectory) -> None:
        self._world = world
        self._directory = directory

    async def nodes(self) -> Mapping[str, bool]:
        await self._directory.asked()
        return dict(self._world.nodes)

    async def draining(self) -> Mapping[str, datetime | None]:
        if self._world.gcs_back_s > self._world.now_s:
            raise DirectoryUnavailableError("simulated: the GCS is down")
        return self._world.drains.reported()

    async def make_relay(self, node_id: str, name: str) -> SimRelay:
        relay = SimRelay(self._world, self._directory, node_id, name)
        self._world.relays.append(relay)
        return relay

    async def end_relay(self, relay: SimRelay) -> None:
        relay.kill()

    async def ask(self, relay: SimRelay, method: str, *args: object) -> Any:
        return await session.ask(relay, method, *args)

    async def find_actor(self, name: str, namespace: str, timeout_s: float) -> Any:
        return await self._directory.find_actor(name, namespace, timeout_s)
