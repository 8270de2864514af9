"""How long an agent waits before it registers again as a new instance, so that a flapping one fills no tables."""

from __future__ import annotations

import math

from seedcore.core.backoff import Backoff

FIRST_S = 1.0
LONGEST_S = 60.0


class Comebacks:
    """The first comeback is at once. Each further one waits about twice as long as the one before, up to `longest_s`
    seconds, until an instance has lived for `longest_s`.

    Owns no clock: the caller passes monotonic seconds.
    """

    def __init__(self, first_s: float = FIRST_S, longest_s: float = LONGEST_S) -> None:
        self.in_a_row = 0
        self._longest_s = longest_s
        self._pauses = Backoff(first_s, longest_s)
        self._why = ""
        self._begins_s = -math.inf

    def note(self, why: str, now_s: float) -> None:
        """An instance was declared dead, or its registration refused: another one may follow after the pause."""
        if now_s - self._begins_s >= self._longest_s:
            self.in_a_row = 0
            self._pauses.reset()
        pause_s = self._pauses.next_s() if self.in_a_row else 0.0
        self.in_a_row += 1
        self._why = why
        self._begins_s = now_s + pause_s

    def problem(self, now_s: float) -> str | None:
        """Why no instance follows yet, in one line; None where it may."""
        wait_s = self._begins_s - now_s
        if wait_s <= 0:
            return None
        return f"{self._why}; {self.in_a_row} times in a row, so it registers again in {math.ceil(wait_s)} s"
