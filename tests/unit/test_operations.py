"""What operators do to instances: holds in the registry's memory and in its database, also when either is behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from seedcore.core.answers import Outcome, Receipt
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import HoldChange
from seedcore.core.errors import StoreRejectedError
from seedcore.core.holds import HoldKind
from seedcore.core.instances import Instance, LiveState
from seedcore.core.lifecycle import Status
from seedcore.registry.server.config import RegistryConfig
from seedcore.store.memory import MemoryStore, Tables
from tests.builders import START, hold, holds, iid, joins
from tests.local import LocalRegistry
from tests.unit.registries import Away, joined_registry
from tests.unit.test_registry import Elapsed, NoWitness
from tests.waiting import eventually

CONFIG = RegistryConfig(
    "cluster",
    beat_interval_s=5.0,
    lease_s=15.0,
    flush_interval_s=0.01,
    linger_s=0.0,
    durable_wait_s=0.05,
    retry_max_s=0.05,
)


class World:
    """A database, and registries that start on it."""

    def __init__(self) -> None:
        self.elapsed = Elapsed()
        self.tables = Tables(self.elapsed.clock().utc())
        self.by_hand = MemoryStore(self.elapsed.clock().utc, self.tables)

    @asynccontextmanager
    async def registry(self, *, is_there: bool = True) -> AsyncIterator[tuple[LocalRegistry, Away]]:
        store = Away(self.elapsed.clock().utc, self.tables)
        store.is_there = is_there

        async def make_store() -> MemoryStore:
            return store

        registry = LocalRegistry(CONFIG, make_store, clock=self.elapsed.clock(), watch_factory=NoWitness)
        registry.start()
        if is_there:
            await eventually(lambda: registry.writer.database.is_complete)
        try:
            yield registry, store
        finally:
            await registry.stop()

    def row(self, number: int = 1) -> Instance:
        return self.tables.rows[iid(number)]

    def is_same_in(self, registry: LocalRegistry, number: int = 1) -> bool:
        known = registry.members.get(iid(number))
        return known is not None and LiveState.of(known) == LiveState.of(self.row(number))


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.parametrize("reported", [Status.STARTING, Status.ALIVE, Status.DRAINING])
async def test_a_drain_that_expires_is_released_and_what_the_agent_reports_counts(
    world: World, reported: Status
) -> None:
    async with world.registry() as (registry, _):
        await registry.register(joins(1).registration)
        if reported is not Status.STARTING:
            await registry.set_status(iid(1), Status.ALIVE, 2)
        await registry.drain(["agent"], "upkeep", "ada", duration_s=10.0)
        if reported is Status.DRAINING:
            await registry.set_status(iid(1), Status.DRAINING, 3)
        for _ in range(2):
            assert (world.row().status, len(world.row().holds)) == (Status.DRAINING, 1)
            world.elapsed.now_s += 4.0
            await registry.beat(iid(1))
            await registry.expiry.sweep(world.elapsed.now_s)
        world.elapsed.now_s += 4.0
        await registry.beat(iid(1))
        await registry.expiry.sweep(world.elapsed.now_s)
        await eventually(lambda: not world.row().holds)
        assert (world.row().status, world.row().cause) == (reported, Cause(CauseKind.DRAIN_ENDED))
        assert world.is_same_in(registry)
        [last, *_] = await registry.transitions("agent")
        assert (last.to_status, last.hold, last.cause) == (
            reported,
            HoldKind.OPERATOR,
            Cause(CauseKind.DRAIN_ENDED),
        )


async def test_changes_of_one_instance_are_committed_in_their_order_after_an_outage(world: World) -> None:
    async with world.registry() as (registry, store):
        await registry.register(joins(1).registration)
        await registry.set_status(iid(1), Status.ALIVE, 2)
        store.is_there = False
        assert not (await registry.drain(["agent"], "first"))[0].durable
        await registry.set_status(iid(1), Status.DRAINING, 3)
        [released] = await registry.undrain(["agent"])
        assert (released.status, released.durable) == (Status.DRAINING, False)
        assert "away for the test" in str(released.why)
        await registry.set_status(iid(1), Status.ALIVE, 4)
        await registry.drain(["agent"], "second")
        await registry.undrain(["agent"])
        store.is_there = True
        await eventually(lambda: not registry.writer.backlog.pending_changes)
        assert world.is_same_in(registry)
        steps = [(step.to_status, step.seq, step.hold) for step in reversed(await registry.transitions("agent"))]
        assert steps == [
            (Status.STARTING, 1, None),
            (Status.ALIVE, 2, None),
            (Status.DRAINING, None, HoldKind.OPERATOR),
            (Status.DRAINING, None, HoldKind.OPERATOR),
            (Status.ALIVE, 4, None),
            (Status.DRAINING, None, HoldKind.OPERATOR),
            (Status.ALIVE, None, HoldKind.OPERATOR),
        ]


async def test_a_registry_that_starts_has_the_holds_of_its_database_and_releases_them_at_their_end(
    world: World,
) -> None:
    async with world.registry() as (registry, _):
        for number in (1, 2):
            await registry.register(joins(number, f"agent-{number}").registration)
            await registry.set_status(iid(number), Status.ALIVE, 2)
        await registry.drain(["agent-1"], duration_s=20.0)
        await registry.drain(["agent-2"], "upkeep")
    async with world.registry() as (registry, _):
        assert [row.instance_id for row in await registry.list_active()] == []
        # an agent whose registration is repeated, and which reports again, stays held
        await registry.register(joins(2, "agent-2").registration, seq=3)
        assert (await registry.set_status(iid(2), Status.ALIVE, 4)).status is Status.DRAINING
        world.elapsed.now_s += 21.0
        await registry.expiry.sweep(world.elapsed.now_s)
        await eventually(lambda: world.row(1).status is Status.ALIVE)
        assert world.row(2).holds[0].reason == "upkeep"


async def test_an_operation_waits_for_the_database_to_be_read_since_it_may_have_a_hold(world: World) -> None:
    await world.by_hand.register_many([joins(1, seq=1), joins(2, "other", seq=1)])
    await world.by_hand.hold_many([holds(1, "in the database"), holds(2, "in the database")])
    async with world.registry(is_there=False) as (registry, store):
        await eventually(lambda: registry.writer.database.is_failing)
        # it has been away for a lease: agents register again, and operators may drain them
        world.elapsed.now_s += CONFIG.lease_s + 1
        await registry.register(joins(1).registration, seq=5)
        await registry.register(joins(2, "other").registration, seq=5)
        [released] = await registry.undrain(["agent"])
        assert (released.durable, released.error) == (False, None)
        [drained] = await registry.drain(["other"], "in memory")
        assert (drained.status, drained.durable) == (Status.DRAINING, False)
        store.is_there = True
        await eventually(lambda: registry.writer.database.is_complete and not registry.writer.backlog.pending_changes)
        await eventually(lambda: world.is_same_in(registry, 1) and world.is_same_in(registry, 2))
        assert world.row(1).holds == ()
        assert [held.reason for held in world.row(2).holds] == ["in memory"]


async def test_a_comparison_takes_holds_from_the_database_and_writes_those_that_it_lost(world: World) -> None:
    async with world.registry() as (registry, _):
        for number in (1, 2, 3):
            await registry.register(joins(number, f"agent-{number}").registration)
            await registry.set_status(iid(number), Status.ALIVE, 2)
        await registry.drain(["agent-2", "agent-3"], "upkeep", "ada")
        # one is held by hand; a backup without the last report and hold of the two others was restored
        await world.by_hand.hold_many([holds(1, "by hand", kind=HoldKind.NODE)])
        node = hold("older", kind=HoldKind.NODE)
        world.tables.rows[iid(2)] = replace(world.row(2), seq=1, holds=(), status=Status.ALIVE)
        world.tables.rows[iid(3)] = replace(world.row(3), seq=1, holds=(node,))
        registry.writer.comparison.request()
        await eventually(lambda: all(world.is_same_in(registry, number) for number in (1, 2)))
        kinds = [[held.kind for held in world.row(number).holds] for number in (1, 2, 3)]
        # what only the database has may have been placed there, and stays
        assert kinds == [[HoldKind.NODE], [HoldKind.OPERATOR], [HoldKind.NODE, HoldKind.OPERATOR]]
        assert [row.instance_id for row in await registry.list_active()] == []
        registry.writer.comparison.request()
        await eventually(lambda: world.is_same_in(registry, 3))
        assert world.row(2).hold(HoldKind.OPERATOR) == world.row(3).hold(HoldKind.OPERATOR)


class Refuses(MemoryStore):
    """A database that refuses holds. While a row is read for the first time, `meanwhile` begins."""

    meanwhile: Callable[[], Coroutine[Any, Any, Receipt]] | None = None

    async def hold_many(self, changes: Sequence[HoldChange]) -> list[Outcome]:
        raise StoreRejectedError("for the test")

    async def read_instance(self, instance_id: str) -> Instance | None:
        row = await super().read_instance(instance_id)
        begin, self.meanwhile = self.meanwhile, None
        if begin is not None:
            self.begun = asyncio.create_task(begin())
            await asyncio.sleep(0)
        return row


async def test_a_hold_that_is_refused_is_not_kept_although_the_agent_reports_meanwhile() -> None:
    tables = Tables(START)
    store = Refuses(lambda: START, tables)
    async with joined_registry(CONFIG, tables, store=store) as registry:
        await registry.register(joins(1).registration)
        await registry.set_status(iid(1), Status.ALIVE, 2)
        store.meanwhile = partial(registry.set_status, iid(1), Status.DRAINING, 3)
        for _ in range(2):
            [refused] = await registry.drain(["agent"], "upkeep", "ada")
            assert isinstance(refused.error, StoreRejectedError)
            known = registry.members.get(iid(1))
            assert known is not None
            assert known.holds == ()
        assert (await store.begun).durable
        assert tables.rows[iid(1)].reported_status is Status.DRAINING
