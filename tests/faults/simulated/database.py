"""Owns the database as its clients reach it: the memory store behind a network that loses calls before or after the
commit, or lets one be carried out long after its client has given up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from seedcore.core.answers import Listing, OutcomeKind
from seedcore.core.errors import FencedError, StoreRejectedError, StoreUnavailableError
from seedcore.core.instances import Instance
from seedcore.core.lifecycle import Status
from seedcore.core.ports import CommitsLostError
from seedcore.store.memory import MemoryStore
from tests.faults.simulated.world import World
from tests.local import is_unstorable

if TYPE_CHECKING:
    from tests.faults.simulated.registries import Office

_WRITES = frozenset(
    {"begin", "register_many", "set_status_many", "hold_many", "beat_many", "expire_old_epochs"}
    | {"set_current_epoch", "stage_epoch"}
)


class SimReader:
    """The database for a caller, which only reads (core.ports.InstanceReader)."""

    def __init__(self, world: World, note: Callable[[Instance], None] = lambda _: None) -> None:
        """`note` is called with each instance that a caller may choose from."""
        self._world = world
        self._note = note
        self._inner = MemoryStore(world.utc, world.tables)

    async def open(self) -> None:
        await self._travel()

    async def close(self) -> None:
        """Nothing to release."""

    def __getattr__(self, method: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            return await self._call(method, *args, **kwargs)

        return call

    async def _travel(self) -> None:
        world = self._world
        await asyncio.sleep(world.random.uniform(0.001, 0.03))
        if world.database_back_s > world.now_s:
            await asyncio.sleep(world.random.uniform(0.0, 0.3))
            raise StoreUnavailableError("simulated: the database is away")

    async def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        await self._travel()
        result = await getattr(self._inner, method)(*args, **kwargs)
        if method == "best_instances":
            for row in result.value.values():
                self._note(row)
        if isinstance(result, Listing):
            for row in result:
                self._note(row)
        await self._travel()
        return result


class SimStore(SimReader):
    """The database for a registry, in an order that a database with several connections may take."""

    def __init__(self, world: World, office: Office) -> None:
        super().__init__(world)
        self._office = office
        self._answered_commits = 0
        self._answered_term: int | None = None

    @property
    def commits(self) -> int:
        return self._inner.commits

    @property
    def database_id(self) -> str | None:
        return self._inner.database_id

    @property
    def found_commits(self) -> int:
        return self._inner.found_commits

    @property
    def found_own(self) -> bool:
        return self._inner.found_own

    @property
    def term(self) -> int | None:
        return self._inner.term

    @property
    def lease_before_s(self) -> float | None:
        return self._inner.lease_before_s

    async def load_live(self) -> AsyncIterator[Instance]:
        await self._travel()
        async for row in self._inner.load_live():
            yield row

    async def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        world, losses = self._world, self._world.losses.count
        await self._travel()
        if world.losses.count != losses:
            raise StoreUnavailableError("simulated: the server that was asked has ended")
        if world.happens(world.database_lost_share):
            fate = world.random.choice(["before", "after", "later"])
            if fate == "after":
                await self._apply(method, *args, **kwargs)
                self._forget_unanswered()
            if fate == "later" and method not in {"begin", "set_current_epoch"}:
                # the server goes on with what its client has given up
                delay_s = world.random.uniform(0.05, 4.0)
                world.loop.run_in("database", self._apply_later(delay_s, method, *args, **kwargs))
            raise StoreUnavailableError(f"simulated: connection lost ({fate})")
        result = await self._apply(method, *args, **kwargs)
        commits, term, applied_s = self._inner.commits, self._inner.term, world.now_s
        self._forget_unanswered()
        await self._travel()
        if method == "begin":
            self._answered_term = self._inner._term = term
        if commits > self._answered_commits:
            self._answered_commits = self._inner._commits = commits
            self._office.wrote_s = applied_s
        return result

    def _forget_unanswered(self) -> None:
        """Only an answer tells a store its term and the number of its commit."""
        self._inner._commits, self._inner._term = self._answered_commits, self._answered_term

    async def _apply_later(self, delay_s: float, method: str, *args: Any, **kwargs: Any) -> None:
        losses = self._world.losses.count
        term, commits = self._answered_term, self._answered_commits
        await asyncio.sleep(delay_s)
        if losses != self._world.losses.count:
            return
        # it has the term and the number that its client had when it sent it
        self._inner._term, self._inner._commits = term, commits
        try:
            with contextlib.suppress(FencedError, StoreRejectedError, CommitsLostError):
                await self._apply(method, *args, **kwargs)
        finally:
            self._forget_unanswered()

    async def _apply(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if method in {"set_status_many", "hold_many"} and any(map(is_unstorable, args[0])):
            self._world.counts["batches refused for a value"] += 1
            raise StoreRejectedError("simulated")
        # the memory store never yields, so this is one transaction
        result = await getattr(self._inner, method)(*args, **kwargs)
        if method == "begin":
            self._office.must_join = False
            self._office.joins_s = self._world.now_s
        elif method in _WRITES:
            self._world.losses.check_write(self._office)
        if method == "set_status_many":
            for change, outcome in zip(args[0], result, strict=True):
                if change.status is Status.DEAD and outcome.kind is OutcomeKind.APPLIED:
                    self._office.buried.add(change.instance_id)
        if method in _WRITES:
            self._office.laws.check_writer(self._office, self._inner.term)
        return result
