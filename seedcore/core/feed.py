"""The change feed: the last changes of live instances, in order and without gaps.

A follower lists once (`list_active`), then requests the changes after its version. It receives a reset, and must list
again, if the feed no longer contains these changes, if the feed belongs to another registry, or if the epoch was
flipped. A beat is not a change; a new verdict (`late`, `suspect`, `fresh`) is one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from seedcore.core.answers import InstanceFilter
from seedcore.core.causes import Cause
from seedcore.core.errors import InvalidInputError
from seedcore.core.instances import Instance, Verdict
from seedcore.core.memory_bound import MIB, weight_of
from seedcore.core.wire import wire

MAX_REMEMBERED_BYTES = 64 * MIB

START = "start"
"""In the place of a position: a watch begins with the state."""


@dataclass(frozen=True, slots=True)
class Position:
    """The position of a watcher: a version of a stream, written STREAM:VERSION."""

    stream: str
    version: int

    @classmethod
    def parsed(cls, text: str, field: str = "position") -> Position:
        """Parse a position. Raises InvalidInputError with the name of the field."""
        stream, _, version = text.rpartition(":")
        if not (version.isascii() and version.isdecimal() and len(version) < 19):
            raise InvalidInputError(field, f"must be STREAM:VERSION from an earlier answer, not {text[:80]!r}")
        return cls(stream, int(version))

    def __str__(self) -> str:
        return f"{self.stream}:{self.version}"


@wire
@dataclass(frozen=True, slots=True)
class FeedChange:
    """The state of an instance after a change. `instance` None: it is dead, unknown, or no longer matches the filter.
    `verdict` is the verdict on its beats, `cause` the cause of its death. `is_new`: it did not match before.
    `is_end`: it lives no longer."""

    version: int
    instance_id: str
    logical_id: str
    instance: Instance | None
    verdict: Verdict = Verdict.FRESH
    cause: Cause | None = None
    is_new: bool = False
    is_end: bool = False


@wire
@dataclass(frozen=True, slots=True)
class FeedBatch:
    """All matching changes after `since` up to `version`, in order. `epoch` is the epoch that listings show.

    `complete` False: the registry is recovering or superseded, and changes may be missing.
    `is_reset`: the changes after `since` are not available. List again, then continue from `version` of this `stream`.
    `waited_s`: how long the registry had the question before it answered, in seconds. The answer was true so long after
    the question was sent, at the earliest. `loads` are loads that have changed, for a follower that asked for them; it
    asks with `loads_number` next time.
    """

    stream: str
    since: int
    version: int
    epoch: str
    changes: tuple[FeedChange, ...]
    is_reset: bool = False
    complete: bool = True
    waited_s: float = 0.0
    loads: Mapping[str, float] | None = None
    loads_number: int = 0


class _Entry(NamedTuple):
    version: int
    before: Instance | None
    after: Instance | None
    verdict: Verdict
    cause: Cause | None
    weight: int
    is_end: bool

    def selected_by(self, wanted: InstanceFilter, epoch: str) -> bool:
        """Whether a follower with this filter receives the change: the instance matches before or after it."""
        return _is_wanted(self.before, wanted, epoch) or _is_wanted(self.after, wanted, epoch)

    def change_for(self, wanted: InstanceFilter, epoch: str) -> FeedChange:
        """The change as a follower with this filter receives it."""
        known = self.after if self.after is not None else self.before
        assert known is not None
        after = self.after if _is_wanted(self.after, wanted, epoch) else None
        is_new = after is not None and not _is_wanted(self.before, wanted, epoch)
        return FeedChange(
            self.version, known.instance_id, known.logical_id, after, self.verdict, self.cause, is_new, self.is_end
        )


class Feed:
    """Keeps the last `capacity` changes, and at most `max_bytes` of instances. Use it from one event loop.

    `stream` identifies this feed: a version is valid only within its stream. A copy of a feed repeats the changes that
    it received, with the same stream and the same versions.
    """

    def __init__(self, stream: str, capacity: int, max_bytes: int = MAX_REMEMBERED_BYTES) -> None:
        self.stream = stream
        self.version = 0
        self.epoch = ""
        self._reaches_back_to = 0
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._entries: deque[_Entry] = deque()
        self.bytes = 0
        self._followers: dict[int, tuple[InstanceFilter, Callable[[], None]] | None] = {}
        self._serial = 0

    def append(
        self,
        before: Instance | None,
        after: Instance | None,
        verdict: Verdict = Verdict.FRESH,
        cause: Cause | None = None,
        version: int | None = None,
        *,
        is_end: bool | None = None,
    ) -> None:
        """Record a change of an instance or of its verdict. `before` is None for a new instance, `after` for an ended
        one; `cause` is the cause of its death. A copy of a feed passes the `version` and `is_end` that it received."""
        self.version = self.version + 1 if version is None else version
        weight = _weight(before) + _weight(after)
        entry = _Entry(self.version, before, after, verdict, cause, weight, after is None if is_end is None else is_end)
        self._entries.append(entry)
        self.bytes += entry.weight
        while len(self._entries) > self._capacity or self.bytes > self._max_bytes:
            forgotten = self._entries.popleft()
            self.bytes -= forgotten.weight
            self._reaches_back_to = forgotten.version
        for number, waiting in self._followers.items():
            if waiting is not None and entry.selected_by(waiting[0], self.epoch):
                self._wake(number)

    def start_over(self, epoch: str) -> None:
        """Record an epoch flip. Every follower must list again."""
        self.become(self.stream, self.version + 1, epoch)

    def become(self, stream: str, version: int, epoch: str) -> None:
        """Become another stream, without changes before `version`. Every follower must list again."""
        self.stream, self.version, self.epoch = stream, version, epoch
        self._reaches_back_to = version
        self._entries.clear()
        self.bytes = 0
        for number in self._followers:
            self._wake(number)

    def since(self, stream: str | None, version: int, wanted: InstanceFilter) -> FeedBatch:
        """The changes after `version` of `stream` that match a filter, or a reset. Ignores leases."""
        if stream != self.stream or not self._reaches_back_to <= version <= self.version:
            return FeedBatch(self.stream, version, self.version, self.epoch, (), is_reset=True)
        newest_first = takewhile(lambda entry: entry.version > version, reversed(self._entries))
        changes = [
            entry.change_for(wanted, self.epoch) for entry in newest_first if entry.selected_by(wanted, self.epoch)
        ]
        changes.reverse()
        return FeedBatch(self.stream, version, self.version, self.epoch, tuple(changes))

    def follow(self, wanted: InstanceFilter, wake: Callable[[], None]) -> int:
        """Call `wake` once, at the next matching change or reset. The caller counts as a follower until `unfollow`."""
        self._serial += 1
        self._followers[self._serial] = (wanted, wake)
        return self._serial

    def unfollow(self, number: int) -> None:
        """Remove a follower."""
        self._followers.pop(number, None)

    def _wake(self, number: int) -> None:
        waiting = self._followers[number]
        if waiting is not None:
            # wake once: the follower calls `follow` again after it has read
            self._followers[number] = None
            waiting[1]()

    @property
    def followers(self) -> int:
        """The number of followers."""
        return len(self._followers)


def _is_wanted(instance: Instance | None, wanted: InstanceFilter, epoch: str) -> bool:
    return instance is not None and wanted.matches(instance, epoch)


def _weight(instance: Instance | None) -> int:
    return 0 if instance is None else weight_of(instance)
