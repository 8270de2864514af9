"""The two sources of live agents: the followed cache in this process, and the registry actor itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime

from seedcore.core.answers import Answer, InstanceFilter, Listing, Origin, Resolution
from seedcore.core.clock import Clock
from seedcore.core.errors import FencedError, RegistryUnavailableError
from seedcore.core.instances import Epoch, Instance, Transition, Verdict
from seedcore.core.limits import MAX_PAGE, NOTHING
from seedcore.core.paging import decode_cursor, encode_cursor
from seedcore.core.selection import Policy
from seedcore.core.view import LiveView
from seedcore.registry.caller.sources import Choice, NoAnswerError, asked
from seedcore.registry.following.follower import Follower
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.protocol.messages import Description, Health


class SnapshotSource:
    """The followed cache (LiveView). It answers from memory while the registry confirms it, and only what it knows: it
    raises NoAnswerError for an agent without a routable instance, because the registry knows why."""

    origin = Origin.SNAPSHOT

    def __init__(self, follower: Follower, clock: Clock | None = None) -> None:
        self.follower = follower
        self._clock = clock if clock is not None else Clock()

    def view(self) -> LiveView | None:
        """The cache while it is current. Starts the follower."""
        self.follower.start()
        return self.follower.view if self.follower.is_readable_here else None

    async def problem(self) -> str | None:
        return None if self.view() is not None else "the cache is not confirmed by the registry now"

    async def resolve(self, logical_ids: Sequence[str], choice: Choice) -> Answer[list[Resolution]]:
        view = self._current_view()
        if view.is_part:
            # many at once are the registry's
            is_known = len(logical_ids) == 1 and await self.follower.learn(logical_ids[0])
            view = self._current_view()
            if not is_known or not view.has(logical_ids[0]):
                raise NoAnswerError("the cache does not have all agents")
        if choice.policy is Policy.LEAST_LOADED:
            self.follower.want_loads()
            if view.loads is None:
                raise NoAnswerError("the cache has not received the loads yet")
        found = []
        for logical_id in logical_ids:
            candidates = view.candidates(logical_id, allow_late=choice.allow_late)
            chosen = choice.of(candidates, NOTHING if view.loads is None else view.loads)
            if chosen is None:
                raise NoAnswerError(f"the cache has no routable instance of {logical_id!r}")
            found.append(Resolution(logical_id, chosen, verdict=view.verdict(chosen.instance_id)))
        return Answer(found, Origin.SNAPSHOT, self._as_of(view), view.version, complete=True)

    async def page(self, wanted: InstanceFilter, limit: int, cursor: str | None) -> Listing:
        view = self._current_view()
        if not view.knows(wanted):
            raise NoAnswerError("the cache has only live instances of the current epoch, and perhaps not all of them")
        rows, has_more = view.page(wanted, decode_cursor(cursor), limit)
        return Listing(
            items=tuple(rows),
            source=Origin.SNAPSHOT,
            as_of=self._as_of(view),
            version=view.version,
            complete=True,
            next_cursor=encode_cursor(rows[-1]) if has_more else None,
            stream=view.stream,
            verdicts={row.instance_id: view.verdict(row.instance_id) for row in rows},
        )

    def _current_view(self) -> LiveView:
        view = self.view()
        if view is None:
            raise NoAnswerError("the cache is not confirmed by the registry now")
        return view

    def _as_of(self, view: LiveView) -> datetime:
        return view.as_of if view.as_of is not None else self._clock.utc()


class RegistrySource:
    """The registry actor. `slots` bounds the answers that are held at once."""

    origin = Origin.REGISTRY

    def __init__(
        self, connection: RegistryConnection, slots: asyncio.Semaphore | None = None, clock: Clock | None = None
    ) -> None:
        self._connection = connection
        self._slots = slots
        self._clock = clock if clock is not None else Clock()

    async def health(self) -> Health | str:
        """The registry's own report, or why there is none."""
        try:
            return await self._connection.health()
        except RegistryUnavailableError as error:
            return str(error)

    async def problem(self) -> str | None:
        return registry_problem(await self.health())

    async def resolve(self, logical_ids: Sequence[str], choice: Choice) -> Answer[list[Resolution]]:
        async with asked(self._slots):
            if choice.policy is not Policy.NEWEST and len(logical_ids) == 1:
                chosen = await self._by_policy(logical_ids[0], choice)
                if chosen is not None:
                    return chosen
            return await self._connection.resolve(logical_ids, allow_late=choice.allow_late)

    async def _by_policy(self, logical_id: str, choice: Choice) -> Answer[list[Resolution]] | None:
        """One of all the instances that the registry lists; None if none of them is routable."""
        listing = await self._connection.list_active(logical_id=logical_id, limit=MAX_PAGE)
        for verdict in (Verdict.FRESH, Verdict.LATE) if choice.allow_late else (Verdict.FRESH,):
            rows = [row for row in listing if listing.verdicts.get(row.instance_id, Verdict.FRESH) is verdict]
            chosen = choice.of(rows, listing.loads)
            if chosen is not None:
                found = [Resolution(logical_id, chosen, verdict=verdict)]
                return Answer(found, listing.source, listing.as_of, listing.version, listing.complete)
        return None

    async def page(self, wanted: InstanceFilter, limit: int, cursor: str | None) -> Listing:
        async with asked(self._slots):
            return await self._connection.page(wanted, limit, cursor)

    async def describe(self, logical_id: str) -> Description:
        async with asked(self._slots):
            described = await self._connection.describe(logical_id)
        if not described.complete and not described.live:
            raise NoAnswerError("the registry cannot read the database")
        return described

    async def transitions(self, logical_id: str, limit: int) -> Answer[list[Transition]]:
        async with asked(self._slots):
            found = await self._connection.transitions(logical_id, limit)
        return Answer(found, Origin.REGISTRY, self._clock.utc(), 0, complete=True)

    async def deaths(self, limit: int, cursor: str | None, within_s: float | None) -> Listing:
        async with asked(self._slots):
            return await self._connection.deaths(limit, cursor, within_s)

    async def instance(self, instance_id: str) -> Answer[Instance]:
        async with asked(self._slots):
            return await self._connection.get_instance(instance_id)

    async def epoch(self) -> Answer[Epoch]:
        async with asked(self._slots):
            return await self._connection.current_epoch()

    async def report_gone(self, instance: Instance) -> None:
        try:
            await self._connection.report_dead_call(instance.instance_id)
        except (RegistryUnavailableError, FencedError):
            # the death is found without this report too, only later
            return


def registry_problem(health: Health | str) -> str | None:
    """Why the registry cannot answer completely according to its report, or to the lack of one; None if it can."""
    if isinstance(health, str):
        return health
    if health.fenced_by is not None:
        return f"superseded by the registry of term {health.fenced_by}: it only reads"
    if not health.recovered:
        return "the registry is still recovering"
    return None if health.epoch_problem is None else f"it resolves no agent: {health.epoch_problem}"
