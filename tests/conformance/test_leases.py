"""Beats and expiry, in every store."""

from __future__ import annotations

import pytest

from seedcore.core.answers import BeatOutcome, InstanceFilter, LostBeat, OutcomeKind
from seedcore.core.causes import CauseKind
from seedcore.core.errors import InvalidInputError, StoreRejectedError
from seedcore.core.instances import Beat
from seedcore.core.lifecycle import Status
from tests.builders import iid, joins, turns
from tests.conformance.worlds import World, enter, row_of

WITNESS = 99


async def somebody_beats(world: World) -> None:
    """The registry is there and records beats: another instance's."""
    await enter(world, WITNESS, "witness")
    assert await world.store.beat_many([Beat(iid(WITNESS))]) == []


async def fresh_ids(world: World) -> list[str]:
    return [row.instance_id for row in await world.store.list_instances(InstanceFilter(), 100)]


# Beats


async def test_beat_renews_the_lease_and_nothing_else(world: World) -> None:
    await enter(world, 1)
    await world.age(iid(1), 100.0)
    before = await row_of(world, 1)
    assert await world.store.beat_many([Beat(iid(1))]) == []
    row = await row_of(world, 1)
    assert (row.last_heartbeat - before.last_heartbeat).total_seconds() >= 99.0
    assert (row.status, row.seq, row.status_changed_at) == (before.status, before.seq, before.status_changed_at)


async def test_beat_counts_from_its_arrival(world: World) -> None:
    await enter(world, 1)
    await world.age(iid(1), 100.0)
    before = await row_of(world, 1)
    await world.store.beat_many([Beat(iid(1), age_s=60.0)])
    renewed_s = ((await row_of(world, 1)).last_heartbeat - before.last_heartbeat).total_seconds()
    assert 39.0 < renewed_s < 50.0


async def test_older_beat_does_not_take_back_a_newer_one(world: World) -> None:
    await enter(world, 1)
    await world.store.beat_many([Beat(iid(1))])
    before = await row_of(world, 1)
    assert await world.store.beat_many([Beat(iid(1), age_s=30.0)]) == []
    assert await row_of(world, 1) == before


@pytest.mark.parametrize("ages_s", [(0.0, 40.0, 80.0), (80.0, 40.0, 0.0), (40.0, 0.0, 80.0)])
async def test_of_several_beats_in_one_batch_the_newest_wins(world: World, ages_s: tuple[float, ...]) -> None:
    await enter(world, 1)
    await world.age(iid(1), 200.0)
    before = await row_of(world, 1)
    assert await world.store.beat_many([Beat(iid(1), age_s) for age_s in ages_s]) == []
    assert ((await row_of(world, 1)).last_heartbeat - before.last_heartbeat).total_seconds() >= 199.0


async def test_batch_renews_the_known_and_names_the_rest_once(world: World) -> None:
    await enter(world, 1)
    await enter(world, 2, status="dead")
    await enter(world, 3, status="starting")
    await enter(world, 4, status="draining")
    for number in (1, 3, 4):
        await world.age(iid(number), 100.0)
    lost = await world.store.beat_many([Beat(iid(number)) for number in (8, 4, 2, 3, 1, 8, 2)])
    assert len(lost) == 2
    assert set(lost) == {LostBeat(iid(2), BeatOutcome.DEAD), LostBeat(iid(8), BeatOutcome.UNKNOWN)}
    reference = (await row_of(world, 1)).last_heartbeat
    for number in (3, 4):
        assert (await row_of(world, number)).last_heartbeat == reference


async def test_beat_does_not_revive_the_dead(world: World) -> None:
    await enter(world, 1, status="dead")
    before = await row_of(world, 1)
    assert await world.store.beat_many([Beat(iid(1))]) == [LostBeat(iid(1), BeatOutcome.DEAD)]
    assert await row_of(world, 1) == before


@pytest.mark.parametrize("age_s", [-1.5, -1e5, float("-inf"), float("nan"), float("inf")])
async def test_beat_from_the_future_or_from_no_time_is_refused_with_its_whole_batch(world: World, age_s: float) -> None:
    await enter(world, 1)
    await enter(world, 2)
    before = [await row_of(world, number) for number in (1, 2)]
    with pytest.raises(StoreRejectedError):
        await world.store.beat_many([Beat(iid(1)), Beat(iid(2), age_s)])
    assert [await row_of(world, number) for number in (1, 2)] == before


async def test_age_that_two_readings_of_a_clock_make_negative_counts_as_none(world: World) -> None:
    await enter(world, 1)
    await world.age(iid(1), 100.0)
    assert await world.store.beat_many([Beat(iid(1), -0.9)]) == []
    received_at = (await row_of(world, 1)).last_heartbeat
    await world.pass_time()
    assert await world.store.beat_many([Beat(iid(1))]) == []
    assert (await row_of(world, 1)).last_heartbeat > received_at


# Expiry


async def test_silent_instance_expires_with_its_cause_and_others_do_not(world: World) -> None:
    await enter(world, 1)
    await enter(world, 2)
    await world.age(iid(1), 60.0)
    await somebody_beats(world)
    assert await world.store.expire_stale(None, 10) == [iid(1)]
    row = await row_of(world, 1)
    assert row.status is Status.DEAD
    assert row.cause is not None
    assert row.cause.kind is CauseKind.LEASE_EXPIRED
    assert row.stopped_at is not None
    assert (await row_of(world, 2)).status is Status.ALIVE
    assert await world.store.expire_stale(None, 10) == []


async def test_late_renewal_does_not_revive_an_expired_instance(world: World) -> None:
    await enter(world, 1)
    await world.age(iid(1), 60.0)
    await somebody_beats(world)
    await world.store.expire_stale(None, 10)
    dead = await row_of(world, 1)
    assert await world.store.beat_many([Beat(iid(1), age_s=59.0), Beat(iid(1))]) == [LostBeat(iid(1), BeatOutcome.DEAD)]
    (registered,) = await world.store.register_many([joins(1, seq=9)])
    (changed,) = await world.store.set_status_many([turns(1, Status.ALIVE, 10)])
    assert registered.kind is changed.kind is OutcomeKind.DEAD
    assert registered.cause == dead.cause
    assert await row_of(world, 1) == dead


@pytest.mark.parametrize("status", ["starting", "alive", "draining"])
async def test_every_live_status_has_a_lease(world: World, status: str) -> None:
    await enter(world, 1, status=status)
    await world.age(iid(1), 60.0)
    await somebody_beats(world)
    assert await world.store.expire_stale(None, 10) == [iid(1)]


async def test_expiry_is_bounded_and_comes_to_an_end(world: World) -> None:
    for number in range(5):
        await enter(world, number)
        await world.age(iid(number), 60.0)
    await somebody_beats(world)
    sweeps = [await world.store.expire_stale(None, 2) for _ in range(4)]
    assert [len(sweep) for sweep in sweeps] == [2, 2, 1, 0]
    assert sorted(instance_id for sweep in sweeps for instance_id in sweep) == [iid(number) for number in range(5)]


@pytest.mark.parametrize("limit", [0, -1, 1001])
async def test_sweep_without_a_legal_bound_is_refused(world: World, limit: int) -> None:
    with pytest.raises(InvalidInputError):
        await world.store.expire_stale(None, limit)
    with pytest.raises(InvalidInputError):
        await world.store.expire_old_epochs(limit)


@pytest.mark.parametrize("lease_s", [0.0, -5.0, float("nan"), float("inf")])
async def test_sweep_with_an_invalid_lease_is_refused_and_ends_no_instance(world: World, lease_s: float) -> None:
    await enter(world, 1)
    await somebody_beats(world)
    with pytest.raises(StoreRejectedError):
        await world.store.expire_stale(lease_s, 10)
    assert (await row_of(world, 1)).status is Status.ALIVE


async def test_lease_is_the_one_the_registry_began_with_unless_a_sweep_names_another(world: World) -> None:
    await world.store.begin("cluster", None, 100.0)
    for number, age_s in ((1, 60.0), (2, 120.0), (3, 5.0)):
        await enter(world, number)
        await world.age(iid(number), age_s)
    await somebody_beats(world)
    assert await world.store.expire_stale(None, 10) == [iid(2)]
    assert await world.store.expire_stale(30.0, 10) == [iid(1)]
    assert await world.store.expire_stale(30.0, 10) == []


async def test_while_no_registry_records_beats_no_instance_expires_or_is_late(world: World) -> None:
    await enter(world, 1)
    await enter(world, 2)
    for number in (1, 2):
        await world.age(iid(number), 1000.0)
    await world.silence(1000.0)
    assert await world.store.expire_stale(None, 10) == []
    assert await fresh_ids(world) == [iid(1), iid(2)]
    assert set((await world.store.best_instances(["agent"])).value) == {"agent"}


async def test_lease_is_judged_against_the_last_recorded_beat(world: World) -> None:
    for number, age_s in ((1, 105.0), (2, 130.0)):
        await enter(world, number)
        await world.age(iid(number), age_s)
    await world.silence(100.0)
    # 2 was silent before the registry went away; 1 may be beating to deaf ears since
    assert await fresh_ids(world) == [iid(1)]
    assert await world.store.expire_stale(None, 10) == [iid(2)]


async def test_beats_of_strangers_are_no_sign_that_beats_are_recorded(world: World) -> None:
    await enter(world, 1)
    await world.age(iid(1), 100.0)
    await world.silence(100.0)
    await world.store.beat_many([Beat(iid(50))])
    assert await world.store.expire_stale(None, 10) == []


@pytest.mark.parametrize("lease_s", [0.0, -1.0, 86_401.0, float("nan"), float("inf")])
async def test_lease_out_of_bounds_is_refused_and_nothing_changes(world: World, lease_s: float) -> None:
    await world.store.begin("one", None, 100.0)
    with pytest.raises(InvalidInputError):
        await world.store.begin("two", None, lease_s)
    assert (await world.store.begin("one", None, 100.0)).name == "epoch-1"


async def test_a_beat_by_sql_while_the_registry_is_down_makes_no_other_instance_silent(world: World) -> None:
    await world.store.begin("cluster-a", None, 15.0)
    await enter(world, 1)
    await world.age(iid(1), 600.0)
    await world.silence(600.0)
    # as the SQL function beat does: nothing of a registry has seen it
    await somebody_beats(world)
    assert set(await fresh_ids(world)) == {iid(1), iid(WITNESS)}
    assert await world.store.expire_stale(None, 10) == []
    await world.store.renew_term(15.0)
    assert await fresh_ids(world) == [iid(WITNESS)]
