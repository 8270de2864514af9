"""A follower's copy of who lives, as the feed tells it: whom to hand out is looked up, nobody is asked.

Of one feed at a time. Times of beats are not followed, only what they make of an instance (its verdict).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from seedcore.core.feed import FeedBatch, FeedChange
from seedcore.core.index import InstanceIndex
from seedcore.core.lifecycle import Status
from seedcore.core.model import Instance, InstanceFilter, Listing, Verdict
from seedcore.core.paging import first_page


@dataclass(frozen=True, slots=True)
class FleetCounts:
    """How many instances there are by status, by verdict and by organ (None: of no organ)."""

    statuses: Mapping[Status, int]
    verdicts: Mapping[Verdict, int]
    organs: Mapping[str | None, int]


class LiveView:
    """Everybody of the current epoch whom the follower selects. One event loop owns it."""

    def __init__(self) -> None:
        self.stream: str | None = None
        self.version = 0
        self.epoch = ""
        self.as_of: datetime | None = None
        self._instances = InstanceIndex()
        self._verdicts: dict[str, Verdict] = {}

    def __len__(self) -> int:
        return len(self._instances)

    def load(self, reset: FeedBatch, pages: Iterable[Listing]) -> None:
        """Begin anew from the pages that were listed after `reset`: what changed meanwhile the feed tells again."""
        self._instances = InstanceIndex()
        self._verdicts = {}
        for page in pages:
            for instance in page.items:
                self._instances.put(instance)
            self._verdicts.update(page.verdicts)
        self.stream, self.version, self.epoch = reset.stream, reset.version, reset.epoch

    def apply(self, batch: FeedBatch) -> set[str]:
        """Take the changes after our version; the logical ids of those concerned."""
        concerned = {logical_id for change in batch.changes for logical_id in [self._take(change)] if logical_id}
        self.version, self.epoch = batch.version, batch.epoch
        return concerned

    def candidates(self, logical_id: str, *, allow_late: bool = False) -> list[Instance]:
        """The instances of an agent that may be handed out: alive and fresh, or late ones where that is allowed and
        nobody is fresh."""
        alive = [row for row in self._instances.of(logical_id) if row.status is Status.ALIVE]
        fresh = [row for row in alive if row.instance_id not in self._verdicts]
        if fresh or not allow_late:
            return fresh
        return [row for row in alive if self._verdicts[row.instance_id] is Verdict.LATE]

    def get(self, instance_id: str) -> Instance | None:
        """The instance with this id."""
        return self._instances.get(instance_id)

    def verdict(self, instance_id: str) -> Verdict:
        """What the feed has told of an instance."""
        return Verdict.UNKNOWN if instance_id not in self._instances else self._verdicts.get(instance_id, Verdict.FRESH)

    def knows(self, wanted: InstanceFilter) -> bool:
        """Whether everybody wanted is in the copy: the living of the epoch that is shown."""
        wants_dead = wanted.statuses is not None and Status.DEAD in wanted.statuses
        return not wants_dead and wanted.epoch in {None, self.epoch}

    def page(self, wanted: InstanceFilter, after: tuple[str, str], limit: int) -> tuple[list[Instance], bool]:
        """Up to `limit` wanted instances behind `after` in key order, and whether there are more. `fresh_only` leaves
        nobody out: a lease that is over is a death, which the feed tells."""
        rows = self._instances.wanted(wanted, self.epoch, after)
        verdicts = wanted.verdicts
        if verdicts is not None:
            rows = (row for row in rows if self._verdicts.get(row.instance_id, Verdict.FRESH) in verdicts)
        return first_page(rows, limit)

    def counts(self) -> FleetCounts:
        """How many there are, by what one wants to know first."""
        rows = self._instances.by_id.values()
        return FleetCounts(
            statuses=Counter(row.status for row in rows),
            verdicts=Counter(self._verdicts.get(instance_id, Verdict.FRESH) for instance_id in self._instances.by_id),
            organs=Counter(row.organ_id for row in rows),
        )

    def _take(self, change: FeedChange) -> str | None:
        if change.instance is None:
            self._verdicts.pop(change.instance_id, None)
            gone = self._instances.pop(change.instance_id)
            return None if gone is None else gone.logical_id
        self._instances.put(change.instance)
        if change.verdict is Verdict.FRESH:
            self._verdicts.pop(change.instance_id, None)
        else:
            self._verdicts[change.instance_id] = change.verdict
        return change.instance.logical_id
