"""Lease arithmetic, and the measurement of the registry's own absence."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seedcore.core.lease import MAX_INTERVAL_S, SHRINK_AFTER_S, AbsenceMeter, BeatRate, LeaseTerms, MassLateness
from seedcore.core.limits import MAX_LEASE_S
from seedcore.core.verdict import Beats

TERMS = LeaseTerms(beat_interval_s=5.0, lease_s=15.0)
SILENCES = st.floats(min_value=-100.0, max_value=1000.0)


@pytest.mark.parametrize(
    ("silence_s", "beats"),
    [
        (-3.0, Beats.FRESH),
        (0.0, Beats.FRESH),
        (7.5, Beats.FRESH),
        (math.nextafter(7.5, 11.0), Beats.LATE),
        (11.25, Beats.LATE),
        (math.nextafter(11.25, 16.0), Beats.SUSPECT),
        (15.0, Beats.SUSPECT),
        (math.nextafter(15.0, 16.0), Beats.LAPSED),
        (1e9, Beats.LAPSED),
    ],
)
def test_silence_is_late_after_one_beat_suspect_after_two_and_lapsed_after_the_lease(
    silence_s: float, beats: Beats
) -> None:
    assert TERMS.beats(silence_s) is beats


@given(SILENCES)
def test_beats_are_lapsed_exactly_when_the_lease_has_expired(silence_s: float) -> None:
    assert (TERMS.beats(silence_s) is Beats.LAPSED) == TERMS.has_lapsed(silence_s)


@given(SILENCES, SILENCES, st.floats(0.01, 100.0), st.floats(0.01, 100.0))
def test_longer_silence_never_improves_the_verdict(first: float, second: float, beat_s: float, lease_s: float) -> None:
    terms = LeaseTerms(beat_s, lease_s)
    order = [Beats.FRESH, Beats.LATE, Beats.SUSPECT, Beats.LAPSED]
    shorter, longer = sorted((first, second))
    assert order.index(terms.beats(shorter)) <= order.index(terms.beats(longer))


def test_lease_shorter_than_two_beats_is_not_fresh_after_its_end() -> None:
    terms = LeaseTerms(beat_interval_s=5.0, lease_s=6.0)
    assert terms.beats(6.0) is Beats.FRESH
    assert terms.beats(6.1) is Beats.LAPSED


def test_punctual_ticks_give_no_credit() -> None:
    meter = AbsenceMeter(period_s=1.0, now=100.0)
    assert [meter.tick(now) for now in (101.0, 101.5, 103.0, 104.5)] == [0.0, 0.0, 0.0, 0.0]
    assert meter.total_credit_s == 0.0


def test_stall_is_credited_once_with_its_delay() -> None:
    meter = AbsenceMeter(period_s=1.0, now=100.0)
    assert meter.tick(131.0) == 30.0
    assert meter.tick(132.0) == 0.0
    assert meter.tick(135.0) == 2.0
    assert meter.total_credit_s == 32.0


@given(st.lists(st.floats(0.0, 100.0), max_size=30), st.floats(0.1, 10.0))
def test_credit_never_exceeds_the_elapsed_time(gaps_s: list[float], period_s: float) -> None:
    meter = AbsenceMeter(period_s, now=0.0)
    now = 0.0
    for gap_s in gaps_s:
        now += gap_s
        credit_s = meter.tick(now)
        assert 0.0 <= credit_s <= gap_s
    assert meter.total_credit_s <= now


def test_few_silent_instances_do_not_freeze_expiry() -> None:
    lateness = MassLateness(floor=10, share=0.25, max_s=100.0)
    assert not lateness.note(silent=9, living=9, now=0.0)
    assert not lateness.note(silent=24, living=100, now=1.0)


def test_mass_lateness_freezes_expiry_until_fewer_than_half_are_silent() -> None:
    lateness = MassLateness(floor=10, share=0.25, max_s=100.0)
    assert lateness.note(silent=25, living=100, now=0.0)
    assert lateness.note(silent=13, living=100, now=10.0)
    assert not lateness.note(silent=12, living=100, now=20.0)
    assert lateness.note(silent=25, living=100, now=30.0)


def test_freeze_ends_at_its_time_limit_and_does_not_begin_again_at_once() -> None:
    lateness = MassLateness(floor=10, share=0.25, max_s=100.0)
    assert lateness.note(silent=50, living=100, now=0.0)
    assert lateness.note(silent=50, living=100, now=100.0)
    assert not lateness.note(silent=50, living=100, now=100.1)
    assert not lateness.note(silent=50, living=100, now=101.0)
    # the next freeze is possible only after the number of silent instances has fallen
    assert not lateness.note(silent=5, living=50, now=102.0)
    assert lateness.note(silent=50, living=100, now=103.0)


# The beat rate of the fleet


@given(st.integers(0, 10_000_000), st.floats(1.0, 1e6))
def test_beats_of_the_fleet_stay_below_the_ceiling_and_leases_grow_in_proportion(living: int, ceiling: float) -> None:
    rate = BeatRate(TERMS, ceiling)
    rate.note(living, 0.0)
    asked = rate.asked
    assert asked == rate.judged
    assert asked.beat_interval_s >= TERMS.beat_interval_s
    if living / ceiling <= MAX_INTERVAL_S:
        assert living / asked.beat_interval_s <= ceiling * (1 + 1e-6)
        # the interval is at most one step longer than necessary
        assert asked.beat_interval_s <= max(TERMS.beat_interval_s, 1.11 * living / ceiling)
    assert asked.lease_s == pytest.approx(min(MAX_LEASE_S, 3 * asked.beat_interval_s))


def test_shorter_interval_is_requested_after_a_delay_and_judged_after_another_lease() -> None:
    rate = BeatRate(TERMS, 10.0)
    rate.note(100, 0.0)
    long = rate.asked
    assert long.beat_interval_s > 10.0
    rate.note(20, 1.0)
    rate.note(20, SHRINK_AFTER_S)
    assert rate.asked == long
    # the fleet has grown in between: the delay starts again
    rate.note(100, SHRINK_AFTER_S + 0.5)
    rate.note(20, SHRINK_AFTER_S + 1.0)
    rate.note(20, 2 * SHRINK_AFTER_S + 0.9)
    assert rate.asked == long
    shrunk_s = 2 * SHRINK_AFTER_S + 1.0
    rate.note(20, shrunk_s)
    assert (rate.asked, rate.judged) == (TERMS, long)
    rate.note(20, shrunk_s + long.lease_s - 0.1)
    assert rate.judged == long
    rate.note(20, shrunk_s + long.lease_s)
    assert rate.judged == TERMS


def test_longer_interval_applies_at_once() -> None:
    rate = BeatRate(TERMS, 10.0)
    rate.note(50, 0.0)
    assert rate.asked == TERMS
    rate.note(51, 1.0)
    assert rate.asked == rate.judged
    assert rate.asked.beat_interval_s == pytest.approx(5.5)


def test_new_registry_judges_by_the_longer_lease_of_the_previous_one_until_it_has_expired() -> None:
    before = BeatRate(TERMS, 10.0)
    before.note(150, 0.0)
    rate = BeatRate(TERMS, 1000.0)
    rate.remember(before.asked.lease_s, 100.0)
    rate.note(150, 101.0)
    assert rate.asked == TERMS
    assert rate.judged.lease_s == pytest.approx(before.asked.lease_s)
    rate.note(150, 100.0 + rate.judged.lease_s)
    assert rate.judged == TERMS
    for lease_s in (None, 1.0, TERMS.lease_s):
        rate.remember(lease_s, 200.0)
        assert rate.judged == TERMS
