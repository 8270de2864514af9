"""The two bounded buffers before the store: beats coalesce and may be dropped, changes keep their order
and never are.

Neither awaits; both belong to one event loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from seedcore.core.errors import BacklogFullError
from seedcore.core.model import Change, RegisterChange


@dataclass(slots=True)
class BeatCounts:
    """What became of the beats offered: every one is written, coalesced, dropped or still buffered."""

    offered: int = 0
    coalesced: int = 0
    dropped: int = 0


class BeatBatch:
    """The newest beat of each instance, as the monotonic second it was heard.

    Bounded by `capacity` instances: beyond it a beat of an instance not yet in the batch is dropped and
    counted (the next beat makes up for it).
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._heard: dict[str, float] = {}
        self.counts = BeatCounts()

    def __len__(self) -> int:
        return len(self._heard)

    def offer(self, instance_id: str, heard_at: float) -> bool:
        """Take a beat; False when it was dropped."""
        self.counts.offered += 1
        known = self._heard.get(instance_id)
        if known is not None:
            self.counts.coalesced += 1
            if heard_at > known:
                self._heard[instance_id] = heard_at
            return True
        if len(self._heard) >= self._capacity:
            self.counts.dropped += 1
            return False
        self._heard[instance_id] = heard_at
        return True

    def offer_all(self, instance_ids: Sequence[str], heard_at: float) -> None:
        """Take beats of many instances heard at once: the hot path, one dictionary update."""
        before = len(self._heard)
        room = self._capacity - before
        if len(instance_ids) > room:
            for instance_id in instance_ids:
                self.offer(instance_id, heard_at)
            return
        self._heard.update(dict.fromkeys(instance_ids, heard_at))
        self.counts.offered += len(instance_ids)
        self.counts.coalesced += len(instance_ids) - (len(self._heard) - before)

    def take(self, limit: int) -> dict[str, float]:
        """Remove and return up to `limit` beats, those waiting longest first."""
        if len(self._heard) <= limit:
            taken, self._heard = self._heard, {}
            return taken
        taken = dict(islice(self._heard.items(), limit))
        for instance_id in taken:
            del self._heard[instance_id]
        return taken

    def put_back(self, taken: dict[str, float]) -> None:
        """Return what could not be written, in front, but never over a newer beat."""
        merged = {**taken, **self._heard}
        for instance_id in taken.keys() & self._heard.keys():
            merged[instance_id] = max(taken[instance_id], self._heard[instance_id])
        self.counts.coalesced += len(taken) + len(self._heard) - len(merged)
        for instance_id in list(islice(merged, max(0, len(merged) - self._capacity))):
            del merged[instance_id]
            self.counts.dropped += 1
        self._heard = merged

    def discard(self, instance_id: str) -> None:
        """Forget the beat of an instance that is no more."""
        if self._heard.pop(instance_id, None) is not None:
            self.counts.dropped += 1


class ChangeBatch:
    """Status changes and registrations in the order they came. Refuses when full; never drops."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._changes: deque[Change] = deque()

    def __len__(self) -> int:
        return len(self._changes)

    def offer(self, change: Change) -> None:
        """Append a change, or raise BacklogFullError and take nothing."""
        self.require_room()
        self._changes.append(change)

    def require_room(self, count: int = 1) -> None:
        """Raise BacklogFullError unless `count` more changes fit."""
        if len(self._changes) + count > self._capacity:
            raise BacklogFullError(self._capacity)

    def take(self, limit: int) -> list[Change]:
        """Remove and return a run from the front that may be committed as one batch, at most `limit` long.

        A batch registers first and changes statuses after, so the run ends before a registration of an
        instance whose status change it already holds.
        """
        taken: list[Change] = []
        changed: set[str] = set()
        while self._changes and len(taken) < limit:
            change = self._changes[0]
            if isinstance(change, RegisterChange):
                if change.instance_id in changed:
                    break
            else:
                changed.add(change.instance_id)
            taken.append(self._changes.popleft())
        return taken

    def clear(self) -> None:
        """Let go of every change: whoever gave it keeps it."""
        self._changes.clear()

    def put_back(self, taken: Sequence[Change]) -> None:
        """Return what could not be committed to the front, in its order. Never refused: it had its place."""
        self._changes.extendleft(reversed(taken))
