"""How long an agent waits before it registers again as a new instance: a flapping one must not fill the history."""

from __future__ import annotations

import math
import random

FIRST_S = 1.0
LONGEST_S = 60.0


class Comebacks:
    """The first comeback is at once. Each further one waits about twice as long as the one before, up to LONGEST_S
    seconds, until an instance has lived for LONGEST_S.

    Owns no clock: the caller gives monotonic seconds.
    """

    def __init__(self) -> None:
        self.in_a_row = 0
        self._why = ""
        self._begins_s = 0.0

    def note(self, why: str, now_s: float) -> None:
        """An instance was declared dead, or its registration refused: another one may follow after the pause."""
        if now_s - self._begins_s >= LONGEST_S:
            self.in_a_row = 0
        pause_s = min(LONGEST_S, FIRST_S * 2.0 ** (self.in_a_row - 1)) if self.in_a_row else 0.0
        self.in_a_row = min(self.in_a_row + 1, 32)
        self._why = why
        self._begins_s = now_s + pause_s * random.uniform(0.5, 1.0)

    def problem(self, now_s: float) -> str | None:
        """Why no instance follows yet, in one line; None where it may."""
        wait_s = self._begins_s - now_s
        if wait_s <= 0:
            return None
        return f"{self._why}; {self.in_a_row} times in a row, so it registers again in {math.ceil(wait_s)} s"
