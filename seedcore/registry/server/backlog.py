"""What the registry has accepted and the database does not have yet: changes, deaths, beats, refined causes.

Owns these buffers, and who waits for a change. The flusher commits them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeAlias

from seedcore.core.answers import Outcome
from seedcore.core.batch import BeatBatch, ChangeBatch
from seedcore.core.causes import Cause
from seedcore.core.changes import Change, RegisterChange, StatusChange
from seedcore.core.clock import Clock
from seedcore.core.errors import FencedError, StoreRejectedError
from seedcore.core.memory_bound import MemoryBound, weight_of_change
from seedcore.core.timeouts import within

Key: TypeAlias = tuple[str, int]
Settled: TypeAlias = Outcome | StoreRejectedError | FencedError


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A change that is accepted and not committed, since a monotonic second. It uses `weight` bytes."""

    change: Change
    settled: asyncio.Future[Settled]
    since_s: float
    weight: int


class Backlog:
    """Bounded: `change_capacity` changes, and a beat and a death for each instance. Use it from one event loop.

    Once `close` was called it accepts nothing until `reopen`: a newer registry writes to the database.
    """

    def __init__(self, change_capacity: int, max_instances: int, clock: Clock, memory: MemoryBound) -> None:
        """`memory` counts the bytes of the changes that wait."""
        self._memory = memory
        self.beats = BeatBatch(max_instances)
        self._changes = ChangeBatch(change_capacity)
        self._change_capacity = change_capacity
        self._clock = clock
        self._waiting: dict[Key, _Waiting] = {}
        # the keys of each instance, in the order of their changes
        self._unsettled: dict[str, dict[Key, None]] = {}
        self._refined: dict[str, Cause] = {}
        self._numbers = 0
        self._has_work = asyncio.Event()
        self._closed_by: FencedError | None = None

    # Accepting

    def require_open(self) -> None:
        """Raise FencedError where a newer registry writes to the database."""
        if self._closed_by is not None:
            raise self._closed_by

    def require_room(self) -> None:
        """Raise BacklogFullError unless another change fits, or FencedError as `require_open`."""
        self.require_open()
        self._changes.require_room()

    def offer(self, change: Change) -> Key:
        """Accept a change. Returns the key to wait for it. Raises BacklogFullError."""
        self._changes.offer(change)
        return self._note_waiting(change)

    def offer_death(self, change: StatusChange) -> None:
        """Accept a death that the registry has declared. Never refused: there is room for one of each instance."""
        if self._changes.offer_death(change):
            self._note_waiting(change)

    def _note_waiting(self, change: Change) -> Key:
        key = key_of(change)
        settled: asyncio.Future[Settled] = asyncio.get_running_loop().create_future()
        weight = weight_of_change(change)
        replaced = self._waiting.get(key)
        self._memory.waiting += weight - (0 if replaced is None else replaced.weight)
        self._waiting[key] = _Waiting(change, settled, self._clock.monotonic(), weight)
        self._unsettled.setdefault(change.instance_id, {})[key] = None
        self._has_work.set()
        return key

    def next_number(self) -> int:
        """A number for a change of the registry itself, or of an operator."""
        self._numbers += 1
        return self._numbers

    def offer_beats(self, instance_ids: Sequence[str], now_s: float) -> None:
        """Accept beats, unless a newer registry writes."""
        if self._closed_by is None:
            self.beats.offer_all(instance_ids, now_s)

    def offer_refined(self, instance_id: str, cause: Cause) -> None:
        """Accept a refined cause of a death. Dropped while too many wait: the death itself is not affected."""
        if self._closed_by is None and len(self._refined) < self._change_capacity:
            self._refined[instance_id] = cause
            self._has_work.set()

    # State

    def is_waiting(self, key: Key) -> bool:
        """Whether the change under `key` is accepted and not committed."""
        return key in self._waiting

    def unsettled(self, instance_id: str) -> int:
        """How many changes of this instance are not committed."""
        return len(self._unsettled.get(instance_id, ()))

    def waiting_of(self, instance_id: str, but: Key | None = None) -> list[Change]:
        """The changes of an instance that are not committed, in their order; without the one under `but`."""
        return [self._waiting[key].change for key in self._unsettled.get(instance_id, ()) if key != but]

    @property
    def pending_changes(self) -> int:
        """Changes that are not committed."""
        return len(self._waiting)

    @property
    def oldest_wait_s(self) -> float:
        """How long the oldest change has waited, in seconds."""
        oldest = next(iter(self._waiting.values()), None)
        return 0.0 if oldest is None else self._clock.monotonic() - oldest.since_s

    async def settled(self, keys: Sequence[Key], timeout_s: float) -> dict[Key, Settled]:
        """The outcomes of changes: of those for which it is known within `timeout_s` seconds."""
        waiting = {key: self._waiting[key].settled for key in keys if key in self._waiting}
        if waiting:
            await asyncio.wait(set(waiting.values()), timeout=timeout_s)
        return {key: outcome.result() for key, outcome in waiting.items() if outcome.done()}

    async def wait_for_work(self, timeout_s: float) -> bool:
        """Wait until a change or a refined cause is accepted. Returns False after `timeout_s` seconds."""
        if self._changes:
            return True
        self._has_work.clear()
        try:
            await within(self._has_work.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    # Committing

    @property
    def unplaced(self) -> set[str]:
        """The instances whose registration waits, and whose epoch its commit decides: memory has only a guess."""
        return {
            change.instance_id
            for change in self._changes.registrations
            if not change.is_update
            and change.registration.cluster_epoch is None
            and change.registration.started_epoch is None
        }

    def take_changes(self, limit: int) -> list[Change]:
        """Remove and return up to `limit` changes that fit in one batch; `put_back` or `settle` each of them."""
        now_s = self._clock.monotonic()
        return [self._aged(change, now_s) for change in self._changes.take(limit)]

    def put_back(self, changes: Sequence[Change]) -> None:
        """Put changes that could not be committed back in front, in their order."""
        self._changes.put_back(changes)

    def settle(self, change: Change, outcome: Outcome | StoreRejectedError) -> None:
        """Record the outcome of a change, for the callers that wait for it."""
        key = key_of(change)
        waiting = self._waiting.pop(key, None)
        if waiting is None:
            return
        self._memory.waiting -= waiting.weight
        if not waiting.settled.done():
            waiting.settled.set_result(outcome)
        keys = self._unsettled[change.instance_id]
        del keys[key]
        if not keys:
            del self._unsettled[change.instance_id]

    def refined(self, limit: int) -> Mapping[str, Cause]:
        """Up to `limit` refined causes; `discard_refined` those that are committed."""
        return dict(islice(self._refined.items(), limit))

    def discard_refined(self, causes: Sequence[tuple[str, Cause]]) -> None:
        """Remove refined causes, unless they were refined again."""
        for instance_id, cause in causes:
            if self._refined.get(instance_id) == cause:
                del self._refined[instance_id]

    def close(self, error: FencedError) -> None:
        """A newer registry writes: refuse everything. What waits was never acknowledged as durable: agents keep it."""
        self._closed_by = error
        self._changes.clear()
        self.beats.take(len(self.beats))
        self._refined.clear()
        for waiting in self._waiting.values():
            if not waiting.settled.done():
                waiting.settled.set_result(error)
        self._waiting.clear()
        self._unsettled.clear()
        self._memory.waiting = 0

    def reopen(self) -> None:
        """This registry writes again."""
        self._closed_by = None

    def _aged(self, change: Change, now_s: float) -> Change:
        """The change with its age: the history has the time when it happened, not the time of the commit."""
        waiting = self._waiting.get(key_of(change))
        if waiting is None or isinstance(change, RegisterChange):
            return change
        return replace(change, age_s=max(0.0, now_s - waiting.since_s))


def key_of(change: Change) -> Key:
    """The key that a change waits under: its agent's number for it, or, for one that has none, ours, below zero."""
    if change.seq is not None:
        return (change.instance_id, change.seq)
    assert not isinstance(change, RegisterChange)
    assert change.number is not None
    return (change.instance_id, -change.number)
