"""A summary of the fleet, computed at most once per second for all callers together."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Mapping
from datetime import datetime
from typing import Any

from seedcore import __version__
from seedcore.core.answers import Origin
from seedcore.core.clock import utc_now
from seedcore.core.errors import CannotKnowError, RegistryError
from seedcore.core.limits import NOTHING
from seedcore.core.timeouts import within
from seedcore.core.view import FleetCounts, LiveView
from seedcore.discovery.api import EpochOut, LossOut, OverviewAnswer, RegistryOut, ServiceOut
from seedcore.discovery.reader import DiscoveryReader, SourceStates
from seedcore.discovery.rendering import sources_out
from seedcore.registry.caller.live_sources import registry_problem
from seedcore.registry.caller.sources import NoAnswerError
from seedcore.registry.protocol.messages import Health
from seedcore.settings import Settings

MAX_ORGANS = 50


class Overviews:
    """Computes the summary and shares it among callers. Use it from one event loop."""

    def __init__(
        self, settings: Settings, reader: DiscoveryReader, timeout_s: float = 1.5, max_age_s: float = 1.0
    ) -> None:
        """Each source gets `timeout_s` seconds to answer; a summary is shared for `max_age_s` seconds."""
        self._timeout_s = timeout_s
        self._max_age_s = max_age_s
        self._service = ServiceOut(version=__version__, mode=settings.mode.value, namespace=settings.namespace)
        self._reader = reader
        self._made: asyncio.Task[OverviewAnswer] | None = None
        self._made_s = 0.0
        self._answered_at: datetime | None = None
        self._counted: tuple[object, FleetCounts] | None = None
        self._epoch: EpochOut | None = None

    async def now(self) -> OverviewAnswer:
        """Return the current summary. Raises CannotKnowError if no source answers."""
        made = self._made
        if made is None or (made.done() and time.monotonic() - self._made_s >= self._max_age_s):
            made = self._made = asyncio.create_task(self._make(), name="overview")
        # the cancellation of one caller must not cancel it for the others
        return await asyncio.shield(made)

    async def _make(self) -> OverviewAnswer:
        try:
            return await self._look()
        finally:
            self._made_s = time.monotonic()

    async def _look(self) -> OverviewAnswer:
        answer: Health | str = await self._in_time(self._reader.registry.health())
        health = answer if isinstance(answer, Health) else None
        if health is not None:
            self._answered_at = health.as_of
            # the registry reports the state of its database
            postgres, ray_listing = health.store_problem, await self._in_time(self._reader.listing.problem())
        else:
            postgres, ray_listing = await asyncio.gather(
                self._in_time(self._reader.postgres.problem()), self._in_time(self._reader.listing.problem())
            )
        return OverviewAnswer(
            service=self._service,
            sources=sources_out(SourceStates(registry_problem(answer), postgres, ray_listing)),
            epoch=await self._epoch_now(None if health is None else health.epoch),
            registry=None if health is None else registry_out(health),
            registry_problem=answer if isinstance(answer, str) else None,
            as_of_registry=self._answered_at,
            **await self._count(health),
        )

    async def _count(self, health: Health | None) -> dict[str, Any]:
        """Count the instances from the best source that answers, and name the source."""
        view = self._reader.view()
        if view is None and health is not None:
            statuses = health.instances
            return _counted(
                Origin.REGISTRY, health.as_of, sum(statuses.values()), statuses, is_complete=health.is_ready
            )
        is_current = view is not None
        view = view if view is not None else self._reader.last_view()
        if view is None:
            return _counted(Origin.RAY, utc_now(), await self._count_names(), {}, is_complete=False)
        counts = self._counts_of(view)
        return _counted(
            Origin.SNAPSHOT,
            view.as_of if view.as_of is not None else utc_now(),
            sum(counts.statuses.values()),
            {status.value: count for status, count in counts.statuses.items()},
            {verdict.value: count for verdict, count in counts.verdicts.items()},
            {organ or "": count for organ, count in counts.organs.items()},
            version=view.version,
            is_complete=is_current,
        )

    async def _count_names(self) -> int:
        try:
            return len(await self._reader.listing.names())
        except NoAnswerError as error:
            raise CannotKnowError("*", error.why) from error

    async def _in_time(self, question: Awaitable[Any]) -> Any:
        try:
            return await within(question, self._timeout_s)
        except TimeoutError:
            return f"no answer within {self._timeout_s:g} s"

    def _counts_of(self, view: LiveView) -> FleetCounts:
        # counting 100,000 instances takes time, and usually nothing has changed
        key = (view.stream, view.version)
        if self._counted is None or self._counted[0] != key:
            self._counted = key, view.counts()
        return self._counted[1]

    async def _epoch_now(self, name: str | None) -> EpochOut | None:
        if name is None or (self._epoch is not None and self._epoch.name == name):
            return self._epoch
        try:
            epoch = (await self._reader.epoch()).value
        except RegistryError:
            return self._epoch
        self._epoch = EpochOut(name=epoch.name, number=epoch.number)
        return self._epoch


def _counted(
    source: Origin,
    as_of: datetime,
    instances: int,
    statuses: Mapping[str, int],
    verdicts: Mapping[str, int] = NOTHING,
    organs: Mapping[str, int] = NOTHING,
    *,
    version: int = 0,
    is_complete: bool,
) -> dict[str, Any]:
    return {
        "source": source.value,
        "as_of": as_of,
        "version": version,
        "complete": is_complete,
        "instances": instances,
        "by_status": statuses,
        "by_verdict": verdicts,
        "by_organ": dict(Counter(organs).most_common(MAX_ORGANS)),
    }


def registry_out(health: Health) -> RegistryOut:
    """The registry's own report in the shape of the API."""
    return RegistryOut(
        pid=health.hello.pid,
        node_id=health.hello.node_id,
        started_at=health.hello.started_at,
        code_version=health.hello.code_version,
        recovered=health.recovered,
        store_kind=health.store_kind,
        store_problem=health.store_problem,
        term=health.term,
        fenced_by=health.fenced_by,
        beat_interval_s=health.beat_interval_s,
        lease_s=health.lease_s,
        beats_per_s=health.beats_per_s,
        flush_s=health.flush.last_flush_s,
        pending_changes=health.pending_changes,
        pending_beats=health.pending_beats,
        beats_dropped=health.flush.beats_dropped,
        is_frozen=health.is_frozen,
        silent=health.silent,
        credited_s=health.credited_s,
        relays=health.relays,
        watched=health.watched,
        watch_problem=health.watch_problem,
        followers=health.followers,
        healed=health.healed,
        compared_at=health.compared_at,
        notes=list(health.notes),
        unwatched=dict(health.unwatched),
        last_loss=None if health.last_loss is None else LossOut.model_validate(health.last_loss),
        agents_ahead=health.agents_ahead,
        agents_ahead_at=health.agents_ahead_at,
        epoch_problem=health.epoch_problem,
        capacity_problem=health.capacity_problem,
    )
