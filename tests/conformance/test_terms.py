"""Fencing: of all the registries on one database only the last to start writes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from seedcore.core.answers import InstanceFilter
from seedcore.core.changes import Registration
from seedcore.core.errors import EpochLimitError, FencedError, RetiredEpochError
from seedcore.core.instances import Beat, Epoch
from seedcore.core.lifecycle import Status
from seedcore.core.ports import CommitsLostError, Store
from tests.builders import iid, joins, turns
from tests.conformance.worlds import EVERYONE, World, enter, row_of

LEASE_S = 15.0

WRITES: dict[str, Callable[[Store], Awaitable[object]]] = {
    "register_many": lambda store: store.register_many([joins(2)]),
    "register_many_staging": lambda store: store.register_many([joins(2, cluster_epoch="green")]),
    "set_status_many": lambda store: store.set_status_many([turns(1, Status.DRAINING)]),
    "beat_many": lambda store: store.beat_many([Beat(iid(1))]),
    "expire_stale": lambda store: store.expire_stale(1.0, 10),
    "expire_old_epochs": lambda store: store.expire_old_epochs(10),
    "set_current_epoch": lambda store: store.set_current_epoch("green"),
    "stage_epoch": lambda store: store.stage_epoch("green"),
    "renew_every_lease": lambda store: store.renew_every_lease(),
}


@pytest.fixture
async def rival(world: World) -> AsyncIterator[Store]:
    """A second store on the database of the first."""
    store = world.rival()
    await store.open()
    yield store
    await store.close()


async def test_each_start_takes_the_next_term(world: World, rival: Store) -> None:
    assert world.store.term is None
    await world.store.begin("cluster-a", None, LEASE_S)
    first = world.store.term
    assert first is not None
    await world.store.begin("cluster-a", None, LEASE_S)
    assert world.store.term == first + 1
    await rival.begin("cluster-a", None, LEASE_S)
    assert rival.term == first + 2


async def test_a_superseded_store_takes_no_term_from_the_newer_one_while_that_is_at_work(
    world: World, rival: Store
) -> None:
    await world.store.begin("cluster-a", None, LEASE_S)
    term, before = world.store.term, await world.store.term_seen()
    await rival.begin("cluster-a", None, LEASE_S)
    for seen in (None, before):
        with pytest.raises(FencedError) as caught:
            await world.store.begin("cluster-a", None, LEASE_S, seen)
        assert (caught.value.term, caught.value.in_force, world.store.term) == (term, rival.term, term)
    # the newer one was not disturbed
    await rival.register_many([joins(1)])
    await world.store.begin("cluster-a", None, LEASE_S, await world.store.term_seen())
    assert world.store.term == (rival.term or 0) + 1


@pytest.mark.parametrize("write", WRITES)
async def test_a_superseded_writer_is_refused_and_changes_nothing(world: World, rival: Store, write: str) -> None:
    await world.store.begin("cluster-a", None, LEASE_S)
    await enter(world, 1)
    await world.age(iid(1), 60)
    await rival.begin("cluster-b", "epoch-1", LEASE_S)
    before = (await row_of(world, 1), [await world.store.list_epochs(10)], await world.store.current_epoch())
    with pytest.raises(FencedError) as caught:
        await WRITES[write](world.store)
    assert (caught.value.term, caught.value.in_force) == (world.store.term, rival.term)
    assert (await row_of(world, 1), [await world.store.list_epochs(10)], await world.store.current_epoch()) == before
    assert await world.store.get_instance(iid(2)) is None
    await WRITES[write](rival)


async def test_a_superseded_store_still_reads(world: World, rival: Store) -> None:
    await world.store.begin("cluster-a", None, LEASE_S)
    await enter(world, 1)
    await rival.begin("cluster-a", None, LEASE_S)
    assert [row.instance_id for row in await world.store.list_instances(EVERYONE, 10)] == [iid(1)]
    assert [row.instance_id async for row in world.store.load_live()] == [iid(1)]


async def test_a_replaced_cluster_cannot_take_the_registry_back(world: World, rival: Store) -> None:
    await world.store.begin("cluster-a", None, LEASE_S)
    await rival.begin("cluster-b", None, LEASE_S)
    for epoch in (None, "green"):
        with pytest.raises(FencedError):
            await world.store.begin("cluster-a", epoch, LEASE_S)
    assert await rival.current_epoch() == Epoch("epoch-2", 2)
    # the newer one was not disturbed
    await rival.register_many([joins(1)])


async def test_a_replaced_cluster_takes_the_registry_back_from_one_that_is_seen_no_more(
    world: World, rival: Store
) -> None:
    await world.store.begin("cluster-a", None, LEASE_S)
    await rival.begin("cluster-b", None, LEASE_S)
    before = await world.store.term_seen()
    assert before.term == rival.term
    assert await world.store.term_seen() == before
    await world.pass_time()
    await rival.renew_term(LEASE_S)
    seen = await world.store.term_seen()
    assert seen != before
    with pytest.raises(FencedError):
        await world.store.begin("cluster-a", None, LEASE_S, before)
    assert await world.store.begin("cluster-a", None, LEASE_S, seen) == Epoch("epoch-3", 3)
    await world.store.register_many([joins(1)])
    # now it is the other one that was replaced
    with pytest.raises(FencedError):
        await rival.register_many([joins(2)])
    for former in (None, seen):
        with pytest.raises(FencedError):
            await rival.begin("cluster-b", None, LEASE_S, former)
    # a restart in the same cluster is no replacement
    assert (await world.store.begin("cluster-a", None, LEASE_S)).name == "epoch-3"


async def test_a_database_that_has_lost_commits_refuses_writes_until_the_store_begins_again(
    world: World, rival: Store
) -> None:
    await world.store.begin("cluster-a", None, LEASE_S)
    await enter(world, 1)
    known, term = world.store.commits, world.store.term
    await world.exchange()
    with pytest.raises(CommitsLostError) as caught:
        await world.store.register_many([joins(2)])
    assert (caught.value.known, caught.value.found) == (known, 0)
    assert await world.store.get_instance(iid(2)) is None
    await world.store.begin("cluster-a", None, LEASE_S)
    assert (world.store.found_commits, world.store.found_own) == (0, False)
    assert (world.store.commits, world.store.term) == (known + 1, (term or 0) + 1)
    await world.store.register_many([joins(2)])


async def test_another_database_with_more_commits_and_a_lower_term_is_one_that_has_lost_everything(
    world: World, rival: Store
) -> None:
    for _ in range(3):
        await world.store.begin("cluster-a", None, LEASE_S)
    await world.exchange()
    await rival.begin("cluster-b", None, LEASE_S)
    for number in range(9):
        await rival.register_many([joins(number)])
    with pytest.raises(CommitsLostError, match="another database") as caught:
        await world.store.register_many([joins(20)])
    assert caught.value.found == 0
    await world.store.begin("cluster-a", None, LEASE_S)
    assert (world.store.found_commits, world.store.commits, world.store.term) == (0, 11, 4)
    assert not world.store.found_own


async def test_a_lost_term_that_another_registry_has_taken_again_is_not_the_own_one(world: World, rival: Store) -> None:
    await world.store.begin("cluster-a", None, LEASE_S)
    await world.store.begin("cluster-a", None, LEASE_S)
    assert world.store.found_own
    await world.exchange()
    for _ in range(2):
        await rival.begin("cluster-a", None, LEASE_S)
    assert rival.term == world.store.term
    with pytest.raises(FencedError):
        await world.store.begin("cluster-a", None, LEASE_S)
    await world.store.begin("cluster-a", None, LEASE_S, await world.store.term_seen())
    assert not world.store.found_own


async def test_a_store_in_force_begins_again_on_a_database_from_before_it_took_it_back(
    world: World, rival: Store
) -> None:
    for _ in range(3):
        await world.store.begin("cluster-a", None, LEASE_S)
    await world.exchange()
    await rival.begin("cluster-a", None, LEASE_S)
    await rival.begin("cluster-b", None, LEASE_S)
    await world.store.begin("cluster-a", None, LEASE_S)
    assert world.store.term == 4


async def test_a_store_in_force_goes_on_in_its_epoch_on_a_database_from_before_every_registry(world: World) -> None:
    for cluster in ("cluster-a", "cluster-b"):
        await world.store.begin(cluster, None, LEASE_S)
    await world.exchange()
    epoch = await world.store.begin("cluster-b", None, LEASE_S, None, "epoch-2")
    assert epoch.name == "epoch-2"
    # and so do the agents of the epoch that it continues
    assert await world.store.epochs_of([Registration(iid(1), "agent", started_epoch="epoch-1")]) == ["epoch-2"]


async def test_a_start_answers_the_lease_that_was_in_force(world: World, rival: Store) -> None:
    await world.store.begin("cluster-a", None, LEASE_S)
    await world.store.renew_term(2 * LEASE_S)
    await rival.begin("cluster-a", None, LEASE_S)
    assert rival.lease_before_s == 2 * LEASE_S


async def test_a_start_gives_every_lease_its_whole_length_again(world: World) -> None:
    await enter(world, 1)
    await enter(world, 2, "other")
    await world.age(iid(1), LEASE_S + 5)
    assert [row.instance_id for row in await world.store.list_instances(InstanceFilter(), 10)] == [iid(2)]
    await world.store.begin("cluster-a", None, LEASE_S)
    await world.store.beat_many([Beat(iid(2))])
    # one beat was recorded, and the other instance has not had the time to send its own
    assert len(await world.store.list_instances(InstanceFilter(), 10)) == 2
    assert len((await world.store.best_instances(["agent", "other"])).value) == 2
    assert await world.store.expire_stale(None, 10) == []


async def test_an_absence_counts_against_no_instance(world: World) -> None:
    await enter(world, 1)
    await world.age(iid(1), LEASE_S + 5)
    await world.store.renew_every_lease()
    assert await world.store.expire_stale(None, 10) == []
    assert len(await world.store.list_instances(InstanceFilter(), 10)) == 1
    await world.age(iid(1), LEASE_S + 5)
    assert await world.store.expire_stale(None, 10) == [iid(1)]


async def test_an_epoch_can_be_staged_by_name_before_anybody_registers_in_it(world: World) -> None:
    assert await world.store.stage_epoch("green")
    assert not await world.store.stage_epoch("green")
    await enter(world, 1, cluster_epoch="green")
    newest, current = await world.store.list_epochs(10)
    assert (newest.name, newest.number, newest.current_at, newest.retired_at, newest.live) == (
        "green",
        2,
        None,
        None,
        1,
    )
    assert (current.name, current.retired_at, current.live) == ("epoch-1", None, 0)
    assert current.current_at is not None
    await world.store.set_current_epoch("green")
    assert [(row.name, row.retired_at is None) for row in await world.store.list_epochs(10)] == [
        ("green", True),
        ("epoch-1", False),
    ]
    assert [row.name for row in await world.store.list_epochs(1)] == ["green"]
    with pytest.raises(RetiredEpochError):
        await world.store.stage_epoch("epoch-1")


async def test_staged_epochs_are_bounded(world: World) -> None:
    for number in range(64):
        await world.store.stage_epoch(f"stage-{number}")
    with pytest.raises(EpochLimitError):
        await world.store.stage_epoch("one-more")
    assert not await world.store.stage_epoch("stage-0")
