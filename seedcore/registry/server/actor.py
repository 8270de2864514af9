"""The registry on Ray: the detached, named actor, created race-free, with a version handshake."""

from __future__ import annotations

import asyncio
import functools
import logging
from dataclasses import replace

import ray
from ray.exceptions import ActorDiedError, RayActorError

from seedcore.core.backoff import Backoff, supervise
from seedcore.core.errors import DirectoryUnavailableError, RegistryUnavailableError, first_line
from seedcore.core.member_queries import count_by_verdict
from seedcore.core.timeouts import within
from seedcore.registry.protocol.connection import REGISTRY_NAME, RegistryConnection
from seedcore.registry.protocol.messages import Hello
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.actors import end_actor
from seedcore.registry.ray_support.logs import log_to_stderr
from seedcore.registry.ray_support.lookup import find_actor, in_thread
from seedcore.registry.ray_support.metrics import PERIOD_S
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.database import StoreFactory
from seedcore.registry.server.death_watch import DeathWatch
from seedcore.registry.server.metrics import RegistryMetrics
from seedcore.registry.server.ray_cluster import RayCluster
from seedcore.registry.server.registry import Registry

logger = logging.getLogger(__name__)

_HEAD = "node:__internal_head__"
_ATTEMPTS = 5
_RETRY_S, _RETRY_MAX_S = 0.4, 4.0
_MAX_CONCURRENCY = 10_000
_GATHER_S = 0.25


class RegistryActor(Registry):
    """A Registry that serves as soon as Ray has started it, also after a restart."""

    def __init__(self, config: RegistryConfig, store_factory: StoreFactory, relay_class: type) -> None:
        log_to_stderr(config.log_format)
        node_id = session.context().get_node_id()
        gather_s = min(_GATHER_S, config.beat_interval_s / 20)
        cluster = RayCluster(relay_class, config.namespace, config.call_timeout_s, gather_s)
        super().__init__(
            replace(config, node_id=node_id),
            store_factory,
            watch_factory=lambda on_death: DeathWatch(on_death, cluster),
        )
        self._metrics = RegistryMetrics()
        self.writer.flusher.on_flush = self._metrics.note_flush
        self.start()
        exporting = supervise(self._export_metrics, Backoff(PERIOD_S, 10 * PERIOD_S), "the export of metrics")
        self._exporting = asyncio.create_task(exporting, name="registry-metrics")

    async def _export_metrics(self) -> float:
        health = await self.health()
        self._metrics.export(health, count_by_verdict(self.members), self.writer.database.pool)
        return PERIOD_S


async def ensure_registry(
    config: RegistryConfig,
    store_factory: StoreFactory,
    relay_class: type,
    namespace: str,
    call_timeout_s: float = 30.0,
) -> Hello:
    """The registry actor of `namespace`, started unless it runs; safe when many start it at once. `relay_class`
    is the actor that it keeps on each node.

    It is pinned to the head node, where an embedded database has its data. Raises SessionError where this process is
    not connected to Ray, VersionMismatchError where an actor of a version too far from this one holds the name,
    RegistryUnavailableError where none starts in time.
    """
    session.require()
    # get_if_exists may return an actor that is just dying: only an answer counts
    connection = RegistryConnection(namespace, call_timeout_s)
    retries = Backoff(_RETRY_S, _RETRY_MAX_S)
    problem = ""
    for attempt in range(_ATTEMPTS):
        try:
            await _create(replace(config, namespace=namespace), store_factory, relay_class, call_timeout_s)
            hello = await connection.hello()
        except (DirectoryUnavailableError, RegistryUnavailableError) as error:
            problem = error.why
            logger.info("the registry actor does not answer yet: %s", problem, extra={"attempt": attempt})
            await asyncio.sleep(retries.next_s())
            continue
        hello.require_understood()
        return hello
    raise RegistryUnavailableError(f"the registry actor does not come up: {problem}")


async def _create(
    config: RegistryConfig, store_factory: StoreFactory, relay_class: type, timeout_s: float
) -> session.ActorHandle:
    """Create the actor unless it exists, in a thread: Ray's call blocks while the GCS is away."""
    options = {
        "name": REGISTRY_NAME,
        "namespace": config.namespace,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "max_task_retries": 0,
        "max_concurrency": _MAX_CONCURRENCY,
        "num_cpus": 0,
        "resources": {_HEAD: 0.001},
    }
    create = functools.partial(session.create, ray.remote(RegistryActor), options, config, store_factory, relay_class)
    # an actor that is created too late is not ended: others may use it by then, and the next attempt finds it
    return await in_thread(create, timeout_s)


async def stop_registry(namespace: str, timeout_s: float = 10.0) -> bool:
    """Let the registry commit what waits, then end its actor for good, and see it gone. False where none runs."""
    handle = await find_actor(REGISTRY_NAME, namespace, timeout_s)
    if handle is None:
        return False
    try:
        await within(session.ask(handle, "stop"), timeout_s)
    except (TimeoutError, ActorDiedError, RayActorError, AttributeError) as error:
        # one of another version may know no such call
        logger.warning("the registry did not stop by itself: %s", first_line(error))
    if not await end_actor(handle, timeout_s):
        raise RegistryUnavailableError(f"the registry actor was ended but is not gone after {timeout_s:g} s")
    return True
