"""The instances of a node that Ray drains have a hold of kind node, for as long as Ray reports the drain."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from seedcore.core.answers import Outcome
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import HoldChange, Registration
from seedcore.core.errors import BacklogFullError, StoreRejectedError
from seedcore.core.holds import HoldKind
from seedcore.core.lifecycle import Status
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.death_watch import DeathWatch
from seedcore.registry.server.drains import BY_RAY, LOOKS
from seedcore.store.memory import MemoryStore, Tables
from tests.builders import START, holds, iid
from tests.local import LocalRegistry as Registry
from tests.unit.registries import Away, joined_registry
from tests.unit.test_death_watch import QUICK, LocalCluster
from tests.waiting import eventually

AT = datetime(2026, 11, 27, 12, 0, 5, tzinfo=UTC)
WORDS = "node node is being drained by Ray, deadline 2026-11-27 12:00:05 UTC"
CONFIG = RegistryConfig(
    "cluster", lease_s=60.0, flush_interval_s=0.01, durable_wait_s=0.05, retry_max_s=0.05, epoch_check_s=0.05
)


class Refusing(Away):
    """A database that refuses holds while `refuses` is set."""

    refuses = False
    refused = 0

    async def hold_many(self, changes: Sequence[HoldChange]) -> list[Outcome]:
        if self.refuses:
            self.refused += 1
            raise StoreRejectedError("no holds today")
        return await super().hold_many(changes)


@pytest.fixture
def cluster() -> LocalCluster:
    cluster = LocalCluster()
    cluster.table["other"] = True
    return cluster


@pytest.fixture
def tables() -> Tables:
    return Tables(START)


@pytest.fixture
def store(tables: Tables) -> Refusing:
    return Refusing(lambda: START, tables)


@pytest.fixture
async def registry(cluster: LocalCluster, tables: Tables, store: Refusing) -> AsyncIterator[Registry]:
    """A registry with an alive agent on each of two nodes: 1 on `node`, 2 on `other`."""
    async with started(CONFIG, cluster, tables, store) as registry:
        await alive(registry, 1, "node")
        await alive(registry, 2, "other")
        yield registry


def started(
    config: RegistryConfig, cluster: LocalCluster, tables: Tables, store: MemoryStore
) -> AbstractAsyncContextManager[Registry]:
    return joined_registry(config, tables, lambda on_death: DeathWatch(on_death, cluster, QUICK), store=store)


async def alive(registry: Registry, number: int, node_id: str) -> None:
    await registry.register(Registration(iid(number), f"agent-{number}", node_id=node_id, pid=number))
    await registry.set_status(iid(number), Status.ALIVE, 2)


def held(tables: Tables) -> dict[str, str | None]:
    """The reasons of the holds of kind node in the database, by instance."""
    found = {key: row.hold(HoldKind.NODE) for key, row in tables.rows.items()}
    return {key: hold.reason for key, hold in found.items() if hold is not None}


async def looks(cluster: LocalCluster, count: int) -> None:
    """So many looks at Ray's tables."""
    seen = cluster.looks
    await eventually(lambda: cluster.looks > seen + count, every_s=0.001)


async def test_instances_of_a_draining_node_are_held_and_no_others(
    registry: Registry, cluster: LocalCluster, tables: Tables
) -> None:
    cluster.draining_nodes = {"node": AT, "a node without agents": None}
    await eventually(lambda: held(tables) == {iid(1): WORDS})
    row = tables.rows[iid(1)]
    hold = row.hold(HoldKind.NODE)
    assert hold is not None
    assert (hold.by, hold.expires_at, row.status, row.reported_status) == (
        BY_RAY,
        None,
        Status.DRAINING,
        Status.ALIVE,
    )
    assert row.cause == Cause(CauseKind.OPERATOR, WORDS, BY_RAY)
    resolved = (await registry.resolve(["agent-1", "agent-2"])).value
    assert [one.instance is None for one in resolved] == [True, False]
    assert (await registry.health()).draining_nodes == 2
    # nothing happens at the deadline
    await looks(cluster, 2 * LOOKS)
    assert held(tables) == {iid(1): WORDS}


async def test_an_instance_that_registers_on_a_draining_node_is_held_at_once(
    registry: Registry, cluster: LocalCluster
) -> None:
    cluster.draining_nodes = {"node": None}
    await eventually(lambda: registry.expiry.drains.nodes)
    receipt = await registry.register(Registration(iid(3), "late", node_id="node", pid=3))
    assert receipt.status is Status.DRAINING
    receipt = await registry.set_status(iid(3), Status.ALIVE, 2)
    assert (receipt.status, receipt.durable) == (Status.DRAINING, True)
    assert (await registry.register(Registration(iid(4), "elsewhere", node_id="other"))).status is Status.STARTING
    assert (await registry.register(Registration(iid(5), "nowhere"))).status is Status.STARTING


async def test_a_new_deadline_replaces_the_hold_and_not_its_begin(
    registry: Registry, cluster: LocalCluster, tables: Tables
) -> None:
    cluster.draining_nodes = {"node": None}
    await eventually(lambda: held(tables) == {iid(1): "node node is being drained by Ray"})
    since = tables.rows[iid(1)].holds[0].since
    cluster.draining_nodes = {"node": AT}
    await eventually(lambda: held(tables) == {iid(1): WORDS})
    assert tables.rows[iid(1)].holds[0].since == since


async def test_holds_end_when_ray_has_not_reported_the_drain_for_a_while(
    registry: Registry, cluster: LocalCluster, tables: Tables
) -> None:
    cluster.draining_nodes = {"node": AT}
    await eventually(lambda: held(tables))
    steps = len(tables.transitions)
    # a GCS that was restarted reports no drain until the nodes have reported to it
    cluster.draining_nodes = {}
    await looks(cluster, LOOKS // 2)
    cluster.draining_nodes = {"node": AT}
    await looks(cluster, LOOKS)
    assert len(tables.transitions) == steps
    cluster.draining_nodes = {}
    await eventually(lambda: not held(tables))
    assert tables.rows[iid(1)].status is Status.ALIVE
    last = tables.transitions[-1]
    assert (last.hold, last.to_status) == (HoldKind.NODE, Status.ALIVE)
    assert last.cause == Cause(CauseKind.DRAIN_ENDED, "Ray drains node node no longer", BY_RAY)
    assert (await registry.health()).draining_nodes == 0


@pytest.mark.parametrize("what", ["is_away", "is_moved"])
async def test_no_hold_ends_while_it_is_not_known_which_nodes_drain(
    registry: Registry, cluster: LocalCluster, tables: Tables, what: str
) -> None:
    cluster.draining_nodes = {"node": AT}
    await eventually(lambda: held(tables))
    cluster.draining_nodes = {}
    await looks(cluster, LOOKS // 2)
    setattr(cluster, what, True)
    await looks(cluster, 2 * LOOKS)
    setattr(cluster, what, False)
    # looks before that count no more
    await looks(cluster, LOOKS // 2)
    assert held(tables) == {iid(1): WORDS}
    await eventually(lambda: not held(tables))


async def test_a_registry_that_starts_keeps_the_holds_of_draining_nodes_and_ends_the_others(
    cluster: LocalCluster, tables: Tables, store: Refusing
) -> None:
    cluster.draining_nodes = {"node": AT, "other": AT}
    async with started(CONFIG, cluster, tables, store) as registry:
        await alive(registry, 1, "node")
        await alive(registry, 2, "other")
        await eventually(lambda: len(held(tables)) == 2)
    del cluster.draining_nodes["other"]
    cluster.is_away = True
    steps = len(tables.transitions)
    async with started(CONFIG, cluster, tables, store) as registry:
        await looks(cluster, 2 * LOOKS)
        assert len(held(tables)) == 2
        cluster.is_away = False
        await eventually(lambda: held(tables) == {iid(1): WORDS})
        assert len(tables.transitions) == steps + 1
        assert registry.members.index.by_id[iid(2)].status is Status.ALIVE


async def test_a_hold_of_another_party_stays_and_an_operators_hold_is_left_alone(
    registry: Registry, cluster: LocalCluster, tables: Tables
) -> None:
    by_hand = holds(1, "by hand", kind=HoldKind.NODE)
    registry.members.hold(replace(by_hand, number=1), START)
    registry.writer.backlog.offer(replace(by_hand, number=1))
    await registry.drain(["agent-2"], "a new disk")
    cluster.draining_nodes = {"node": AT, "other": AT}
    await eventually(lambda: set(held(tables)) == {iid(1), iid(2)})
    assert held(tables)[iid(1)] == "by hand"
    await registry.undrain(["agent-2"])
    assert tables.rows[iid(2)].status is Status.DRAINING
    cluster.draining_nodes = {}
    await eventually(lambda: held(tables) == {iid(1): "by hand"})
    assert tables.rows[iid(2)].status is Status.ALIVE


async def test_a_hold_that_the_database_refuses_is_tried_again(
    registry: Registry, cluster: LocalCluster, tables: Tables, store: Refusing
) -> None:
    store.refuses = True
    cluster.draining_nodes = {"node": AT}
    await eventually(lambda: store.refused)
    await eventually(lambda: not registry.members.index.by_id[iid(1)].holds)
    store.refuses = False
    await eventually(lambda: held(tables) == {iid(1): WORDS})
    assert registry.members.index.by_id[iid(1)].status is Status.DRAINING


async def test_holds_of_a_large_node_wait_for_room_and_are_all_placed(
    cluster: LocalCluster, tables: Tables, store: Refusing
) -> None:
    config = replace(CONFIG, change_capacity=40, sweep_limit=15, durable_wait_s=5.0)
    async with started(config, cluster, tables, store) as registry:
        numbers = range(1, 101)
        for number in numbers:
            await registry.register(Registration(iid(number), f"agent-{number}", node_id="node", pid=number))
        store.is_there = False
        cluster.draining_nodes = {"node": None}

        # a step places no more than its limit, and all together no more than there is room for
        def in_memory() -> int:
            return sum(bool(row.holds) for row in registry.members)

        await eventually(in_memory)
        await eventually(lambda: in_memory() == 40)
        with pytest.raises(BacklogFullError):
            await registry.set_status(iid(1), Status.ALIVE, 2)
        await looks(cluster, 5)
        assert in_memory() == 40
        store.is_there = True
        await eventually(lambda: len(held(tables)) == len(numbers))
        assert {row.status for row in tables.rows.values()} == {Status.DRAINING}


async def test_a_fenced_registry_places_no_hold(registry: Registry, cluster: LocalCluster, tables: Tables) -> None:
    newer = MemoryStore(lambda: START + timedelta(seconds=1), tables)
    await newer.begin("cluster", None, 60.0)
    await eventually(lambda: registry.writer.database.fenced_by is not None)
    cluster.draining_nodes = {"node": AT}
    await looks(cluster, 5)
    assert (held(tables), registry.members.index.by_id[iid(1)].holds) == ({}, ())
