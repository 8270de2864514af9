"""The places of those who wait for changes: a bounded number, each kept by its follower from question to question."""

from __future__ import annotations


class Places:
    """At most `limit` at once. A place that is not claimed again in time is free.

    Owns no clock: the caller gives monotonic seconds.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept_until_s: dict[str, float] = {}

    def claim(self, follower: str, duration_s: float, now_s: float) -> bool:
        """Take a place, or keep the one that it has, for so many seconds; False where all are taken."""
        if follower not in self._kept_until_s and self.taken(now_s) >= self.limit:
            return False
        self._kept_until_s[follower] = now_s + duration_s
        return True

    def is_among(self, follower: str | None, first: int, now_s: float) -> bool:
        """Whether fewer than so many others have a place."""
        taken = self.taken(now_s)
        return taken - (follower in self._kept_until_s) < first

    def release(self, follower: str) -> None:
        """Leave the place to another."""
        self._kept_until_s.pop(follower, None)

    def taken(self, now_s: float) -> int:
        """How many are taken."""
        for follower in [follower for follower, until_s in self._kept_until_s.items() if until_s <= now_s]:
            del self._kept_until_s[follower]
        return len(self._kept_until_s)
