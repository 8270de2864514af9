"""The two sources for while the registry is away: its database, and Ray's listing of named actors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from seedcore.core.answers import Answer, InstanceFilter, Listing, NotResolved, Origin, Resolution
from seedcore.core.clock import Clock
from seedcore.core.errors import UnknownInstanceError
from seedcore.core.instances import Epoch, Instance, Transition
from seedcore.core.limits import T
from seedcore.core.paging import decode_cursor, encode_name_cursor
from seedcore.core.ports import ActorDirectory, InstanceReader
from seedcore.registry.caller.sources import Choice, NameListing, NoAnswerError, asked
from seedcore.registry.protocol.messages import INSTANCES_LIMIT, TRANSITIONS_LIMIT, Description

ReaderFactory = Callable[[], Awaitable[InstanceReader]]


class PostgresSource:
    """The registry's database, read while the registry is away: records, and no verdicts. It always chooses the newest
    instance. Use it from one event loop."""

    origin = Origin.POSTGRES

    def __init__(
        self, reader_factory: ReaderFactory, slots: asyncio.Semaphore | None = None, clock: Clock | None = None
    ) -> None:
        self._reader_factory = reader_factory
        self._slots = slots
        self._clock = clock if clock is not None else Clock()
        self._reader: InstanceReader | None = None
        self._opening = asyncio.Lock()

    async def close(self) -> None:
        """Release the connections."""
        if self._reader is not None:
            await self._reader.close()

    async def problem(self) -> str | None:
        try:
            await self.epoch()
        except NoAnswerError as error:
            return error.why
        return None

    async def resolve(self, logical_ids: Sequence[str], choice: Choice) -> Answer[list[Resolution]]:
        async with self._read() as reader:
            found = await reader.best_instances(logical_ids)
        return Answer(
            [_in_the_database(logical_id, found.value.get(logical_id)) for logical_id in logical_ids],
            found.source,
            found.as_of,
            found.version,
            found.complete,
        )

    async def page(self, wanted: InstanceFilter, limit: int, cursor: str | None) -> Listing:
        if wanted.verdicts is not None:
            raise NoAnswerError("the database has no verdicts: only a registry compares beats with the time")
        async with self._read() as reader:
            return await reader.list_instances(wanted, limit, cursor)

    async def describe(self, logical_id: str) -> Description:
        async with self._read() as reader:
            instances, transitions = await reader.history(logical_id, INSTANCES_LIMIT, TRANSITIONS_LIMIT)
        return Description(
            logical_id,
            (),
            tuple(instances),
            Origin.POSTGRES,
            self._clock.utc(),
            0,
            complete=True,
            transitions=tuple(transitions),
        )

    async def transitions(self, logical_id: str, limit: int) -> Answer[list[Transition]]:
        async with self._read() as reader:
            return self._recorded(await reader.transitions(logical_id, limit))

    async def deaths(self, limit: int, cursor: str | None, within_s: float | None) -> Listing:
        async with self._read() as reader:
            return await reader.deaths(limit, cursor, within_s)

    async def instance(self, instance_id: str) -> Answer[Instance]:
        async with self._read() as reader:
            found = await reader.get_instance(instance_id)
        if found is None:
            raise UnknownInstanceError(instance_id)
        return self._recorded(found)

    async def epoch(self) -> Answer[Epoch]:
        async with self._read() as reader:
            return self._recorded(await reader.current_epoch())

    async def report_gone(self, instance: Instance) -> None:
        """Nothing: the registry alone accepts reports."""

    def _recorded(self, value: T) -> Answer[T]:
        return Answer(value, Origin.POSTGRES, self._clock.utc(), 0, complete=True)

    @asynccontextmanager
    async def _read(self) -> AsyncIterator[InstanceReader]:
        async with asked(self._slots):
            async with self._opening:
                if self._reader is None:
                    self._reader = await self._reader_factory()
            yield self._reader


class RayListing:
    """Ray's listing of named actors: names without state. An agent's actor is named like its logical id."""

    origin = Origin.RAY

    def __init__(self, directory: ActorDirectory, clock: Clock | None = None) -> None:
        self._directory = directory
        self._clock = clock if clock is not None else Clock()

    async def names(self) -> Sequence[str]:
        """The names of all agents' actors, sorted."""
        async with asked(None):
            return await self._directory.names()

    async def problem(self) -> str | None:
        try:
            await self.names()
        except NoAnswerError as error:
            return error.why
        return None

    async def resolve(self, logical_ids: Sequence[str], choice: Choice) -> NameListing:
        listed = set(await self.names())
        return NameListing(tuple(name for name in logical_ids if name in listed), self._clock.utc(), None)

    async def page(self, wanted: InstanceFilter, limit: int, cursor: str | None) -> NameListing:
        if wanted != InstanceFilter(logical_id=wanted.logical_id, fresh_only=wanted.fresh_only):
            raise NoAnswerError("Ray's listing has names only: no status, organ, node, labels, epoch or verdict")
        after = decode_cursor(cursor)[0]
        names = [
            name
            for name in await self.names()
            if name > after and (wanted.logical_id is None or name == wanted.logical_id)
        ]
        page = tuple(names[:limit])
        return NameListing(page, self._clock.utc(), encode_name_cursor(page[-1]) if len(names) > limit else None)


def _in_the_database(logical_id: str, instance: Instance | None) -> Resolution:
    if instance is not None:
        return Resolution(logical_id, instance)
    detail = "the database has no active instance of it"
    return Resolution(logical_id, None, NotResolved.NOT_REGISTERED, detail)
