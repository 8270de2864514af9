"""Spares callers the wait for somebody who was silent a moment ago."""

from __future__ import annotations


class Circuit:
    """Open after a silence: for `pause_s` seconds nobody asks, then one caller does, and its answer closes it. Each
    further silence doubles the pause, up to `longest_s` (by default it stays as it is).

    Owns no clock: the caller gives monotonic seconds.
    """

    def __init__(self, pause_s: float, longest_s: float | None = None) -> None:
        self._first_s = self._pause_s = pause_s
        self._longest_s = pause_s if longest_s is None else longest_s
        self._asks_again_s: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether the last one who asked heard nothing."""
        return self._asks_again_s is not None

    def allows(self, now_s: float) -> bool:
        """Whether the caller shall ask. While open, one caller in each pause is told so."""
        if self._asks_again_s is None:
            return True
        if now_s < self._asks_again_s:
            return False
        self._asks_again_s = now_s + self._pause_s
        return True

    def note_silence(self, now_s: float) -> None:
        """Nobody answered in time."""
        self._asks_again_s = now_s + self._pause_s
        self._pause_s = min(self._longest_s, 2 * self._pause_s)

    def note_answer(self) -> bool:
        """Somebody answered; whether there was silence before."""
        was_open, self._asks_again_s = self.is_open, None
        self._pause_s = self._first_s
        return was_open
