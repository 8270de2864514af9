"""The feed: every change of who lives and as what, in order, without gaps, as far back as it reaches.

A follower lists once (`list_active`), then asks for what came after the version it has. Where the feed does not reach
back that far, is another registry's, or the epoch was flipped, it is told to list again. Beats are no changes; what
their absence makes of an instance (`late`, `suspect`) is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from seedcore.core.model import Instance, InstanceFilter, Verdict
from seedcore.core.wire import wire


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
    """Remembers the last `capacity` changes. One event loop owns it.

    `stream` names this feed: versions of another mean nothing here. A copy of a feed retells what it was told, under
    the same name and the same versions.
    """

    def __init__(self, stream: str, capacity: int) -> None:
        self.stream = stream
        self.version = 0
        self.epoch = ""
        self._reaches_back_to = 0
        self._entries: deque[_Entry] = deque(maxlen=capacity)
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
        entry = _Entry(self.version, before, after, verdict, cause)
        if len(self._entries) == self._entries.maxlen:
            self._reaches_back_to = self._entries[0].version if self._entries else self.version
        self._entries.append(entry)
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
