"""The ladder of sources: asks them in order, and returns the first complete answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from seedcore.core.answers import Answer, InstanceFilter, Listing, Origin, Resolution
from seedcore.core.errors import CannotKnowError
from seedcore.registry.caller.sources import Choice, Listed, NoAnswerError, RecordSource, Resolved, Source

S = TypeVar("S", bound=Source)
T = TypeVar("T")

_NEWEST = Choice()
_RECOVERING = "the registry is still recovering, or superseded"


class Resolver:
    """Answers from the best source that answers: the followed cache, then the registry, then its database, then Ray's
    listing, as far as the caller has them."""

    def __init__(
        self,
        *,
        snapshot: Source | None = None,
        records: Sequence[RecordSource] = (),
        listing: Source | None = None,
    ) -> None:
        """`snapshot` answers from memory, `records` know dead agents too, `listing` knows names only."""
        self.snapshot = snapshot
        self.records = tuple(records)
        self.listing = listing

    async def first(self, ask: Callable[[S], Awaitable[T]], sources: Sequence[S]) -> T:
        """The result of `ask` for the first source that answers. Raises NoAnswerError, with the problems of all of
        them, if none does."""
        problems: list[str] = []
        for source in sources:
            try:
                return await ask(source)
            except NoAnswerError as error:
                problems.append(error.why)
        raise NoAnswerError("; ".join(problems))

    async def recorded(self, about: str, ask: Callable[[RecordSource], Awaitable[T]]) -> T:
        """An answer of the first source with records. Raises CannotKnowError if none answers, and what `ask` raises."""
        try:
            return await self.first(ask, self.records)
        except NoAnswerError as error:
            raise CannotKnowError(about, error.why) from error

    async def resolve(self, logical_ids: Sequence[str], choice: Choice = _NEWEST) -> Resolved:
        """The chosen instance of each agent, or why there is none; mere names if only Ray's listing answers.

        An incomplete answer is returned if no other source with records answers. Raises InvalidInputError, or
        CannotKnowError if no source answers.
        """
        incomplete: list[Answer[list[Resolution]]] = []

        async def ask(source: Source) -> Resolved:
            if source is self.listing and incomplete:
                return replace(incomplete[0], value=[_in_doubt(found) for found in incomplete[0].value])
            answer = await source.resolve(logical_ids, choice)
            if isinstance(answer, Answer) and not answer.complete:
                incomplete.append(answer)
                raise NoAnswerError(_RECOVERING)
            return answer

        return await self._known(", ".join(logical_ids[:3]), ask, self._sources())

    async def page(self, wanted: InstanceFilter, limit: int, cursor: str | None, *, consistent: bool = False) -> Listed:
        """A page of instances, or of mere names if only Ray's listing answers. `consistent` does not use the cache.

        An incomplete page with instances is returned if no other source with records answers. Raises InvalidInputError,
        or CannotKnowError if no source can answer.
        """
        incomplete: list[Listing] = []

        async def ask(source: Source) -> Listed:
            if source is self.listing and incomplete and incomplete[0].items:
                return incomplete[0]
            found = await source.page(wanted, limit, cursor)
            if isinstance(found, Listing) and not found.complete:
                incomplete.append(found)
                raise NoAnswerError(_RECOVERING)
            return found

        return await self._known("*", ask, self._sources(with_snapshot=not consistent))

    async def problems(self) -> dict[Origin, str | None]:
        """Why each source cannot answer now; None for one that can."""
        sources = self._sources(with_snapshot=False)
        found = await asyncio.gather(*(source.problem() for source in sources))
        return {source.origin: problem for source, problem in zip(sources, found, strict=True)}

    async def _known(self, about: str, ask: Callable[[Source], Awaitable[T]], sources: Sequence[Source]) -> T:
        try:
            return await self.first(ask, sources)
        except NoAnswerError as error:
            raise CannotKnowError(about, error.why) from error

    def _sources(self, *, with_snapshot: bool = True) -> list[Source]:
        snapshot = [self.snapshot] if self.snapshot is not None and with_snapshot else []
        listing = [self.listing] if self.listing is not None else []
        return [*snapshot, *self.records, *listing]


def _in_doubt(resolution: Resolution) -> Resolution:
    """A resolution by a registry that does not know every agent yet."""
    if resolution.is_known:
        return resolution
    return replace(resolution, reason=None, detail="cannot know now: the registry is still recovering")
