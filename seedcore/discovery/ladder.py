"""Who is asked, in which order: the registry actor, PostgreSQL while that is away, Ray's listing while both are.

A plain class; `app.py` puts it behind Serve. Every answer says which rung gave it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial

from seedcore.core.answers import Answer, InstanceFilter, Listing, Origin, Receipt, Resolution
from seedcore.core.clock import utc_now
from seedcore.core.errors import (
    ActorGoneError,
    CannotKnowError,
    DirectoryUnavailableError,
    InvalidInputError,
    NotResolvableError,
    RegistryError,
    RegistryUnavailableError,
    StoreUnavailableError,
    UnknownInstanceError,
)
from seedcore.core.feed import Feed
from seedcore.core.instances import Epoch, Instance, Transition, Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_PAGE, check_instance_id, operators_cause
from seedcore.core.paging import check_limit, decode_cursor, encode_cursor, encode_name_cursor
from seedcore.core.ports import ActorDirectory, InstanceReader
from seedcore.core.selection import best
from seedcore.core.view import LiveView
from seedcore.registry.caller.follower import Follower
from seedcore.registry.caller.handles import HandleFinder
from seedcore.registry.caller.metrics import CallerMetrics
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.protocol.messages import HISTORY_LIMIT, STEPS_LIMIT, Description, Health
from seedcore.registry.ray_support.lookup import ActorHandle

logger = logging.getLogger(__name__)

PAGES_AT_ONCE = 8
"""How many answers of the registry or the database are held while they are made smaller: each may have MAX_PAGE
instances, of which one may have MAX_METADATA_BYTES and as much again in labels."""

ReaderFactory = Callable[[], Awaitable[InstanceReader]]


@dataclass(frozen=True, slots=True)
class NameListing:
    """Ray's bare listing: names that are alive or about to be, and nothing else."""

    names: tuple[str, ...]
    as_of: datetime
    next_cursor: str | None
    source: Origin = Origin.RAY
    version: int = 0
    complete: bool = False


@dataclass(frozen=True, slots=True)
class RungState:
    """Whether a rung of the ladder answers now; None is no problem."""

    registry: str | None
    postgres: str | None
    ray: str | None

    @property
    def is_ready(self) -> bool:
        """Whether anything can be answered."""
        return None in (self.registry, self.postgres, self.ray)


class DiscoveryLadder:
    """Reads, and passes on what operators change. Use from one event loop. Waits are bounded by those of the rungs."""

    def __init__(
        self,
        connection: RegistryConnection,
        reader_factory: ReaderFactory,
        directory: ActorDirectory,
        finder: HandleFinder,
        follower: Follower | None = None,
        metrics: CallerMetrics | None = None,
    ) -> None:
        """With a `follower`, what that knows is answered from its copy. `metrics` count resolutions."""
        self._metrics = metrics if metrics is not None else CallerMetrics("discovery")
        self._connection = connection
        self._follower = follower
        self._reader_factory = reader_factory
        self._directory = directory
        self._finder = finder
        self._reader: InstanceReader | None = None
        self._opening = asyncio.Lock()
        self._paging = asyncio.Semaphore(PAGES_AT_ONCE)

    async def close(self) -> None:
        """Follow no more, and release the reader's connections."""
        if self._follower is not None:
            await self._follower.stop()
        if self._reader is not None:
            await self._reader.close()

    @property
    def feed(self) -> Feed | None:
        """The copy of the registry's feed, as far as it was told; None where none is followed."""
        if self._follower is None:
            return None
        self._follower.start()
        return self._follower.feed

    def is_unchanged(self, stream: str, version: int, wanted: InstanceFilter) -> bool:
        """Whether nothing that is wanted has changed after a version of a stream, as far as is remembered."""
        feed = self.feed
        if feed is None:
            return False
        batch = feed.since(stream, version, wanted)
        return not batch.is_reset and not batch.changes

    @property
    def is_current(self) -> bool:
        """Whether the registry confirms the copy of its memory now."""
        return self._follower is not None and self._follower.is_current

    async def until_current(self, timeout_s: float) -> bool:
        """Wait for the copy to be up to date; whether it is within `timeout_s` seconds."""
        return self._follower is not None and await self._follower.until_current(timeout_s)

    def last_view(self) -> LiveView | None:
        """The copy of the registry's memory as it was last confirmed, however long ago; None where it never was."""
        view = None if self._follower is None else self._follower.view
        return view if view is not None and view.as_of is not None else None

    def view(self) -> LiveView | None:
        """The copy of the registry's memory, while it is up to date."""
        if self._follower is None:
            return None
        self._follower.start()
        return self._follower.view if self._follower.is_current else None

    async def list_instances(
        self, wanted: InstanceFilter, limit: int, cursor: str | None, *, consistent: bool = False
    ) -> Listing | NameListing:
        """A page of instances, or of mere names where only Ray's listing answers. `consistent` asks the registry
        itself, also for what the copy of its memory knows.

        Raises InvalidInputError, or CannotKnowError where no rung can answer the question asked.
        """
        wanted.validated()
        check_limit(limit)
        after = decode_cursor(cursor)
        view = None if consistent else self.view()
        if view is not None and view.knows(wanted):
            return _listing_of(view, wanted, after, limit)
        async with self._paging:
            return await self._list_elsewhere(wanted, limit, cursor)

    async def _list_elsewhere(self, wanted: InstanceFilter, limit: int, cursor: str | None) -> Listing | NameListing:
        incomplete: Listing | None = None
        problems: list[str] = []
        try:
            listing = await self._connection.page(wanted, limit, cursor)
            if listing.complete:
                return listing
            incomplete = listing
            problems.append("the registry is still recovering, or superseded")
        except (RegistryUnavailableError, StoreUnavailableError) as error:
            problems.append(str(error))
        if wanted.verdicts is not None:
            problems.append("the database does not listen to beats, and knows no verdicts")
        else:
            try:
                return await (await self._open_reader()).list_instances(wanted, limit, cursor)
            except StoreUnavailableError as error:
                problems.append(str(error))
        if incomplete is not None and incomplete.items:
            return incomplete
        if wanted != InstanceFilter(logical_id=wanted.logical_id, fresh_only=wanted.fresh_only):
            problems.append("and Ray's listing knows names alone: no status, organ, node, labels, epoch or verdict")
            raise CannotKnowError("*", "; ".join(problems))
        try:
            return await self._list_names(wanted.logical_id, limit, cursor)
        except DirectoryUnavailableError as error:
            raise CannotKnowError("*", "; ".join([*problems, str(error)])) from error

    async def resolve(self, logical_ids: Sequence[str], *, allow_late: bool = False) -> Answer[list[Resolution]]:
        """The best instance of each agent, or why there is none. `complete` False: none may mean unknown.
        `allow_late` takes one that has missed a beat where nobody is fresh.

        Raises InvalidInputError, or CannotKnowError where neither registry nor database answers.
        """
        answer = await self._resolve(logical_ids, allow_late=allow_late)
        self._metrics.resolved[answer.source.value] += len(answer.value)
        return answer

    async def _resolve(self, logical_ids: Sequence[str], *, allow_late: bool) -> Answer[list[Resolution]]:
        view = self.view()
        if view is not None:
            found_all = _resolved_in(view, logical_ids, allow_late)
            if found_all is not None:
                return found_all
        async with self._paging:
            return await self._resolve_elsewhere(logical_ids, allow_late=allow_late)

    async def _resolve_elsewhere(self, logical_ids: Sequence[str], *, allow_late: bool) -> Answer[list[Resolution]]:
        incomplete: Answer[list[Resolution]] | None = None
        try:
            answer = await self._connection.resolve(logical_ids, allow_late=allow_late)
            if answer.complete:
                return answer
            incomplete = answer
        except RegistryUnavailableError as error:
            logger.info("resolving without the registry: %s", error)
        try:
            found = await (await self._open_reader()).best_instances(logical_ids)
        except StoreUnavailableError as error:
            if incomplete is not None:
                return replace(incomplete, value=[_in_doubt(resolution) for resolution in incomplete.value])
            raise CannotKnowError(", ".join(logical_ids[:3]), str(error)) from error
        resolutions = [
            Resolution(
                logical_id,
                found.value.get(logical_id),
                None if logical_id in found.value else "the database has no active instance of it",
                is_known=logical_id in found.value,
            )
            for logical_id in logical_ids
        ]
        return Answer(resolutions, found.source, found.as_of, found.version, found.complete)

    async def names_among(self, logical_ids: Sequence[str]) -> NameListing:
        """Those of the agents that Ray's listing has an actor for. Raises CannotKnowError."""
        try:
            names = set(await self._directory.names())
        except DirectoryUnavailableError as error:
            raise CannotKnowError(", ".join(logical_ids[:3]), str(error)) from error
        return NameListing(tuple(name for name in logical_ids if name in names), utc_now(), None)

    async def handle_of(self, logical_id: str) -> ActorHandle:
        """A live, proven handle. Raises NotResolvableError or CannotKnowError."""
        try:
            return await self._handle_of(logical_id)
        except ActorGoneError:
            # it died since it was last heard: a newer incarnation may be there, or the reason why none is
            return await self._handle_of(logical_id)

    async def _handle_of(self, logical_id: str) -> ActorHandle:
        try:
            answer = await self.resolve([logical_id], allow_late=True)
        except CannotKnowError as error:
            return await self._handle_by_name(logical_id, error.why)
        found = answer.value[0]
        if found.instance is not None:
            return await self._finder.of_instance(
                found.instance,
                is_vouched=found.verdict is not Verdict.LATE,
                is_registered=partial(self._is_registered, found.instance),
            )
        if answer.complete:
            raise NotResolvableError(logical_id, found.why or "unknown")
        return await self._handle_by_name(logical_id, found.why or "unknown")

    async def _is_registered(self, instance: Instance) -> bool:
        """Whether it is still the one that would be resolved."""
        found = (await self._resolve([instance.logical_id], allow_late=True)).value[0].instance
        return found is not None and found.instance_id == instance.instance_id

    async def handles_of(self, logical_ids: Sequence[str]) -> dict[str, ActorHandle | str]:
        """A proven handle for each agent, or the reason why there is none.

        Raises InvalidInputError for more than MAX_PAGE at once.
        """
        if len(logical_ids) > MAX_PAGE:
            raise InvalidInputError("logical_ids", f"must be at most {MAX_PAGE} ids, not {len(logical_ids)}")
        outcomes = await asyncio.gather(*(self._handle_or_reason(logical_id) for logical_id in logical_ids))
        return dict(zip(logical_ids, outcomes, strict=True))

    async def describe(self, logical_id: str) -> Description:
        """One agent with its history. Raises InvalidInputError or CannotKnowError."""
        try:
            described = await self._connection.describe(logical_id)
            if described.complete or described.live:
                return described
            problem = "the registry cannot read the database"
        except RegistryUnavailableError as error:
            problem = str(error)
        try:
            reader = await self._open_reader()
            history = await reader.history(logical_id, HISTORY_LIMIT)
            steps = await reader.transitions(logical_id, STEPS_LIMIT)
        except StoreUnavailableError as error:
            raise CannotKnowError(logical_id, f"{problem}; {error}") from error
        return Description(
            logical_id, (), tuple(history), Origin.POSTGRES, utc_now(), 0, complete=True, steps=tuple(steps)
        )

    async def transitions(self, logical_id: str, limit: int) -> Answer[list[Transition]]:
        """The newest steps of an agent's instances. Raises InvalidInputError or CannotKnowError."""
        try:
            steps, source = await self._connection.transitions(logical_id, limit), Origin.REGISTRY
        except (RegistryUnavailableError, StoreUnavailableError) as error:
            try:
                steps, source = await (await self._open_reader()).transitions(logical_id, limit), Origin.POSTGRES
            except StoreUnavailableError as own:
                raise CannotKnowError(logical_id, f"{error}; {own}") from own
        return Answer(steps, source, utc_now(), 0, complete=True)

    async def deaths(self, limit: int, cursor: str | None = None, within_s: float | None = None) -> Listing:
        """Dead instances, the last first. Raises InvalidInputError or CannotKnowError."""
        async with self._paging:
            try:
                return await self._connection.deaths(limit, cursor, within_s)
            except (RegistryUnavailableError, StoreUnavailableError) as error:
                try:
                    return await (await self._open_reader()).deaths(limit, cursor, within_s)
                except StoreUnavailableError as own:
                    raise CannotKnowError("*", f"{error}; {own}") from own

    async def instance(self, instance_id: str) -> Answer[Instance]:
        """One instance, dead or alive. Raises UnknownInstanceError, InvalidInputError or CannotKnowError."""
        check_instance_id(instance_id)
        try:
            return await self._connection.get_instance(instance_id)
        except (RegistryUnavailableError, StoreUnavailableError) as error:
            problem = str(error)
        try:
            found = await (await self._open_reader()).get_instance(instance_id)
        except StoreUnavailableError as error:
            raise CannotKnowError(instance_id, f"{problem}; {error}") from error
        if found is None:
            raise UnknownInstanceError(instance_id)
        return Answer(found, Origin.POSTGRES, utc_now(), 0, complete=True)

    async def epoch(self) -> Answer[Epoch]:
        """The current epoch. Raises CannotKnowError."""
        try:
            return await self._connection.current_epoch()
        except (RegistryUnavailableError, StoreUnavailableError) as error:
            problem = str(error)
        try:
            found = await (await self._open_reader()).current_epoch()
        except StoreUnavailableError as error:
            raise CannotKnowError("*", f"{problem}; {error}") from error
        return Answer(found, Origin.POSTGRES, utc_now(), 0, complete=True)

    async def turn_agent(
        self,
        logical_id: str,
        status: Status,
        reason: str | None,
        duration_s: float | None = None,
        who: str | None = None,
    ) -> dict[str, Receipt | RegistryError]:
        """An operator's change of an agent, for a reason. Raises as Registry.turn_agent, RegistryUnavailableError."""
        return await self._connection.turn_agent(
            logical_id, status, operators_cause(reason, who), duration_s=duration_s
        )

    async def turn_instance(
        self, instance_id: str, status: Status, reason: str | None, who: str | None = None
    ) -> Receipt:
        """An operator's change of one instance, for a reason. Raises as Registry.set_status."""
        return await self._connection.set_status(instance_id, status, cause=operators_cause(reason, who))

    async def registry_health(self) -> Health | str:
        """The registry's own report, or why there is none."""
        try:
            return await self._connection.health()
        except RegistryUnavailableError as error:
            return str(error)

    async def rungs(self) -> RungState:
        """Which rungs answer now."""

        async def registry() -> str | None:
            return registry_problem(await self.registry_health())

        return RungState(*await asyncio.gather(registry(), self.postgres_problem(), self.ray_problem()))

    async def postgres_problem(self) -> str | None:
        """Why the database cannot be read now, or None."""
        try:
            await (await self._open_reader()).current_epoch()
        except StoreUnavailableError as error:
            return str(error)
        return None

    async def ray_problem(self) -> str | None:
        """Why Ray's listing cannot be read now, or None."""
        try:
            await self._directory.names()
        except DirectoryUnavailableError as error:
            return str(error)
        return None

    async def count_names(self) -> int:
        """How many agents' actors Ray lists. Raises CannotKnowError."""
        try:
            return len(await self._directory.names())
        except DirectoryUnavailableError as error:
            raise CannotKnowError("*", str(error)) from error

    async def _open_reader(self) -> InstanceReader:
        async with self._opening:
            if self._reader is None:
                self._reader = await self._reader_factory()
            return self._reader

    async def _list_names(self, logical_id: str | None, limit: int, cursor: str | None) -> NameListing:
        after = decode_cursor(cursor)[0]
        names = [
            name
            for name in await self._directory.names()
            if name > after and (logical_id is None or name == logical_id)
        ]
        page = tuple(names[:limit])
        return NameListing(page, utc_now(), encode_name_cursor(page[-1]) if len(names) > limit else None)

    async def _handle_by_name(self, logical_id: str, why: str) -> ActorHandle:
        try:
            return await self._finder.of_name(logical_id)
        except NotResolvableError as error:
            raise CannotKnowError(logical_id, f"{why}; and {error.why}") from error

    async def _handle_or_reason(self, logical_id: str) -> ActorHandle | str:
        try:
            return await self.handle_of(logical_id)
        except (NotResolvableError, CannotKnowError) as error:
            return str(error)


def registry_problem(health: Health | str) -> str | None:
    """What is wrong with the registry by its report, or by there being none; None where nothing is."""
    if isinstance(health, str):
        return health
    if health.fenced_by is not None:
        return f"superseded by the registry of term {health.fenced_by}: it only reads"
    return None if health.recovered else "the registry is still recovering"


def _listing_of(view: LiveView, wanted: InstanceFilter, after: tuple[str, str], limit: int) -> Listing:
    rows, has_more = view.page(wanted, after, limit)
    return Listing(
        items=tuple(rows),
        source=Origin.SNAPSHOT,
        as_of=view.as_of if view.as_of is not None else utc_now(),
        version=view.version,
        complete=True,
        next_cursor=encode_cursor(rows[-1]) if has_more else None,
        stream=view.stream,
        verdicts={row.instance_id: view.verdict(row.instance_id) for row in rows},
    )


def _in_doubt(resolution: Resolution) -> Resolution:
    """What a registry that does not know everything yet says of whom it does not know."""
    if resolution.instance is not None or resolution.is_known:
        return resolution
    return replace(resolution, why="cannot know now: the registry is still recovering, and the database is away")


def _resolved_in(view: LiveView, logical_ids: Sequence[str], allow_late: bool) -> Answer[list[Resolution]] | None:
    """Everybody's best instance; None where anybody has none: the registry says why."""
    found = []
    for logical_id in logical_ids:
        chosen = best(view.candidates(logical_id, allow_late=allow_late))
        if chosen is None:
            return None
        verdict = view.verdict(chosen.instance_id)
        found.append(Resolution(logical_id, chosen, is_known=True, verdict=verdict))
    as_of = view.as_of if view.as_of is not None else utc_now()
    return Answer(found, Origin.SNAPSHOT, as_of, view.version, complete=True)
