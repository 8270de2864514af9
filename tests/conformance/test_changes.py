"""What registrations and status changes do, in every store."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from seedcore.core.answers import Outcome, OutcomeKind
from seedcore.core.causes import Cause, CauseKind, is_refined_by
from seedcore.core.changes import HoldChange, RegisterChange, Registration
from seedcore.core.dependencies import Dependency
from seedcore.core.errors import StoreRejectedError
from seedcore.core.holds import HoldKind
from seedcore.core.lifecycle import LIVE_STATUSES, Status, is_allowed
from seedcore.core.limits import (
    MAX_LABEL_KEY_CHARS,
    MAX_LABEL_VALUE_CHARS,
    MAX_LABELS,
    MAX_METADATA_BYTES,
    MAX_METADATA_DEPTH,
    MAX_TEXT_CHARS,
)
from tests.builders import START, hold, holds, iid, joins, readies, releases, turns
from tests.conformance.worlds import EVERYONE, World, enter, row_of

FULL = Registration(
    instance_id=iid(1),
    logical_id="agent é \U0001f600",
    actor_name="actor",
    namespace="seedcore",
    actor_id="a1",
    serve_route="/route",
    organ_id="vision",
    labels={"zone": "a", "empty": ""},
    metadata={"list": [1, 2.5, None, True], "text": 'quote " backslash \\ {brace}', "deep": {"é": []}},
    node_id="n1",
    ip_address="2001:db8::1",
    pid=4242,
    dependencies=(
        Dependency("vllm", 4243, "its key", stderr_path="/tmp/vllm é"),
        Dependency("redis", 4244, "another key", is_fatal=False),
    ),
)


def agents(detail: str) -> Cause:
    """The cause that an agent reports."""
    return Cause(CauseKind.AGENT, detail)


# Registering

BAD_REGISTRATIONS: dict[str, RegisterChange] = {
    "blank logical id": joins(2, "  "),
    "logical id of other spaces": joins(2, "\u3000\u00a0"),
    "logical id of two lines": joins(2, "hand\n4"),
    "blank organ": joins(2, organ_id=" "),
    "blank epoch": joins(2, cluster_epoch=" "),
    "negative seq": joins(2, seq=-9),
    "label that is no text": joins(2, labels={"a": {"x": 1}}),
    "label that is null": joins(2, labels={"a": None}),
    "too many labels": joins(2, labels={f"k{n}": "v" for n in range(MAX_LABELS + 1)}),
    "label without a key": joins(2, labels={"": "v"}),
    "label with a long key": joins(2, labels={"k" * (MAX_LABEL_KEY_CHARS + 1): "v"}),
    "label with a long value": joins(2, labels={"k": "v" * (MAX_LABEL_VALUE_CHARS + 1)}),
    "label of two lines": joins(2, labels={"k": "a\nb"}),
    "too many dependencies": joins(2, dependencies=tuple(Dependency(f"d{n}", 7, "key") for n in range(9))),
    "two dependencies of a name": joins(2, dependencies=(Dependency("d", 7, "key"), Dependency("d", 8, "key"))),
    "dependency with a long name": joins(2, dependencies=(Dependency("d" * 64, 7, "key"),)),
    "dependency with a blank name": joins(2, dependencies=(Dependency(" ", 7, "key"),)),
    "dependency with a text for its pid": joins(2, dependencies=(Dependency("d", "7", "key"),)),  # type: ignore[arg-type]
    "deep metadata": joins(2, metadata={"deep": json.loads("[" * MAX_METADATA_DEPTH + "]" * MAX_METADATA_DEPTH)}),
}


@pytest.mark.parametrize("bad", BAD_REGISTRATIONS)
async def test_registration_beyond_a_limit_is_refused_with_its_whole_batch(world: World, bad: str) -> None:
    with pytest.raises(StoreRejectedError):
        await world.store.register_many([joins(1), BAD_REGISTRATIONS[bad], joins(3)])
    assert [row async for row in world.store.load_live()] == []


async def test_registration_at_its_limits_is_taken(world: World) -> None:
    labels = {
        f"{n:02d}".ljust(MAX_LABEL_KEY_CHARS, "\u00e9"): "\u00e9" * MAX_LABEL_VALUE_CHARS for n in range(MAX_LABELS)
    }
    deep = {"deep": json.loads("[" * (MAX_METADATA_DEPTH - 1) + "]" * (MAX_METADATA_DEPTH - 1))}
    wide = {"wide": [0] * ((MAX_METADATA_BYTES - 12) // 3)}
    changes = [joins(1, labels=labels), joins(2, metadata=deep), joins(3, metadata=wide), joins(4, labels={"k": ""})]
    for change in changes:
        change.registration.validated()
    assert [outcome.kind for outcome in await world.store.register_many(changes)] == [OutcomeKind.APPLIED] * 4
    assert (await row_of(world, 1)).labels == labels
    assert [(await row_of(world, number)).metadata for number in (2, 3)] == [deep, wide]


async def test_change_with_a_negative_number_is_refused_with_its_whole_batch(world: World) -> None:
    await enter(world, 1, status="starting")
    with pytest.raises(StoreRejectedError):
        await world.store.set_status_many([turns(1, Status.ALIVE, 2), turns(1, Status.DEAD, -9)])
    assert (await row_of(world, 1)).status is Status.STARTING


@pytest.mark.parametrize("cause", ["x" * (MAX_TEXT_CHARS + 1), "nul \x00", "half a pair \ud800"])
async def test_cause_that_cannot_be_stored_is_refused_with_its_whole_batch(world: World, cause: str) -> None:
    await enter(world, 1, status="starting")
    await enter(world, 2, status="starting")
    killed = Cause(CauseKind.PROCESS_KILLED)
    await world.store.set_status_many([turns(2, Status.DEAD, None, killed)])
    with pytest.raises(StoreRejectedError):
        await world.store.set_status_many([turns(1, Status.ALIVE, 2), turns(1, Status.DRAINING, 3, cause)])
    with pytest.raises(StoreRejectedError):
        await world.store.refine_causes({iid(2): Cause(CauseKind.PROCESS_KILLED, cause)})
    with pytest.raises(StoreRejectedError):
        await world.store.hold_many([holds(1), holds(1, cause)])
    row = await row_of(world, 1)
    assert (row.status, row.holds) == (Status.STARTING, ())
    assert (await row_of(world, 2)).cause == killed


async def test_registered_instance_is_starting_in_the_current_epoch_with_all_its_details(world: World) -> None:
    outcomes = await world.store.register_many([RegisterChange(FULL, seq=2**63 - 1)])
    assert outcomes == [Outcome(OutcomeKind.APPLIED, Status.STARTING, "epoch-1")]
    row = await row_of(world, 1)
    assert (row.status, row.cluster_epoch, row.seq) == (Status.STARTING, "epoch-1", 2**63 - 1)
    for field in ("logical_id", "actor_name", "namespace", "actor_id", "serve_route", "organ_id", "labels"):
        assert getattr(row, field) == getattr(FULL, field)
    for field in ("metadata", "node_id", "ip_address", "pid"):
        assert getattr(row, field) == getattr(FULL, field)
    assert row.started_at == row.status_changed_at == row.last_heartbeat
    assert row.started_at.utcoffset() is not None
    assert (row.stopped_at, row.cause) == (None, None)


async def test_registration_with_the_two_ids_alone_leaves_the_rest_empty(world: World) -> None:
    row = await enter(world, 1, status="starting")
    assert (row.labels, row.metadata, row.seq) == ({}, {}, 0)
    assert (row.actor_name, row.serve_route, row.ip_address, row.pid, row.node_id) == (None,) * 5


async def test_registering_again_changes_no_status_and_refreshes_the_details(world: World) -> None:
    before = await enter(world, 1, organ_id="old", labels={"zone": "a"}, pid=1)
    await world.pass_time()
    await world.age(iid(1), 10.0)
    outcomes = await world.store.register_many([joins(1, seq=4, organ_id="new", node_id="n2")])
    assert outcomes == [Outcome(OutcomeKind.UNCHANGED, Status.ALIVE, "epoch-1")]
    row = await row_of(world, 1)
    assert (row.status, row.seq, row.organ_id, row.node_id) == (Status.ALIVE, 4, "new", "n2")
    assert (row.labels, row.pid) == ({}, None)
    assert (row.started_at, row.status_changed_at) == (before.started_at, before.status_changed_at)
    assert row.last_heartbeat > before.last_heartbeat


async def test_a_registration_that_is_alive_is_one_change_and_one_entry_of_the_history(world: World) -> None:
    alive = joins(1, seq=2, is_alive=True)
    assert await world.store.register_many([alive]) == [Outcome(OutcomeKind.APPLIED, Status.ALIVE, "epoch-1")]
    again = Outcome(OutcomeKind.UNCHANGED, Status.ALIVE, "epoch-1")
    assert await world.store.register_many([alive, alive]) == [again, again]
    row = await row_of(world, 1)
    assert (row.status, row.reported_status, row.seq) == (Status.ALIVE, Status.ALIVE, 2)
    history = await world.store.transitions("agent", 10)
    assert [(one.from_status, one.to_status, one.seq) for one in history] == [(None, Status.ALIVE, 2)]


async def test_a_registration_that_is_alive_makes_a_known_instance_alive_unless_it_is_a_replay(world: World) -> None:
    await world.store.register_many([joins(1, seq=1), joins(2, seq=2), joins(3, seq=1)])
    await world.store.hold_many([holds(3, "upkeep")])
    outcomes = await world.store.register_many([joins(number, seq=2, is_alive=True) for number in (1, 2, 3)])
    assert [(one.kind, one.status) for one in outcomes] == [
        (OutcomeKind.APPLIED, Status.ALIVE),
        (OutcomeKind.UNCHANGED, Status.STARTING),
        (OutcomeKind.UNCHANGED, Status.DRAINING),
    ]
    assert [(await row_of(world, number)).reported_status for number in (1, 2, 3)] == [
        Status.ALIVE,
        Status.STARTING,
        Status.ALIVE,
    ]


async def test_a_registration_with_other_dependencies_replaces_them(world: World) -> None:
    await world.store.register_many([joins(1, seq=1, dependencies=FULL.dependencies)])
    assert (await row_of(world, 1)).dependencies == FULL.dependencies
    await world.store.register_many([joins(1, seq=2, dependencies=FULL.dependencies[1:])])
    await world.store.register_many([joins(1, seq=1, dependencies=FULL.dependencies)])
    assert (await row_of(world, 1)).dependencies == FULL.dependencies[1:]
    await world.store.register_many([joins(1, seq=3)])
    assert (await row_of(world, 1)).dependencies == ()


async def test_replayed_registration_leaves_newer_details(world: World) -> None:
    await world.store.register_many([joins(1, seq=5, organ_id="newer")])
    outcomes = await world.store.register_many([joins(1, seq=4, organ_id="older")])
    assert outcomes == [Outcome(OutcomeKind.UNCHANGED, Status.STARTING, "epoch-1")]
    row = await row_of(world, 1)
    assert (row.organ_id, row.seq) == ("newer", 5)


async def test_registration_does_not_revive_the_dead(world: World) -> None:
    await enter(world, 1)
    await world.store.set_status_many([turns(1, Status.DEAD, cause="stopped")])
    before = await row_of(world, 1)
    outcomes = await world.store.register_many([joins(1, seq=9, organ_id="new")])
    assert outcomes == [Outcome(OutcomeKind.DEAD, Status.DEAD, "epoch-1", agents("stopped"))]
    assert await row_of(world, 1) == before


async def test_instance_id_belongs_to_one_agent_for_ever(world: World) -> None:
    before = await enter(world, 1, "mine")
    assert await world.store.register_many([joins(1, "yours", seq=9)]) == [
        Outcome(OutcomeKind.CONFLICT, Status.ALIVE, "epoch-1")
    ]
    assert await row_of(world, 1) == before
    await world.store.set_status_many([turns(1, Status.DEAD, cause="gone")])
    assert await world.store.register_many([joins(1, "yours", seq=9)]) == [
        Outcome(OutcomeKind.CONFLICT, Status.DEAD, "epoch-1", agents("gone"))
    ]


async def test_outcomes_come_in_the_order_of_the_changes(world: World) -> None:
    await enter(world, 5, "taken")
    await enter(world, 2)
    outcomes = await world.store.register_many(
        [joins(9), joins(5, "thief"), joins(1), joins(2), joins(1, seq=1, organ_id="late"), joins(1, "thief")]
    )
    kinds = [outcome.kind for outcome in outcomes]
    assert kinds == [
        OutcomeKind.APPLIED,
        OutcomeKind.CONFLICT,
        OutcomeKind.APPLIED,
        OutcomeKind.UNCHANGED,
        OutcomeKind.UNCHANGED,
        OutcomeKind.CONFLICT,
    ]
    assert (await row_of(world, 1)).organ_id == "late"


async def test_empty_batches_do_nothing(world: World) -> None:
    assert await world.store.register_many([]) == []
    assert await world.store.set_status_many([]) == []
    assert await world.store.beat_many([]) == []
    assert (await world.store.best_instances([])).value == {}


async def test_registration_keeps_its_epoch_when_it_comes_again_under_another(world: World) -> None:
    await enter(world, 1)
    (outcome,) = await world.store.register_many([joins(1, seq=1, cluster_epoch="never-staged")])
    assert (outcome.kind, outcome.cluster_epoch) == (OutcomeKind.UNCHANGED, "epoch-1")
    assert (await row_of(world, 1)).cluster_epoch == "epoch-1"
    # naming it there did not stage it either
    assert (await world.store.set_current_epoch("epoch-next")).number == 2


# Status changes


@pytest.mark.parametrize("current", Status)
@pytest.mark.parametrize("wanted", Status)
async def test_store_keeps_the_transition_table(world: World, current: Status, wanted: Status) -> None:
    before = await enter(world, 1, status=current.value)
    (outcome,) = await world.store.set_status_many([turns(1, wanted, cause="because")])
    row = await row_of(world, 1)
    if is_allowed(current, wanted):
        assert outcome == Outcome(OutcomeKind.APPLIED, wanted, "epoch-1", agents("because"))
        assert (row.status, row.reported_status, row.holds, row.cause) == (wanted, wanted, (), agents("because"))
        assert row.status_changed_at >= before.status_changed_at
        assert row.stopped_at == (row.status_changed_at if wanted is Status.DEAD else None)
    else:
        unchanged = OutcomeKind.UNCHANGED if current is wanted else OutcomeKind.FORBIDDEN
        kind = OutcomeKind.DEAD if current is Status.DEAD and wanted is not Status.DEAD else unchanged
        assert outcome == Outcome(kind, current, "epoch-1", None)
        assert row == before


async def test_changes_of_one_batch_are_applied_in_their_order(world: World) -> None:
    await enter(world, 1, status="starting")
    await enter(world, 2, status="starting")
    outcomes = await world.store.set_status_many(
        [
            turns(2, Status.ALIVE, 1),
            turns(1, Status.ALIVE, 1),
            turns(2, Status.STARTING, 2),
            turns(1, Status.DRAINING, 2, "rolling"),
            turns(1, Status.ALIVE, 3),
            turns(2, Status.DEAD, 3, "done"),
            turns(1, Status.ALIVE, 4),
            turns(2, Status.ALIVE, 4),
        ]
    )
    assert [(outcome.kind.value, str(outcome.status)) for outcome in outcomes] == [
        ("applied", "alive"),
        ("applied", "alive"),
        ("forbidden", "alive"),
        ("applied", "draining"),
        ("applied", "alive"),
        ("applied", "dead"),
        ("unchanged", "alive"),
        ("dead", "dead"),
    ]
    assert outcomes[-1].cause == agents("done")
    assert [(await row_of(world, number)).seq for number in (1, 2)] == [4, 3]


async def test_replayed_batch_is_harmless(world: World) -> None:
    registrations = [joins(1, seq=1), joins(2, seq=1)]
    statuses = [turns(1, Status.ALIVE, 2), turns(1, Status.DRAINING, 3), turns(2, Status.DEAD, 2, "done")]
    await world.store.register_many(registrations)
    await world.store.set_status_many(statuses)
    before = [await row_of(world, 1), await row_of(world, 2)]
    await world.pass_time()
    assert [outcome.kind for outcome in await world.store.register_many(registrations)] == [
        OutcomeKind.UNCHANGED,
        OutcomeKind.DEAD,
    ]
    outcomes = await world.store.set_status_many(statuses)
    assert [outcome.kind for outcome in outcomes] == [OutcomeKind.UNCHANGED] * 3
    assert [outcome.status for outcome in outcomes] == [Status.DRAINING, Status.DRAINING, Status.DEAD]
    assert [await row_of(world, 1), await row_of(world, 2)] == before


async def test_registrys_own_change_is_applied_once_however_often_it_is_sent(world: World) -> None:
    await enter(world, 1)
    await world.store.set_status_many([turns(1, Status.ALIVE, 1)])
    holding = [replace(holds(1, "upkeep"), number=1), replace(releases(1, "released"), number=2)]
    reporting = [turns(1, Status.DRAINING, 2, "the agent"), turns(1, Status.ALIVE, 3)]
    last = [replace(holds(1, "again"), number=3), replace(releases(1, "released again"), number=4)]
    for _ in range(2):
        outcomes = await world.store.hold_many(holding)
        outcomes += await world.store.set_status_many(reporting)
        outcomes += await world.store.hold_many(last)
    assert [outcome.kind for outcome in outcomes] == [OutcomeKind.UNCHANGED] * 6
    row = await row_of(world, 1)
    assert (row.status, row.seq) == (Status.ALIVE, 3)
    details = [None if one.cause is None else one.cause.detail for one in await world.store.transitions("agent", 10)]
    expected = [None, None, "upkeep", "released", "the agent", None, "again", "released again"]
    assert details[::-1] == expected
    # a later one counts
    [outcome] = await world.store.hold_many([replace(holds(1), number=5)])
    assert outcome.kind is OutcomeKind.APPLIED
    [repeated, death] = await world.store.set_status_many(
        [replace(turns(1, Status.DEAD), number=number) for number in (5, 6)]
    )
    assert [repeated.kind, death.kind] == [OutcomeKind.UNCHANGED, OutcomeKind.APPLIED]


async def test_number_used_up_by_a_change_to_the_same_status_stays_used(world: World) -> None:
    await enter(world, 1)
    assert [
        outcome.kind
        for outcome in await world.store.set_status_many([turns(1, Status.ALIVE, 5), turns(1, Status.DRAINING, 5)])
    ] == [OutcomeKind.UNCHANGED, OutcomeKind.UNCHANGED]
    row = await row_of(world, 1)
    assert (row.status, row.seq) == (Status.ALIVE, 5)


async def test_refused_change_uses_up_no_number(world: World) -> None:
    await enter(world, 1)
    await world.store.set_status_many([turns(1, Status.STARTING, 7)])
    (outcome,) = await world.store.set_status_many([turns(1, Status.DRAINING, 7)])
    assert outcome.kind is OutcomeKind.APPLIED


async def test_registrys_own_change_uses_none_of_the_agents_numbers(world: World) -> None:
    await world.store.register_many([joins(1, seq=1)])
    await world.store.set_status_many([turns(1, Status.ALIVE, 2)])
    await world.store.set_status_many([turns(1, Status.DRAINING, None, "by SQL")])
    assert (await row_of(world, 1)).seq == 2
    (outcome,) = await world.store.set_status_many([turns(1, Status.DRAINING, 3)])
    assert outcome == Outcome(OutcomeKind.UNCHANGED, Status.DRAINING, "epoch-1", agents("by SQL"))
    assert (await row_of(world, 1)).seq == 3


async def test_agents_own_change_renews_its_lease_and_the_registrys_does_not(world: World) -> None:
    await enter(world, 1)
    await world.age(iid(1), 10.0)
    aged = await row_of(world, 1)
    await world.store.set_status_many([turns(1, Status.DRAINING, None), turns(1, Status.ALIVE, None)])
    assert (await row_of(world, 1)).last_heartbeat == aged.last_heartbeat
    await world.store.set_status_many([turns(1, Status.DRAINING, 1)])
    assert (await row_of(world, 1)).last_heartbeat > aged.last_heartbeat


async def test_status_of_an_unknown_instance_is_unknown(world: World) -> None:
    await enter(world, 1)
    outcomes = await world.store.set_status_many([turns(7, Status.ALIVE, 1), turns(1, Status.DRAINING)])
    assert outcomes[0] == Outcome(OutcomeKind.UNKNOWN)
    assert outcomes[1].kind is OutcomeKind.APPLIED


async def test_nothing_revives_the_dead(world: World) -> None:
    await enter(world, 1)
    await world.store.set_status_many([turns(1, Status.DEAD, 5, "stopped")])
    before = await row_of(world, 1)
    for status in LIVE_STATUSES:
        for seq in (None, 5, 6, 2**62):
            (outcome,) = await world.store.set_status_many([turns(1, status, seq)])
            assert outcome.kind in {OutcomeKind.DEAD, OutcomeKind.UNCHANGED}
            assert outcome.status is Status.DEAD
    assert await row_of(world, 1) == before


async def test_second_cause_does_not_replace_the_first(world: World) -> None:
    await enter(world, 1)
    await world.store.set_status_many([turns(1, Status.DEAD, None, "first")])
    (outcome,) = await world.store.set_status_many([turns(1, Status.DEAD, None, "second")])
    assert outcome == Outcome(OutcomeKind.UNCHANGED, Status.DEAD, "epoch-1", agents("first"))
    assert (await row_of(world, 1)).cause == agents("first")


async def test_every_change_of_a_status_raises_the_version(world: World) -> None:
    async def version() -> int:
        return (await world.store.list_instances(EVERYONE, 1)).version

    versions = [await version()]
    await world.store.register_many([joins(1)])
    versions.append(await version())
    for status in (Status.ALIVE, Status.DRAINING, Status.DEAD):
        await world.store.set_status_many([turns(1, status)])
        versions.append(await version())
    assert versions == sorted(set(versions))
    await world.store.set_status_many([turns(1, Status.DEAD), turns(2, Status.ALIVE)])
    assert await version() == versions[-1]


async def test_every_change_of_a_hold_raises_the_version(world: World) -> None:
    async def version() -> int:
        return (await world.store.list_instances(EVERYONE, 1)).version

    await enter(world, 1)
    versions = [await version()]
    for change in (holds(1), holds(1, "upkeep"), releases(1)):
        await world.store.hold_many([change])
        versions.append(await version())
    assert versions == sorted(set(versions))
    await world.store.hold_many([releases(1), holds(2)])
    assert await version() == versions[-1]


async def test_history_is_pruned_the_oldest_first_and_a_little_at_a_time(world: World) -> None:
    await world.store.register_many([joins(number, f"agent-{number}", 1) for number in range(1, 5)])
    await world.store.set_status_many([turns(number, Status.DEAD, 2, "over") for number in (1, 2)])
    await world.age_history(100.0)
    await world.store.set_status_many([turns(3, Status.DEAD, 2, "of late")])
    assert await world.store.prune_history(3600.0, 10) == 0
    # six transitions and two of the dead are older than a minute; three and one of them at a time
    assert await world.store.prune_history(60.0, 3) == 3 + 2
    assert await world.store.get_instance(iid(1)) is None
    assert await world.store.prune_history(60.0, 3) == 3
    assert await world.store.prune_history(60.0, 3) == 0
    assert [row.instance_id for row in await world.store.instances("agent-3", 5)] == [iid(3)]
    assert [one.to_status for one in await world.store.transitions("agent-3", 5)] == [Status.DEAD]
    # the living stay, however long ago they registered
    assert {row.instance_id async for row in world.store.load_live()} == {iid(4)}


@pytest.mark.parametrize(("keep_s", "limit"), [(-1.0, 5), (float("nan"), 5), (1e12, 5), (60.0, 0), (60.0, -1)])
async def test_a_prune_that_makes_no_sense_is_refused(world: World, keep_s: float, limit: int) -> None:
    with pytest.raises(StoreRejectedError):
        await world.store.prune_history(keep_s, limit)


# Holds

HOUR = timedelta(hours=1)


async def test_operators_hold_drains_an_instance_until_it_is_released(world: World) -> None:
    before = await enter(world, 1)
    (placed,) = await world.store.hold_many([holds(1, "upkeep", START + HOUR, by="ann")])
    cause = Cause(CauseKind.OPERATOR, "upkeep", "ann")
    assert placed == Outcome(OutcomeKind.APPLIED, Status.DRAINING, "epoch-1", cause)
    row = await row_of(world, 1)
    assert (row.status, row.reported_status, row.cause) == (Status.DRAINING, Status.ALIVE, cause)
    assert row.holds == (hold("upkeep", START + HOUR, by="ann"),)
    assert row.status_changed_at > before.status_changed_at
    (released,) = await world.store.hold_many([releases(1, "done")])
    assert released == Outcome(OutcomeKind.APPLIED, Status.ALIVE, "epoch-1", Cause(CauseKind.OPERATOR, "done"))
    row = await row_of(world, 1)
    assert (row.status, row.holds, row.cause) == (Status.ALIVE, (), released.cause)
    kept = [
        (one.from_status, one.to_status, one.hold, one.expires_at) for one in await world.store.transitions("agent", 2)
    ]
    assert kept == [
        (Status.DRAINING, Status.ALIVE, HoldKind.OPERATOR, None),
        (Status.ALIVE, Status.DRAINING, HoldKind.OPERATOR, START + HOUR),
    ]


async def test_agents_readiness_is_applied_once_and_in_the_order_of_its_numbers(world: World) -> None:
    before = await enter(world, 1)
    await world.pass_time()
    changes = [readies(1, False, 10, "loading weights"), readies(1, True, 11), readies(1, False, 12, "loading again")]
    for _ in range(2):
        outcomes = [outcome for change in changes for outcome in await world.store.hold_many([change])]
    assert [outcome.kind for outcome in outcomes] == [OutcomeKind.UNCHANGED] * 3
    row = await row_of(world, 1)
    assert (row.status, row.reported_status, row.seq) == (Status.STARTING, Status.ALIVE, 12)
    assert row.holds == (hold("loading again", kind=HoldKind.READINESS),)
    assert row.last_heartbeat > before.last_heartbeat
    kept = [(one.to_status, one.seq, one.hold) for one in await world.store.transitions("agent", 3)]
    readiness = HoldKind.READINESS
    assert kept == [
        (Status.STARTING, 12, readiness),
        (Status.ALIVE, 11, readiness),
        (Status.STARTING, 10, readiness),
    ]
    assert (await world.store.best_instances(["agent"])).value == {}
    await world.store.hold_many([readies(1, True, 13)])
    assert list((await world.store.best_instances(["agent"])).value) == ["agent"]


async def test_a_number_counts_for_readiness_and_status_alike(world: World) -> None:
    await enter(world, 1)
    await world.store.set_status_many([turns(1, Status.DRAINING, 10)])
    (outcome,) = await world.store.hold_many([readies(1, False, 10)])
    assert outcome.kind is OutcomeKind.UNCHANGED
    # nothing is released, and the number counts
    (outcome,) = await world.store.hold_many([readies(1, True, 12)])
    assert (outcome.kind, (await row_of(world, 1)).seq) == (OutcomeKind.UNCHANGED, 12)
    (outcome,) = await world.store.set_status_many([turns(1, Status.ALIVE, 11)])
    assert (outcome.kind, outcome.status) == (OutcomeKind.UNCHANGED, Status.DRAINING)
    # neither does a registry's own number hide it, nor the other way round
    await world.store.hold_many([replace(holds(1, "upkeep"), number=99)])
    (outcome,) = await world.store.hold_many([readies(1, False, 13)])
    assert outcome.kind is OutcomeKind.APPLIED
    (outcome,) = await world.store.hold_many([replace(releases(1), number=99)])
    assert outcome.kind is OutcomeKind.UNCHANGED
    (outcome,) = await world.store.hold_many([replace(releases(1), number=100)])
    assert (outcome.kind, outcome.status) == (OutcomeKind.APPLIED, Status.DRAINING)


async def test_same_hold_again_and_release_of_none_change_nothing(world: World) -> None:
    before = await enter(world, 1)
    (outcome,) = await world.store.hold_many([releases(1)])
    assert outcome == Outcome(OutcomeKind.UNCHANGED, Status.ALIVE, "epoch-1")
    assert await row_of(world, 1) == before
    await world.store.hold_many([holds(1, "upkeep", START)])
    before = await row_of(world, 1)
    (outcome,) = await world.store.hold_many([holds(1, "upkeep", START, since=START + HOUR)])
    assert (outcome.kind, outcome.status) == (OutcomeKind.UNCHANGED, Status.DRAINING)
    assert await row_of(world, 1) == before
    assert len(await world.store.transitions("agent", 10)) == 3


@pytest.mark.parametrize(
    "change", [holds(1, "takes longer", START), holds(1, "upkeep", START + HOUR), holds(1, "upkeep", START, by="bob")]
)
async def test_hold_with_another_reason_end_or_operator_replaces_the_one_before(
    world: World, change: HoldChange
) -> None:
    await enter(world, 1)
    await world.store.hold_many([holds(1, "upkeep", START)])
    since = (await row_of(world, 1)).status_changed_at
    await world.pass_time()
    (outcome,) = await world.store.hold_many([change])
    assert (outcome.kind, outcome.cause) == (OutcomeKind.APPLIED, change.why)
    row = await row_of(world, 1)
    assert (row.holds, row.status_changed_at) == ((change.hold,), since)
    (last, first) = await world.store.transitions("agent", 2)
    assert (last.from_status, last.to_status, last.cause) == (Status.DRAINING, Status.DRAINING, change.why)
    assert (first.expires_at, first.cause) == (START, Cause(CauseKind.OPERATOR, "upkeep"))
    assert last.at > first.at


async def test_holds_of_several_kinds_are_independent(world: World) -> None:
    await enter(world, 1)
    kinds = (HoldKind.READINESS, HoldKind.NODE, HoldKind.OPERATOR)
    outcomes = await world.store.hold_many([holds(1, kind=kind) for kind in kinds])
    assert [outcome.status for outcome in outcomes] == [Status.STARTING, Status.DRAINING, Status.DRAINING]
    assert [one.kind for one in (await row_of(world, 1)).holds] == sorted(kinds)
    outcomes = await world.store.hold_many([releases(1, kind=kind) for kind in reversed(kinds)])
    assert [outcome.status for outcome in outcomes] == [Status.DRAINING, Status.STARTING, Status.ALIVE]
    assert {outcome.kind for outcome in outcomes} == {OutcomeKind.APPLIED}


@pytest.mark.parametrize(
    ("own", "reported", "after"),
    [
        ("alive", None, Status.ALIVE),
        ("starting", None, Status.STARTING),
        ("starting", Status.ALIVE, Status.ALIVE),
        ("alive", Status.DRAINING, Status.DRAINING),
        ("draining", Status.ALIVE, Status.ALIVE),
        ("draining", None, Status.DRAINING),
    ],
)
async def test_what_an_agent_reports_under_a_hold_counts_once_it_is_released(
    world: World, own: str, reported: Status | None, after: Status
) -> None:
    await enter(world, 1, status=own)
    await world.store.hold_many([holds(1, "upkeep", START)])
    if reported is not None:
        (outcome,) = await world.store.set_status_many([turns(1, reported, 9, "its own reason")])
        assert (outcome.kind, outcome.status) == (OutcomeKind.UNCHANGED, Status.DRAINING)
        assert outcome.cause == Cause(CauseKind.OPERATOR, "upkeep")
    row = await row_of(world, 1)
    assert (row.status, row.holds, row.cause) == (Status.DRAINING, (hold("upkeep", START),), hold("upkeep").cause)
    assert row.reported_status is (reported or Status(own))
    assert (row.seq == 9) is (reported is not None)
    before = len(await world.store.transitions("agent", 20))
    (outcome,) = await world.store.hold_many([releases(1, "over")])
    assert (outcome.kind, outcome.status) == (OutcomeKind.APPLIED, after)
    row = await row_of(world, 1)
    assert (row.status, row.reported_status, row.holds) == (after, after, ())
    # the release is history, also where the agent drains by its own report
    assert len(await world.store.transitions("agent", 20)) == before + 1
    if after is Status.STARTING:
        (outcome,) = await world.store.set_status_many([turns(1, Status.ALIVE, 12)])
        assert (outcome.kind, outcome.status) == (OutcomeKind.APPLIED, Status.ALIVE)


async def test_agent_that_reports_ready_under_a_readiness_hold_stays_starting(world: World) -> None:
    await enter(world, 1, status="starting")
    await world.store.hold_many([holds(1, kind=HoldKind.READINESS)])
    (alive, draining) = await world.store.set_status_many(
        [turns(1, Status.ALIVE, 1), turns(1, Status.DRAINING, 2, "x")]
    )
    assert (alive.kind, alive.status) == (OutcomeKind.UNCHANGED, Status.STARTING)
    assert (draining.kind, draining.status, draining.cause) == (OutcomeKind.APPLIED, Status.DRAINING, agents("x"))


@pytest.mark.parametrize("seq", [None, 9])
async def test_no_agent_can_report_starting_again(world: World, seq: int | None) -> None:
    await enter(world, 1)
    await world.store.hold_many([holds(1, "upkeep")])
    (outcome,) = await world.store.set_status_many([turns(1, Status.STARTING, seq)])
    assert outcome.kind is OutcomeKind.FORBIDDEN


@pytest.mark.parametrize("how", ["by a change", "by its lease"])
async def test_instance_that_dies_under_a_hold_has_none(world: World, how: str) -> None:
    await enter(world, 1)
    await world.store.hold_many([holds(1, "upkeep", START)])
    if how == "by a change":
        await world.store.set_status_many([turns(1, Status.DEAD, 9, "stopped")])
    else:
        await world.age(iid(1), 300.0)
        assert await world.store.expire_stale(15.0, 10) == [iid(1)]
    row = await row_of(world, 1)
    assert (row.status, row.reported_status, row.holds) == (Status.DEAD, Status.DEAD, ())
    assert row.cause is not None
    assert row.cause.kind is (CauseKind.AGENT if how == "by a change" else CauseKind.LEASE_EXPIRED)
    placed, released = await world.store.hold_many([holds(1), releases(1)])
    assert [placed.kind, released.kind] == [OutcomeKind.DEAD, OutcomeKind.UNCHANGED]
    assert await row_of(world, 1) == row


async def test_hold_of_an_unknown_instance_is_unknown(world: World) -> None:
    await enter(world, 1)
    outcomes = await world.store.hold_many([holds(7), releases(7), holds(1)])
    assert [outcome.kind.value for outcome in outcomes] == ["unknown", "unknown", "applied"]


async def test_registration_again_keeps_holds_and_cause(world: World) -> None:
    await enter(world, 1)
    await world.store.hold_many([holds(1, "upkeep", START)])
    before = await row_of(world, 1)
    await world.store.register_many([joins(1, seq=9)])
    row = await row_of(world, 1)
    assert (row.status, row.reported_status, row.seq) == (Status.DRAINING, Status.ALIVE, 9)
    assert (row.holds, row.cause) == (before.holds, before.cause)


async def test_agent_that_drains_by_its_own_report_ends_that_itself(world: World) -> None:
    await enter(world, 1)
    await world.store.set_status_many([turns(1, Status.DRAINING, 8)])
    assert (await row_of(world, 1)).holds == ()
    (outcome,) = await world.store.hold_many([releases(1)])
    assert (outcome.kind, outcome.status) == (OutcomeKind.UNCHANGED, Status.DRAINING)
    (outcome,) = await world.store.set_status_many([turns(1, Status.ALIVE, 9)])
    assert (outcome.kind, outcome.status) == (OutcomeKind.APPLIED, Status.ALIVE)


@pytest.mark.parametrize(
    "bad",
    [
        holds(1, "x" * (MAX_TEXT_CHARS + 1)),
        holds(1, by="x" * 256),
        holds(1, "half a pair \ud800"),
        holds(1, "nul \x00"),
        holds(1, None, datetime.max.replace(tzinfo=UTC)),
    ],
)
async def test_hold_that_cannot_be_stored_is_refused_with_its_whole_batch(world: World, bad: HoldChange) -> None:
    before = await enter(world, 1)
    with pytest.raises(StoreRejectedError):
        await world.store.hold_many([holds(1), bad])
    assert await row_of(world, 1) == before


# When it happened


async def test_change_that_is_stored_late_keeps_the_time_at_which_it_happened(world: World) -> None:
    before = await enter(world, 1)
    await world.live_longer(3600.0)
    await world.store.set_status_many([replace(turns(1, Status.DEAD, None, "killed"), age_s=600.0)])
    row, last = await row_of(world, 1), (await world.store.transitions("agent", 1))[0]
    assert row.stopped_at is not None
    late_s = (before.status_changed_at - row.stopped_at).total_seconds()
    assert late_s == pytest.approx(600.0, abs=60.0)
    assert row.stopped_at == row.status_changed_at == last.at


async def test_transitions_of_one_instance_keep_their_order_whatever_their_ages_are(world: World) -> None:
    await enter(world, 1)
    ages = [(turns(1, Status.DRAINING, 5), 1e6), (turns(1, Status.ALIVE, 6), 1e8), (turns(1, Status.DEAD, 7), 0.0)]
    await world.store.set_status_many([replace(change, age_s=age_s) for change, age_s in ages])
    times = [one.at for one in await world.store.transitions("agent", 10)]
    assert times == sorted(times, reverse=True)
    row = await row_of(world, 1)
    assert row.stopped_at is not None
    assert row.stopped_at > row.started_at


@pytest.mark.parametrize("age_s", [-1.0, float("nan"), 1e10])
async def test_age_that_cannot_be_is_refused_with_its_whole_batch(world: World, age_s: float) -> None:
    before = await enter(world, 1)
    with pytest.raises(StoreRejectedError):
        await world.store.set_status_many([turns(1, Status.DRAINING), replace(turns(1, Status.DEAD), age_s=age_s)])
    assert await row_of(world, 1) == before


# What becomes known of a death later


async def test_cause_of_a_death_is_refined_in_the_row_and_in_the_history(world: World) -> None:
    exited, better = Cause(CauseKind.PROCESS_EXITED, "pid 7"), Cause(CauseKind.OUT_OF_MEMORY, "of its node")
    for number in (1, 2, 3, 4):
        await enter(world, number)
    await world.store.set_status_many([turns(number, Status.DEAD, None, exited) for number in (1, 2)])
    await world.store.set_status_many([turns(3, Status.DEAD, 9, "stopped")])
    causes = {iid(1): better, iid(2): Cause(CauseKind.LEASE_EXPIRED), iid(3): better, iid(4): better, iid(9): better}
    assert await world.store.refine_causes(causes) == [iid(1)]
    assert await world.store.refine_causes(causes) == [iid(1)]
    known = {iid(1): better, iid(2): exited, iid(3): agents("stopped"), iid(4): None}
    assert {row.instance_id: row.cause for row in await world.store.instances("agent", 9)} == known
    deaths = [one for one in await world.store.transitions("agent", 9) if one.to_status is Status.DEAD]
    del known[iid(4)]
    assert {one.instance_id: one.cause for one in deaths} == known
    assert await world.store.refine_causes({}) == []


@pytest.mark.parametrize("known", [None, *CauseKind])
async def test_only_an_observed_end_is_refined_and_by_an_explanation_alone(
    world: World, known: CauseKind | None
) -> None:
    first = None if known is None else Cause(known, "first")
    for number, better in enumerate(CauseKind):
        await enter(world, number)
        await world.store.set_status_many([turns(number, Status.DEAD, None, first)])
        refined = await world.store.refine_causes({iid(number): Cause(better, "better")})
        assert refined == ([iid(number)] if is_refined_by(first, Cause(better, "better")) else [])
