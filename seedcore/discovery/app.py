"""The Serve deployment: starts the registry actor, keeps it running, hands out live handles.

Its health check never asks the database: an outage there must not restart replicas.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from ray.serve.context import _get_global_client

from seedcore.composition import start_registry, store_recipe
from seedcore.core.errors import RegistryError, RegistryUnavailableError, StoreUnavailableError
from seedcore.core.feed import Feed
from seedcore.core.ports import InstanceReader
from seedcore.discovery.access import Access, check_proxies, is_behind_haproxy
from seedcore.discovery.exposure import exposures
from seedcore.discovery.ladder import DiscoveryLadder
from seedcore.discovery.overview import Overviews
from seedcore.discovery.pages import AnswerCache
from seedcore.discovery.traffic import Rates
from seedcore.registry.caller.follower import Follower
from seedcore.registry.caller.handles import HandleFinder
from seedcore.registry.caller.metrics import CallerMetrics
from seedcore.registry.protocol.connection import NoRegistry, RegistryConnection
from seedcore.registry.ray_support.directory import RayDirectory
from seedcore.registry.ray_support.logs import log_to_stderr
from seedcore.registry.ray_support.lookup import ActorHandle
from seedcore.settings import Mode, Settings

logger = logging.getLogger(__name__)

FEED_CAPACITY = 10_000
MAX_WATCHERS = 250
_KEEP_PERIOD_S = 5.0


def ladder_of(settings: Settings, connection: RegistryConnection | None = None) -> DiscoveryLadder:
    """The ladder that the settings ask for: in mode ray it has the last rung alone."""
    connection = connection if connection is not None else _connection_of(settings)
    follows = settings.follow and settings.mode is not Mode.RAY
    metrics = CallerMetrics("discovery")
    return DiscoveryLadder(
        connection,
        _no_reader if settings.mode is Mode.RAY else store_recipe(settings).reader,
        RayDirectory(settings.namespace, settings.call_timeout_s),
        HandleFinder(settings.namespace, settings.probe_timeout_s),
        Follower(connection, feed=Feed("", FEED_CAPACITY), metrics=metrics) if follows else None,
        metrics,
    )


def _connection_of(settings: Settings) -> RegistryConnection:
    kind = NoRegistry if settings.mode is Mode.RAY else RegistryConnection
    return kind(settings.namespace, settings.call_timeout_s)


async def _no_reader() -> InstanceReader:
    raise StoreUnavailableError("the mode is ray")


def listening_host() -> str | None:
    """The address that Serve's proxies listen on, or None where Serve does not run yet."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.http_config.host


class Discovery:
    """One replica. `routes.py` answers HTTP through its ladder; its methods answer in-cluster callers with handles."""

    def __init__(
        self,
        settings: Settings,
        keep_registry: bool,
        max_watchers: int = MAX_WATCHERS,
        max_requests: int = 4 * MAX_WATCHERS,
    ) -> None:
        """`max_requests` are what Serve lets a replica have at once, `max_watchers` of them of /v1/watch. One caller
        may have half of them."""
        self.max_watchers = max_watchers
        log_to_stderr(settings.log_format)
        self.settings = settings
        check_proxies(settings)
        self.access = Access(settings, listening_host(), knows_peers=not is_behind_haproxy())
        self.rates = Rates(settings.http_max_requests_per_s, max(1, max_requests // 2), max(1, max_watchers // 2))
        self.answers = AnswerCache()
        self._connection = _connection_of(settings)
        self.ladder = ladder_of(settings, self._connection)
        self.overviews = Overviews(settings, self.ladder)
        for exposure in exposures():
            logger.warning("%s; %s", exposure.what, exposure.remedy)
        self._keeping: asyncio.Task[None] | None = None
        if keep_registry and settings.registry_enabled and settings.mode is not Mode.RAY:
            self._keeping = asyncio.get_running_loop().create_task(self._keep_registry())

    def check_health(self) -> None:
        """The replica answers, that is all: what is behind it has its own health."""

    # For in-cluster callers

    async def resolve(self, logical_id: str) -> ActorHandle:
        """A live, proven handle. Raises NotResolvableError or CannotKnowError."""
        return await self.ladder.handle_of(logical_id)

    async def resolve_many(self, logical_ids: Sequence[str]) -> dict[str, ActorHandle | str]:
        """A proven handle for each agent, or the reason why there is none; at most MAX_PAGE at once."""
        return await self.ladder.handles_of(logical_ids)

    async def _keep_registry(self) -> None:
        """Start the registry actor, and again whenever it is gone for good."""
        while True:
            try:
                await self._connection.hello()
            except RegistryUnavailableError:
                try:
                    hello = await start_registry(self.settings)
                    logger.info("registry actor runs", extra={"pid": hello.pid, "node_id": hello.node_id})
                except RegistryError as error:
                    logger.warning("the registry actor could not be started: %s", error)
            await asyncio.sleep(_KEEP_PERIOD_S)
