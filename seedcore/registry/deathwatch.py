"""Who dies, as Ray's nodes tell it: one relay for each node with instances, and Ray's node table.

The registry's second witness. It declares nobody dead; it reports.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping
from itertools import islice
from typing import Any, Protocol

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from seedcore.core.errors import DirectoryUnavailableError, first_line
from seedcore.core.model import Instance
from seedcore.core.ports import OnDeath
from seedcore.core.verdict import Witness
from seedcore.core.waiting import end, within
from seedcore.registry.lookup import ActorHandle, actor_id_of, find_actor, in_thread
from seedcore.registry.processes import Watched
from seedcore.registry.relay import MAX_WATCHED_A_CALL, Exit, Relay

logger = logging.getLogger(__name__)

_POLL_WAIT_S = 10.0
_CALL_TIMEOUT_S = 10.0
_START_TIMEOUT_S = 60.0
_NODE_TABLE_S = 1.0
_RETRY_MAX_S = 10.0


class _Node:
    """Whom a relay shall watch, and what it has not been told yet."""

    def __init__(self) -> None:
        self.wanted: dict[str, Watched] = {}
        self.to_watch: dict[str, Watched] = {}
        self.to_drop: dict[str, None] = {}
        self.changed = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def add(self, watched: Watched) -> None:
        if self.wanted.get(watched.instance_id) != watched:
            self.wanted[watched.instance_id] = watched
            self.to_watch[watched.instance_id] = watched
            self.to_drop.pop(watched.instance_id, None)
            self.changed.set()

    def drop(self, instance_id: str) -> None:
        if self.wanted.pop(instance_id, None) is not None:
            self.to_watch.pop(instance_id, None)
            self.to_drop[instance_id] = None
            self.changed.set()


class Cluster(Protocol):
    """What the watch needs of Ray. Each raises DirectoryUnavailableError where Ray cannot tell in time."""

    async def nodes(self) -> Mapping[str, bool]:
        """Every node that ever was, and whether it is alive."""
        ...

    def make_relay(self, node_id: str) -> ActorHandle:
        """A relay on a node, ours alone."""
        ...

    def end_relay(self, relay: ActorHandle) -> None:
        """End it, whatever it does."""
        ...

    async def find_actor(self, name: str, namespace: str, timeout_s: float) -> ActorHandle | None:
        """A weak handle of a named actor, or None where there is certainly none."""
        ...


class RayCluster:
    """Implements Cluster."""

    async def nodes(self) -> Mapping[str, bool]:
        table: list[dict[str, Any]] = await in_thread(ray.nodes, _CALL_TIMEOUT_S)
        return {entry["NodeID"]: bool(entry["Alive"]) for entry in table}

    def make_relay(self, node_id: str) -> ActorHandle:
        # unnamed: making it waits for nobody; owned: it ends with the registry
        relay_class: Any = ray.remote(Relay)
        return relay_class.options(
            num_cpus=0,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        ).remote()

    def end_relay(self, relay: ActorHandle) -> None:
        ray.kill(relay, no_restart=True)

    async def find_actor(self, name: str, namespace: str, timeout_s: float) -> ActorHandle | None:
        return await find_actor(name, namespace, timeout_s)


class DeathWatch:
    """Implements core.ports.DeathWitness. Use from one event loop."""

    def __init__(self, on_death: OnDeath, cluster: Cluster | None = None) -> None:
        self._on_death = on_death
        self._cluster: Cluster = cluster if cluster is not None else RayCluster()
        self._nodes: dict[str, _Node] = {}
        self._home: dict[str, str] = {}
        self._table: asyncio.Task[None] | None = None
        self.problem: str | None = None

    def start(self) -> None:
        """Begin to read the node table, and to make relays where they are needed."""
        if self._table is None:
            self._table = asyncio.create_task(self._read_table_for_ever(), name="node-table")

    async def stop(self) -> None:
        """End every relay."""
        await end(self._table, *(node.task for node in self._nodes.values()))
        self._table = None

    def add(self, instance: Instance) -> None:
        """Watch an instance from now on; again when its details change. One without a node is not watched."""
        if instance.node_id is None:
            return
        if self._home.get(instance.instance_id, instance.node_id) != instance.node_id:
            self.drop(instance.instance_id)
        self._home[instance.instance_id] = instance.node_id
        self._nodes.setdefault(instance.node_id, _Node()).add(
            Watched(
                instance.instance_id,
                instance.pid,
                instance.process_key,
                instance.actor_name,
                instance.namespace,
                instance.actor_id,
            )
        )

    def drop(self, instance_id: str) -> None:
        """Watch it no more."""
        node = self._nodes.get(self._home.pop(instance_id, ""))
        if node is not None:
            node.drop(instance_id)

    async def ask_ray(self, instance: Instance, timeout_s: float) -> Witness:
        """What Ray's actor table says of an instance's actor now."""
        if instance.actor_name is None or instance.namespace is None:
            return Witness.UNKNOWN
        try:
            handle = await self._cluster.find_actor(instance.actor_name, instance.namespace, timeout_s)
        except DirectoryUnavailableError:
            return Witness.UNKNOWN
        if handle is None or instance.actor_id not in {None, actor_id_of(handle)}:
            return Witness.GONE
        return Witness.ALIVE

    # Nodes

    async def _read_table_for_ever(self) -> None:
        while True:
            try:
                self._follow(await self._cluster.nodes())
                self.problem = None
            except DirectoryUnavailableError as error:
                self.problem = str(error)
            except Exception as error:
                logger.exception("the node table could not be followed; going on")
                self.problem = first_line(error)
            await asyncio.sleep(_NODE_TABLE_S * random.uniform(0.9, 1.1))

    def _follow(self, alive: Mapping[str, bool]) -> None:
        for node_id, node in list(self._nodes.items()):
            # an id that is not in the table (RAY_NODE_ID names it otherwise) says nothing
            if alive.get(node_id) is False:
                for instance_id in list(node.wanted):
                    self._on_death(instance_id, Witness.UNKNOWN, Witness.GONE, "its node died")
                node.wanted.clear()
            if not node.wanted and not (node.task is not None and alive.get(node_id)):
                self._forget(node_id, node)
            elif node.wanted and node.task is None and alive.get(node_id):
                node.task = asyncio.create_task(self._serve(node_id, node), name=f"relay-{node_id[:8]}")

    def _forget(self, node_id: str, node: _Node) -> None:
        if node.task is not None:
            node.task.cancel()
        del self._nodes[node_id]

    async def _serve(self, node_id: str, node: _Node) -> None:
        """Keep a relay on a node; its loss is nobody's death."""
        delay_s = 0.1
        while True:
            relay = self._cluster.make_relay(node_id)
            try:
                await within(_ready(relay), _START_TIMEOUT_S)
                delay_s = 0.1
                node.to_watch, node.to_drop = dict(node.wanted), {}
                await self._converse(relay, node)
            except (RayError, asyncio.TimeoutError) as error:
                logger.info("relay lost, making another: %s", first_line(error), extra={"node_id": node_id})
            except Exception:
                logger.exception("relay failed, making another", extra={"node_id": node_id})
            finally:
                self._cluster.end_relay(relay)
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(_RETRY_MAX_S, delay_s * 2)

    async def _converse(self, relay: ActorHandle, node: _Node) -> None:
        handled = 0
        poll: asyncio.Future[list[Exit]] = asyncio.ensure_future(_exits(relay, handled))
        changed: asyncio.Future[Any] = asyncio.ensure_future(node.changed.wait())
        try:
            while True:
                if changed.done():
                    changed = asyncio.ensure_future(node.changed.wait())
                await self._tell(relay, node)
                waits: set[asyncio.Future[Any]] = {poll, changed}
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if poll.done():
                    for ended in poll.result():
                        handled = ended.number
                        if ended.instance_id in node.wanted:
                            self._on_death(ended.instance_id, Witness.GONE, Witness.ALIVE, ended.cause)
                    poll = asyncio.ensure_future(_exits(relay, handled))
        finally:
            poll.cancel()
            changed.cancel()

    async def _tell(self, relay: ActorHandle, node: _Node) -> None:
        node.changed.clear()
        while node.to_drop or node.to_watch:
            dropped = list(islice(node.to_drop, MAX_WATCHED_A_CALL))
            added = list(islice(node.to_watch.values(), MAX_WATCHED_A_CALL))
            for instance_id in dropped:
                del node.to_drop[instance_id]
            for watched in added:
                del node.to_watch[watched.instance_id]
            await within(_told(relay, dropped, added), _CALL_TIMEOUT_S * (1 + len(added) / 100))


async def _ready(relay: ActorHandle) -> None:
    await relay.__ray_ready__.remote()


async def _exits(relay: ActorHandle, handled: int) -> list[Exit]:
    answer: list[Exit] = await within(relay.exits.remote(handled, _POLL_WAIT_S), _POLL_WAIT_S + _CALL_TIMEOUT_S)
    return answer


async def _told(relay: ActorHandle, dropped: list[str], added: list[Watched]) -> None:
    if dropped:
        await relay.unwatch.remote(dropped)
    if added:
        await relay.watch.remote(added)
