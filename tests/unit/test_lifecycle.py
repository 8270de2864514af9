"""The transition table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seedcore.core.lifecycle import LIVE_STATUSES, TRANSITIONS, Status, is_allowed

EDGES = {
    ("starting", "alive"),
    ("starting", "draining"),
    ("starting", "dead"),
    ("alive", "draining"),
    ("alive", "dead"),
    ("draining", "alive"),
    ("draining", "dead"),
}


@pytest.mark.parametrize("current", Status)
@pytest.mark.parametrize("wanted", Status)
def test_exactly_the_listed_transitions_exist(current: Status, wanted: Status) -> None:
    assert is_allowed(current, wanted) == ((str(current), str(wanted)) in EDGES)


@given(st.lists(st.sampled_from(Status)))
def test_no_path_leaves_dead(wanted: list[Status]) -> None:
    current = Status.STARTING
    has_died = False
    for status in wanted:
        if is_allowed(current, status):
            current = status
        has_died = has_died or current is Status.DEAD
        assert not has_died or current is Status.DEAD


def test_every_live_status_can_die_and_only_dead_is_not_live() -> None:
    assert frozenset(Status) - {Status.DEAD} == LIVE_STATUSES
    assert all(is_allowed(status, Status.DEAD) for status in LIVE_STATUSES)
    assert set(TRANSITIONS) == set(Status)


def test_nothing_returns_to_starting() -> None:
    assert not any(is_allowed(status, Status.STARTING) for status in Status)


@pytest.mark.parametrize("status", Status)
def test_str_of_a_status_is_its_value(status: Status) -> None:
    assert str(status) == f"{status}" == status.value == status
    assert Status(str(status)) is status
