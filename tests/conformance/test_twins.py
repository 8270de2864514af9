"""The memory store stands for PostgreSQL in other tests, because any history leaves both in the same state."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seedcore.core.answers import Answer, InstanceFilter, Listing, Outcome
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import Registration
from seedcore.core.dependencies import Dependency
from seedcore.core.errors import RegistryError
from seedcore.core.holds import HoldKind
from seedcore.core.instances import Beat, Instance, Transition
from seedcore.core.lifecycle import Status
from seedcore.core.selector import parse_selector
from tests.builders import START, holds, iid, joins, readies, releases, turns
from tests.conformance.worlds import MemoryWorld, PostgresWorld, World

NAMES = ["a", "b", "B", "\u00e9"]
EPOCH_NAMES = ["epoch-1", "epoch-2", "epoch-3", "blue", "green"]
NUMBERS = st.integers(1, 5)
SEQS = st.integers(0, 6)
EPOCHS = st.sampled_from(EPOCH_NAMES)
# no sum or difference of these lies near a lease, so that the seconds which the test takes decide nothing
AGES_S = st.sampled_from([0.0, 70.0, 300.0])
LEASES_S = st.sampled_from([15.0, 100.0])


class Step(NamedTuple):
    """A call of the store, or of the world around it."""

    name: str
    arguments: tuple[object, ...]


REGISTRATIONS = st.builds(
    joins,
    NUMBERS,
    st.sampled_from(NAMES),
    SEQS,
    is_alive=st.booleans(),
    cluster_epoch=st.none() | EPOCHS,
    actor_id=st.sampled_from([None, "first", "second"]),
    organ_id=st.sampled_from([None, "vision", "hearing"]),
    labels=st.dictionaries(st.sampled_from("kl"), st.sampled_from(["", "v"])),
    metadata=st.dictionaries(st.sampled_from("mn"), st.sampled_from([None, 1, 2.5, "x", [True], {"y": []}])),
    pid=st.none() | st.integers(1, 9),
    dependencies=st.sampled_from([(), (Dependency("vllm", 7, "key", is_fatal=False),)]),
    ip_address=st.sampled_from([None, "10.0.0.1", "2001:db8::1"]),
)
CAUSES = st.none() | st.builds(
    Cause, st.sampled_from(CauseKind), st.sampled_from([None, "why"]), st.sampled_from([None, "ann"])
)
CHANGES = st.builds(turns, NUMBERS, st.sampled_from(Status), st.none() | SEQS, CAUSES)
HOLDS = st.builds(
    holds,
    NUMBERS,
    st.sampled_from([None, "upkeep"]),
    st.sampled_from([None, START, START + timedelta(hours=1)]),
    kind=st.sampled_from(HoldKind),
    by=st.sampled_from([None, "ann"]),
)
RELEASES = st.builds(releases, NUMBERS, st.sampled_from([None, "done"]), st.sampled_from(HoldKind))
READINESS = st.builds(readies, NUMBERS, st.booleans(), st.none() | SEQS, st.sampled_from([None, "loading"]))
BETTER = st.builds(Cause, st.sampled_from(CauseKind), st.sampled_from([None, "because"]))
EXPLANATIONS = st.dictionaries(NUMBERS.map(iid), BETTER, max_size=3)
BEATS = st.builds(Beat, st.integers(1, 7).map(iid), AGES_S)
STEPS = st.one_of(
    st.builds(Step, st.just("register_many"), st.tuples(st.lists(REGISTRATIONS, min_size=1, max_size=4))),
    st.builds(Step, st.just("set_status_many"), st.tuples(st.lists(CHANGES, min_size=1, max_size=4))),
    st.builds(Step, st.just("hold_many"), st.tuples(st.lists(HOLDS | RELEASES | READINESS, min_size=1, max_size=4))),
    st.builds(Step, st.just("beat_many"), st.tuples(st.lists(BEATS, max_size=5))),
    st.builds(Step, st.just("refine_causes"), st.tuples(EXPLANATIONS)),
    st.builds(Step, st.just("expire_stale"), st.tuples(st.none() | LEASES_S, st.integers(1, 3))),
    st.builds(Step, st.just("expire_old_epochs"), st.tuples(st.integers(1, 3))),
    st.builds(Step, st.just("set_current_epoch"), st.tuples(EPOCHS)),
    st.builds(Step, st.just("begin"), st.tuples(st.sampled_from(["one", "two"]), st.none() | EPOCHS, LEASES_S)),
    st.builds(Step, st.just("age"), st.tuples(NUMBERS.map(iid), AGES_S)),
    st.builds(Step, st.just("silence"), st.tuples(AGES_S)),
)


def timeless(value: object) -> object:
    """The value without what two clocks disagree on."""
    if isinstance(value, Instance):
        stopped_at = START if value.stopped_at is not None else None
        value = replace(
            value, started_at=START, status_changed_at=START, last_heartbeat=START, stopped_at=stopped_at
        )  # fmt: skip
    if isinstance(value, Transition):
        value = replace(value, at=START)
    if isinstance(value, (Instance, Outcome, Transition)) and value.cause is not None:
        if value.cause.kind is CauseKind.LEASE_EXPIRED:
            value = replace(value, cause=replace(value.cause, detail=None))
        return value
    if isinstance(value, Listing):
        return [timeless(row) for row in value], value.next_cursor, value.complete, value.source
    if isinstance(value, Answer):
        return {name: timeless(row) for name, row in value.value.items()}, value.complete, value.source
    if isinstance(value, list):
        return [timeless(element) for element in value]
    return value


async def perform(world: World, step: Step) -> object:
    """What a step returns; an error is an answer too."""
    await world.pass_time()
    if step.name in {"age", "silence"}:
        return await getattr(world, step.name)(*step.arguments)
    try:
        answer = timeless(await getattr(world.store, step.name)(*step.arguments))
    except RegistryError as error:
        return type(error), str(error)
    if isinstance(answer, list) and step.name in {"beat_many", "refine_causes", "expire_stale", "expire_old_epochs"}:
        return set(answer)  # the order of these is not promised
    return answer


async def everything(world: World) -> list[object]:
    """All that can be read from a store."""
    found: list[object] = [await world.store.current_epoch()]
    found.append({row.instance_id: timeless(row) async for row in world.store.load_live()})
    found += [timeless(await world.store.instances(name, 100)) for name in NAMES]
    for name in NAMES:
        # the order between instances that one statement changes is not promised
        transitions = sorted(await world.store.transitions(name, 100), key=lambda one: one.instance_id)
        found.append(timeless(transitions))
    found.append(timeless(await world.store.best_instances(NAMES)))
    of_epochs = [Registration(iid(9), "a", started_epoch=epoch) for epoch in EPOCH_NAMES]
    of_actors = [Registration(iid(9), name, actor_id=actor) for name in NAMES for actor in ("first", "second")]
    found.append(await world.store.epochs_of([*of_epochs, *of_actors]))
    for epoch in (None, *EPOCH_NAMES):
        for fresh_only in (True, False):
            wanted = InstanceFilter(statuses=None, epoch=epoch, fresh_only=fresh_only)
            found.append(timeless(await world.store.list_instances(wanted, 3)))
    for narrowed in (
        InstanceFilter(organ_id="vision"),
        InstanceFilter(labels={"k": "v"}),
        InstanceFilter(selector=parse_selector("k in (v, w), l != v, m notin (1), !n")),
        InstanceFilter(logical_id="B"),
    ):
        found.append(timeless(await world.store.list_instances(narrowed, 100)))
    return found


@pytest.fixture(params=["dsn15", "dsn18"], ids=["postgres15", "postgres18"])
async def twins(request: pytest.FixtureRequest) -> AsyncIterator[tuple[World, World]]:
    postgres = PostgresWorld(request.getfixturevalue(request.param))
    await postgres.store.open()
    yield MemoryWorld(), postgres
    await postgres.close()


@settings(max_examples=60)
@given(st.lists(STEPS, min_size=4, max_size=14))
async def test_any_history_gives_the_same_answers_and_the_same_rows(
    twins: tuple[World, World], history: Sequence[Step]
) -> None:
    memory, postgres = twins
    for world in twins:
        await world.reset()
    for step in history:
        if step.name == "age" and await memory.store.get_instance(str(step.arguments[0])) is None:
            continue
        assert await perform(memory, step) == await perform(postgres, step), step
    assert await everything(memory) == await everything(postgres)
