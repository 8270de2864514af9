"""Lease arithmetic: how long an instance may be silent, and how the registry's own absence is credited.

All times are seconds on one monotonic clock. The caller passes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from seedcore.core.limits import MAX_LEASE_S
from seedcore.core.verdict import Beats

# one missed beat, then two, each with tolerance for jitter and delay
LATE_AFTER_BEATS = 1.5
SUSPECT_AFTER_BEATS = 2.25

MAX_INTERVAL_S = 600.0
SHRINK_AFTER_S = 60.0
_STEP = 1.1
_MOMENT_S = 0.001


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """The beat interval that the registry requests, and the silence that ends a lease, both in seconds."""

    beat_interval_s: float
    lease_s: float

    def beats(self, silence_s: float) -> Beats:
        """`late` after one missed beat, `suspect` after two, `lapsed` when the lease has expired."""
        if self.has_lapsed(silence_s):
            return Beats.LAPSED
        if silence_s > SUSPECT_AFTER_BEATS * self.beat_interval_s:
            return Beats.SUSPECT
        if silence_s > LATE_AFTER_BEATS * self.beat_interval_s:
            return Beats.LATE
        return Beats.FRESH

    @property
    def just_late_s(self) -> float:
        """A silence after which an instance is not fresh, and has the most time left to beat."""
        return min(LATE_AFTER_BEATS * self.beat_interval_s + _MOMENT_S, self.lease_s)

    def has_lapsed(self, silence_s: float) -> bool:
        """Whether the lease has expired. Never for a negative silence: the beat arrived after `now` was read."""
        return silence_s > self.lease_s


class BeatRate:
    """The beat interval that keeps the beats of the whole fleet below a ceiling. Leases grow in proportion.

    The interval grows at once, in steps of 10 %. It shrinks after a shorter interval has been sufficient for
    SHRINK_AFTER_S seconds. An agent receives a new interval with the answer to its next beat. Until all agents have it,
    their silence is judged by the longer of the two intervals.
    """

    def __init__(self, base: LeaseTerms, ceiling_per_s: float) -> None:
        self._base = base
        self._ceiling_per_s = ceiling_per_s
        self._steps = 0
        self._sufficient_since_s: float | None = None
        self._judged_steps = 0
        self._judged_until_s = 0.0

    @property
    def asked(self) -> LeaseTerms:
        """The terms that the registry sends to agents."""
        return self._terms(self._steps)

    @property
    def judged(self) -> LeaseTerms:
        """The terms by which the silence of agents is judged."""
        return self._terms(self._judged_steps)

    def remember(self, lease_s: float | None, now: float) -> None:
        """Record the lease of the previous registry: agents use its interval until they receive ours."""
        if lease_s is None or lease_s <= self.judged.lease_s:
            return
        self._judged_steps = math.ceil(math.log(lease_s / self._base.lease_s, _STEP) - 1e-9)
        self._judged_until_s = now + self.judged.lease_s

    def note(self, living: int, now: float) -> None:
        """Record the number of live instances, and adjust the interval."""
        needed = self._needed(living)
        if needed >= self._steps:
            self._sufficient_since_s = None
            self._steps = needed
        elif self._sufficient_since_s is None:
            self._sufficient_since_s = now
        elif now - self._sufficient_since_s >= SHRINK_AFTER_S:
            self._sufficient_since_s = None
            self._judged_until_s = now + self.judged.lease_s
            self._steps = needed
        if self._steps >= self._judged_steps or now >= self._judged_until_s:
            self._judged_steps = self._steps

    def _needed(self, living: int) -> int:
        interval_s = min(living / self._ceiling_per_s, MAX_INTERVAL_S)
        if interval_s <= self._base.beat_interval_s:
            return 0
        # 1e-9: a rounding error of an exact power must not add a step
        return math.ceil(math.log(interval_s / self._base.beat_interval_s, _STEP) - 1e-9)

    def _terms(self, steps: int) -> LeaseTerms:
        longer = _STEP**steps
        return LeaseTerms(self._base.beat_interval_s * longer, min(self._base.lease_s * longer, MAX_LEASE_S))


class AbsenceMeter:
    """Measures the stalls of this process, from a loop that ticks every `period_s` seconds and from ticks in between.

    A tick that is much later than planned means that this process was stalled. Beats that arrived meanwhile may still
    wait in its queue, so the delay is credited to every lease.
    """

    def __init__(self, period_s: float, now: float, tolerance: float = 0.5) -> None:
        self._period_s = period_s
        self._tolerance_s = period_s * tolerance
        self._last_tick = now
        self.total_credit_s = 0.0

    def tick(self, now: float) -> float:
        """Record a tick. Returns the absence to credit in seconds, 0.0 if the tick was on time."""
        surplus = now - self._last_tick - self._period_s
        self._last_tick = now
        if surplus <= self._tolerance_s:
            return 0.0
        self.total_credit_s += surplus
        return surplus


class MassLateness:
    """Freezes expiry while many instances miss their beats at once: then the registry or the network is more likely at
    fault than the instances.

    A freeze begins when at least `floor` instances, and at least `share` of all, are silent, which means that they have
    missed two beats. This is before the first of their leases expires. The freeze ends when fewer than half of that
    number are silent, or after `max_s` seconds. If it ended by `max_s`, the next freeze begins only after the number of
    silent instances has fallen below that half.
    """

    def __init__(self, floor: int, share: float, max_s: float) -> None:
        self._floor = floor
        self._share = share
        self._max_s = max_s
        self._began_s: float | None = None
        self._is_spent = False

    @property
    def is_frozen(self) -> bool:
        """Whether expiry is frozen: no lease expires unless Ray confirms the death."""
        return self._began_s is not None and not self._is_spent

    @property
    def is_spent(self) -> bool:
        """Whether the freeze reached its time limit while the instances are still silent."""
        return self._is_spent

    def note(self, silent: int, living: int, now: float) -> bool:
        """Record a sweep: the number of silent instances, and of all. Returns whether expiry is frozen."""
        begins_at = max(float(self._floor), self._share * living)
        if self._began_s is None:
            if silent >= begins_at:
                self._began_s = now
        elif silent < begins_at / 2:
            self._began_s, self._is_spent = None, False
        elif now - self._began_s > self._max_s:
            self._is_spent = True
        return self.is_frozen
