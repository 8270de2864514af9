"""The effective status, and what one change of a hold does to one instance."""

from __future__ import annotations

from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from seedcore.core.answers import OutcomeKind
from seedcore.core.causes import CauseKind
from seedcore.core.changes import HoldChange, StatusChange
from seedcore.core.holds import HoldKind, effective_status
from seedcore.core.lifecycle import Status
from seedcore.core.rules import apply_hold, apply_status
from tests.builders import START, hold, holds, iid, instance, releases, turns

KINDS = st.sets(st.sampled_from(HoldKind))
CHANGES = st.lists(
    st.one_of(
        st.builds(turns, st.just(1), st.sampled_from(Status)),
        st.builds(holds, st.just(1), st.sampled_from([None, "a"]), kind=st.sampled_from(HoldKind)),
        st.builds(releases, st.just(1), kind=st.sampled_from(HoldKind)),
    ),
    max_size=12,
)


@given(st.sampled_from(Status), KINDS)
def test_only_an_alive_instance_without_holds_is_alive(reported: Status, kinds: set[HoldKind]) -> None:
    assert (effective_status(reported, kinds) is Status.ALIVE) == (reported is Status.ALIVE and not kinds)


@given(st.sampled_from(Status), KINDS, st.sampled_from(HoldKind))
def test_a_further_hold_makes_no_instance_routable(reported: Status, kinds: set[HoldKind], more: HoldKind) -> None:
    order = [Status.ALIVE, Status.STARTING, Status.DRAINING, Status.DEAD]
    before, after = effective_status(reported, kinds), effective_status(reported, kinds | {more})
    assert order.index(after) >= order.index(before)


@given(CHANGES)
def test_status_follows_from_the_reported_one_and_the_holds_after_any_changes(
    changes: list[StatusChange | HoldChange],
) -> None:
    row, now = instance(status=Status.STARTING), START
    for change in changes:
        now += timedelta(seconds=1)
        before = row
        if isinstance(change, HoldChange):
            outcome, row = apply_hold(row, change, now)
        else:
            outcome, row = apply_status(row, change, now)
        kinds = [held.kind for held in row.holds]
        assert kinds == sorted(set(kinds))
        assert row.status is effective_status(row.reported_status, kinds)
        assert (row.stopped_at is not None) is (row.status is Status.DEAD)
        assert (row.status_changed_at > before.status_changed_at) is (row.status is not before.status)
        assert outcome.status is row.status
        if before.status is Status.DEAD:
            assert row == before


def test_replaced_hold_has_a_cause_and_a_release_needs_its_own() -> None:
    placed = holds(1, "upkeep", by="ann")
    outcome, row = apply_hold(instance(), placed, START)
    assert (outcome.kind, row.cause) == (OutcomeKind.APPLIED, hold("upkeep", by="ann").cause)
    assert apply_hold(row, HoldChange(iid(1), HoldKind.OPERATOR), START)[1].cause is None
    _, row = apply_hold(row, releases(1, "done"), START)
    assert row.cause is not None
    assert (row.cause.kind, row.cause.detail) == (CauseKind.OPERATOR, "done")
