"""Lease arithmetic: how long silence is tolerated, and what of it was our own absence.

All times are seconds on one monotonic clock that the caller reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from seedcore.core.verdict import Beats

# one beat missed, then two, each with some room for jitter and delay
LATE_AFTER_BEATS = 1.5
SUSPECT_AFTER_BEATS = 2.25


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """The beat interval an agent is asked for and the silence that ends its lease, both in seconds."""

    beat_interval_s: float
    lease_s: float

    def beats(self, silence_s: float) -> Beats:
        """`late` once a beat is missed, `suspect` once two are, `lapsed` when the lease is over."""
        if self.has_lapsed(silence_s):
            return Beats.LAPSED
        if silence_s > SUSPECT_AFTER_BEATS * self.beat_interval_s:
            return Beats.SUSPECT
        if silence_s > LATE_AFTER_BEATS * self.beat_interval_s:
            return Beats.LATE
        return Beats.FRESH

    def has_lapsed(self, silence_s: float) -> bool:
        """Whether the lease is over. A negative silence (heard after `now` was read) never is."""
        return silence_s > self.lease_s


class AbsenceMeter:
    """Measures how long we were not looking, from a loop that should tick every `period_s`, and from whoever asks in
    between.

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


class MassLateness:
    """Freezes expiry while so many miss their beats at once that the fault is more likely ours, or the network's.

    Begins when at least `floor` instances, and at least `share` of all, are silent: have missed two beats, which comes
    before the first lease of them is over. Ends by itself when fewer than half of that are, or after `max_s` seconds,
    and then begins anew only after it would have ended.
    """

    def __init__(self, floor: int, share: float, max_s: float) -> None:
        self._floor = floor
        self._share = share
        self._max_s = max_s
        self._began_s: float | None = None
        self._is_spent = False

    @property
    def is_frozen(self) -> bool:
        """Whether expiry by silence alone is suspended."""
        return self._began_s is not None and not self._is_spent

    @property
    def is_spent(self) -> bool:
        """Whether the freeze ended by its time limit, with as many silent as before."""
        return self._is_spent

    def note(self, silent: int, living: int, now: float) -> bool:
        """Note a sweep: how many have missed two beats, of how many. Whether expiry is frozen."""
        begins_at = max(float(self._floor), self._share * living)
        if self._began_s is None:
            if silent >= begins_at:
                self._began_s = now
        elif silent < begins_at / 2:
            self._began_s, self._is_spent = None, False
        elif now - self._began_s > self._max_s:
            self._is_spent = True
        return self.is_frozen
