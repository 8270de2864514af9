"""The feed: every change of who lives and as what, in order, without gaps, as far back as it reaches.

A follower lists once (`list_active`), then asks for what came after the version it has. Where the feed does not reach
back that far, is another registry's, or the epoch was flipped, it is told to list again. Beats are no changes; what
their absence makes of an instance (`late`, `suspect`) is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from sys import getsizeof
from typing import NamedTuple

from seedcore.core.model import Instance, InstanceFilter, Verdict
from seedcore.core.wire import wire

MAX_REMEMBERED_BYTES = 64 * 1024 * 1024
# an instance without labels and metadata
_ROW_BYTES = 1024


@wire
@dataclass(frozen=True, slots=True)
class FeedChange:
    """What became of an instance at a version; `instance` None: it is dead, unknown, or not selected any more.
    `verdict` is what its beats say of it, `cause` why it died."""

    version: int
    instance_id: str
    logical_id: str
    instance: Instance | None
    verdict: Verdict = Verdict.FRESH
    cause: str | None = None


@wire
@dataclass(frozen=True, slots=True)
class FeedBatch:
    """All selected changes after `since` up to `version`, in order; of `epoch`, the one that listings show.

    `complete` False: the registry is recovering, or superseded, and its feed does not tell everything.
    `is_reset`: there is no telling what came after `since`. List again, then go on from `version` of this `stream`.
    """

    stream: str
    since: int
    version: int
    epoch: str
    changes: tuple[FeedChange, ...]
    is_reset: bool = False
    complete: bool = True


class _Entry(NamedTuple):
    version: int
    before: Instance | None
    after: Instance | None
    verdict: Verdict
    cause: str | None
    weight: int

    def selected_by(self, wanted: InstanceFilter, epoch: str) -> bool:
        """Whether it concerns who wants these: a step into the selection, within it, or out of it."""
        return _is_wanted(self.before, wanted, epoch) or _is_wanted(self.after, wanted, epoch)

    def told(self, wanted: InstanceFilter, epoch: str) -> FeedChange:
        """The same for a follower who wants these."""
        some = self.after if self.after is not None else self.before
        assert some is not None
        after = self.after if _is_wanted(self.after, wanted, epoch) else None
        return FeedChange(self.version, some.instance_id, some.logical_id, after, self.verdict, self.cause)


class Feed:
    """Remembers the last `capacity` changes, and no more than `max_bytes` of instances. One event loop owns it.

    `stream` names this feed: versions of another mean nothing here. A copy of a feed retells what it was told, under
    the same name and the same versions.
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
        cause: str | None = None,
        version: int | None = None,
    ) -> None:
        """Note a change of an instance, or of the verdict on it; None: it was, or is, not there, `cause` says why.
        `version` is the one that a copy was told."""
        self.version = self.version + 1 if version is None else version
        entry = _Entry(self.version, before, after, verdict, cause, _weight(before) + _weight(after))
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
        """Listings show another epoch from now on: everybody has to list again."""
        self.become(self.stream, self.version + 1, epoch)

    def become(self, stream: str, version: int, epoch: str) -> None:
        """Know nothing before `version` of `stream`: everybody has to list again."""
        self.stream, self.version, self.epoch = stream, version, epoch
        self._reaches_back_to = version
        self._entries.clear()
        self.bytes = 0
        for number in self._followers:
            self._wake(number)

    def since(self, stream: str | None, version: int, wanted: InstanceFilter) -> FeedBatch:
        """What came after `version` of `stream`, of whom `wanted` selects, their leases apart."""
        if stream != self.stream or not self._reaches_back_to <= version <= self.version:
            return FeedBatch(self.stream, version, self.version, self.epoch, (), is_reset=True)
        newest_first = takewhile(lambda entry: entry.version > version, reversed(self._entries))
        changes = [entry.told(wanted, self.epoch) for entry in newest_first if entry.selected_by(wanted, self.epoch)]
        changes.reverse()
        return FeedBatch(self.stream, version, self.version, self.epoch, tuple(changes))

    def follow(self, wanted: InstanceFilter, wake: Callable[[], None]) -> int:
        """Call `wake` once, at the next change that `wanted` selects; count as a follower until `unfollow`."""
        self._serial += 1
        self._followers[self._serial] = (wanted, wake)
        return self._serial

    def unfollow(self, number: int) -> None:
        """Wake no more."""
        self._followers.pop(number, None)

    def _wake(self, number: int) -> None:
        waiting = self._followers[number]
        if waiting is not None:
            # once is enough: it comes back when it has read
            self._followers[number] = None
            waiting[1]()

    @property
    def followers(self) -> int:
        """How many wait."""
        return len(self._followers)


def _is_wanted(instance: Instance | None, wanted: InstanceFilter, epoch: str) -> bool:
    return instance is not None and wanted.matches(instance, epoch)


def _weight(instance: Instance | None) -> int:
    """Bytes of memory that an instance takes, about."""
    return 0 if instance is None else _ROW_BYTES + _size(instance.labels) + _size(instance.metadata)


def _size(value: object) -> int:
    if isinstance(value, Mapping):
        # all that have none have the same one
        return getsizeof(value) + sum(getsizeof(key) + _size(child) for key, child in value.items()) if value else 0
    if isinstance(value, (list, tuple)):
        return getsizeof(value) + sum(map(_size, value))
    return getsizeof(value)
