"""What a replica answers, and from which source. It reads, and passes on the changes of operators.

A plain class; `app.py` puts it behind Serve. The ladder of sources itself is `registry.caller.resolver`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from seedcore.composition import store_recipe
from seedcore.core.answers import Answer, InstanceFilter, Listing, NotResolved, Origin
from seedcore.core.errors import (
    CannotKnowError,
    ForbiddenTransitionError,
    InvalidInputError,
    NotResolvableError,
    StoreUnavailableError,
)
from seedcore.core.feed import Feed
from seedcore.core.instances import Epoch, Instance, Transition
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_PAGE, check_instance_id, check_key
from seedcore.core.paging import check_limit, decode_cursor
from seedcore.core.ports import ActorDirectory, InstanceReader
from seedcore.core.view import LiveView
from seedcore.discovery.rendered import RenderedInstances
from seedcore.registry.caller.fallback_sources import PostgresSource, RayListing, ReaderFactory
from seedcore.registry.caller.handle_cache import HandleCache
from seedcore.registry.caller.handles import HandleFinder
from seedcore.registry.caller.live_sources import RegistrySource, SnapshotSource
from seedcore.registry.caller.locator import Locator
from seedcore.registry.caller.metrics import CallerMetrics
from seedcore.registry.caller.resolver import Resolver
from seedcore.registry.caller.sources import Choice, Listed, NameListing, Resolved
from seedcore.registry.following.follower import Follower
from seedcore.registry.following.nearby import Nearby
from seedcore.registry.protocol.connection import NoRegistry, RegistryConnection
from seedcore.registry.protocol.messages import Description, OperationResult
from seedcore.registry.ray_support.directory import RayDirectory
from seedcore.registry.ray_support.lookup import ActorHandle
from seedcore.settings import Mode, Settings

FEED_CAPACITY = 10_000

PAGES_AT_ONCE = 8
"""How many answers of the registry or the database are held at once: each may have MAX_PAGE instances, and an instance
MAX_METADATA_BYTES and as much again in labels."""


@dataclass(frozen=True, slots=True)
class SourceStates:
    """Why each source does not answer now; None for one that does."""

    registry: str | None
    postgres: str | None
    ray: str | None

    @property
    def is_ready(self) -> bool:
        """Whether any source answers."""
        return None in (self.registry, self.postgres, self.ray)


class DiscoveryReader:
    """Use from one event loop. Waits are bounded by those of the sources."""

    def __init__(
        self,
        connection: RegistryConnection,
        reader_factory: ReaderFactory,
        directory: ActorDirectory,
        finder: HandleFinder,
        metrics: CallerMetrics,
        *,
        follows: bool = True,
    ) -> None:
        """`follows`: keeps a local cache of the live agents, and answers from it what it knows."""
        self._connection = connection
        self._metrics = metrics
        slots = asyncio.Semaphore(PAGES_AT_ONCE)
        cache = HandleCache(finder.probe_timeout_s)
        self._cache = cache
        self.rendered = RenderedInstances()
        self.follower: Follower | None = None
        if follows:
            feed = Feed("", FEED_CAPACITY)
            self.follower = Follower(
                Nearby(connection), on_change=self._evict, on_reset=self._clear, feed=feed, export=metrics.export
            )
        self._snapshot = None if self.follower is None else SnapshotSource(self.follower)
        self.registry = RegistrySource(connection, slots)
        self.postgres = PostgresSource(reader_factory, slots)
        self.listing = RayListing(directory)
        self._resolver = Resolver(snapshot=self._snapshot, records=[self.registry, self.postgres], listing=self.listing)
        self._locator = Locator(self._resolver, finder, cache, metrics)

    async def close(self) -> None:
        """Stop following, and release the connections to the database."""
        if self.follower is not None:
            await self.follower.stop()
        await self._cache.close()
        await self.postgres.close()

    # The cache and its feed

    @property
    def feed(self) -> Feed | None:
        """The copy of the registry's feed; None if this replica follows no registry."""
        if self.follower is None:
            return None
        self.follower.start()
        return self.follower.feed

    def is_unchanged(self, stream: str, version: int, wanted: InstanceFilter) -> bool:
        """Whether no wanted instance has changed after a version of a stream, as far as the feed remembers."""
        feed = self.feed
        if feed is None:
            return False
        batch = feed.since(stream, version, wanted)
        return not batch.is_reset and not batch.changes

    @property
    def is_current(self) -> bool:
        """Whether the registry confirms the cache now."""
        return self.follower is not None and self.follower.is_current

    async def until_current(self, timeout_s: float) -> bool:
        """Wait until the cache is current. Returns whether it is within `timeout_s` seconds."""
        return self.follower is not None and await self.follower.until_current(timeout_s)

    def last_view(self) -> LiveView | None:
        """The cache as the registry last confirmed it, however long ago; None if it never did."""
        view = None if self.follower is None else self.follower.view
        return view if view is not None and view.as_of is not None else None

    def view(self) -> LiveView | None:
        """The cache while it is current."""
        return None if self._snapshot is None else self._snapshot.view()

    def _evict(self, logical_id: str) -> None:
        self._cache.evict(logical_id)
        self.rendered.forget(logical_id)

    def _clear(self) -> None:
        self._cache.clear()
        self.rendered.clear()

    # Agents

    async def list_instances(
        self, wanted: InstanceFilter, limit: int, cursor: str | None, *, consistent: bool = False
    ) -> Listed:
        """A page of instances, or of mere names if only Ray's listing answers. `consistent` asks the registry itself,
        also for what the cache knows.

        Raises InvalidInputError, or CannotKnowError if no source can answer this question.
        """
        wanted.validated()
        check_limit(limit)
        decode_cursor(cursor)
        return await self._resolver.page(wanted, limit, cursor, consistent=consistent)

    async def resolve(self, logical_ids: Sequence[str], *, allow_late: bool = False) -> Resolved:
        """The best instance of each agent, or why there is none; mere names if only Ray's listing answers.

        `complete` False: an agent without an instance may have one. `allow_late` takes an instance that missed one
        beat, if none is fresh. Raises InvalidInputError, or CannotKnowError if no source answers.
        """
        answer = await self._resolver.resolve(logical_ids, Choice(allow_late=allow_late))
        self._metrics.resolved[answer.source.value] += len(logical_ids)
        return answer

    async def require_resolved(self, logical_id: str, *, allow_late: bool = False) -> Resolved:
        """As `resolve`, for one agent that has an instance. Raises NotResolvableError, CannotKnowError or
        InvalidInputError."""
        check_key("logical_id", logical_id)
        answer = await self.resolve([logical_id], allow_late=allow_late)
        if isinstance(answer, NameListing):
            if logical_id not in answer.names:
                raise CannotKnowError(logical_id, "only Ray's listing answers, and it has no actor of that name")
            return answer
        [found] = answer.value
        if found.instance is None:
            detail = found.detail or "no live instance is registered"
            if found.reason is None:
                raise CannotKnowError(logical_id, detail)
            raise NotResolvableError(logical_id, found.reason, detail)
        return answer

    async def handle_of(self, logical_id: str) -> ActorHandle:
        """A live, proven handle. Raises NotResolvableError, CannotKnowError or InvalidInputError."""
        if self.is_current:
            handle = self._locator.cached(logical_id)
            if handle is not None:
                return handle
        return (await self._locator.locate(logical_id)).handle

    async def handles_of(self, logical_ids: Sequence[str]) -> dict[str, ActorHandle | str]:
        """A proven handle for each agent, or the reason why there is none.

        Raises InvalidInputError for more than MAX_PAGE at once.
        """
        if len(logical_ids) > MAX_PAGE:
            raise InvalidInputError("logical_ids", f"must be at most {MAX_PAGE} ids, not {len(logical_ids)}")
        outcomes = await asyncio.gather(*(self._handle_or_reason(logical_id) for logical_id in logical_ids))
        return dict(zip(logical_ids, outcomes, strict=True))

    async def _handle_or_reason(self, logical_id: str) -> ActorHandle | str:
        try:
            return await self.handle_of(logical_id)
        except (NotResolvableError, CannotKnowError) as error:
            return str(error)

    # Records

    async def describe(self, logical_id: str) -> Description:
        """One agent with its instances and transitions. Raises InvalidInputError or CannotKnowError."""
        return await self._resolver.recorded(logical_id, lambda source: source.describe(logical_id))

    async def require_registered(self, logical_id: str) -> Description:
        """As `describe`; NotResolvableError if no agent has registered under this id."""
        described = await self.describe(logical_id)
        if described.complete and not described.live and not described.instances:
            detail = "no agent has registered under this id"
            raise NotResolvableError(logical_id, NotResolved.NOT_REGISTERED, detail)
        return described

    async def transitions(self, logical_id: str, limit: int) -> Answer[list[Transition]]:
        """The newest transitions of an agent's instances. Raises NotResolvableError if there are none,
        InvalidInputError or CannotKnowError."""
        found = await self._resolver.recorded(logical_id, lambda source: source.transitions(logical_id, limit))
        if not found.value:
            detail = "there are no transitions of this agent"
            raise NotResolvableError(logical_id, NotResolved.NOT_REGISTERED, detail)
        return found

    async def deaths(self, limit: int, cursor: str | None = None, within_s: float | None = None) -> Listing:
        """Dead instances, the latest death first. Raises InvalidInputError or CannotKnowError."""
        return await self._resolver.recorded("*", lambda source: source.deaths(limit, cursor, within_s))

    async def instance(self, instance_id: str) -> Answer[Instance]:
        """One instance, dead or alive. Raises UnknownInstanceError, InvalidInputError or CannotKnowError."""
        check_instance_id(instance_id)
        return await self._resolver.recorded(instance_id, lambda source: source.instance(instance_id))

    async def epoch(self) -> Answer[Epoch]:
        """The current epoch. Raises CannotKnowError."""
        return await self._resolver.recorded("*", lambda source: source.epoch())

    # The changes of operators

    async def operate(
        self,
        status: Status,
        logical_id: str,
        reason: str | None,
        duration_s: float | None = None,
        by: str | None = None,
    ) -> list[OperationResult]:
        """Drain, undrain or deregister an agent. Raises as RegistryApi.drain, and the error where every instance
        refuses."""
        if status is Status.DRAINING:
            results = await self._connection.drain([logical_id], reason, by, duration_s)
        elif status is Status.ALIVE:
            results = await self._connection.undrain([logical_id], reason, by)
        else:
            results = await self._connection.deregister([logical_id], reason, by)
        if all(isinstance(result.error, (NotResolvableError, ForbiddenTransitionError)) for result in results):
            results[0].raise_if_refused()
        return results

    async def deregister_instance(self, instance_id: str, reason: str | None, by: str | None = None) -> OperationResult:
        """Declare one instance dead. Raises as RegistryApi.deregister, and the refusal."""
        [result] = await self._connection.deregister((), reason, by, instance_ids=[instance_id])
        return result.raise_if_refused()

    # The sources

    async def sources(self) -> SourceStates:
        """Which sources answer now."""
        problems = await self._resolver.problems()
        return SourceStates(problems[Origin.REGISTRY], problems[Origin.POSTGRES], problems[Origin.RAY])


def reader_of(settings: Settings, connection: RegistryConnection | None = None) -> DiscoveryReader:
    """The reader that the settings ask for. In mode ray only Ray's listing answers."""
    is_ray_only = settings.mode is Mode.RAY
    return DiscoveryReader(
        connection if connection is not None else connection_of(settings),
        _no_reader if is_ray_only else store_recipe(settings).reader,
        RayDirectory(settings.namespace, settings.call_timeout_s),
        HandleFinder(settings.namespace, settings.probe_timeout_s),
        CallerMetrics("discovery"),
        follows=settings.follow and not is_ray_only,
    )


def connection_of(settings: Settings) -> RegistryConnection:
    """A connection to the registry; one that never asks it in mode ray."""
    kind = NoRegistry if settings.mode is Mode.RAY else RegistryConnection
    return kind(settings.namespace, settings.call_timeout_s)


async def _no_reader() -> InstanceReader:
    raise StoreUnavailableError("the mode is ray")
