"""Who dies, as Ray's nodes tell it: one relay for each node with instances, and Ray's node table.

The registry's second witness. It declares nobody dead; it reports.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Protocol

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from seedcore.core.errors import DirectoryUnavailableError, SessionError, first_line
from seedcore.core.instances import Instance
from seedcore.core.ports import OnDeath, OnExplained, OnLostNodes, OnUnwatched
from seedcore.core.timeouts import end, within
from seedcore.core.verdict import Witness
from seedcore.registry.protocol.messages import MAX_WATCHED_PER_CALL, Exit, Unwatched, Watched
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.directory import RESERVED_PREFIX
from seedcore.registry.ray_support.lookup import ActorHandle, actor_id_of, find_actor, in_thread

logger = logging.getLogger(__name__)

_POLL_WAIT_S = 5.0
_POLL_GRACE_S = 5.0
_CALL_TIMEOUT_S = 10.0
_END_TIMEOUT_S = 2.0
_START_TIMEOUT_S = 60.0
_NODE_TABLE_S = 1.0
_RETRY_MAX_S = 10.0
_UNWATCHED_S, _UNWATCHED_MAX_S = 10.0, 60.0
_MAX_PROBLEMS = 3
_MAX_CONCURRENCY = 10_000


class _Node:
    """Whom a relay shall watch, and what it has not been told yet."""

    def __init__(self) -> None:
        self.wanted: dict[str, Instance] = {}
        self.to_watch: dict[str, Watched] = {}
        self.to_drop: dict[str, None] = {}
        self.unwatched: dict[str, Unwatched] = {}
        self.changed = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.relay: str | None = None
        self.problem: str | None = None

    @property
    def is_served(self) -> bool:
        """Whether its relay is made, works, or will be made again."""
        return self.task is not None and not self.task.done()

    @property
    def has_relay(self) -> bool:
        """Whether a relay is at work."""
        return self.relay is not None

    def take_relay(self, name: str) -> None:
        """A new relay, which has been told nothing."""
        self.to_watch = {instance_id: _watched(instance) for instance_id, instance in self.wanted.items()}
        self.to_drop = {}
        self.relay = name
        self.changed.set()

    def lose_relay(self) -> None:
        """No relay: nothing is left to be told."""
        self.to_watch, self.to_drop = {}, {}
        self.unwatched.clear()
        self.relay = None

    def note_unwatched(self, told: Iterable[str], unwatched: Mapping[str, Unwatched]) -> None:
        """What the relay said of those that it was told to watch: whom it cannot, and why."""
        for instance_id in told:
            self.unwatched.pop(instance_id, None)
        self.unwatched.update((one, why) for one, why in unwatched.items() if one in self.wanted)

    def count_unwatched(self) -> Counter[Unwatched]:
        """How many of its instances are not watched, by the reason."""
        return Counter(self.unwatched.values()) if self.has_relay else Counter({Unwatched.RELAY: len(self.wanted)})

    def find_problem(self, node_id: str) -> str | None:
        """Why it is not watched, or not all of it is."""
        if self.problem is not None:
            return self.problem
        told = [
            f"{count} of {len(self.wanted)} instances on node {node_id} are not watched: {why.problem}"
            for why, count in self.count_unwatched().most_common()
            if why.problem is not None
        ]
        return "; ".join(told) or None

    def try_again(self) -> None:
        """Tell the relay anew of those that it could not watch: it may have been short of descriptors, or of Ray."""
        self.to_watch.update((instance_id, _watched(self.wanted[instance_id])) for instance_id in self.unwatched)

    def add(self, instance: Instance) -> None:
        instance_id = instance.instance_id
        known = self.wanted.get(instance_id)
        # the registry's own object, and no copy of it
        self.wanted[instance_id] = instance
        if self.has_relay and (known is None or _watched(known) != _watched(instance)):
            self.to_watch[instance_id] = _watched(instance)
            self.to_drop.pop(instance_id, None)
            self.changed.set()

    def drop(self, instance_id: str) -> None:
        self.unwatched.pop(instance_id, None)
        if self.wanted.pop(instance_id, None) is not None and self.has_relay:
            self.to_watch.pop(instance_id, None)
            self.to_drop[instance_id] = None
            self.changed.set()


def _watched(instance: Instance) -> Watched:
    return Watched(
        instance.instance_id,
        instance.pid,
        instance.process_key,
        instance.actor_name,
        instance.namespace,
        instance.actor_id,
    )


class Cluster(Protocol):
    """What the watch needs of Ray. Each raises DirectoryUnavailableError where Ray cannot tell in time."""

    async def nodes(self) -> Mapping[str, bool]:
        """Every node that ever was, and whether it is alive."""
        ...

    async def make_relay(self, node_id: str, name: str) -> ActorHandle:
        """A relay on a node, ours alone, that the node's agents find by a name that no other has."""
        ...

    async def end_relay(self, relay: ActorHandle) -> None:
        """End it, whatever it does."""
        ...

    async def ask(self, relay: ActorHandle, method: str, *args: object) -> Any:
        """What a relay answers. Raises RayError, or SessionError, where it does not."""
        ...

    async def find_actor(self, name: str, namespace: str, timeout_s: float) -> ActorHandle | None:
        """A weak handle of a named actor, or None where there is certainly none."""
        ...


class RayCluster:
    """Implements Cluster. Its relays, actors of `relay_class`, pass on what they gather to the registry of
    `namespace`."""

    def __init__(self, relay_class: type, namespace: str, call_timeout_s: float = 5.0, gather_s: float = 0.25) -> None:
        # one for the process: Ray exports each class that it is given anew
        self._relay_class = ray.remote(relay_class)
        self._namespace = namespace
        self._call_timeout_s = call_timeout_s
        self._gather_s = gather_s

    async def nodes(self) -> Mapping[str, bool]:
        table: list[dict[str, Any]] = await in_thread(session.nodes, _CALL_TIMEOUT_S)
        return {entry["NodeID"]: bool(entry["Alive"]) for entry in table}

    async def make_relay(self, node_id: str, name: str) -> ActorHandle:
        # owned: it ends with the registry. The first one exports its class, which waits for the GCS
        options = {
            "name": name,
            "namespace": self._namespace,
            "max_concurrency": _MAX_CONCURRENCY,
            "num_cpus": 0,
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
        }
        make = functools.partial(
            session.create, self._relay_class, options, self._namespace, self._call_timeout_s, self._gather_s
        )
        return await in_thread(make, _CALL_TIMEOUT_S, on_late=session.kill)

    async def end_relay(self, relay: ActorHandle) -> None:
        await in_thread(lambda: session.kill(relay), _END_TIMEOUT_S)

    async def ask(self, relay: ActorHandle, method: str, *args: object) -> Any:
        return await session.ask(relay, method, *args)

    async def find_actor(self, name: str, namespace: str, timeout_s: float) -> ActorHandle | None:
        return await find_actor(name, namespace, timeout_s)


class DeathWatch:
    """Implements core.ports.DeathWitness. Use from one event loop."""

    def __init__(self, on_death: OnDeath, cluster: Cluster) -> None:
        self._on_death = on_death
        self.on_refined: OnExplained = _ignore
        self.on_lost_nodes: OnLostNodes = _ignore
        self.on_unwatched: OnUnwatched = _ignore
        self._cluster = cluster
        self._nodes: dict[str, _Node] = {}
        self._without_node: set[str] = set()
        self._table: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._alive: Mapping[str, bool] = {}
        self._table_problem: str | None = None

    def start(self) -> None:
        """Begin to read the node table, and to make relays where they are needed."""
        if self._table is None:
            self._table = asyncio.create_task(self._read_table_for_ever(), name="node-table")

    async def stop(self) -> None:
        """End every relay."""
        await end(self._table, *(node.task for node in self._nodes.values()))
        await asyncio.gather(*self._leaving, return_exceptions=True)
        self._table = None

    def add(self, instance: Instance) -> None:
        """Watch an instance from now on; again when anything of it changes. One without a node is not watched."""
        if instance.node_id is None:
            self._without_node.add(instance.instance_id)
            return
        self._nodes.setdefault(instance.node_id, _Node()).add(instance)

    def drop(self, instance: Instance) -> None:
        """Watch it no more."""
        if instance.node_id is None:
            self._without_node.discard(instance.instance_id)
        elif instance.node_id in self._nodes:
            self._nodes[instance.node_id].drop(instance.instance_id)

    @property
    def problem(self) -> str | None:
        """Why it does not see everything, or None."""
        if self._table_problem is not None or not self._alive:
            return self._table_problem
        return self._find_problem()

    @property
    def relays(self) -> int:
        """How many relays are at work."""
        return sum(node.has_relay for node in self._nodes.values())

    @property
    def watched(self) -> int:
        """How many instances they watch."""
        return sum(
            len(node.wanted) - len(node.unwatched | node.to_watch.keys())
            for node in self._nodes.values()
            if node.has_relay
        )

    def relay_of(self, node_id: str) -> str | None:
        """The name of the relay at work on a node."""
        node = self._nodes.get(node_id)
        return None if node is None else node.relay

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
                self._alive = await self._cluster.nodes()
                self._follow(self._alive)
                self.on_unwatched(self._count_unwatched())
                self._table_problem = None
            except DirectoryUnavailableError as error:
                self._table_problem = str(error)
            except Exception as error:
                logger.exception("the node table could not be followed; going on")
                self._table_problem = first_line(error)
            await asyncio.sleep(_NODE_TABLE_S * random.uniform(0.9, 1.1))

    def _follow(self, alive: Mapping[str, bool]) -> None:
        # first: who is declared dead below must not register there again
        self.on_lost_nodes(frozenset(node_id for node_id, is_alive in alive.items() if not is_alive))
        for node_id, node in list(self._nodes.items()):
            # an id that is not in the table (RAY_NODE_ID names it otherwise) says nothing
            if alive.get(node_id) is False:
                for instance_id in list(node.wanted):
                    self._on_death(instance_id, Witness.UNKNOWN, Witness.GONE, "its node died")
                node.wanted.clear()
                node.unwatched.clear()
            if not node.wanted and not (node.is_served and alive.get(node_id)):
                self._forget(node_id, node)
            elif node.wanted and not node.is_served and alive.get(node_id):
                node.task = asyncio.create_task(self._serve(node_id, node), name=f"relay-{node_id[:8]}")

    def _count_unwatched(self) -> Mapping[str, int]:
        counts = Counter({Unwatched.ELSEWHERE: len(self._without_node)})
        for node in self._nodes.values():
            counts.update(node.count_unwatched())
        return {why.value: count for why, count in counts.items() if count}

    def _find_problem(self) -> str | None:
        """Which nodes with instances are not watched, or not wholly, and why."""
        alive = self._alive
        wanting = [(node_id, node) for node_id, node in self._nodes.items() if node.wanted]
        problems = [
            node.find_problem(node_id) if node_id in alive else f"no such node in Ray's table: {node_id} (RAY_NODE_ID?)"
            for node_id, node in wanting
        ]
        told = sorted(problem for problem in problems if problem is not None)
        if not told:
            return None
        shown = "; ".join(told[:_MAX_PROBLEMS])
        return shown if len(told) <= _MAX_PROBLEMS else f"{shown}; {len(told)} of {len(wanting)} nodes in all"

    def _forget(self, node_id: str, node: _Node) -> None:
        if node.task is not None and not node.task.done():
            node.task.cancel()
            self._leaving.add(node.task)
            node.task.add_done_callback(self._leaving.discard)
        del self._nodes[node_id]

    async def _serve(self, node_id: str, node: _Node) -> None:
        """Keep a relay on a node; its loss is nobody's death."""
        delay_s = 0.1
        while True:
            relay: ActorHandle | None = None
            try:
                name = f"{RESERVED_PREFIX}relay-{node_id[:12]}-{uuid.uuid4().hex[:8]}"
                relay = await self._cluster.make_relay(node_id, name)
                await within(self._cluster.ask(relay, "__ray_ready__"), _START_TIMEOUT_S)
                delay_s = 0.1
                node.take_relay(name)
                await self._converse(relay, node)
            except TimeoutError:
                node.problem = f"the relay on node {node_id} did not answer in time; making another"
                logger.info("%s", node.problem, extra={"node_id": node_id})
            except (RayError, DirectoryUnavailableError, SessionError) as error:
                node.problem = f"no relay on node {node_id}: {first_line(error)}"
                logger.info("relay lost, making another: %s", first_line(error), extra={"node_id": node_id})
            except Exception as error:
                node.problem = f"no relay on node {node_id}: {first_line(error)}"
                logger.exception("relay failed, making another", extra={"node_id": node_id})
            finally:
                node.lose_relay()
                if relay is not None:
                    await self._end(relay, node_id)
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(_RETRY_MAX_S, delay_s * 2)

    async def _end(self, relay: ActorHandle, node_id: str) -> None:
        try:
            await self._cluster.end_relay(relay)
        except (RayError, DirectoryUnavailableError) as error:
            # nobody holds it any more: Ray ends it when it can
            logger.info("relay not ended: %s", first_line(error), extra={"node_id": node_id})
        except Exception:
            logger.exception("relay not ended", extra={"node_id": node_id})

    async def _converse(self, relay: ActorHandle, node: _Node) -> None:
        """Tell the relay whom to watch, and hear from it, until either fails."""
        sides = asyncio.create_task(self._tell(relay, node)), asyncio.create_task(self._hear(relay, node))
        try:
            done, _ = await asyncio.wait(sides, return_when=asyncio.FIRST_COMPLETED)
            for side in done:
                side.result()
        finally:
            await end(*sides)

    async def _hear(self, relay: ActorHandle, node: _Node) -> None:
        handled = 0
        while True:
            exits: list[Exit] = await within(
                self._cluster.ask(relay, "exits", handled, _POLL_WAIT_S), _POLL_WAIT_S + _POLL_GRACE_S
            )
            for ended in exits:
                handled = ended.number
                if ended.is_explained:
                    self.on_refined(ended.instance_id, ended.cause)
                elif ended.instance_id in node.wanted:
                    self._on_death(ended.instance_id, Witness.GONE, Witness.ALIVE, ended.cause)
            node.problem = None

    async def _tell(self, relay: ActorHandle, node: _Node) -> None:
        pause_s, unseen = _UNWATCHED_S, 0
        while True:
            node.changed.clear()
            while node.to_drop or node.to_watch:
                dropped = list(islice(node.to_drop, MAX_WATCHED_PER_CALL))
                added = list(islice(node.to_watch.values(), MAX_WATCHED_PER_CALL))
                for instance_id in dropped:
                    del node.to_drop[instance_id]
                for watched in added:
                    del node.to_watch[watched.instance_id]
                unwatched = await within(self._told(relay, dropped, added), _CALL_TIMEOUT_S * (1 + len(added) / 100))
                node.note_unwatched((watched.instance_id for watched in added), unwatched)
            # some will never be seen: those are tried ever more rarely
            pause_s = min(_UNWATCHED_MAX_S, 2 * pause_s) if len(node.unwatched) == unseen else _UNWATCHED_S
            unseen = len(node.unwatched)
            try:
                await within(node.changed.wait(), pause_s if node.unwatched else None)
            except TimeoutError:
                node.try_again()

    async def _told(self, relay: ActorHandle, dropped: list[str], added: list[Watched]) -> Mapping[str, Unwatched]:
        """The instances that it cannot watch, and why."""
        if dropped:
            await self._cluster.ask(relay, "unwatch", dropped)
        unwatched = frozenset(await self._cluster.ask(relay, "watch", added) if added else ())
        unseen = [watched for watched in added if watched.instance_id in unwatched]
        reasons = await self._cluster.ask(relay, "why_unwatched", unseen) if unseen else []
        return {watched.instance_id: Unwatched(why) for watched, why in zip(unseen, reasons, strict=True)}


def _ignore(*_: object) -> None:
    """Nobody listens."""
