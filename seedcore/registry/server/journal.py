"""What this registry has committed lately, in order: where the database loses commits, it is written again from here.

Owns the order and the bound. `restoration` writes it again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TypeAlias

from seedcore.core.answers import Outcome, OutcomeKind
from seedcore.core.causes import Cause
from seedcore.core.changes import Change, HoldChange, RegisterChange, StatusChange
from seedcore.core.clock import Clock
from seedcore.core.feed import MAX_REMEMBERED_BYTES
from seedcore.core.lifecycle import Status
from seedcore.core.memory_bound import weight_of_cause, weight_of_change

_SMALL_WORK_BYTES = 512


@dataclass(frozen=True, slots=True)
class RefinedCause:
    """The better known cause of a death."""

    instance_id: str
    cause: Cause


@dataclass(frozen=True, slots=True)
class EpochStep:
    """An epoch that was staged, or made current with this number."""

    epoch: str
    is_current: bool
    number: int = 0


Work: TypeAlias = Change | RefinedCause | EpochStep


@dataclass(frozen=True, slots=True)
class Committed:
    """A piece of work, the number of its commit, and the monotonic second of that. It uses `weight` bytes."""

    number: int
    at_s: float
    work: Work
    weight: int

    @property
    def instance_id(self) -> str | None:
        """The instance of the work; None for an epoch."""
        return None if isinstance(self.work, EpochStep) else self.work.instance_id


class Journal:
    """The last `capacity` pieces of work, of at most `max_bytes` of memory. Use it from one event loop."""

    def __init__(self, capacity: int, clock: Clock, max_bytes: int = MAX_REMEMBERED_BYTES) -> None:
        self._entries: deque[Committed] = deque()
        self._capacity = capacity
        self._max_bytes = max_bytes
        self.bytes = 0
        self._clock = clock
        self.complete_after = 0
        """Every commit with a higher number is here. Those before made room, or are of another registry."""

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget all of it: another registry has committed after it."""
        self._entries.clear()
        self.bytes = 0

    def begin(self, number: int) -> None:
        """What was committed up to commit `number` may be of other registries."""
        self.complete_after = max(self.complete_after, number)

    def note(self, number: int, works: Iterable[Work]) -> None:
        """Record what commit `number` has written."""
        now_s = self._clock.monotonic()
        self.put_back([Committed(number, now_s, work, _weight(work)) for work in works])

    def note_changes(self, number: int, changes: Sequence[Change], outcomes: Sequence[Outcome]) -> None:
        """Record those changes of a batch that the database has taken, each registration in the epoch that it got."""
        self.note(
            number,
            [
                _placed(change, outcome)
                for change, outcome in zip(changes, outcomes, strict=True)
                if outcome.kind in (OutcomeKind.APPLIED, OutcomeKind.UNCHANGED)
            ],
        )

    def take_after(self, number: int) -> list[Committed]:
        """Remove and return what was committed after commit `number`, in its order."""
        taken = [entry for entry in self._entries if entry.number > number]
        self._entries = deque(entry for entry in self._entries if entry.number <= number)
        self.bytes -= sum(entry.weight for entry in taken)
        return taken

    def put_back(self, entries: Sequence[Committed]) -> None:
        """Append entries in their order. The oldest make room."""
        self._entries.extend(entries)
        self.bytes += sum(entry.weight for entry in entries)
        while len(self._entries) > self._capacity or self.bytes > self._max_bytes:
            oldest = self._entries.popleft()
            self.bytes -= oldest.weight
            self.complete_after = max(self.complete_after, oldest.number)


def first_commit(entries: Sequence[Committed]) -> list[Committed]:
    """What the first commit among the entries has written: of one kind, and at most once of each instance."""
    first = entries[0]
    return list(takewhile(lambda entry: entry.number == first.number and type(entry.work) is type(first.work), entries))


def from_the_beginning(entries: Sequence[Committed]) -> list[Committed]:
    """The entries but for the agents' own changes of instances whose registration is not among them: their numbers
    would stand for changes that are lost. Memory has the last of each, or those agents send all of theirs again. A
    death stays."""
    begun = {
        entry.instance_id for entry in entries if isinstance(entry.work, RegisterChange) and not entry.work.is_update
    }
    return [entry for entry in entries if entry.instance_id in begun or not _is_of_agent(entry.work)]


def _is_of_agent(work: Work) -> bool:
    if isinstance(work, RegisterChange):
        return True
    if isinstance(work, StatusChange):
        return work.seq is not None and work.status is not Status.DEAD
    return isinstance(work, HoldChange) and work.seq is not None


def _weight(work: Work) -> int:
    if isinstance(work, RefinedCause):
        return _SMALL_WORK_BYTES + weight_of_cause(work.cause)
    return _SMALL_WORK_BYTES if isinstance(work, EpochStep) else weight_of_change(work)


def _placed(change: Change, outcome: Outcome) -> Change:
    if not isinstance(change, RegisterChange) or outcome.cluster_epoch is None:
        return change
    return replace(change, registration=replace(change.registration, cluster_epoch=outcome.cluster_epoch))
