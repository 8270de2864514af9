"""A backend of the commands: the registry, PostgreSQL and Ray of the cluster that this process joins."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from seedcore.cli.backend import Event, ListQuery, every_page
from seedcore.cli.cluster import join_cluster
from seedcore.cli.errors import NeverRegisteredError
from seedcore.core.clock import utc_now
from seedcore.core.errors import RegistryUnavailableError
from seedcore.core.feed import Position
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_PAGE
from seedcore.discovery.api import (
    AgentAnswer,
    InstancePage,
    OperationAnswer,
    OverviewAnswer,
    ResolveAnswer,
)
from seedcore.discovery.overview import Overviews
from seedcore.discovery.pages import resolve_json
from seedcore.discovery.reader import reader_of
from seedcore.discovery.rendering import agent_answer, operation_answer, page_of
from seedcore.discovery.watch import Beginning, happenings, require_feed
from seedcore.registry.ray_support.lookup import ray_remembers
from seedcore.settings import Settings

_CURRENT_S = 15.0


class Cluster:
    """Implements Backend with discovery's own resolver, in this process."""

    def __init__(self, settings: Settings) -> None:
        """Joins the cluster. Raises as join_cluster does."""
        self.place = f"Ray cluster at {join_cluster(settings)}, namespace {settings.namespace}"
        self._settings = settings
        # one query is faster than a copy of the whole list
        self._reader = reader_of(settings.model_copy(update={"follow": False}))

    async def listing(self, query: ListQuery) -> InstancePage:
        wanted = query.filter()

        async def page(cursor: str | None) -> InstancePage:
            return page_of(await self._reader.list_instances(wanted, MAX_PAGE, cursor))

        return await every_page(page)

    async def deaths(self, limit: int, within_s: float | None) -> InstancePage:
        return page_of(await self._reader.deaths(limit, None, within_s))

    async def agent(self, logical_id: str) -> AgentAnswer:
        described = await self._reader.describe(logical_id)
        if described.complete and not described.live and not described.instances:
            known = await ray_remembers(logical_id, self._settings.namespace, self._settings.call_timeout_s)
            raise NeverRegisteredError(logical_id, known)
        return agent_answer(described)

    async def resolve(self, logical_ids: Sequence[str]) -> ResolveAnswer:
        answer = await self._reader.resolve(logical_ids)
        return ResolveAnswer.model_validate_json(resolve_json(logical_ids, answer))

    async def overview(self) -> OverviewAnswer:
        return await Overviews(self._settings, self._reader).now()

    async def drain(self, logical_id: str, reason: str | None, duration_s: float | None) -> OperationAnswer:
        return await self._turn(logical_id, Status.DRAINING, reason, duration_s)

    async def undrain(self, logical_id: str, reason: str | None) -> OperationAnswer:
        return await self._turn(logical_id, Status.ALIVE, reason)

    async def deregister(self, logical_id: str, reason: str | None) -> OperationAnswer:
        return await self._turn(logical_id, Status.DEAD, reason)

    async def watch(self, query: ListQuery, after: str | None) -> AsyncIterator[Event]:
        begin = Beginning(None if after is None else Position.parsed(after))
        reader = reader_of(self._settings.model_copy(update={"follow": True}))
        try:
            feed = require_feed(reader)
            if not await reader.until_current(_CURRENT_S):
                raise RegistryUnavailableError(f"its change feed was not read within {_CURRENT_S:g} s")
            async for name, data, at in happenings(reader, feed, begin, query.filter()):
                yield Event(name, data, str(at))
        finally:
            await reader.close()

    async def _turn(
        self, logical_id: str, status: Status, reason: str | None, duration_s: float | None = None
    ) -> OperationAnswer:
        results = await self._reader.operate(status, logical_id, reason, duration_s)
        return operation_answer(logical_id, results, utc_now())
