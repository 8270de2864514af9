"""The registry's memory of the living."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seedcore.core import roster as roster_module
from seedcore.core.answers import InstanceFilter, NotResolved, Outcome, OutcomeKind
from seedcore.core.changes import Change, RegisterChange, StatusChange
from seedcore.core.errors import RegistryFullError
from seedcore.core.instances import Instance, Verdict
from seedcore.core.lease import LeaseTerms
from seedcore.core.lifecycle import Status
from seedcore.core.roster import Roster
from seedcore.core.selection import best
from seedcore.core.verdict import Beats
from seedcore.store.memory import MemoryStore
from tests.builders import START, FakeClock, iid, instance, joins, turns

TERMS = LeaseTerms(beat_interval_s=5.0, lease_s=15.0)
EVERYONE = InstanceFilter(statuses=None, fresh_only=False)
FIRST = ("", iid(0))


def everyone(roster: Roster) -> list[Instance]:
    """Every live instance."""
    return list(roster._live.by_id.values())


def death(roster: Roster, instance_id: str) -> Outcome:
    """What the roster answers to a status that no living instance refuses as dead."""
    return roster.set_status(StatusChange(instance_id, Status.DRAINING, 0), 0.0, START)


def is_dead(roster: Roster, instance_id: str) -> bool:
    """Whether the roster remembers the instance as dead."""
    return death(roster, instance_id).kind is OutcomeKind.DEAD


def cause_of_death(roster: Roster, instance_id: str) -> str | None:
    """Why, by the roster's answer."""
    return death(roster, instance_id).cause


@pytest.fixture
def roster() -> Roster:
    roster = Roster(TERMS, capacity=100)
    roster.set_epoch("epoch-1")
    return roster


def enter(roster: Roster, number: int, logical_id: str = "agent", now_s: float = 0.0, status: str = "alive") -> None:
    """The number-th instance joins and comes to `status`."""
    roster.register(joins(number, logical_id, seq=1), now_s, START)
    if status != "starting":
        roster.set_status(turns(number, Status(status), seq=2), now_s, START)


def listed(roster: Roster, wanted: InstanceFilter = EVERYONE, now_s: float = 0.0, limit: int = 1000) -> list[str]:
    rows, _ = roster.page(wanted, FIRST, limit, now_s)
    return [row.instance_id for row in rows]


# Changes


def test_registered_instance_is_there_and_starting(roster: Roster) -> None:
    outcome = roster.register(joins(1, organ_id="vision", seq=3), 0.0, START)
    assert (outcome.kind, outcome.status, outcome.cluster_epoch) == (OutcomeKind.APPLIED, Status.STARTING, "epoch-1")
    assert len(roster) == 1
    assert iid(1) in roster
    row = roster.get(iid(1))
    assert row is not None
    assert (row.organ_id, row.seq, row.started_at) == ("vision", 3, START)
    assert list(everyone(roster)) == roster.instances_of("agent") == [row]
    assert roster.get(iid(2)) is None
    assert roster.instances_of("nobody") == []


def test_full_roster_refuses_newcomers_and_still_serves_those_it_has() -> None:
    roster = Roster(TERMS, capacity=1)
    roster.register(joins(1), 0.0, START)
    version = roster.version
    with pytest.raises(RegistryFullError, match="limit of 1"):
        roster.register(joins(2), 0.0, START)
    assert roster.version == version
    assert roster.register(joins(1, seq=1), 0.0, START).kind is OutcomeKind.UNCHANGED
    roster.set_status(turns(1, Status.DEAD), 0.0, START)
    assert roster.register(joins(2), 0.0, START).kind is OutcomeKind.APPLIED


def test_dead_instance_is_gone_remembered_and_never_comes_back(roster: Roster) -> None:
    enter(roster, 1)
    roster.set_status(turns(1, Status.DEAD, 3, cause="stopped"), 0.0, START)
    assert iid(1) not in roster
    assert roster.instances_of("agent") == []
    assert is_dead(roster, iid(1))
    assert cause_of_death(roster, iid(1)) == "stopped"
    for outcome in (
        roster.register(joins(1, seq=9), 0.0, START),
        roster.set_status(turns(1, Status.ALIVE, 9), 0.0, START),
    ):
        assert (outcome.kind, outcome.status, outcome.cause) == (OutcomeKind.DEAD, Status.DEAD, "stopped")
    assert roster.renew([iid(1)], 1.0).dead == (iid(1),)


def test_dead_are_remembered_up_to_a_bound(roster: Roster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster_module, "MAX_REMEMBERED_DEAD", 2)
    for number in (1, 2, 3):
        enter(roster, number)
        roster.set_status(turns(number, Status.DEAD), 0.0, START)
    assert [is_dead(roster, iid(number)) for number in (1, 2, 3)] == [False, True, True]
    assert cause_of_death(roster, iid(1)) is None


def test_status_of_an_unknown_instance_is_unknown(roster: Roster) -> None:
    assert roster.set_status(turns(1, Status.ALIVE), 0.0, START).kind is OutcomeKind.UNKNOWN


def test_every_visible_change_raises_the_version(roster: Roster) -> None:
    versions = [roster.version]
    roster.register(joins(1), 0.0, START)
    versions.append(roster.version)
    roster.set_status(turns(1, Status.ALIVE, 1), 0.0, START)
    versions.append(roster.version)
    roster.set_epoch("epoch-2")
    versions.append(roster.version)
    roster.forget(iid(1))
    versions.append(roster.version)
    assert versions == sorted(set(versions))
    roster.forget(iid(1))
    roster.set_epoch("epoch-2")
    roster.set_status(turns(1, Status.ALIVE, 2), 0.0, START)
    assert roster.version == versions[-1]


def test_agents_own_change_renews_its_lease_and_the_registrys_does_not(roster: Roster) -> None:
    enter(roster, 1, now_s=0.0)
    roster.set_status(turns(1, Status.DRAINING, seq=None), 10.0, START)
    assert roster.silence_s(iid(1), 10.0) == 10.0
    roster.set_status(turns(1, Status.ALIVE, seq=3), 12.0, START)
    assert roster.silence_s(iid(1), 12.0) == 0.0
    roster.register(joins(1, seq=4), 20.0, START)
    assert roster.silence_s(iid(1), 20.0) == 0.0


@st.composite
def changes(draw: st.DrawFn) -> Change:
    number, seq = draw(st.integers(1, 4)), draw(st.integers(0, 8))
    if draw(st.integers(0, 2)) == 0:
        return joins(number, draw(st.sampled_from(["a", "b"])), seq, organ_id=draw(st.sampled_from(["x", "y"])))
    return turns(
        number, draw(st.sampled_from(Status)), draw(st.none() | st.just(seq)), draw(st.none() | st.just("why"))
    )


@given(st.lists(changes(), max_size=30))
async def test_memory_answers_as_the_store_does(history: list[Change]) -> None:
    roster = Roster(TERMS, capacity=100)
    roster.set_epoch("epoch-1")
    store = MemoryStore(FakeClock())
    for change in history:
        if isinstance(change, RegisterChange):
            ours = roster.register(change, 0.0, START)
            (theirs,) = await store.register_many([change])
        else:
            ours = roster.set_status(change, 0.0, START)
            (theirs,) = await store.set_status_many([change])
        if is_dead(roster, change.instance_id) and ours.kind is not OutcomeKind.APPLIED:
            # of the dead only id and cause are remembered
            assert theirs.status is Status.DEAD
        else:
            assert ours == theirs
    stored = {row.instance_id: row async for row in store.load_live()}
    assert {row.instance_id: row for row in everyone(roster)} == stored


# Taking over from the store


def test_adopted_instance_gets_a_whole_lease(roster: Roster) -> None:
    roster.adopt(instance(1, age_s=1000.0), now_s=50.0)
    assert roster.verdict(iid(1), 50.0) is Verdict.FRESH
    assert roster.lapsed(65.0, 10) == []
    assert roster.lapsed(65.1, 10) != []


def test_adoption_revives_nobody_whose_death_is_not_in_the_store_yet(roster: Roster) -> None:
    roster.adopt(instance(1), 0.0)
    roster.set_status(StatusChange(iid(1), Status.DEAD, cause="its node died", number=1), 1.0, START)
    roster.adopt(instance(1), 2.0)
    assert iid(1) not in roster
    assert roster.is_dead(iid(1))
    # after another registry has written nothing of ours counts
    roster.forget_everybody()
    roster.adopt(instance(1), 3.0)
    assert iid(1) in roster


def test_what_an_agent_says_again_renews_its_lease_and_what_others_say_does_not(roster: Roster) -> None:
    roster.register(joins(1), 0.0, START)
    roster.set_status(StatusChange(iid(1), Status.ALIVE, 2), 0.0, START)
    roster.set_status(StatusChange(iid(1), Status.DRAINING, number=1), 10.0, START)
    assert roster.silence_s(iid(1), 10.0) == 10.0
    roster.register(joins(1), 11.0, START)
    assert roster.silence_s(iid(1), 11.0) == 0.0
    roster.set_status(StatusChange(iid(1), Status.ALIVE, 2), 12.0, START)
    assert roster.silence_s(iid(1), 12.0) == 0.0
    assert roster.instances_of("agent")[0].status is Status.DRAINING


def test_what_the_agent_told_us_later_survives_adoption(roster: Roster) -> None:
    enter(roster, 1)
    roster.set_status(turns(1, Status.DRAINING, 3), 0.0, START)
    roster.adopt(instance(1, seq=2, cluster_epoch="epoch-1b"), 1.0)
    row = roster.get(iid(1))
    assert row is not None
    assert (row.status, row.seq, row.cluster_epoch) == (Status.DRAINING, 3, "epoch-1b")


def test_store_that_is_ahead_wins(roster: Roster) -> None:
    enter(roster, 1, now_s=5.0)
    ahead = instance(1, seq=7, status=Status.DRAINING)
    roster.adopt(ahead, 9.0)
    assert roster.get(iid(1)) == ahead
    assert roster.silence_s(iid(1), 9.0) == 4.0


def test_death_in_the_store_wins_over_everything(roster: Roster) -> None:
    enter(roster, 1)
    roster.adopt(instance(1, seq=0, status=Status.DEAD, cause="expired"), 1.0)
    assert cause_of_death(roster, iid(1)) == "expired"
    roster.adopt(instance(2, status=Status.DEAD), 1.0)
    assert is_dead(roster, iid(2))
    assert len(roster) == 0


@pytest.mark.parametrize("seq", [0, 99])
def test_id_that_the_store_knows_of_another_agent_is_that_agents(roster: Roster, seq: int) -> None:
    enter(roster, 1, "ours")
    roster.adopt(instance(1, "theirs", seq=seq), 1.0)
    assert roster.instances_of("ours") == []
    assert [row.instance_id for row in roster.instances_of("theirs")] == [iid(1)]
    assert listed(roster) == [iid(1)]
    roster.bury(iid(1), "gone")
    assert listed(roster) == []


def test_overwriting_takes_the_stores_word(roster: Roster) -> None:
    enter(roster, 1, "ours", now_s=5.0)
    roster.set_status(turns(1, Status.DRAINING, 9), 5.0, START)
    told = instance(1, "theirs", seq=1)
    roster.overwrite(told, 7.0)
    assert roster.get(iid(1)) == told
    assert roster.silence_s(iid(1), 7.0) == 2.0
    assert roster.instances_of("ours") == []
    roster.overwrite(replace(told, status=Status.DEAD, cause="said so"), 8.0)
    assert cause_of_death(roster, iid(1)) == "said so"


def test_burying_is_of_the_living_only(roster: Roster) -> None:
    enter(roster, 1)
    roster.bury(iid(1), "its epoch is retired")
    roster.bury(iid(2), "never seen")
    assert cause_of_death(roster, iid(1)) == "its epoch is retired"
    assert not is_dead(roster, iid(2))


def test_forgotten_instance_is_unknown_not_dead(roster: Roster) -> None:
    enter(roster, 1)
    roster.forget(iid(1))
    assert roster.renew([iid(1)], 1.0).unknown == (iid(1),)
    assert roster.verdict(iid(1), 1.0) is Verdict.UNKNOWN


# Epochs


def test_instances_taken_before_the_epoch_is_known_belong_to_it() -> None:
    roster = Roster(TERMS, capacity=10)
    enter(roster, 1)
    assert roster.resolve("agent", 0.0).instance is not None
    roster.register(joins(2, cluster_epoch="staged"), 0.0, START)
    # its own word for where it was started counts once the store has said where that belongs
    roster.register(joins(3, started_epoch="epoch-4"), 0.0, START)
    shown, _ = roster.page(InstanceFilter(statuses=None), ("", ""), 10, 0.0)
    assert {row.instance_id for row in shown} == {iid(1), iid(3)}
    roster.set_epoch("epoch-5")
    epochs = {row.instance_id: row.cluster_epoch for row in everyone(roster)}
    assert epochs == {iid(1): "epoch-5", iid(2): "staged", iid(3): "epoch-5"}


def test_beats_of_those_that_ended_with_their_epoch_are_told_so_and_of_no_other_dead(roster: Roster) -> None:
    enter(roster, 1)
    enter(roster, 2)
    roster.bury(iid(1), "lease expired")
    roster.set_epoch("green")
    for number in (2, 3):
        roster.retire(iid(number))
    renewal = roster.renew([iid(1), iid(2), iid(3)], 1.0)
    assert (renewal.unknown, renewal.dead, renewal.retired) == ((iid(3),), (iid(1), iid(2)), {iid(2): "epoch-1"})
    assert cause_of_death(roster, iid(2)) == "epoch epoch-1 retired"
    assert roster.register(joins(2, seq=1), 1.0, START).kind is OutcomeKind.RETIRED_EPOCH
    assert roster.register(joins(1, seq=1), 1.0, START).kind is OutcomeKind.DEAD
    roster.forget_everybody()
    assert roster.renew([iid(2)], 1.0).unknown == (iid(2),)


@pytest.mark.parametrize("is_expired", [False, True])
def test_an_actor_that_was_in_another_epoch_is_not_shown_in_this_one(roster: Roster, is_expired: bool) -> None:
    roster.register(joins(1, actor_id="a1", seq=1), 0.0, START)
    roster.set_epoch("green")
    if is_expired:
        roster.retire(iid(1))
    roster.register(joins(2, actor_id="a1", seq=1), 0.0, START)
    roster.register(joins(3, actor_id="a2", seq=1), 0.0, START)
    roster.register(joins(4, actor_id="a2", started_epoch="epoch-1", seq=1), 0.0, START)
    shown = {row.instance_id: row.cluster_epoch for row in everyone(roster) if row.instance_id != iid(1)}
    assert shown == {iid(2): "epoch-1", iid(3): "green", iid(4): "epoch-1"}


def test_flip_shows_the_staged_and_hides_the_rest_in_one_step(roster: Roster) -> None:
    enter(roster, 1, "blue")
    roster.register(joins(2, "green", cluster_epoch="green"), 0.0, START)
    roster.set_status(turns(2, Status.ALIVE, 1), 0.0, START)
    assert listed(roster) == [iid(1)]
    hidden = roster.resolve("green", 0.0)
    assert (hidden.instance, hidden.reason, hidden.is_known) == (None, NotResolved.OTHER_EPOCH, True)
    roster.set_epoch("green")
    assert listed(roster) == [iid(2)]
    assert roster.resolve("green", 0.0).instance is not None
    assert roster.resolve("blue", 0.0).instance is None
    assert listed(roster, replace(EVERYONE, epoch="epoch-1")) == [iid(1)]


# Leases


def test_beat_renews_those_it_names_and_tells_of_those_it_cannot(roster: Roster) -> None:
    for number in (1, 2, 3):
        enter(roster, number, now_s=0.0)
    roster.set_status(turns(3, Status.DEAD), 0.0, START)
    assert roster.renew([iid(1), iid(2)], 3.0) == roster_module.Renewal((), ())
    renewal = roster.renew([iid(1), iid(3), iid(9)], 5.0)
    assert renewal == roster_module.Renewal(unknown=(iid(9),), dead=(iid(3),))
    assert [roster.silence_s(iid(number), 5.0) for number in (1, 2)] == [0.0, 2.0]


def test_lapsed_are_the_most_silent_first_and_bounded(roster: Roster) -> None:
    for number, heard_s in ((1, 30.0), (2, 10.0), (3, 20.0), (4, 40.0)):
        enter(roster, number, now_s=heard_s)
    assert roster.lapsed(50.0, 10) == [(iid(2), 40.0), (iid(3), 30.0), (iid(1), 20.0)]
    assert roster.lapsed(50.0, 2) == [(iid(2), 40.0), (iid(3), 30.0)]
    assert roster.lapsed(25.0, 10) == []


@given(
    st.dictionaries(st.integers(1, 20), st.floats(0.0, 100.0), min_size=1),
    st.floats(0.0, 100.0),
    st.floats(100.0, 200.0),
)
def test_our_absence_is_nobodys_silence(heard: dict[int, float], absence_s: float, now_s: float) -> None:
    roster = Roster(TERMS, capacity=100)
    for number, heard_s in heard.items():
        enter(roster, number, now_s=heard_s)
    roster.credit(absence_s, now_s)
    for number, heard_s in heard.items():
        silence_s = roster.silence_s(iid(number), now_s)
        assert silence_s >= 0.0
        assert silence_s == pytest.approx(max(0.0, now_s - heard_s - absence_s))
        beats = TERMS.beats(silence_s)
        expected = Verdict.SUSPECT if beats is Beats.LAPSED else Verdict(beats.value)
        assert roster.verdict(iid(number), now_s) is expected


def test_observed_instance_shows_when_we_heard_it(roster: Roster) -> None:
    enter(roster, 1, now_s=10.0)
    row = roster.get(iid(1))
    assert row is not None
    assert roster.observed(row, 13.0, START).last_heartbeat == START - timedelta(seconds=3)
    assert roster.observed(row, 9.0, START).last_heartbeat == START


# Reading


def test_resolve_hands_out_the_best_alive_instance(roster: Roster) -> None:
    for number in (3, 1, 2):
        enter(roster, number, now_s=0.0)
    roster.set_status(turns(1, Status.DRAINING, 3), 0.0, START)
    resolution = roster.resolve("agent", 0.0)
    assert resolution.is_known
    assert resolution.instance == best(row for row in everyone(roster) if row.status is Status.ALIVE)


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
    roster: Roster, status: str, now_s: float, reason: NotResolved
) -> None:
    enter(roster, 1, status=status)
    resolution = roster.resolve("agent", now_s)
    assert (resolution.instance, resolution.reason, resolution.is_known) == (None, reason, True)
    assert resolution.detail


def test_resolve_distinguishes_an_agent_that_never_registered(roster: Roster) -> None:
    resolution = roster.resolve("unregistered", 0.0)
    assert (resolution.instance, resolution.is_known) == (None, False)
    assert resolution.reason is NotResolved.NOT_REGISTERED


@pytest.mark.parametrize("cause", ["its process exited (pid 7)", None])
def test_resolve_returns_the_cause_of_death_of_the_last_instance(roster: Roster, cause: str | None) -> None:
    for number in (1, 2):
        enter(roster, number)
    roster.set_status(turns(1, Status.DEAD, cause="long ago"), 0.0, START)
    roster.set_status(turns(2, Status.DEAD, cause=cause), 0.0, START)
    resolution = roster.resolve("agent", 0.0)
    assert (resolution.instance, resolution.is_known) == (None, False)
    assert resolution.reason is NotResolved.DIED
    assert (cause or "dead") in str(resolution.detail)
    assert "long ago" not in str(resolution.detail)
    enter(roster, 3)
    assert roster.resolve("agent", 0.0).instance is not None


def test_causes_of_death_are_remembered_up_to_a_bound(roster: Roster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster_module, "MAX_REMEMBERED_DEAD", 2)
    for number, logical_id in enumerate(["first", "second", "first", "third"]):
        enter(roster, number, logical_id)
        roster.set_status(turns(number, Status.DEAD, cause="why"), 0.0, START)
    reasons = [roster.resolve(logical_id, 0.0).reason for logical_id in ("first", "second", "third")]
    assert reasons == [NotResolved.DIED, NotResolved.NOT_REGISTERED, NotResolved.DIED]


def test_silent_instance_does_not_hide_one_that_is_heard(roster: Roster) -> None:
    enter(roster, 1, now_s=0.0)
    enter(roster, 2, now_s=30.0)
    chosen = roster.resolve("agent", 30.0).instance
    assert chosen is not None
    assert chosen.instance_id == iid(2)


@given(st.lists(st.text("aäß\U0001f600\uffff", min_size=1, max_size=3), max_size=25), st.integers(1, 7))
def test_pages_have_no_gap_and_no_repeat(names: list[str], limit: int) -> None:
    roster = Roster(TERMS, capacity=100)
    for number, name in enumerate(names):
        roster.register(joins(number, name), 0.0, START)
    after, seen, has_more = FIRST, list[Instance](), True
    while has_more:
        rows, has_more = roster.page(EVERYONE, after, limit, 0.0)
        assert len(rows) == limit or not has_more
        seen += rows
        if rows:
            after = (rows[-1].logical_id, rows[-1].instance_id)
    keys = [(row.logical_id, row.instance_id) for row in seen]
    assert keys == sorted((name, iid(number)) for number, name in enumerate(names))


def test_page_shows_what_is_wanted_and_only_that(roster: Roster) -> None:
    enter(roster, 1, "a", now_s=0.0)
    enter(roster, 2, "b", now_s=30.0)
    enter(roster, 3, "c", now_s=30.0, status="starting")
    assert listed(roster, now_s=30.0) == [iid(1), iid(2), iid(3)]
    assert listed(roster, InstanceFilter(), now_s=30.0) == [iid(2)]
    assert listed(roster, InstanceFilter(statuses=None), now_s=30.0) == [iid(2), iid(3)]
    roster.register(joins(4, "aa"), 0.0, START)
    roster.forget(iid(2))
    assert listed(roster) == [iid(1), iid(4), iid(3)]


def test_counts_are_by_status_of_the_living(roster: Roster) -> None:
    for number, status in enumerate(["starting", "alive", "alive", "draining", "dead"]):
        enter(roster, number, status=status)
    assert roster.count_by_status() == {Status.STARTING: 1, Status.ALIVE: 2, Status.DRAINING: 1}


def test_late_instance_is_handed_out_only_where_that_is_allowed(roster: Roster) -> None:
    enter(roster, 1, now_s=0.0)
    assert roster.resolve("agent", 8.0).instance is None
    late = roster.resolve("agent", 8.0, allow_late=True)
    assert late.instance is not None
    assert late.verdict is Verdict.LATE
    assert roster.resolve("agent", 12.0, allow_late=True).instance is None
    enter(roster, 2, now_s=8.0)
    fresh = roster.resolve("agent", 8.0, allow_late=True)
    assert fresh.instance is not None
    assert (fresh.instance.instance_id, fresh.verdict) == (iid(2), Verdict.FRESH)


def test_doubted_instance_is_suspect_until_it_is_heard(roster: Roster) -> None:
    enter(roster, 1, now_s=0.0)
    roster.doubt(iid(1))
    roster.doubt(iid(2))
    resolution = roster.resolve("agent", 0.0, allow_late=True)
    assert resolution.instance is None
    assert resolution.reason is NotResolved.REPORTED_DEAD
    roster.renew([iid(1)], 1.0)
    assert roster.resolve("agent", 1.0).instance is not None


def test_listeners_hear_who_comes_moves_and_goes(roster: Roster) -> None:
    heard: list[str] = []
    roster.on_appear = lambda row: heard.append(f"+{row.instance_id[-1]} {row.pid}")
    roster.on_vanish = lambda row: heard.append(f"-{row.instance_id[-1]} {row.pid}")
    enter(roster, 1)
    roster.register(joins(1, seq=9, pid=7), 0.0, START)
    roster.register(joins(1, seq=10, pid=8, node_id="there"), 0.0, START)
    roster.renew([iid(1)], 1.0)
    roster.adopt(instance(2, "other"), 1.0)
    roster.forget(iid(2))
    roster.set_status(turns(1, Status.DEAD, 11), 2.0, START)
    assert heard == ["+1 None", "+1 None", "+1 7", "-1 7", "+1 8", "+2 None", "-2 None", "-1 8"]
