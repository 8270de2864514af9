"""The Serve deployment: keeps the registry actor running, answers HTTP, and returns live handles.

Its health check never asks the database: an outage there must not restart replicas.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

from ray.serve.context import _get_global_client

from seedcore.composition import start_registry
from seedcore.discovery.access import Access, check_proxies, is_behind_haproxy
from seedcore.discovery.endpoints import EndpointLists
from seedcore.discovery.exposure import exposures
from seedcore.discovery.keeper import RegistryKeeper
from seedcore.discovery.overview import Overviews
from seedcore.discovery.pages import AnswerCache
from seedcore.discovery.reader import connection_of, reader_of
from seedcore.discovery.traffic import Rates
from seedcore.registry.ray_support.logs import log_to_stderr
from seedcore.registry.ray_support.lookup import ActorHandle
from seedcore.settings import Mode, Settings

logger = logging.getLogger(__name__)

MAX_WATCHERS = 250


def listening_host() -> str | None:
    """The address that Serve's proxies listen on, or None if Serve does not run yet."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.http_config.host


class Discovery:
    """One replica. The routes answer HTTP by its reader; its methods return handles to callers in the cluster."""

    def __init__(
        self,
        settings: Settings,
        keep_registry: bool,
        max_watchers: int = MAX_WATCHERS,
        max_requests: int = 4 * MAX_WATCHERS,
    ) -> None:
        """`max_requests` is the number of requests that Serve gives a replica at once, of which `max_watchers` may be
        of /v1/watch. One caller may have half of each."""
        self.max_watchers = max_watchers
        log_to_stderr(settings.log_format)
        self.settings = settings
        check_proxies(settings)
        self.access = Access(settings, listening_host(), knows_peers=not is_behind_haproxy())
        self.rates = Rates(settings.http_max_requests_per_s, max(1, max_requests // 2), max(1, max_watchers // 2))
        self.answers = AnswerCache()
        connection = connection_of(settings)
        self.reader = reader_of(settings, connection)
        self.overviews = Overviews(settings, self.reader)
        self.endpoints = EndpointLists(self.reader)
        for exposure in exposures():
            logger.warning("%s; %s", exposure.what, exposure.remedy)
        self._keeping: asyncio.Task[None] | None = None
        if keep_registry and settings.registry_enabled and settings.mode is not Mode.RAY:
            self._keeping = RegistryKeeper(connection.hello, partial(start_registry, settings)).start()

    def check_health(self) -> None:
        """The replica answers. The registry and the database have their own health checks."""

    async def resolve(self, logical_id: str) -> ActorHandle:
        """A live, proven handle. Raises NotResolvableError or CannotKnowError."""
        return await self.reader.handle_of(logical_id)

    async def resolve_many(self, logical_ids: Sequence[str]) -> dict[str, ActorHandle | str]:
        """A proven handle for each agent, or the reason why there is none; at most MAX_PAGE at once."""
        return await self.reader.handles_of(logical_ids)
