"""How much a caller may ask of a replica: requests per second, requests at once, and bytes of memory.

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
"""Of answers that callers have not read yet, and of requests that are being read; a caller may have half."""


class UnreadBytes:
    """Bytes that are held for callers: for all of them together, and for each."""

    def __init__(self, total: int = MAX_UNREAD_BYTES) -> None:
        self._total = total
        self._held: Counter[str] = Counter()
        self.held = 0

    def take(self, caller: str, count: int, *, share: float = 0.5) -> bool:
        """Hold so many more, or answer False. Who holds nothing may have one answer that is above its share."""
        mine = self._held[caller]
        if self.held + count > self._total or (mine and mine + count > self._total * share):
            return False
        self._held[caller] += count
        self.held += count
        return True

    def give_back(self, caller: str, count: int) -> None:
        """Hold so many less."""
        self.held -= count
        self._held[caller] -= count
        if not self._held[caller]:
            del self._held[caller]


class Rates:
    """Requests of each caller per second: a bucket each, for the callers that came last. And how many of them are at
    work at once, `feeds` apart, so that no caller takes all that a replica can do."""

    def __init__(self, per_s: float, at_once: int = 500, feeds: int = 125, unread: UnreadBytes | None = None) -> None:
        self._per_s = per_s
        self._at_once = {False: at_once, True: feeds}
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._at_work: Counter[tuple[str, bool]] = Counter()
        self.unread = unread if unread is not None else UnreadBytes()

    @contextmanager
    def at_work(self, caller: str, *, is_feed: bool, is_bounded: bool = True) -> Iterator[bool]:
        """Whether one more of the caller's requests may be worked at now; for as long as that takes."""
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
    def open_feeds(self) -> int:
        """How many feeds are open, those included whose events are not read yet."""
        return sum(count for (_, is_feed), count in self._at_work.items() if is_feed)

    def wait_s(self, caller: str, now_s: float) -> float:
        """Takes one of the caller's requests and answers 0, or how long until there is one again."""
        left, at_s = self._buckets.pop(caller, (self._per_s * BURST_S, now_s))
        left = min(self._per_s * BURST_S, left + (now_s - at_s) * self._per_s)
        is_allowed = left >= 1.0
        self._buckets[caller] = (left - 1.0 if is_allowed else left, now_s)
        if len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
        return 0.0 if is_allowed else (1.0 - left) / self._per_s
