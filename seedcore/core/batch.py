"""The two bounded buffers in front of the store: beats coalesce and may be dropped, changes keep their order and are
never dropped, and deaths are never refused.

Neither buffer awaits. Use each from one event loop.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from seedcore.core.changes import Change, HoldChange, RegisterChange, StatusChange
from seedcore.core.errors import BacklogFullError
from seedcore.core.lifecycle import Status
from seedcore.core.memory_bound import MIB, weight_of_change

MAX_BATCH_BYTES = 32 * MIB


@dataclass(slots=True)
class BeatCounts:
    """Counts of offered beats. Each offered beat is written, coalesced, dropped or still buffered."""

    offered: int = 0
    coalesced: int = 0
    dropped: int = 0


class BeatBatch:
    """The newest beat of each instance, as the monotonic time in seconds at which it was received.

    Holds beats of at most `capacity` instances. Beyond that, a beat of another instance is dropped and counted; the
    instance's next beat replaces it.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._received: dict[str, float] = {}
        self.counts = BeatCounts()

    def __len__(self) -> int:
        return len(self._received)

    def offer(self, instance_id: str, received_s: float) -> bool:
        """Add a beat. Returns False if it was dropped."""
        self.counts.offered += 1
        known = self._received.get(instance_id)
        if known is not None:
            self.counts.coalesced += 1
            if received_s > known:
                self._received[instance_id] = received_s
            return True
        if len(self._received) >= self._capacity:
            self.counts.dropped += 1
            return False
        self._received[instance_id] = received_s
        return True

    def offer_all(self, instance_ids: Sequence[str], received_s: float) -> None:
        """Add beats of many instances that were received together. This is the hot path: one dictionary update."""
        before = len(self._received)
        room = self._capacity - before
        if len(instance_ids) > room:
            for instance_id in instance_ids:
                self.offer(instance_id, received_s)
            return
        self._received.update(dict.fromkeys(instance_ids, received_s))
        self.counts.offered += len(instance_ids)
        self.counts.coalesced += len(instance_ids) - (len(self._received) - before)

    def take(self, limit: int) -> dict[str, float]:
        """Remove and return up to `limit` beats, longest waiting first."""
        if len(self._received) <= limit:
            taken, self._received = self._received, {}
            return taken
        taken = dict(islice(self._received.items(), limit))
        for instance_id in taken:
            del self._received[instance_id]
        return taken

    def put_back(self, taken: dict[str, float]) -> None:
        """Put beats that could not be written back in front. A newer beat of the same instance wins."""
        merged = {**taken, **self._received}
        for instance_id in taken.keys() & self._received.keys():
            merged[instance_id] = max(taken[instance_id], self._received[instance_id])
        self.counts.coalesced += len(taken) + len(self._received) - len(merged)
        for instance_id in list(islice(merged, max(0, len(merged) - self._capacity))):
            del merged[instance_id]
            self.counts.dropped += 1
        self._received = merged

    def discard(self, instance_id: str) -> None:
        """Remove the beat of an instance that has ended."""
        if self._received.pop(instance_id, None) is not None:
            self.counts.dropped += 1


_STAGES: dict[type[Change], int] = {RegisterChange: 0, StatusChange: 1, HoldChange: 2}


class ChangeBatch:
    """Registrations and changes of statuses and holds in arrival order. Refuses new changes when full; never drops one.

    A death that the registry declares is never refused: it waits beside the queue, at most one for each instance, so
    that it takes no room of other changes. It is taken after the changes of its instance and before those of others.
    """

    def __init__(self, capacity: int, max_batch_bytes: int = MAX_BATCH_BYTES) -> None:
        self._capacity = capacity
        self._max_batch_bytes = max_batch_bytes
        self._changes: deque[Change] = deque()
        self._queued: Counter[str] = Counter()
        self._deaths: dict[str, StatusChange] = {}

    def __len__(self) -> int:
        return len(self._changes) + len(self._deaths)

    @property
    def registrations(self) -> list[RegisterChange]:
        """The registrations that wait, in order."""
        return [change for change in self._changes if isinstance(change, RegisterChange)]

    def offer(self, change: Change) -> None:
        """Append a change. Raises BacklogFullError, and then nothing has changed."""
        self.require_room()
        self._changes.append(change)
        self._queued[change.instance_id] += 1

    def offer_death(self, change: StatusChange) -> bool:
        """Add a death that the registry has declared. Returns False if one of this instance waits already."""
        return self._deaths.setdefault(change.instance_id, change) is change

    def require_room(self, count: int = 1) -> None:
        """Raise BacklogFullError unless `count` more changes fit."""
        if len(self._changes) + count > self._capacity:
            raise BacklogFullError(self._capacity)

    def take(self, limit: int) -> list[Change]:
        """Remove and return changes that can be committed as one batch, at most `limit`: deaths, then changes from the
        front of the queue.

        A batch executes its registrations first, then its changes of statuses, then those of holds. So it ends before a
        change that would be executed before an earlier one of its instance, and before it has too many bytes.
        """
        ready = (instance_id for instance_id in self._deaths if instance_id not in self._queued)
        taken: list[Change] = [self._deaths[instance_id] for instance_id in islice(ready, limit)]
        for change in taken:
            del self._deaths[change.instance_id]
        stages: dict[str, int] = {}
        left = self._max_batch_bytes
        while self._changes and len(taken) < limit:
            change = self._changes[0]
            stage = _STAGES[type(change)]
            left -= weight_of_change(change)
            if stage < stages.get(change.instance_id, 0) or (left < 0 and taken):
                break
            if stage:
                stages[change.instance_id] = stage
            taken.append(self._changes.popleft())
            self._queued[change.instance_id] -= 1
            if not self._queued[change.instance_id]:
                del self._queued[change.instance_id]
        return taken

    def clear(self) -> None:
        """Remove every change. The clients keep their changes and send them again."""
        self._changes.clear()
        self._queued.clear()
        self._deaths.clear()

    def put_back(self, taken: Sequence[Change]) -> None:
        """Put changes that could not be committed back in their order, even beyond the capacity: deaths beside the
        queue, the others in front of it."""
        others: list[Change] = []
        for change in taken:
            if isinstance(change, StatusChange) and change.seq is None and change.status is Status.DEAD:
                # nothing follows it in the life of its instance, so it may wait beside the queue
                self._deaths[change.instance_id] = change
            else:
                others.append(change)
        self._changes.extendleft(reversed(others))
        self._queued.update(change.instance_id for change in others)
