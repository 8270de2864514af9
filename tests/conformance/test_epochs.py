"""Fleet generations, in every store."""

from __future__ import annotations

import pytest

from seedcore.core.answers import InstanceFilter, Outcome, OutcomeKind
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import Registration
from seedcore.core.errors import InvalidInputError, RetiredEpochError
from seedcore.core.instances import Epoch
from seedcore.core.lifecycle import Status
from tests.builders import iid, joins, turns
from tests.conformance.worlds import EVERYONE, World, enter, row_of

LEASE_S = 15.0


async def listed(world: World, epoch: str | None = None) -> list[str]:
    return [row.instance_id for row in await world.store.list_instances(InstanceFilter(epoch=epoch), 100)]


async def test_there_is_an_epoch_from_the_start(world: World) -> None:
    assert await world.store.current_epoch() == Epoch("epoch-1", 1)


async def test_registry_restarted_in_the_same_cluster_keeps_the_epoch(world: World) -> None:
    assert await world.store.begin("cluster-a", None, LEASE_S) == Epoch("epoch-1", 1)
    assert await world.store.begin("cluster-a", None, LEASE_S) == Epoch("epoch-1", 1)
    assert await world.store.current_epoch() == Epoch("epoch-1", 1)


async def test_registry_in_a_new_cluster_rotates_the_epoch(world: World) -> None:
    await world.store.begin("cluster-a", None, LEASE_S)
    assert await world.store.begin("cluster-b", None, LEASE_S) == Epoch("epoch-2", 2)
    assert await world.store.begin("cluster-b", None, LEASE_S) == Epoch("epoch-2", 2)


async def test_rotation_passes_over_a_name_that_is_taken(world: World) -> None:
    await world.store.begin("cluster-a", None, LEASE_S)
    await world.store.register_many([joins(1, cluster_epoch="epoch-3"), joins(2, cluster_epoch="blue")])
    # number 4 is next, but there is no reason that its name is free
    await world.store.register_many([joins(3, cluster_epoch="epoch-5")])
    assert await world.store.begin("cluster-b", None, LEASE_S) == Epoch("epoch-6", 5)


async def test_a_new_cluster_names_the_epoch_that_continues_the_one_before(world: World) -> None:
    await world.store.begin("cluster-a", None, LEASE_S, None, "ignored")
    assert await world.store.begin("cluster-b", None, LEASE_S, None, "mine") == Epoch("mine", 2)
    assert await world.store.epochs_of([Registration(iid(1), "a", started_epoch="epoch-1")]) == ["mine"]
    await world.store.set_current_epoch("green")
    # one that is retired is not made again
    assert await world.store.begin("cluster-c", None, LEASE_S, None, "mine") == Epoch("epoch-4", 4)


async def test_insisted_epoch_becomes_current_and_stays_so_in_a_new_cluster(world: World) -> None:
    assert await world.store.begin("cluster-a", "blue", LEASE_S) == Epoch("blue", 2)
    assert await world.store.begin("cluster-b", "blue", LEASE_S) == Epoch("blue", 2)
    assert await world.store.begin("cluster-b", None, LEASE_S) == Epoch("blue", 2)


async def test_retired_epoch_cannot_come_back(world: World) -> None:
    await world.store.begin("cluster-a", "blue", LEASE_S)
    await world.store.begin("cluster-a", "green", LEASE_S)
    for retired in ("blue", "epoch-1"):
        with pytest.raises(RetiredEpochError) as caught:
            await world.store.set_current_epoch(retired)
        assert caught.value.epoch == retired
        with pytest.raises(RetiredEpochError) as caught:
            await world.store.begin("cluster-b", retired, LEASE_S)
        assert caught.value.epoch == retired
    # refused whole: the cluster was not noted either
    assert await world.store.begin("cluster-a", None, LEASE_S) == Epoch("green", 3)


async def test_registration_in_a_retired_epoch_is_refused(world: World) -> None:
    await world.store.set_current_epoch("blue")
    outcomes = await world.store.register_many([joins(1, cluster_epoch="epoch-1"), joins(2, cluster_epoch="blue")])
    assert outcomes == [
        Outcome(OutcomeKind.RETIRED_EPOCH, None, "epoch-1"),
        Outcome(OutcomeKind.APPLIED, Status.STARTING, "blue"),
    ]
    assert await world.store.get_instance(iid(1)) is None


async def test_instance_of_a_retired_epoch_can_still_refresh_and_change_until_it_is_expired(world: World) -> None:
    await enter(world, 1)
    await world.store.set_current_epoch("blue")
    (refreshed,) = await world.store.register_many([joins(1, seq=1, cluster_epoch="epoch-1")])
    (drained,) = await world.store.set_status_many([turns(1, Status.DRAINING, 2)])
    assert (refreshed.kind, drained.kind) == (OutcomeKind.UNCHANGED, OutcomeKind.APPLIED)


async def test_staged_fleet_is_invisible_until_the_flip_and_then_all_visible_in_one_step(world: World) -> None:
    await enter(world, 1, "blue-agent")
    await enter(world, 2, "green-a", cluster_epoch="green")
    await enter(world, 3, "green-b", cluster_epoch="green")
    names = ["blue-agent", "green-a", "green-b"]
    assert await listed(world) == [iid(1)]
    assert await listed(world, epoch="green") == [iid(2), iid(3)]
    assert set((await world.store.best_instances(names)).value) == {"blue-agent"}
    assert await world.store.set_current_epoch("green") == Epoch("green", 2)
    assert await world.store.current_epoch() == Epoch("green", 2)
    assert await listed(world) == [iid(2), iid(3)]
    assert await listed(world, epoch="epoch-1") == [iid(1)]
    assert set((await world.store.best_instances(names)).value) == {"green-a", "green-b"}


async def test_flipping_to_the_current_epoch_changes_nothing(world: World) -> None:
    assert await world.store.set_current_epoch("epoch-1") == Epoch("epoch-1", 1)
    assert (await world.store.register_many([joins(1, cluster_epoch="epoch-1")]))[0].kind is OutcomeKind.APPLIED


async def test_each_flip_has_a_higher_number_than_the_one_before(world: World) -> None:
    await world.store.stage_epoch("blue")
    await world.store.stage_epoch("green")
    assert await world.store.set_current_epoch("green") == Epoch("green", 3)
    assert await world.store.set_current_epoch("blue") == Epoch("blue", 4)
    assert await world.store.set_current_epoch("blue", above=9) == Epoch("blue", 10)
    assert await world.store.set_current_epoch("red", above=3) == Epoch("red", 11)
    assert await world.store.current_epoch() == Epoch("red", 11)


async def test_instances_of_retired_epochs_expire_in_bounded_sweeps_and_no_others(world: World) -> None:
    for number in range(3):
        await enter(world, number)
    await enter(world, 10, cluster_epoch="green")
    await enter(world, 11, cluster_epoch="staged")
    assert await world.store.expire_old_epochs(10) == []
    await world.store.set_current_epoch("green")
    sweeps = [await world.store.expire_old_epochs(2) for _ in range(3)]
    assert [sorted(sweep) for sweep in sweeps] == [[iid(0), iid(1)], [iid(2)], []]
    row = await row_of(world, 0)
    assert (row.status, row.cause) == (Status.DEAD, Cause(CauseKind.EPOCH_RETIRED, "epoch-1"))
    assert [row.instance_id async for row in world.store.load_live()] == [iid(10), iid(11)]


async def test_staged_epochs_are_bounded_and_the_fleet_is_not_stuck_at_the_bound(world: World) -> None:
    await world.store.begin("cluster-a", None, LEASE_S)
    staged = await world.store.register_many([joins(number, cluster_epoch=f"own-{number}") for number in range(64)])
    assert {outcome.kind for outcome in staged} == {OutcomeKind.APPLIED}
    outcomes = await world.store.register_many(
        [joins(100, cluster_epoch="one-more"), joins(101, cluster_epoch="own-7"), joins(102)]
    )
    assert outcomes == [
        Outcome(OutcomeKind.EPOCH_LIMIT, None, "one-more"),
        Outcome(OutcomeKind.APPLIED, Status.STARTING, "own-7"),
        Outcome(OutcomeKind.APPLIED, Status.STARTING, "epoch-1"),
    ]
    assert await world.store.get_instance(iid(100)) is None
    # what becomes current at once is not staged: a new cluster's registry starts, and an operator can flip
    assert await world.store.begin("cluster-b", None, LEASE_S) == Epoch("epoch-66", 66)
    assert await world.store.begin("cluster-b", "chosen", LEASE_S) == Epoch("chosen", 67)
    assert await world.store.set_current_epoch("next") == Epoch("next", 68)
    assert await world.store.set_current_epoch("own-7") == Epoch("own-7", 69)
    (outcome,) = await world.store.register_many([joins(100, cluster_epoch="one-more")])
    assert outcome.kind is OutcomeKind.APPLIED


@pytest.mark.parametrize("name", ["", " ", "x" * 129, "a\x00b"])
async def test_illegal_epoch_name_is_refused(world: World, name: str) -> None:
    with pytest.raises(InvalidInputError):
        await world.store.set_current_epoch(name)
    with pytest.raises(InvalidInputError):
        await world.store.begin("cluster-a", name, LEASE_S)
    assert await world.store.current_epoch() == Epoch("epoch-1", 1)


async def belongs(world: World, started_epoch: str | None, actor_id: str | None = None) -> str | None:
    """Where a registration belongs that insists on no epoch."""
    asked = Registration(iid(99), "agent", actor_id=actor_id, started_epoch=started_epoch)
    (epoch,) = await world.store.epochs_of([asked])
    return epoch


async def test_an_agent_belongs_to_the_epoch_that_it_was_started_in_also_once_a_flip_has_retired_it(
    world: World,
) -> None:
    await world.store.begin("cluster-a", None, LEASE_S)
    await enter(world, 1, cluster_epoch="green")
    for shown in ("epoch-1", "green", "third"):
        await world.store.set_current_epoch(shown)
        assert await belongs(world, "epoch-1") == "epoch-1"
        assert await belongs(world, "green") == "green"
    assert await world.store.epochs_of([]) == []


async def test_agents_go_on_in_the_epoch_of_a_registry_that_took_the_database_over(world: World) -> None:
    await world.store.begin("cluster-a", None, LEASE_S)
    await world.store.set_current_epoch("green")
    await world.store.begin("cluster-b", None, LEASE_S)
    await world.store.begin("cluster-a", None, LEASE_S, await world.store.term_seen())
    assert await world.store.current_epoch() == Epoch("epoch-4", 4)
    assert await belongs(world, "green") == "epoch-4"
    assert await belongs(world, "epoch-3") == "epoch-4"
    # which a flip had ended before
    assert await belongs(world, "epoch-1") == "epoch-1"
    # one that is insisted on is a flip
    await world.store.begin("cluster-c", "chosen", LEASE_S)
    assert await belongs(world, "green") == "epoch-4"


async def test_an_actor_belongs_to_the_epoch_of_its_instance_before_and_of_that_agent_alone(world: World) -> None:
    await enter(world, 1, actor_id="a1")
    await world.store.set_status_many([turns(1, Status.DEAD, cause="killed")])
    await world.store.set_current_epoch("green")
    await world.pass_time()
    await enter(world, 2, actor_id="a2")
    await enter(world, 3, "another", actor_id="a3")
    asked = [Registration(iid(99), "agent", actor_id=actor) for actor in ("a1", "a2", "a3", None)]
    assert await world.store.epochs_of(asked) == ["epoch-1", "green", None, None]
    # what it was started in counts before that
    assert await belongs(world, "epoch-1", "a2") == "epoch-1"


async def test_an_epoch_that_the_database_does_not_know_is_as_good_as_none(world: World) -> None:
    assert await belongs(world, "of-a-database-before") is None


async def test_dead_of_a_retired_epoch_keep_their_cause(world: World) -> None:
    await enter(world, 1)
    await world.store.set_status_many([turns(1, Status.DEAD, cause="stopped")])
    await world.store.set_current_epoch("green")
    assert await world.store.expire_old_epochs(10) == []
    assert (await row_of(world, 1)).cause == Cause(CauseKind.AGENT, "stopped")
    assert len(await world.store.list_instances(EVERYONE, 10)) == 0
