"""A circuit breaker: after one timeout, callers fail fast until the peer answers again."""

from __future__ import annotations


class Circuit:
    """Opens after a timeout. For `pause_s` seconds no caller may try; then one caller may, and an answer closes the
    circuit. Each further timeout doubles the pause, up to `longest_s` (by default the pause stays constant).

    The caller passes the time, in monotonic seconds.
    """

    def __init__(self, pause_s: float, longest_s: float | None = None) -> None:
        self._first_s = self._pause_s = pause_s
        self._longest_s = pause_s if longest_s is None else longest_s
        self._retry_at_s: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether the last call ended without an answer."""
        return self._retry_at_s is not None

    def allows(self, now_s: float) -> bool:
        """Whether the caller may try. While the circuit is open, one caller may try after each pause."""
        if self._retry_at_s is None:
            return True
        if now_s < self._retry_at_s:
            return False
        self._retry_at_s = now_s + self._pause_s
        return True

    def note_silence(self, now_s: float) -> None:
        """Open the circuit: a call ended without an answer."""
        self._retry_at_s = now_s + self._pause_s
        self._pause_s = min(self._longest_s, 2 * self._pause_s)

    def note_answer(self) -> bool:
        """Close the circuit: the peer answered. Returns whether the circuit was open."""
        was_open, self._retry_at_s = self.is_open, None
        self._pause_s = self._first_s
        return was_open
