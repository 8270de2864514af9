"""Lease arithmetic and the meter of our own absence."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seedcore.core.lease import AbsenceMeter, LeaseTerms
from seedcore.core.model import Verdict

TERMS = LeaseTerms(beat_interval_s=5.0, lease_s=15.0)
SILENCES = st.floats(min_value=-100.0, max_value=1000.0)


@pytest.mark.parametrize(
    ("silence_s", "verdict"),
    [
        (-3.0, Verdict.FRESH),
        (0.0, Verdict.FRESH),
        (10.0, Verdict.FRESH),
        (math.nextafter(10.0, 11.0), Verdict.LATE),
        (15.0, Verdict.LATE),
        (math.nextafter(15.0, 16.0), Verdict.SUSPECT),
        (1e9, Verdict.SUSPECT),
    ],
)
def test_verdict_changes_after_two_beats_and_after_the_lease(silence_s: float, verdict: Verdict) -> None:
    assert TERMS.verdict(silence_s) is verdict


@given(SILENCES)
def test_suspect_is_exactly_a_lapsed_lease(silence_s: float) -> None:
    assert (TERMS.verdict(silence_s) is Verdict.SUSPECT) == TERMS.has_lapsed(silence_s)


@given(SILENCES, SILENCES, st.floats(0.01, 100.0), st.floats(0.01, 100.0))
def test_longer_silence_never_looks_better(first: float, second: float, beat_s: float, lease_s: float) -> None:
    terms = LeaseTerms(beat_s, lease_s)
    order = [Verdict.FRESH, Verdict.LATE, Verdict.SUSPECT]
    shorter, longer = sorted((first, second))
    assert order.index(terms.verdict(shorter)) <= order.index(terms.verdict(longer))


def test_lease_shorter_than_two_beats_is_never_fresh_beyond_its_end() -> None:
    terms = LeaseTerms(beat_interval_s=5.0, lease_s=6.0)
    assert terms.verdict(6.0) is Verdict.FRESH
    assert terms.verdict(6.1) is Verdict.SUSPECT


def test_punctual_ticks_are_credited_nothing() -> None:
    meter = AbsenceMeter(period_s=1.0, now=100.0)
    assert [meter.tick(now) for now in (101.0, 101.5, 103.0, 104.5)] == [0.0, 0.0, 0.0, 0.0]
    assert meter.total_credit_s == 0.0


def test_stall_is_credited_with_its_surplus_and_once() -> None:
    meter = AbsenceMeter(period_s=1.0, now=100.0)
    assert meter.tick(131.0) == 30.0
    assert meter.tick(132.0) == 0.0
    assert meter.tick(135.0) == 2.0
    assert meter.total_credit_s == 32.0


@given(st.lists(st.floats(0.0, 100.0), max_size=30), st.floats(0.1, 10.0))
def test_credit_never_exceeds_the_time_that_passed(gaps_s: list[float], period_s: float) -> None:
    meter = AbsenceMeter(period_s, now=0.0)
    now = 0.0
    for gap_s in gaps_s:
        now += gap_s
        credit_s = meter.tick(now)
        assert 0.0 <= credit_s <= gap_s
    assert meter.total_credit_s <= now
