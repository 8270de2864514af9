"""The bounds of a caller at a replica: requests per second, requests at once, and bytes of memory.

A caller is a machine and the token that it sends. Every bound that protects memory counts bytes, and lasts until the
bytes have left: a reader that stops reading keeps what it holds.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

MAX_CALLERS = 10_000
BURST_S = 2.0
MAX_UNREAD_BYTES = 64 * 1024 * 1024
"""Bytes of answers that callers have not read yet, and of requests that are being read; one caller may have half."""


class UnreadBytes:
    """Bytes that are held for callers, in total and for each."""

    def __init__(self, total: int = MAX_UNREAD_BYTES) -> None:
        self._total = total
        self._held: Counter[str] = Counter()
        self.held = 0

    @property
    def callers(self) -> int:
        """The number of callers that bytes are held for."""
        return len(self._held)

    def take(self, caller: str, count: int, *, share: float = 0.5) -> bool:
        """Hold so many more bytes, or return False. A caller that holds none may have one answer above its share."""
        mine = self._held[caller]
        if self.held + count > self._total or (mine and mine + count > self._total * share):
            return False
        self._held[caller] += count
        self.held += count
        return True

    def give_back(self, caller: str, count: int) -> None:
        """Release so many bytes."""
        self.held -= count
        self._held[caller] -= count
        if not self._held[caller]:
            del self._held[caller]


class Rates:
    """The requests of each caller per second (a bucket each, for the last callers), and at once, with feeds counted
    separately, so that no caller occupies the whole replica."""

    def __init__(self, per_s: float, at_once: int = 500, feeds: int = 125, unread: UnreadBytes | None = None) -> None:
        self._per_s = per_s
        self._at_once = {False: at_once, True: feeds}
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._at_work: Counter[tuple[str, bool]] = Counter()
        self.unread = unread if unread is not None else UnreadBytes()

    @contextmanager
    def at_work(self, caller: str, *, is_feed: bool, is_bounded: bool = True) -> Iterator[bool]:
        """Whether one more of the caller's requests may run now. The request counts until the context ends."""
        key = caller, is_feed
        is_allowed = not is_bounded or self._at_work[key] < self._at_once[is_feed]
        self._at_work[key] += is_allowed
        try:
            yield is_allowed
        finally:
            self._at_work[key] -= is_allowed
            if not self._at_work[key]:
                del self._at_work[key]

    @property
    def requests_at_work(self) -> int:
        """The number of requests that are worked at now, feeds included."""
        return sum(self._at_work.values())

    @property
    def callers(self) -> int:
        """The number of callers whose rate is remembered."""
        return len(self._buckets)

    @property
    def open_feeds(self) -> int:
        """The number of open feeds, including those whose events are not read yet."""
        return sum(count for (_, is_feed), count in self._at_work.items() if is_feed)

    def wait_s(self, caller: str, now_s: float) -> float:
        """Count one request of the caller and return 0, or the seconds until the next one is allowed."""
        left, at_s = self._buckets.pop(caller, (self._per_s * BURST_S, now_s))
        left = min(self._per_s * BURST_S, left + (now_s - at_s) * self._per_s)
        is_allowed = left >= 1.0
        self._buckets[caller] = (left - 1.0 if is_allowed else left, now_s)
        if len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
        return 0.0 if is_allowed else (1.0 - left) / self._per_s
