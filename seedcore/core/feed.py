"""The feed: every change of who lives and as what, in order, without gaps, as far back as it reaches.

A follower lists once (`list_active`), then asks for what came after the version it has. Where the feed does not reach
back that far, is another registry's, or the epoch was flipped, it is told to list again. Beats are no changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from seedcore.core.model import Instance, InstanceFilter


@dataclass(frozen=True, slots=True)
class FeedChange:
    """What became of an instance at a version; `instance` None: it is dead, unknown, or not selected any more."""

    version: int
    instance_id: str
    instance: Instance | None


@dataclass(frozen=True, slots=True)
class FeedBatch:
    """All selected changes after `since` up to `version`, in order; of `epoch`, the one that listings show.

    `is_reset`: there is no telling what came after `since`. List again, then go on from `version` of this `stream`.
    """

    stream: str
    since: int
    version: int
    epoch: str
    changes: tuple[FeedChange, ...]
    is_reset: bool = False


@dataclass(frozen=True, slots=True)
class _Entry:
    before: Instance | None
    after: Instance | None

    def selected_by(self, wanted: InstanceFilter, epoch: str) -> bool:
        """Whether it concerns who wants these: a step into the selection, within it, or out of it."""
        return _is_wanted(self.before, wanted, epoch) or _is_wanted(self.after, wanted, epoch)

    def told(self, version: int, wanted: InstanceFilter, epoch: str) -> FeedChange:
        """The same for a follower who wants these."""
        some = self.after if self.after is not None else self.before
        assert some is not None
        return FeedChange(version, some.instance_id, self.after if _is_wanted(self.after, wanted, epoch) else None)


class Feed:
    """Remembers the last `capacity` changes. One event loop owns it.

    `stream` names this feed: versions of another mean nothing here.
    """

    def __init__(self, stream: str, capacity: int) -> None:
        self.stream = stream
        self.version = 0
        self.epoch = ""
        self._entries: deque[_Entry] = deque(maxlen=capacity)
        self._followers: dict[int, tuple[InstanceFilter, Callable[[], None]]] = {}
        self._serial = 0

    def append(self, before: Instance | None, after: Instance | None) -> None:
        """Note a change of an instance; None: it was, or is, not there."""
        self.version += 1
        entry = _Entry(before, after)
        self._entries.append(entry)
        for wanted, wake in list(self._followers.values()):
            if entry.selected_by(wanted, self.epoch):
                wake()

    def start_over(self, epoch: str) -> None:
        """Listings show another epoch from now on: everybody has to list again."""
        self.version += 1
        self.epoch = epoch
        self._entries.clear()
        for _, wake in list(self._followers.values()):
            wake()

    def since(self, stream: str | None, version: int, wanted: InstanceFilter) -> FeedBatch:
        """What came after `version` of `stream`, of whom `wanted` selects, their leases apart."""
        missing = self.version - version
        if stream != self.stream or not 0 <= missing <= len(self._entries):
            return FeedBatch(self.stream, version, self.version, self.epoch, (), is_reset=True)
        entries = islice(self._entries, len(self._entries) - missing, None)
        changes = tuple(
            entry.told(number, wanted, self.epoch)
            for number, entry in enumerate(entries, version + 1)
            if entry.selected_by(wanted, self.epoch)
        )
        return FeedBatch(self.stream, version, self.version, self.epoch, changes)

    def follow(self, wanted: InstanceFilter, wake: Callable[[], None]) -> int:
        """Call `wake` at each change that `wanted` selects, until `unfollow` of the number returned."""
        self._serial += 1
        self._followers[self._serial] = (wanted, wake)
        return self._serial

    def unfollow(self, number: int) -> None:
        """Wake no more."""
        self._followers.pop(number, None)

    @property
    def followers(self) -> int:
        """How many wait."""
        return len(self._followers)


def _is_wanted(instance: Instance | None, wanted: InstanceFilter, epoch: str) -> bool:
    return instance is not None and wanted.matches(instance, epoch)
