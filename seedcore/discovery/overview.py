"""The fleet at a glance, made at most once a second for however many look at it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Mapping
from datetime import datetime
from typing import Any

from seedcore import __version__
from seedcore.core.errors import RegistryError
from seedcore.core.model import Source
from seedcore.core.view import FleetCounts, LiveView
from seedcore.core.waiting import within
from seedcore.discovery.api import EpochOut, OverviewAnswer, RegistryOut, RungsOut, ServiceOut
from seedcore.discovery.ladder import DiscoveryLadder
from seedcore.registry.answers import Health
from seedcore.registry.clock import utc_now
from seedcore.settings import Settings

MAX_ORGANS = 50
_FOR_S = 1.0
_PATIENCE_S = 1.5


class Overviews:
    """Use from one event loop. Remembers when the registry answered last."""

    def __init__(self, settings: Settings, ladder: DiscoveryLadder) -> None:
        self._service = ServiceOut(version=__version__, mode=settings.mode.value, namespace=settings.namespace)
        self._ladder = ladder
        self._made: asyncio.Task[OverviewAnswer] | None = None
        self._made_s = 0.0
        self._answered_at: datetime | None = None
        self._counted: tuple[object, FleetCounts] | None = None
        self._epoch: EpochOut | None = None

    async def now(self) -> OverviewAnswer:
        """What can be told now. Raises CannotKnowError where nobody can tell anything."""
        made = self._made
        if made is None or (made.done() and time.monotonic() - self._made_s > _FOR_S):
            made = self._made = asyncio.create_task(self._make(), name="overview")
        # one who goes away does not take it from the others
        return await asyncio.shield(made)

    async def _make(self) -> OverviewAnswer:
        try:
            return await self._look()
        finally:
            self._made_s = time.monotonic()

    async def _look(self) -> OverviewAnswer:
        health = await _in_time(self._ladder.registry_health())
        problem: str | None = None
        if isinstance(health, Health):
            self._answered_at = health.as_of
            rungs = await self._rungs_by(health)
        else:
            problem = health
            # only now is it worth asking them
            postgres, ray_listing = await asyncio.gather(
                _in_time(self._ladder.postgres_problem()), _in_time(self._ladder.ray_problem())
            )
            rungs = RungsOut(registry=problem, postgres=postgres or "ok", ray=ray_listing or "ok")
        return OverviewAnswer(
            service=self._service,
            rungs=rungs,
            epoch=await self._epoch_now(health.epoch if isinstance(health, Health) else None),
            registry=_registry_out(health) if isinstance(health, Health) else None,
            registry_problem=problem,
            as_of_registry=self._answered_at,
            **await self._count(health if isinstance(health, Health) else None),
        )

    async def _rungs_by(self, health: Health) -> RungsOut:
        """The registry knows how its database is; it answers, and so does Ray's table, or says why not."""
        registry = "ok"
        if health.fenced_by is not None:
            registry = f"superseded by the registry of term {health.fenced_by}: it only reads"
        elif not health.recovered:
            registry = "the registry is still recovering"
        return RungsOut(
            registry=registry,
            postgres=health.store_problem or "ok",
            ray=await _in_time(self._ladder.ray_problem()) or "ok",
        )

    async def _count(self, health: Health | None) -> dict[str, Any]:
        """Who there is, by the best source there is, and what that is worth."""
        view = self._ladder.view()
        if view is not None:
            return _counted(self._counts_of(view), Source.SNAPSHOT, view.as_of, view.version, is_complete=True)
        if health is not None:
            statuses = dict(health.instances)
            return _counted_so(statuses, Source.REGISTRY, health.as_of, complete=health.is_ready)
        last = self._ladder.last_view()
        if last is not None:
            return _counted(self._counts_of(last), Source.SNAPSHOT, last.as_of, last.version, is_complete=False)
        names = await self._ladder.count_names()
        return {**_counted_so({}, Source.RAY, utc_now(), complete=False), "instances": names}

    def _counts_of(self, view: LiveView) -> FleetCounts:
        # counting a hundred thousand takes its time, and most of the time nothing has changed
        key = (view.stream, view.version)
        if self._counted is None or self._counted[0] != key:
            self._counted = key, view.counts()
        return self._counted[1]

    async def _epoch_now(self, name: str | None) -> EpochOut | None:
        if name is None or (self._epoch is not None and self._epoch.name == name):
            return self._epoch
        try:
            epoch = (await self._ladder.epoch()).value
        except RegistryError:
            return self._epoch
        self._epoch = EpochOut(name=epoch.name, number=epoch.number)
        return self._epoch


async def _in_time(question: Awaitable[Any]) -> Any:
    try:
        return await within(question, _PATIENCE_S)
    except asyncio.TimeoutError:
        return f"no answer within {_PATIENCE_S:g} s"


def _counted(
    counts: FleetCounts, source: Source, as_of: datetime | None, version: int, *, is_complete: bool
) -> dict[str, Any]:
    organs = Counter({organ or "": count for organ, count in counts.organs.items()})
    return {
        "source": source.value,
        "as_of": as_of if as_of is not None else utc_now(),
        "version": version,
        "complete": is_complete,
        "instances": sum(counts.statuses.values()),
        "by_status": {status.value: count for status, count in counts.statuses.items()},
        "by_verdict": {verdict.value: count for verdict, count in counts.verdicts.items()},
        "by_organ": dict(organs.most_common(MAX_ORGANS)),
    }


def _counted_so(statuses: Mapping[str, int], source: Source, as_of: datetime, *, complete: bool) -> dict[str, Any]:
    return {
        "source": source.value,
        "as_of": as_of,
        "version": 0,
        "complete": complete,
        "instances": sum(statuses.values()),
        "by_status": statuses,
        "by_verdict": {},
        "by_organ": {},
    }


def _registry_out(health: Health) -> RegistryOut:
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
        beats_per_s=health.beats_a_s,
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
    )
