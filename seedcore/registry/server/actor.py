"""The registry on Ray: the detached, named actor, created race-free, with a version handshake."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import ray
from ray.exceptions import ActorDiedError, RayActorError

from seedcore.core.errors import RegistryUnavailableError, first_line
from seedcore.core.timeouts import within
from seedcore.registry.protocol.connection import REGISTRY_NAME, RegistryConnection
from seedcore.registry.protocol.messages import Hello
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.actors import end_actor
from seedcore.registry.ray_support.logs import log_to_stderr
from seedcore.registry.ray_support.lookup import find_actor
from seedcore.registry.ray_support.metrics import PERIOD_S
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.death_watch import DeathWatch, RayCluster
from seedcore.registry.server.flusher import StoreFactory
from seedcore.registry.server.metrics import RegistryMetrics
from seedcore.registry.server.registry import Registry

logger = logging.getLogger(__name__)

_HEAD = "node:__internal_head__"
_ATTEMPTS = 5
_MAX_CONCURRENCY = 10_000
_GATHER_S = 0.25


class RegistryActor(Registry):
    """A Registry that serves as soon as Ray has made it, also after a restart."""

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
        self._writer.on_flush = self._metrics.note_flush
        self.start()
        self._telling = asyncio.create_task(self._tell_metrics(), name="registry-metrics")

    async def _tell_metrics(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                self._metrics.tell(await self.health(), self._roster.count_by_verdict(), self._writer.pool)
            except Exception:
                logger.exception("metrics were not told; going on")


async def ensure_registry(
    config: RegistryConfig,
    store_factory: StoreFactory,
    relay_class: type,
    namespace: str,
    call_timeout_s: float = 30.0,
) -> Hello:
    """The registry actor of `namespace`, started unless it runs; safe when many start it at once. `relay_class`
    is the actor that it keeps on each node.

    It is pinned to the head node, where an embedded database has its data. Raises VersionMismatchError where
    an actor of a version too far from this one holds the name, RegistryUnavailableError where none comes up in time.
    """
    # get_if_exists may return an actor that is just dying: only an answer counts
    connection = RegistryConnection(namespace, call_timeout_s)
    problem = ""
    for attempt in range(_ATTEMPTS):
        _create(replace(config, namespace=namespace), store_factory, relay_class)
        try:
            hello = await connection.hello()
        except RegistryUnavailableError as error:
            problem = error.why
            logger.info("the registry actor is not up yet: %s", problem, extra={"attempt": attempt})
            await asyncio.sleep(0.2 * 2**attempt)
            continue
        hello.require_understood()
        return hello
    raise RegistryUnavailableError(f"the registry actor does not come up: {problem}")


def _create(config: RegistryConfig, store_factory: StoreFactory, relay_class: type) -> None:
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
    session.create(ray.remote(RegistryActor), options, config, store_factory, relay_class)


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
