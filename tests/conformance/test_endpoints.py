"""What a registration with other endpoints does, in every store; and the filter by the name of one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from seedcore.core.answers import InstanceFilter, OutcomeKind
from seedcore.core.changes import RegisterChange
from seedcore.core.dependencies import Dependency
from seedcore.core.errors import StoreRejectedError
from seedcore.core.instances import LiveState
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_ENDPOINTS
from tests.builders import iid, joins, turns
from tests.conformance.worlds import EVERYONE, World, enter, row_of
from tests.endpoint_urls import BAD_ENDPOINTS, GOOD_URLS

OLD, NEW = {"http": "http://10.0.0.3:8000"}, {"http": "http://10.0.0.3:9000", "metrics": "http://10.0.0.3:9001/m"}


def updates(number: int, seq: int, **details: Any) -> RegisterChange:
    """The number-th instance registers with other details."""
    return replace(joins(number, seq=seq, **details), is_update=True)


@pytest.mark.parametrize("wrong", BAD_ENDPOINTS)
async def test_registration_with_bad_endpoints_is_refused_with_its_whole_batch(world: World, wrong: str) -> None:
    endpoints, _ = BAD_ENDPOINTS[wrong]
    with pytest.raises(StoreRejectedError, match="endpoint"):
        await world.store.register_many([joins(1), joins(2, endpoints=endpoints)])
    assert [row async for row in world.store.load_live()] == []


async def test_endpoints_at_their_limits_are_kept_as_they_are(world: World) -> None:
    given: list[dict[str, str]] = [{"http": url} for url in GOOD_URLS]
    given += [{f"n{number}": "http://h" for number in range(MAX_ENDPOINTS)}, {}]
    changes = [joins(number, endpoints=endpoints) for number, endpoints in enumerate(given)]
    assert {outcome.kind for outcome in await world.store.register_many(changes)} == {OutcomeKind.APPLIED}
    assert [(await row_of(world, number)).endpoints for number in range(len(given))] == given


async def test_a_later_registration_changes_the_endpoints_and_nothing_of_the_status(world: World) -> None:
    await world.store.register_many([joins(1, seq=1, endpoints=OLD)])
    await world.store.set_status_many([turns(1, Status.ALIVE, 2)])
    before = await row_of(world, 1)
    (outcome,) = await world.store.register_many([updates(1, 3, endpoints=NEW)])
    assert (outcome.kind, outcome.status) == (OutcomeKind.UNCHANGED, Status.ALIVE)
    after = await row_of(world, 1)
    assert after == replace(before, endpoints=NEW, seq=3, last_heartbeat=after.last_heartbeat)
    # a repetition, or an earlier one that arrives late, changes nothing back
    await world.store.register_many([updates(1, 3, endpoints=NEW), updates(1, 2, endpoints=OLD)])
    assert (await row_of(world, 1)).endpoints == NEW
    await world.store.register_many([updates(1, 4)])
    assert (await row_of(world, 1)).endpoints == {}


async def test_a_status_behind_a_change_of_endpoints_is_ordered_by_its_number(world: World) -> None:
    await world.store.register_many([joins(1, seq=1)])
    await world.store.set_status_many([turns(1, Status.ALIVE, 2)])
    await world.store.register_many([updates(1, 4, endpoints=NEW)])
    await world.store.set_status_many([turns(1, Status.DRAINING, 3)])
    assert (await row_of(world, 1)).status is Status.ALIVE
    await world.store.set_status_many([turns(1, Status.DRAINING, 5)])
    row = await row_of(world, 1)
    assert (row.status, row.endpoints, row.seq) == (Status.DRAINING, NEW, 5)


async def test_a_change_of_details_makes_no_instance_and_changes_no_dead_one(world: World) -> None:
    await enter(world, 2, status="dead", endpoints=OLD)
    outcomes = await world.store.register_many([updates(1, 3, endpoints=NEW), updates(2, 9, endpoints=NEW)])
    assert [outcome.kind for outcome in outcomes] == [OutcomeKind.UNKNOWN, OutcomeKind.DEAD]
    assert await world.store.get_instance(iid(1)) is None
    assert (await row_of(world, 2)).endpoints == OLD


async def test_several_registrations_of_an_instance_in_one_batch_count_in_their_order(world: World) -> None:
    changes = [joins(1, seq=1, endpoints=OLD), updates(1, 2, endpoints=NEW), updates(1, 3, endpoints=OLD)]
    outcomes = await world.store.register_many(changes)
    assert [outcome.kind for outcome in outcomes] == [OutcomeKind.APPLIED, *[OutcomeKind.UNCHANGED] * 2]
    row = await row_of(world, 1)
    assert (row.endpoints, row.seq) == (OLD, 3)


async def test_the_version_grows_with_other_endpoints_and_with_no_repetition(world: World) -> None:
    await enter(world, 1, endpoints=OLD)
    versions = []
    for seq, endpoints in ((3, OLD), (4, NEW), (5, NEW), (6, {})):
        await world.store.register_many([updates(1, seq, endpoints=endpoints)])
        versions.append((await world.store.list_instances(EVERYONE, 1)).version)
    first = versions[0]
    assert versions == [first, first + 1, first + 1, first + 2]


async def test_the_states_that_are_compared_have_the_details_that_change(world: World) -> None:
    process = Dependency("vllm", 7, "4026531836-7/boot", is_fatal=False, stderr_path="/tmp/stderr")
    await enter(world, 1, endpoints=NEW, dependencies=(process,))
    await enter(world, 2)
    states = await world.store.live_states(("", iid(0)), 10)
    assert [(state.endpoints, state.dependencies) for state in states] == [(NEW, (process,)), ({}, ())]
    assert states == [LiveState.of(await row_of(world, number)) for number in (1, 2)]


@pytest.mark.parametrize(
    ("name", "numbers"), [("http", [1, 2]), ("metrics", [2]), ("HTTP", []), ("http'\"%s\\", [3]), ("none", [])]
)
async def test_a_list_has_the_instances_with_an_endpoint_of_that_name(
    world: World, name: str, numbers: list[int]
) -> None:
    await enter(world, 1, endpoints=OLD)
    await enter(world, 2, endpoints=NEW)
    await enter(world, 3, endpoints={"http'\"%s\\": "tcp://h:1"})
    await enter(world, 4, labels={"http": "http://h"})
    await enter(world, 5, status="draining", endpoints=OLD)
    page = await world.store.list_instances(InstanceFilter(endpoint=name), 10)
    assert [row.instance_id for row in page] == [iid(number) for number in numbers]
