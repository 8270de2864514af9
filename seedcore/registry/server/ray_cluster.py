"""What the death watch needs of Ray: the node table, the nodes that drain, relays, and the actor table.

Owns no state. Ray's calls block while the GCS is away, so each runs in a thread.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.lookup import ActorHandle, draining_nodes, find_actor, in_thread

_CALL_TIMEOUT_S = 10.0
_END_TIMEOUT_S = 2.0
_MAX_CONCURRENCY = 10_000


class Cluster(Protocol):
    """Each method raises DirectoryUnavailableError where Ray does not answer in time."""

    async def nodes(self) -> Mapping[str, bool]:
        """Every node that ever was, and whether it is alive."""
        ...

    async def draining(self) -> Mapping[str, datetime | None]:
        """The nodes that Ray drains, with the deadline of each, where it has one."""
        ...

    async def make_relay(self, node_id: str, name: str) -> ActorHandle:
        """A relay on a node, owned by this process. The node's agents find it by its name, which no other has."""
        ...

    async def end_relay(self, relay: ActorHandle) -> None:
        """End a relay, whatever it does."""
        ...

    async def ask(self, relay: ActorHandle, method: str, *args: object) -> Any:
        """The answer of a relay. Raises RayError, or SessionError, where there is none."""
        ...

    async def find_actor(self, name: str, namespace: str, timeout_s: float) -> ActorHandle | None:
        """A weak handle of a named actor, or None where there is certainly none."""
        ...


class RayCluster:
    """Implements Cluster. Its relays, actors of `relay_class`, send what they gather to the registry of `namespace`."""

    def __init__(self, relay_class: type, namespace: str, call_timeout_s: float = 5.0, gather_s: float = 0.25) -> None:
        # one for the process: Ray exports each new class that it gets
        self._relay_class = ray.remote(relay_class)
        self._namespace = namespace
        self._call_timeout_s = call_timeout_s
        self._gather_s = gather_s

    async def nodes(self) -> Mapping[str, bool]:
        table: list[dict[str, Any]] = await in_thread(session.nodes, _CALL_TIMEOUT_S)
        return {entry["NodeID"]: bool(entry["Alive"]) for entry in table}

    async def draining(self) -> Mapping[str, datetime | None]:
        return await draining_nodes(_CALL_TIMEOUT_S)

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
