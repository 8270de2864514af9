"""Lease arithmetic: how long silence is tolerated, and what of it was our own absence.

All times are seconds on one monotonic clock that the caller reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from seedcore.core.model import Verdict

LATE_AFTER_BEATS = 2.0


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """The beat interval an agent is asked for and the silence that ends its lease, both in seconds."""

    beat_interval_s: float
    lease_s: float

    def verdict(self, silence_s: float) -> Verdict:
        """`fresh` up to two missed beats, `late` up to the end of the lease, then `suspect`."""
        if silence_s <= min(LATE_AFTER_BEATS * self.beat_interval_s, self.lease_s):
            return Verdict.FRESH
        if silence_s <= self.lease_s:
            return Verdict.LATE
        return Verdict.SUSPECT

    def has_lapsed(self, silence_s: float) -> bool:
        """Whether the lease is over. A negative silence (heard after `now` was read) never is."""
        return silence_s > self.lease_s


class AbsenceMeter:
    """Measures how long we were not looking, from a loop that should tick every `period_s`.

    A tick that comes much later than planned means that this process was stalled, so beats sent meanwhile
    may still wait to be read: the surplus is credited to every lease.
    """

    def __init__(self, period_s: float, now: float, tolerance: float = 0.5) -> None:
        self._period_s = period_s
        self._tolerance_s = period_s * tolerance
        self._last_tick = now
        self.total_credit_s = 0.0

    def tick(self, now: float) -> float:
        """Note that we looked at `now`; returns the absence to credit, 0.0 where we were on time."""
        surplus = now - self._last_tick - self._period_s
        self._last_tick = now
        if surplus <= self._tolerance_s:
            return 0.0
        self.total_credit_s += surplus
        return surplus
