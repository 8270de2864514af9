"""Lease arithmetic: how long silence is tolerated, and what of it was our own absence.

All times are seconds on one monotonic clock that the caller reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from seedcore.core.model import MAX_LEASE_S
from seedcore.core.verdict import Beats

# one beat missed, then two, each with some room for jitter and delay
LATE_AFTER_BEATS = 1.5
SUSPECT_AFTER_BEATS = 2.25

MAX_INTERVAL_S = 600.0
SHRINK_AFTER_S = 60.0
_STEP = 1.1


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


class BeatRate:
    """The interval that agents are asked for, so that all their beats together stay under a ceiling; leases follow.

    It grows at once, in steps of a tenth, and shrinks when a smaller one has been enough for a while. Agents learn of a
    new one with their next beat: until all had time to, silence is judged by the longer of the two.
    """

    def __init__(self, base: LeaseTerms, ceiling_per_s: float) -> None:
        self._base = base
        self._ceiling_per_s = ceiling_per_s
        self._steps = 0
        self._enough_since_s: float | None = None
        self._judged_steps = 0
        self._judged_until_s = 0.0

    @property
    def asked(self) -> LeaseTerms:
        """What agents are told."""
        return self._terms(self._steps)

    @property
    def judged(self) -> LeaseTerms:
        """What their silence is measured by."""
        return self._terms(self._judged_steps)

    def remember(self, lease_s: float | None, now: float) -> None:
        """Note the lease of the registry before: agents still beat as it had asked them to, until we tell them."""
        if lease_s is None or lease_s <= self.judged.lease_s:
            return
        self._judged_steps = math.ceil(math.log(lease_s / self._base.lease_s, _STEP) - 1e-9)
        self._judged_until_s = now + self.judged.lease_s

    def note(self, living: int, now: float) -> None:
        """Note how many there are."""
        needed = self._needed(living)
        if needed >= self._steps:
            self._enough_since_s = None
            self._steps = needed
        elif self._enough_since_s is None:
            self._enough_since_s = now
        elif now - self._enough_since_s >= SHRINK_AFTER_S:
            self._enough_since_s = None
            self._judged_until_s = now + self.judged.lease_s
            self._steps = needed
        if self._steps >= self._judged_steps or now >= self._judged_until_s:
            self._judged_steps = self._steps

    def _needed(self, living: int) -> int:
        interval_s = min(living / self._ceiling_per_s, MAX_INTERVAL_S)
        if interval_s <= self._base.beat_interval_s:
            return 0
        # not one step more for the rounding of an exact power
        return math.ceil(math.log(interval_s / self._base.beat_interval_s, _STEP) - 1e-9)

    def _terms(self, steps: int) -> LeaseTerms:
        longer = _STEP**steps
        return LeaseTerms(self._base.beat_interval_s * longer, min(self._base.lease_s * longer, MAX_LEASE_S))


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
