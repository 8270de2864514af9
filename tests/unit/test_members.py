"""The registry's memory of the living."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seedcore.core.answers import InstanceFilter, NotResolved, Outcome, OutcomeKind
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import Change, HoldChange, RegisterChange, StatusChange
from seedcore.core.errors import RegistryFullError
from seedcore.core.holds import HoldKind
from seedcore.core.instances import Instance, Verdict
from seedcore.core.lease import LeaseTerms
from seedcore.core.lifecycle import Status
from seedcore.core.member_queries import count_by_status, observed, page, resolve
from seedcore.core.members import Members, Renewal
from seedcore.core.recent_deaths import RecentDeaths
from seedcore.core.selection import best
from seedcore.core.verdict import Beats
from seedcore.store.memory import MemoryStore
from tests.builders import START, FakeClock, hold, holds, iid, instance, joins, readies, releases, turns

TERMS = LeaseTerms(beat_interval_s=5.0, lease_s=15.0)
EVERYONE = InstanceFilter(statuses=None, fresh_only=False)
FIRST = ("", iid(0))
STOPPED = Cause(CauseKind.AGENT, "stopped")
LAPSED = Cause(CauseKind.LEASE_EXPIRED)


def everyone(members: Members) -> list[Instance]:
    """Every live instance."""
    return list(members)


def death(members: Members, instance_id: str) -> Outcome:
    """What the members answers to a status that no living instance refuses as dead."""
    return members.set_status(StatusChange(instance_id, Status.DRAINING, 0), 0.0, START)


def is_dead(members: Members, instance_id: str) -> bool:
    """Whether the members remembers the instance as dead."""
    return death(members, instance_id).kind is OutcomeKind.DEAD


def cause_of_death(members: Members, instance_id: str) -> Cause | None:
    """Why, by the members's answer."""
    return death(members, instance_id).cause


@pytest.fixture
def members() -> Members:
    members = Members(TERMS, capacity=100)
    members.set_epoch("epoch-1")
    return members


@pytest.fixture
def few_deaths() -> Members:
    """Remembers two deaths."""
    members = Members(TERMS, capacity=100, deaths=RecentDeaths(capacity=2))
    members.set_epoch("epoch-1")
    return members


def enter(members: Members, number: int, logical_id: str = "agent", now_s: float = 0.0, status: str = "alive") -> None:
    """The number-th instance joins and comes to `status`."""
    members.register(joins(number, logical_id, seq=1), now_s, START)
    if status != "starting":
        members.set_status(turns(number, Status(status), seq=2), now_s, START)


def listed(members: Members, wanted: InstanceFilter = EVERYONE, now_s: float = 0.0, limit: int = 1000) -> list[str]:
    rows, _ = page(members, wanted, FIRST, limit, now_s)
    return [row.instance_id for row in rows]


# Changes


def test_registered_instance_is_there_and_starting(members: Members) -> None:
    outcome = members.register(joins(1, organ_id="vision", seq=3), 0.0, START)
    assert (outcome.kind, outcome.status, outcome.cluster_epoch) == (OutcomeKind.APPLIED, Status.STARTING, "epoch-1")
    assert len(members) == 1
    assert iid(1) in members
    row = members.get(iid(1))
    assert row is not None
    assert (row.organ_id, row.seq, row.started_at) == ("vision", 3, START)
    assert list(everyone(members)) == members.instances_of("agent") == [row]
    assert members.get(iid(2)) is None
    assert members.instances_of("unregistered") == []


def test_full_memory_refuses_newcomers_and_still_serves_those_it_has() -> None:
    members = Members(TERMS, capacity=1)
    members.register(joins(1), 0.0, START)
    version = members.feed.version
    with pytest.raises(RegistryFullError, match="limit of 1"):
        members.register(joins(2), 0.0, START)
    assert members.feed.version == version
    assert members.register(joins(1, seq=1), 0.0, START).kind is OutcomeKind.UNCHANGED
    members.set_status(turns(1, Status.DEAD), 0.0, START)
    assert members.register(joins(2), 0.0, START).kind is OutcomeKind.APPLIED


def test_dead_instance_is_gone_remembered_and_never_comes_back(members: Members) -> None:
    enter(members, 1)
    members.set_status(turns(1, Status.DEAD, 3, cause="stopped"), 0.0, START)
    assert iid(1) not in members
    assert members.instances_of("agent") == []
    assert is_dead(members, iid(1))
    assert cause_of_death(members, iid(1)) == STOPPED
    for outcome in (
        members.register(joins(1, seq=9), 0.0, START),
        members.set_status(turns(1, Status.ALIVE, 9), 0.0, START),
    ):
        assert (outcome.kind, outcome.status, outcome.cause) == (OutcomeKind.DEAD, Status.DEAD, STOPPED)
    assert members.renew([iid(1)], 1.0).dead == (iid(1),)


def test_dead_are_remembered_up_to_a_bound(few_deaths: Members) -> None:
    members = few_deaths
    for number in (1, 2, 3):
        enter(members, number)
        members.set_status(turns(number, Status.DEAD), 0.0, START)
    assert [is_dead(members, iid(number)) for number in (1, 2, 3)] == [False, True, True]
    assert cause_of_death(members, iid(1)) is None


def test_status_of_an_unknown_instance_is_unknown(members: Members) -> None:
    assert members.set_status(turns(1, Status.ALIVE), 0.0, START).kind is OutcomeKind.UNKNOWN


def test_every_visible_change_raises_the_version(members: Members) -> None:
    versions = [members.feed.version]
    members.register(joins(1), 0.0, START)
    versions.append(members.feed.version)
    members.set_status(turns(1, Status.ALIVE, 1), 0.0, START)
    versions.append(members.feed.version)
    members.set_epoch("epoch-2")
    versions.append(members.feed.version)
    members.forget(iid(1))
    versions.append(members.feed.version)
    assert versions == sorted(set(versions))
    members.forget(iid(1))
    members.set_epoch("epoch-2")
    members.set_status(turns(1, Status.ALIVE, 2), 0.0, START)
    assert members.feed.version == versions[-1]


def test_agents_own_change_renews_its_lease_and_the_registrys_does_not(members: Members) -> None:
    enter(members, 1, now_s=0.0)
    members.set_status(turns(1, Status.DRAINING, seq=None), 10.0, START)
    assert members.silence.silence_s(iid(1), 10.0) == 10.0
    members.set_status(turns(1, Status.ALIVE, seq=3), 12.0, START)
    assert members.silence.silence_s(iid(1), 12.0) == 0.0
    members.register(joins(1, seq=4), 20.0, START)
    assert members.silence.silence_s(iid(1), 20.0) == 0.0


def test_agents_own_hold_renews_its_lease_and_others_do_not(members: Members) -> None:
    enter(members, 1, now_s=0.0)
    members.hold(holds(1), START, 10.0)
    assert members.silence.silence_s(iid(1), 10.0) == 10.0
    members.hold(readies(1, False, 3, "loading"), START, 12.0)
    assert members.silence.silence_s(iid(1), 12.0) == 0.0
    members.hold(readies(1, True, 3), START, 20.0)
    assert members.silence.silence_s(iid(1), 20.0) == 0.0
    assert members.get(iid(1)).hold(HoldKind.READINESS) is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("is_ahead", [True, False])
def test_readiness_of_the_later_state_counts_where_memory_and_store_differ(members: Members, is_ahead: bool) -> None:
    enter(members, 1, now_s=0.0)
    members.hold(readies(1, True, 5), START, 0.0)
    stored = instance(1, holds=(hold("loading", kind=HoldKind.READINESS),), seq=4 if is_ahead else 6)
    members.adopt(stored, 0.0)
    row = members.get(iid(1))
    assert row is not None
    assert row.status is (Status.ALIVE if is_ahead else Status.STARTING)
    members.adopt(replace(stored, seq=7, holds=(hold("by ann"),)), 0.0)
    assert {held.kind for held in members.get(iid(1)).holds} == {HoldKind.OPERATOR}  # type: ignore[union-attr]


@st.composite
def changes(draw: st.DrawFn) -> Change:
    number, seq = draw(st.integers(1, 4)), draw(st.integers(0, 8))
    if draw(st.integers(0, 2)) == 0:
        return joins(number, draw(st.sampled_from(["a", "b"])), seq, organ_id=draw(st.sampled_from(["x", "y"])))
    if draw(st.integers(0, 2)) == 0:
        kind = draw(st.sampled_from(HoldKind))
        reason, seconds = draw(st.none() | st.just("why")), draw(st.none() | st.integers(1, 2))
        expires_at = None if seconds is None else START + timedelta(seconds=seconds)
        own = readies(number, draw(st.booleans()), seq, reason)
        return draw(
            st.sampled_from([holds(number, reason, expires_at, kind=kind), releases(number, reason, kind), own, own])
        )
    return turns(
        number, draw(st.sampled_from(Status)), draw(st.none() | st.just(seq)), draw(st.none() | st.just("why"))
    )


@given(st.lists(changes(), max_size=30))
async def test_memory_answers_as_the_store_does(history: list[Change]) -> None:
    members = Members(TERMS, capacity=100)
    members.set_epoch("epoch-1")
    store = MemoryStore(FakeClock())
    for change in history:
        if isinstance(change, RegisterChange):
            ours = members.register(change, 0.0, START)
            (theirs,) = await store.register_many([change])
        elif isinstance(change, HoldChange):
            ours = members.hold(change, START, 0.0)
            (theirs,) = await store.hold_many([change])
        else:
            ours = members.set_status(change, 0.0, START)
            (theirs,) = await store.set_status_many([change])
        if is_dead(members, change.instance_id) and ours.kind is not OutcomeKind.APPLIED:
            # of the dead only id and cause are remembered
            assert theirs.status is Status.DEAD
        else:
            assert ours == theirs
    stored = {row.instance_id: row async for row in store.load_live()}
    assert {row.instance_id: row for row in everyone(members)} == stored


# Taking over from the store


def test_adopted_instance_gets_a_whole_lease(members: Members) -> None:
    members.adopt(instance(1, age_s=1000.0), now_s=50.0)
    assert members.silence.verdict(iid(1), 50.0) is Verdict.FRESH
    assert members.silence.lapsed(65.0) == []
    assert members.silence.lapsed(65.1) == [iid(1)]


def test_adoption_revives_no_instance_whose_death_is_not_in_the_store_yet(members: Members) -> None:
    members.adopt(instance(1), 0.0)
    members.set_status(StatusChange(iid(1), Status.DEAD, cause=Cause(CauseKind.NODE_DIED), number=1), 1.0, START)
    members.adopt(instance(1), 2.0)
    assert iid(1) not in members
    assert iid(1) in members.deaths
    # another registry has written since: what lives in its database lives, and any other death is final
    members.adopt(instance(2), 3.0)
    members.bury(iid(2), LAPSED)
    members.forget_all([iid(1)])
    for number in (1, 2):
        members.adopt(instance(number), 4.0)
    assert [row.instance_id for row in everyone(members)] == [iid(1)]
    assert members.deaths.cause_of(iid(2)) == LAPSED


def test_repeated_change_of_an_agent_renews_its_lease_and_a_change_of_others_does_not(members: Members) -> None:
    members.register(joins(1), 0.0, START)
    members.set_status(StatusChange(iid(1), Status.ALIVE, 2), 0.0, START)
    members.hold(holds(1), START)
    assert members.silence.silence_s(iid(1), 10.0) == 10.0
    members.register(joins(1), 11.0, START)
    assert members.silence.silence_s(iid(1), 11.0) == 0.0
    members.set_status(StatusChange(iid(1), Status.ALIVE, 2), 12.0, START)
    assert members.silence.silence_s(iid(1), 12.0) == 0.0
    assert members.instances_of("agent")[0].status is Status.DRAINING


@pytest.mark.parametrize("seq", [1, 9])
def test_adoption_keeps_the_holds_of_memory_and_of_the_store(members: Members, seq: int) -> None:
    enter(members, 1)
    ours, node, theirs = hold("ours"), hold("theirs", kind=HoldKind.NODE), hold("older")
    members.hold(holds(1, "ours"), START)
    members.adopt(instance(1, seq=seq, holds=(node, theirs)), 1.0)
    row = members.get(iid(1))
    assert row is not None
    assert (row.status, row.reported_status, row.holds) == (Status.DRAINING, Status.ALIVE, (node, ours))
    assert count_by_status(members) == {Status.STARTING: 0, Status.ALIVE: 0, Status.DRAINING: 1}


def test_expired_holds_are_returned_until_they_are_released(members: Members) -> None:
    for number, seconds in ((1, 10), (2, 20), (3, None)):
        enter(members, number)
        members.hold(holds(number, expires_at=None if seconds is None else START + timedelta(seconds=seconds)), START)
    members.hold(holds(1, kind=HoldKind.NODE, expires_at=START + timedelta(seconds=30)), START)
    assert members.expired_holds(START + timedelta(seconds=9), 10) == []
    at = START + timedelta(seconds=20)
    assert members.expired_holds(at, 10) == [(iid(1), HoldKind.OPERATOR), (iid(2), HoldKind.OPERATOR)]
    assert members.expired_holds(at, 1) == [(iid(1), HoldKind.OPERATOR)]
    members.hold(releases(1), at)
    members.forget(iid(2))
    assert members.expired_holds(at, 10) == []
    members.set_status(turns(1, Status.DEAD, 3), 0.0, START)
    assert members.expired_holds(START + timedelta(seconds=60), 10) == []


def test_the_agents_report_does_not_end_a_hold_and_a_release_restores_what_it_reported(members: Members) -> None:
    enter(members, 1, status="starting")
    members.hold(holds(1), START)
    assert resolve(members, "agent", 0.0).reason is NotResolved.DRAINING
    members.set_status(turns(1, Status.ALIVE, 2), 0.0, START)
    assert resolve(members, "agent", 0.0).reason is NotResolved.DRAINING
    members.hold(releases(1), START)
    assert resolve(members, "agent", 0.0).instance is not None
    assert members.hold(holds(9), START).kind is OutcomeKind.UNKNOWN
    members.set_status(turns(1, Status.DEAD, 3, "stopped"), 0.0, START)
    assert members.hold(holds(1), START) == Outcome(OutcomeKind.DEAD, Status.DEAD, None, STOPPED)


def test_later_change_of_the_agent_survives_adoption(members: Members) -> None:
    enter(members, 1)
    members.set_status(turns(1, Status.DRAINING, 3), 0.0, START)
    members.adopt(instance(1, seq=2, cluster_epoch="epoch-1b"), 1.0)
    row = members.get(iid(1))
    assert row is not None
    assert (row.status, row.seq, row.cluster_epoch) == (Status.DRAINING, 3, "epoch-1b")


def test_store_that_is_ahead_wins(members: Members) -> None:
    enter(members, 1, now_s=5.0)
    ahead = instance(1, seq=7, status=Status.DRAINING)
    members.adopt(ahead, 9.0)
    assert members.get(iid(1)) == ahead
    assert members.silence.silence_s(iid(1), 9.0) == 4.0


def test_death_in_the_store_wins_over_everything(members: Members) -> None:
    enter(members, 1)
    members.adopt(instance(1, seq=0, status=Status.DEAD, cause=LAPSED), 1.0)
    assert cause_of_death(members, iid(1)) == LAPSED
    members.adopt(instance(2, status=Status.DEAD), 1.0)
    assert is_dead(members, iid(2))
    assert len(members) == 0


@pytest.mark.parametrize("seq", [0, 99])
def test_id_that_the_store_knows_of_another_agent_is_that_agents(members: Members, seq: int) -> None:
    enter(members, 1, "ours")
    members.adopt(instance(1, "theirs", seq=seq), 1.0)
    assert members.instances_of("ours") == []
    assert [row.instance_id for row in members.instances_of("theirs")] == [iid(1)]
    assert listed(members) == [iid(1)]
    members.bury(iid(1), LAPSED)
    assert listed(members) == []


def test_overwriting_takes_the_state_of_the_store(members: Members) -> None:
    enter(members, 1, "ours", now_s=5.0)
    members.set_status(turns(1, Status.DRAINING, 9), 5.0, START)
    stored = instance(1, "theirs", seq=1)
    members.overwrite(stored, 7.0)
    assert members.get(iid(1)) == stored
    assert members.silence.silence_s(iid(1), 7.0) == 2.0
    assert members.instances_of("ours") == []
    members.overwrite(replace(stored, status=Status.DEAD, cause=LAPSED), 8.0)
    assert cause_of_death(members, iid(1)) == LAPSED


def test_burying_is_of_the_living_only(members: Members) -> None:
    enter(members, 1)
    members.bury(iid(1), LAPSED)
    members.bury(iid(2), LAPSED)
    assert cause_of_death(members, iid(1)) == LAPSED
    assert not is_dead(members, iid(2))


def test_forgotten_instance_is_unknown_not_dead(members: Members) -> None:
    enter(members, 1)
    members.forget(iid(1))
    assert members.renew([iid(1)], 1.0).unknown == (iid(1),)
    assert members.silence.verdict(iid(1), 1.0) is Verdict.UNKNOWN


# Epochs


def test_instances_taken_before_the_epoch_is_known_belong_to_it() -> None:
    members = Members(TERMS, capacity=10)
    enter(members, 1)
    assert resolve(members, "agent", 0.0).instance is not None
    members.register(joins(2, cluster_epoch="staged"), 0.0, START)
    # the epoch in which it was started counts once the store has returned where that belongs
    members.register(joins(3, started_epoch="epoch-4"), 0.0, START)
    shown, _ = page(members, InstanceFilter(statuses=None), ("", ""), 10, 0.0)
    assert {row.instance_id for row in shown} == {iid(1), iid(3)}
    members.set_epoch("epoch-5")
    epochs = {row.instance_id: row.cluster_epoch for row in everyone(members)}
    assert epochs == {iid(1): "epoch-5", iid(2): "staged", iid(3): "epoch-5"}


def test_beats_of_instances_that_ended_with_their_epoch_are_answered_with_it(members: Members) -> None:
    enter(members, 1)
    enter(members, 2)
    members.bury(iid(1), LAPSED)
    members.set_epoch("green")
    for number in (2, 3):
        members.retire(iid(number))
    renewal = members.renew([iid(1), iid(2), iid(3)], 1.0)
    assert (renewal.unknown, renewal.dead, renewal.retired) == ((iid(3),), (iid(1), iid(2)), {iid(2): "epoch-1"})
    assert cause_of_death(members, iid(2)) == Cause(CauseKind.EPOCH_RETIRED, "epoch-1")
    assert members.register(joins(2, seq=1), 1.0, START).kind is OutcomeKind.RETIRED_EPOCH
    assert members.register(joins(1, seq=1), 1.0, START).kind is OutcomeKind.DEAD
    members.forget_all([])
    assert members.renew([iid(2)], 1.0).unknown == (iid(2),)


@pytest.mark.parametrize("is_expired", [False, True])
def test_an_actor_that_was_in_another_epoch_is_not_shown_in_this_one(members: Members, is_expired: bool) -> None:
    members.register(joins(1, actor_id="a1", seq=1), 0.0, START)
    members.set_epoch("green")
    if is_expired:
        members.retire(iid(1))
    members.register(joins(2, actor_id="a1", seq=1), 0.0, START)
    members.register(joins(3, actor_id="a2", seq=1), 0.0, START)
    members.register(joins(4, actor_id="a2", started_epoch="epoch-1", seq=1), 0.0, START)
    shown = {row.instance_id: row.cluster_epoch for row in everyone(members) if row.instance_id != iid(1)}
    assert shown == {iid(2): "epoch-1", iid(3): "green", iid(4): "epoch-1"}


def test_flip_shows_the_staged_and_hides_the_rest_in_one_step(members: Members) -> None:
    enter(members, 1, "blue")
    members.register(joins(2, "green", cluster_epoch="green"), 0.0, START)
    members.set_status(turns(2, Status.ALIVE, 1), 0.0, START)
    assert listed(members) == [iid(1)]
    hidden = resolve(members, "green", 0.0)
    assert (hidden.instance, hidden.reason, hidden.is_known) == (None, NotResolved.OTHER_EPOCH, True)
    members.set_epoch("green")
    assert listed(members) == [iid(2)]
    assert resolve(members, "green", 0.0).instance is not None
    assert resolve(members, "blue", 0.0).instance is None
    assert listed(members, replace(EVERYONE, epoch="epoch-1")) == [iid(1)]


# Leases


def test_beat_renews_those_it_names_and_returns_the_others(members: Members) -> None:
    for number in (1, 2, 3):
        enter(members, number, now_s=0.0)
    members.set_status(turns(3, Status.DEAD), 0.0, START)
    assert members.renew([iid(1), iid(2)], 3.0) == Renewal((), ())
    renewal = members.renew([iid(1), iid(3), iid(9)], 5.0)
    assert renewal == Renewal(unknown=(iid(9),), dead=(iid(3),))
    assert [members.silence.silence_s(iid(number), 5.0) for number in (1, 2)] == [0.0, 2.0]


def test_lapsed_are_the_longest_silent_first(members: Members) -> None:
    for number, heard_s in ((1, 30.0), (2, 10.0), (3, 20.0), (4, 40.0)):
        enter(members, number, now_s=heard_s)
    assert members.silence.lapsed(50.0) == [iid(2), iid(3), iid(1)]
    assert members.silence.lapsed(25.0) == []


@given(
    st.dictionaries(st.integers(1, 20), st.floats(0.0, 100.0), min_size=1),
    st.floats(0.0, 100.0),
    st.floats(100.0, 200.0),
)
def test_absence_of_the_registry_is_no_silence(seen: dict[int, float], absence_s: float, now_s: float) -> None:
    members = Members(TERMS, capacity=100)
    for number, seen_s in seen.items():
        enter(members, number, now_s=seen_s)
    members.silence.credit(absence_s, now_s)
    for number, seen_s in seen.items():
        silence_s = members.silence.silence_s(iid(number), now_s)
        assert silence_s >= 0.0
        assert silence_s == pytest.approx(max(0.0, now_s - seen_s - absence_s))
        beats = TERMS.beats(silence_s)
        expected = Verdict.SUSPECT if beats is Beats.LAPSED else Verdict(beats.value)
        assert members.silence.verdict(iid(number), now_s) is expected


def test_observed_instance_has_the_time_of_its_last_beat(members: Members) -> None:
    enter(members, 1, now_s=10.0)
    row = members.get(iid(1))
    assert row is not None
    assert observed(members, row, 13.0, START).last_heartbeat == START - timedelta(seconds=3)
    assert observed(members, row, 9.0, START).last_heartbeat == START


# Reading


def test_resolve_returns_the_best_alive_instance(members: Members) -> None:
    for number in (3, 1, 2):
        enter(members, number, now_s=0.0)
    members.set_status(turns(1, Status.DRAINING, 3), 0.0, START)
    resolution = resolve(members, "agent", 0.0)
    assert resolution.is_known
    assert resolution.instance == best(row for row in everyone(members) if row.status is Status.ALIVE)


def test_resolve_names_the_reason_of_an_agent_that_is_not_ready(members: Members) -> None:
    enter(members, 1)
    members.hold(readies(1, False, 3, "loading weights"), START, 0.0)
    found = resolve(members, "agent", 0.0)
    assert (found.instance, found.reason, found.detail) == (
        None,
        NotResolved.NOT_READY,
        "it is not ready: loading weights",
    )
    assert found.is_known
    members.hold(holds(1, "upkeep"), START)
    assert resolve(members, "agent", 0.0).reason is NotResolved.DRAINING
    members.hold(releases(1), START)
    members.hold(readies(1, True, 4), START, 0.0)
    assert resolve(members, "agent", 0.0).instance is not None


@pytest.mark.parametrize(
    ("status", "now_s", "reason"),
    [
        ("starting", 0.0, NotResolved.STARTING),
        ("draining", 0.0, NotResolved.DRAINING),
        ("alive", 8.0, NotResolved.LATE),
        ("alive", 12.0, NotResolved.SUSPECT),
        ("alive", 40.0, NotResolved.LEASE_EXPIRED),
    ],
)
def test_resolve_returns_the_reason_why_a_known_agent_is_not_resolved(
    members: Members, status: str, now_s: float, reason: NotResolved
) -> None:
    enter(members, 1, status=status)
    resolution = resolve(members, "agent", now_s)
    assert (resolution.instance, resolution.reason, resolution.is_known) == (None, reason, True)
    assert resolution.detail


def test_resolve_of_an_agent_that_is_not_registered(members: Members) -> None:
    resolution = resolve(members, "unregistered", 0.0)
    assert (resolution.instance, resolution.is_known) == (None, False)
    assert resolution.reason is NotResolved.NOT_REGISTERED


@pytest.mark.parametrize("cause", [Cause(CauseKind.PROCESS_EXITED, "pid 7"), None])
def test_resolve_has_the_cause_of_the_last_death_of_an_agent(members: Members, cause: Cause | None) -> None:
    for number in (1, 2):
        enter(members, number)
    members.set_status(turns(1, Status.DEAD, cause="long ago"), 0.0, START)
    members.set_status(turns(2, Status.DEAD, cause=cause), 0.0, START)
    resolution = resolve(members, "agent", 0.0)
    assert (resolution.instance, resolution.is_known) == (None, False)
    assert resolution.reason is NotResolved.DIED
    assert str(cause or "dead") in str(resolution.detail)
    assert "long ago" not in str(resolution.detail)
    enter(members, 3)
    assert resolve(members, "agent", 0.0).instance is not None


def test_causes_of_death_are_remembered_up_to_a_bound(few_deaths: Members) -> None:
    members = few_deaths
    for number, logical_id in enumerate(["first", "second", "first", "third"]):
        enter(members, number, logical_id)
        members.set_status(turns(number, Status.DEAD, cause="why"), 0.0, START)
    reasons = [resolve(members, logical_id, 0.0).reason for logical_id in ("first", "second", "third")]
    assert reasons == [NotResolved.DIED, NotResolved.NOT_REGISTERED, NotResolved.DIED]


def test_silent_instance_does_not_hide_a_fresh_one(members: Members) -> None:
    enter(members, 1, now_s=0.0)
    enter(members, 2, now_s=30.0)
    chosen = resolve(members, "agent", 30.0).instance
    assert chosen is not None
    assert chosen.instance_id == iid(2)


@given(st.lists(st.text("aäß\U0001f600\uffff", min_size=1, max_size=3), max_size=25), st.integers(1, 7))
def test_pages_have_no_gap_and_no_repeat(names: list[str], limit: int) -> None:
    members = Members(TERMS, capacity=100)
    for number, name in enumerate(names):
        members.register(joins(number, name), 0.0, START)
    after, seen, has_more = FIRST, list[Instance](), True
    while has_more:
        rows, has_more = page(members, EVERYONE, after, limit, 0.0)
        assert len(rows) == limit or not has_more
        seen += rows
        if rows:
            after = (rows[-1].logical_id, rows[-1].instance_id)
    keys = [(row.logical_id, row.instance_id) for row in seen]
    assert keys == sorted((name, iid(number)) for number, name in enumerate(names))


def test_page_shows_what_is_wanted_and_only_that(members: Members) -> None:
    enter(members, 1, "a", now_s=0.0)
    enter(members, 2, "b", now_s=30.0)
    enter(members, 3, "c", now_s=30.0, status="starting")
    assert listed(members, now_s=30.0) == [iid(1), iid(2), iid(3)]
    assert listed(members, InstanceFilter(), now_s=30.0) == [iid(2)]
    assert listed(members, InstanceFilter(statuses=None), now_s=30.0) == [iid(2), iid(3)]
    members.register(joins(4, "aa"), 0.0, START)
    members.forget(iid(2))
    assert listed(members) == [iid(1), iid(4), iid(3)]


def test_counts_are_by_status_of_the_living(members: Members) -> None:
    for number, status in enumerate(["starting", "alive", "alive", "draining", "dead"]):
        enter(members, number, status=status)
    assert count_by_status(members) == {Status.STARTING: 1, Status.ALIVE: 2, Status.DRAINING: 1}


def test_late_instance_is_resolved_only_where_that_is_allowed(members: Members) -> None:
    enter(members, 1, now_s=0.0)
    assert resolve(members, "agent", 8.0).instance is None
    late = resolve(members, "agent", 8.0, allow_late=True)
    assert late.instance is not None
    assert late.verdict is Verdict.LATE
    assert resolve(members, "agent", 12.0, allow_late=True).instance is None
    enter(members, 2, now_s=8.0)
    fresh = resolve(members, "agent", 8.0, allow_late=True)
    assert fresh.instance is not None
    assert (fresh.instance.instance_id, fresh.verdict) == (iid(2), Verdict.FRESH)


def test_instance_reported_dead_is_suspect_until_its_next_beat(members: Members) -> None:
    enter(members, 1, now_s=0.0)
    members.silence.report_dead(iid(1))
    members.silence.report_dead(iid(2))
    resolution = resolve(members, "agent", 0.0, allow_late=True)
    assert resolution.instance is None
    assert resolution.reason is NotResolved.REPORTED_DEAD
    members.renew([iid(1)], 1.0)
    assert resolve(members, "agent", 1.0).instance is not None


def test_callbacks_get_each_instance_that_appears_moves_and_vanishes(members: Members) -> None:
    calls: list[str] = []
    members.on_appear = lambda row: calls.append(f"+{row.instance_id[-1]} {row.pid}")
    members.on_vanish = lambda row: calls.append(f"-{row.instance_id[-1]} {row.pid}")
    enter(members, 1)
    members.register(joins(1, seq=9, pid=7), 0.0, START)
    members.register(joins(1, seq=10, pid=8, node_id="there"), 0.0, START)
    members.renew([iid(1)], 1.0)
    members.adopt(instance(2, "other"), 1.0)
    members.forget(iid(2))
    members.set_status(turns(1, Status.DEAD, 11), 2.0, START)
    assert calls == ["+1 None", "+1 None", "+1 7", "-1 7", "+1 8", "+2 None", "-2 None", "-1 8"]
