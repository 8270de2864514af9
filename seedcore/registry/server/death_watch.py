"""The second witness: a relay on each node with instances, Ray's node table, and the nodes that Ray drains.

Owns the map of nodes. It reports and declares nothing dead: `expiry` does.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Mapping

from seedcore.core.backoff import Backoff, supervise
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.clock import Clock
from seedcore.core.errors import DirectoryUnavailableError, first_line
from seedcore.core.instances import Instance
from seedcore.core.ports import OnDeath, OnDependency, OnDraining, OnExplained, OnLostNodes, OnUnwatched
from seedcore.core.timeouts import end
from seedcore.core.verdict import Witness
from seedcore.registry.protocol.messages import Exit, Unwatched
from seedcore.registry.ray_support.lookup import actor_id_of
from seedcore.registry.server.ray_cluster import Cluster
from seedcore.registry.server.watched_node import WatchedNode, WatchTimes

logger = logging.getLogger(__name__)

_MAX_PROBLEMS = 3
_TIMES = WatchTimes()


class DeathWatch:
    """Implements core.ports.DeathWitness. Use it from one event loop."""

    def __init__(
        self, on_death: OnDeath, cluster: Cluster, times: WatchTimes = _TIMES, clock: Clock | None = None
    ) -> None:
        self._on_death = on_death
        self.on_refined: OnExplained = _ignore
        self.on_dependency: OnDependency = _ignore
        self.on_lost_nodes: OnLostNodes = _ignore
        self.on_unwatched: OnUnwatched = _ignore
        self.on_draining: OnDraining = _ignore
        self._cluster = cluster
        self._times = times
        self._clock = clock if clock is not None else Clock()
        self._nodes: dict[str, WatchedNode] = {}
        self._without_node: set[str] = set()
        self._table: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._alive: Mapping[str, bool] = {}
        self._table_problem: str | None = None
        self._can_read_draining = True

    def start(self) -> None:
        """Begin to read the node table, and to make relays where they are needed."""
        if self._table is None:
            backoff = Backoff(self._times.node_table_s, self._times.restart_max_s)
            reading = supervise(self._read_table, backoff, "the node table", on_failure=self._note_failure)
            self._table = asyncio.create_task(reading, name="node-table")

    async def stop(self) -> None:
        """End every relay."""
        await end(self._table)
        await asyncio.gather(*(node.stop() for node in self._nodes.values()))
        await asyncio.gather(*self._leaving, return_exceptions=True)
        self._table = None

    def add(self, instance: Instance) -> None:
        """Watch an instance from now on; again when its details change. One without a node is not watched."""
        node_id = instance.node_id
        if node_id is None:
            self._without_node.add(instance.instance_id)
            return
        if node_id not in self._nodes:
            self._nodes[node_id] = WatchedNode(node_id, self._cluster, self._take_exit, self._times, self._clock)
        self._nodes[node_id].add(instance)

    def drop(self, instance: Instance) -> None:
        """Watch an instance no longer."""
        if instance.node_id is None:
            self._without_node.discard(instance.instance_id)
        elif instance.node_id in self._nodes:
            self._nodes[instance.node_id].drop(instance.instance_id)

    # State

    @property
    def problem(self) -> str | None:
        """Why it does not see everything, or None."""
        if self._table_problem is not None or not self._alive:
            return self._table_problem
        return self._find_problem()

    @property
    def is_blind(self) -> bool:
        """Whether Ray's tables could not be read last."""
        return self._table_problem is not None

    @property
    def relays(self) -> int:
        """How many relays are at work."""
        return sum(node.has_relay for node in self._nodes.values())

    @property
    def watched(self) -> int:
        """How many instances they watch."""
        return sum(node.watched for node in self._nodes.values())

    @property
    def nodes(self) -> Mapping[str, WatchedNode]:
        """The nodes with instances, and those whose relay is still there, by id."""
        return self._nodes

    def relay_of(self, node_id: str) -> str | None:
        """The name of the relay at work on a node."""
        node = self._nodes.get(node_id)
        return None if node is None else node.relay

    async def ask_ray(self, instance: Instance, timeout_s: float) -> Witness:
        """What Ray's actor table has on an instance's actor now."""
        if instance.actor_name is None or instance.namespace is None:
            return Witness.UNKNOWN
        try:
            handle = await self._cluster.find_actor(instance.actor_name, instance.namespace, timeout_s)
        except DirectoryUnavailableError:
            return Witness.UNKNOWN
        if handle is None or instance.actor_id not in {None, actor_id_of(handle)}:
            return Witness.GONE
        return Witness.ALIVE

    # Reports

    def _take_exit(self, ended: Exit) -> None:
        if ended.dependency is not None:
            self.on_dependency(ended.instance_id, ended.dependency, ended.cause)
        elif ended.is_explained:
            self.on_refined(ended.instance_id, ended.cause)
        else:
            self._on_death(ended.instance_id, Witness.GONE, Witness.ALIVE, ended.cause)

    # The node table

    async def _read_table(self) -> float:
        try:
            self._alive = await self._cluster.nodes()
        except DirectoryUnavailableError as error:
            self._table_problem = str(error)
            self.on_draining(None)
        else:
            self._follow(self._alive)
            self.on_unwatched(self._count_unwatched())
            self._table_problem = None
            await self._read_draining()
        return self._times.node_table_s * random.uniform(0.9, 1.1)

    async def _read_draining(self) -> None:
        try:
            draining = await self._cluster.draining()
        except DirectoryUnavailableError as error:
            if self._can_read_draining:
                logger.warning("it is not known which nodes Ray drains: %s", error.why)
            self._can_read_draining = False
            self.on_draining(None)
        else:
            self._can_read_draining = True
            self.on_draining(draining)

    def _note_failure(self, error: Exception) -> None:
        self._table_problem = first_line(error)

    def _follow(self, alive: Mapping[str, bool]) -> None:
        # first: an instance that is declared dead below must not register there again
        self.on_lost_nodes(frozenset(node_id for node_id, is_alive in alive.items() if not is_alive))
        for node_id, node in list(self._nodes.items()):
            # an id that is not in the table (RAY_NODE_ID names it otherwise) shows nothing
            if alive.get(node_id) is False:
                for instance_id in list(node.wanted):
                    self._on_death(instance_id, Witness.UNKNOWN, Witness.GONE, Cause(CauseKind.NODE_DIED, node_id))
                node.wanted.clear()
                node.unwatched.clear()
            if not node.wanted and not (node.is_served and alive.get(node_id)):
                self._forget(node_id, node)
            elif node.wanted and alive.get(node_id):
                node.serve()

    def _forget(self, node_id: str, node: WatchedNode) -> None:
        leaving = asyncio.create_task(node.stop(), name="relay-ended")
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)
        del self._nodes[node_id]

    def _count_unwatched(self) -> Mapping[str, int]:
        counts = Counter({Unwatched.ELSEWHERE: len(self._without_node)})
        for node in self._nodes.values():
            counts.update(node.count_unwatched())
        return {why.value: count for why, count in counts.items() if count}

    def _find_problem(self) -> str | None:
        """Which nodes with instances are not watched, or not wholly, and why."""
        wanting = [(node_id, node) for node_id, node in self._nodes.items() if node.wanted]
        problems = sorted(
            problem
            for problem in (
                node.find_problem()
                if node_id in self._alive
                else f"no such node in Ray's table: {node_id} (RAY_NODE_ID?)"
                for node_id, node in wanting
            )
            if problem is not None
        )
        if not problems:
            return None
        text = "; ".join(problems[:_MAX_PROBLEMS])
        return text if len(problems) <= _MAX_PROBLEMS else f"{text}; {len(problems)} of {len(wanting)} nodes in all"


def _ignore(*_: object) -> None:
    """The default of a callback."""
