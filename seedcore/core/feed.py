"""The change feed: the last changes of live instances, in order and without gaps.

A follower lists once (`list_active`), then requests the changes after its version. Changes that are older than the feed
remembers are compacted: of each instance the last one, which is enough to keep a copy, not to tell what happened. A
follower receives a reset, and must list again, if the feed belongs to another registry, if the epoch was flipped, or if
even compacted changes are missing. A beat is not a change; a new verdict (`late`, `suspect`, `fresh`) is one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from seedcore.core.answers import InstanceFilter
from seedcore.core.causes import Cause
from seedcore.core.errors import InvalidInputError
from seedcore.core.instances import Instance, Verdict
from seedcore.core.limits import check_kind
from seedcore.core.memory_bound import MIB, weight_of
from seedcore.core.wire import wire

MAX_REMEMBERED_BYTES = 64 * MIB
MAX_COMPACTED = 2_000
"""Forgotten changes in one batch; those that are remembered one by one come with the last of them."""

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
        check_kind(field, text, str)
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
    `age_s`: how old the copy was that answered, in seconds; 0 for the registry's own answer, which names in `relay` the
    relay of the follower's node, if there is one.
    `is_compacted`: the changes between are left out of which an instance has a later one. `has_more`: the other ones
    come after `version`; a copy is that of one moment only after the last of them.
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
    is_compacted: bool = False
    has_more: bool = False
    age_s: float = 0.0
    relay: str | None = None


class _Entry(NamedTuple):
    version: int
    instance_id: str
    logical_id: str
    before: Instance | None
    after: Instance | None
    verdict: Verdict
    cause: Cause | None
    weight: int
    is_end: bool
    # in a copy: what it was before is not known, and this is what the registry said
    is_new: bool | None = None

    def selected_by(self, wanted: InstanceFilter, epoch: str) -> bool:
        """Whether a follower with this filter receives the change: the instance matches before or after it, or may have
        matched before."""
        may_match = self.is_new is not None
        return may_match or _is_wanted(self.before, wanted, epoch) or _is_wanted(self.after, wanted, epoch)

    def change_for(self, wanted: InstanceFilter, epoch: str) -> FeedChange:
        """The change as a follower with this filter receives it."""
        after = self.after if _is_wanted(self.after, wanted, epoch) else None
        is_new = not _is_wanted(self.before, wanted, epoch) if self.is_new is None else self.is_new
        is_new = after is not None and is_new
        ids = self.instance_id, self.logical_id
        return FeedChange(self.version, *ids, after, self.verdict, self.cause, is_new, self.is_end)


class Feed:
    """Keeps the last `capacity` changes, and at most `max_bytes` of instances. One that `compacts` also keeps, of those
    before, the last change of each live instance and of as many ended ones. Use it from one event loop.

    `stream` identifies this feed: a version is valid only within its stream. A copy of a feed repeats the changes that
    it received, with the same stream and the same versions.
    """

    def __init__(
        self, stream: str, capacity: int, max_bytes: int = MAX_REMEMBERED_BYTES, *, compacts: bool = False
    ) -> None:
        self.stream = stream
        self.version = 0
        self.epoch = ""
        self._reaches_back_to = 0
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._entries: deque[_Entry] = deque()
        self.bytes = 0
        self._compacts = compacts
        # the last of the forgotten changes of each instance, in their order
        self._last_of_live: dict[str, _Entry] = {}
        self._last_of_ended: dict[str, _Entry] = {}
        self._ended_bytes = 0
        self._compacted_back_to = 0
        self._followers: dict[int, tuple[InstanceFilter, Callable[[], None]] | None] = {}
        self._serial = 0
        self._is_silent = False

    def append(
        self,
        before: Instance | None,
        after: Instance | None,
        verdict: Verdict = Verdict.FRESH,
        cause: Cause | None = None,
    ) -> None:
        """Record a change of an instance or of its verdict. `before` is None for a new instance, `after` for an ended
        one; `cause` is the cause of its death."""
        if self._is_silent:
            return
        known = after if after is not None else before
        assert known is not None
        self.version += 1
        weight = _weight(before) + _weight(after)
        ids = known.instance_id, known.logical_id
        self._enter(_Entry(self.version, *ids, before, after, verdict, cause, weight, after is None))

    def repeat(self, batch: FeedBatch, known: Callable[[str], Instance | None], listed_at: int = 0) -> None:
        """Repeat the changes that this copy has received, under their versions. `known` returns what an instance was
        before them; of changes up to the version `listed_at` it may return a later state, so that every follower gets
        them. A copy that does not compact starts over behind compacted changes."""
        if batch.is_compacted and not self._compacts:
            self.become(batch.stream, batch.version, batch.epoch)
            return
        # a batch may have several changes of one instance: each begins where the one before ended
        seen: dict[str, Instance | None] = {}
        entries = []
        for change in sorted(batch.changes, key=lambda change: change.version):
            instance_id, after = change.instance_id, change.instance
            before = seen.get(instance_id, known(instance_id))
            seen[instance_id] = after
            # a registry of an earlier version sends a cause, and no is_end
            is_end = change.is_end or change.cause is not None
            what = instance_id, change.logical_id, before, after, change.verdict, change.cause
            is_new = change.is_new if change.version <= listed_at else None
            entries.append(_Entry(change.version, *what, _weight(before) + _weight(after), is_end, is_new))
        if batch.is_compacted:
            self._skip(entries, batch.version)
        else:
            for entry in entries:
                self._enter(entry)
        self.version = batch.version

    def _skip(self, compacted: Sequence[_Entry], version: int) -> None:
        """Take compacted changes as what they are: of those up to `version` the others are forgotten."""
        for forgotten in (*self._entries, *compacted):
            self._compact(forgotten)
        self._entries.clear()
        self.bytes = 0
        self._reaches_back_to = version
        for number in self._followers:
            self._wake(number)

    def _enter(self, entry: _Entry) -> None:
        self._entries.append(entry)
        self.bytes += entry.weight
        while len(self._entries) > self._capacity or self.bytes > self._max_bytes:
            forgotten = self._entries.popleft()
            self.bytes -= forgotten.weight
            self._reaches_back_to = forgotten.version
            if self._compacts:
                self._compact(forgotten)
        for number, waiting in self._followers.items():
            if waiting is not None and entry.selected_by(waiting[0], self.epoch):
                self._wake(number)

    def _compact(self, forgotten: _Entry) -> None:
        instance_id = forgotten.instance_id
        self._last_of_live.pop(instance_id, None)
        ended = self._last_of_ended.pop(instance_id, None)
        self._ended_bytes -= 0 if ended is None else ended.weight
        if forgotten.after is not None:
            self._last_of_live[instance_id] = forgotten._replace(before=None)
            return
        self._ended_bytes += forgotten.weight
        self._last_of_ended[instance_id] = forgotten
        while len(self._last_of_ended) > self._capacity or self._ended_bytes > self._max_bytes:
            oldest = self._last_of_ended.pop(next(iter(self._last_of_ended)))
            self._ended_bytes -= oldest.weight
            self._compacted_back_to = oldest.version

    @contextmanager
    def as_one_reset(self) -> Iterator[None]:
        """Record no change within; at the end every follower must list again."""
        self._is_silent = True
        try:
            yield
        finally:
            self._is_silent = False
            self.start_over(self.epoch)

    def start_over(self, epoch: str) -> None:
        """Record an epoch flip, or changes of many. Every follower must list again."""
        self.become(self.stream, self.version + 1, epoch)

    def become(self, stream: str, version: int, epoch: str) -> None:
        """Become another stream, without changes before `version`. Every follower must list again."""
        self.stream, self.version, self.epoch = stream, version, epoch
        self._reaches_back_to = self._compacted_back_to = version
        self._entries.clear()
        self._last_of_live.clear()
        self._last_of_ended.clear()
        self.bytes = self._ended_bytes = 0
        for number in self._followers:
            self._wake(number)

    def since(
        self,
        stream: str | None,
        version: int,
        wanted: InstanceFilter,
        *,
        may_compact: bool = False,
        most: int = MAX_COMPACTED,
    ) -> FeedBatch:
        """The changes after `version` of `stream` that match a filter, or a reset. Where they are forgotten, and it
        `may_compact`, at most `most` compacted ones. Ignores leases."""
        oldest = self._compacted_back_to if may_compact and self._compacts else self._reaches_back_to
        if stream != self.stream or not oldest <= version <= self.version:
            return FeedBatch(self.stream, version, self.version, self.epoch, (), is_reset=True)
        if version < self._reaches_back_to:
            return self._compacted_since(version, wanted, most)
        newest_first = takewhile(lambda entry: entry.version > version, reversed(self._entries))
        changes = [
            entry.change_for(wanted, self.epoch) for entry in newest_first if entry.selected_by(wanted, self.epoch)
        ]
        changes.reverse()
        return FeedBatch(self.stream, version, self.version, self.epoch, tuple(changes))

    def _compacted_since(self, version: int, wanted: InstanceFilter, most: int) -> FeedBatch:
        """The last forgotten change of each instance, and then, where these are no more than `most`, those that are
        remembered one by one."""
        forgotten = sorted(
            (
                entry
                for kept in (self._last_of_live, self._last_of_ended)
                for entry in takewhile(lambda entry: entry.version > version, reversed(kept.values()))
            ),
            key=lambda entry: entry.version,
        )
        has_more = len(forgotten) > most
        # what an instance was before a forgotten change is not known: it may have matched
        sent = forgotten[:most]
        if not has_more:
            sent += [entry for entry in self._entries if entry.selected_by(wanted, self.epoch)]
        return FeedBatch(
            self.stream,
            version,
            sent[-1].version if has_more else self.version,
            self.epoch,
            tuple(entry.change_for(wanted, self.epoch) for entry in sent),
            is_compacted=True,
            has_more=has_more,
        )

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
