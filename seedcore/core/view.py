"""A follower's local cache of the live instances, updated from the change feed.

The cache follows one feed at a time. The feed contains verdicts, but not the times of beats.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from seedcore.core.answers import InstanceFilter, Listing
from seedcore.core.feed import FeedBatch, FeedChange
from seedcore.core.index import InstanceIndex
from seedcore.core.instances import Instance, Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.loads import Loads
from seedcore.core.paging import first_page


@dataclass(frozen=True, slots=True)
class FleetCounts:
    """The number of instances by status, by verdict and by organ (None: without an organ)."""

    statuses: Mapping[Status, int]
    verdicts: Mapping[Verdict, int]
    organs: Mapping[str | None, int]


class LiveView:
    """The live instances of the current epoch that match the follower's filter; after `keep_only_learned` those of the
    agents that were learned since. One event loop changes it; other threads may read `candidates`, `verdict`, `get` and
    `loads`, by single ids."""

    def __init__(self) -> None:
        self.stream: str | None = None
        self.version = 0
        self.epoch = ""
        self.as_of: datetime | None = None
        # how often its content was replaced
        self.loaded = 0
        self._loads: Loads | None = None
        self._instances = InstanceIndex()
        self._verdicts: dict[str, Verdict] = {}
        # by logical id the version of its listing; None: all agents are kept
        self._learned: OrderedDict[str, int] | None = None
        self._expected: dict[str, dict[str, FeedChange]] = {}

    def __len__(self) -> int:
        return len(self._instances)

    def load(self, reset: FeedBatch, pages: Iterable[Listing]) -> None:
        """Replace the content by pages that were listed after `reset`. The feed repeats the changes since `reset`."""
        instances, verdicts = InstanceIndex(), dict[str, Verdict]()
        for page in pages:
            for instance in page.items:
                instances.put(instance)
            verdicts.update(page.verdicts)
        self._instances, self._verdicts = instances, verdicts
        self._learned = None
        self._expected.clear()
        self.loaded += 1
        self.forget_loads()
        self.stream, self.version, self.epoch = reset.stream, reset.version, reset.epoch

    # A part of the fleet

    @property
    def is_whole(self) -> bool:
        """Whether it has all agents. It has none before it was loaded."""
        return self.loaded > 0 and self._learned is None

    @property
    def is_part(self) -> bool:
        """Whether it keeps only agents that were learned."""
        return self._learned is not None

    def keep_only_learned(self, reset: FeedBatch) -> None:
        """Replace the content by no agents. From here on only those that are learned are kept."""
        self.load(reset, ())
        self._learned = OrderedDict()

    def has(self, logical_id: str) -> bool:
        """Whether it knows which instances this agent has."""
        return self.is_whole if self._learned is None else logical_id in self._learned

    def learned_at(self, logical_id: str) -> int | None:
        """The version of the listing by which an agent was learned; None if it was not."""
        return None if self._learned is None else self._learned.get(logical_id)

    def expect(self, logical_id: str) -> None:
        """Remember the changes of an agent from now on: its listing is on its way."""
        self._expected.setdefault(logical_id, {})

    def expect_no_more(self, logical_id: str) -> None:
        """Its listing does not come."""
        self._expected.pop(logical_id, None)

    def learn(self, logical_id: str, listed: Listing) -> None:
        """Keep an agent that is expected, by the listing of all its instances at the version of this cache when it was
        expected, or later."""
        assert self._learned is not None
        for instance in listed.items:
            self._instances.put(instance)
        self._verdicts.update(listed.verdicts)
        self._learned[logical_id] = listed.version
        for change in self._expected.pop(logical_id).values():
            self._take(change)

    def note_use(self, logical_id: str) -> None:
        """The agent is the last one to be forgotten."""
        if self._learned is not None:
            self._learned.move_to_end(logical_id)

    def forget_beyond(self, most: int, was_used: Callable[[str], bool] = lambda _: False) -> list[str]:
        """Keep at most so many agents and instances, or the agent that was used or learned last. Agents that `was_used`
        since this asked last are kept before others. Returns the logical ids of those that are not kept."""
        forgotten = []
        newest = next(reversed(self._learned)) if self._learned else None
        while (
            self._learned is not None
            and len(self._learned) > 1
            and (len(self._learned) > most or len(self._instances) > most)
        ):
            logical_id, version = self._learned.popitem(last=False)
            if logical_id == newest or was_used(logical_id):
                self._learned[logical_id] = version
                continue
            for instance in self._instances.of(logical_id):
                self._drop(instance.instance_id)
            forgotten.append(logical_id)
        return forgotten

    def apply(self, batch: FeedBatch) -> set[str]:
        """Apply the changes after the cache's version. Returns the logical ids of the changed instances."""
        changed = {logical_id for change in batch.changes for logical_id in [self._take(change)] if logical_id}
        self.version, self.epoch = batch.version, batch.epoch
        if batch.loads is not None:
            known = self._loads if self._loads is not None else Loads()
            loads = batch.loads
            if not self.is_part:
                # a part keeps all of them: an agent may be learned later, or its listing be on its way
                loads = {one: load for one, load in loads.items() if one in self._instances}
            known.repeat(loads, batch.loads_number)
            self._loads = known
        return changed

    @property
    def loads(self) -> Mapping[str, float] | None:
        """The loads of instances of agents that have several. None: none were received."""
        return None if self._loads is None else self._loads.by_id

    @property
    def loads_number(self) -> int:
        """What the next question for loads has to say."""
        return 0 if self._loads is None else self._loads.number

    def loads_after(self, number: int, wanted: InstanceFilter) -> tuple[dict[str, float] | None, int]:
        """The loads, of instances that match a filter, that have changed since `number`; and the number after them.
        None: none were received."""
        if self._loads is None:
            return None, number
        instances, epoch = self._instances.by_id, self.epoch
        return self._loads.since(number, lambda instance_id: wanted.matches(instances[instance_id], epoch))

    def forget_loads(self) -> None:
        """Drop the loads: they are not received any more, or are those of another registry."""
        self._loads = None

    def candidates(self, logical_id: str, *, allow_late: bool = False) -> list[Instance]:
        """The routable instances of an agent: alive and fresh. With `allow_late`, the late ones if none is fresh."""
        alive = [row for row in self._instances.of(logical_id) if row.status is Status.ALIVE]
        verdicts = self._verdicts
        fresh = [row for row in alive if row.instance_id not in verdicts]
        if fresh or not allow_late:
            return fresh
        return [row for row in alive if verdicts.get(row.instance_id) is Verdict.LATE]

    def get(self, instance_id: str) -> Instance | None:
        """The instance with this id."""
        return self._instances.get(instance_id)

    def verdict(self, instance_id: str) -> Verdict:
        """The verdict on an instance according to the feed; UNKNOWN if it is not in the cache."""
        return Verdict.UNKNOWN if instance_id not in self._instances else self._verdicts.get(instance_id, Verdict.FRESH)

    def verdicts_of(self, instances: Iterable[Instance]) -> dict[str, Verdict]:
        """The verdicts on those instances that are not fresh."""
        known = self._verdicts
        return {row.instance_id: known[row.instance_id] for row in instances if row.instance_id in known}

    def knows(self, wanted: InstanceFilter) -> bool:
        """Whether the cache can answer a filter completely: it contains only live instances of the current epoch, and
        perhaps not all of them."""
        wants_dead = wanted.statuses is not None and Status.DEAD in wanted.statuses
        return self.is_whole and not wants_dead and wanted.epoch in {None, self.epoch}

    def page(self, wanted: InstanceFilter, after: tuple[str, str], limit: int) -> tuple[list[Instance], bool]:
        """Return up to `limit` matching instances after `after` in key order, and whether there are more. `fresh_only`
        has no effect: when a lease ends, the instance is dead and the feed removes it. While expiry is frozen, it is
        listed as suspect."""
        rows = self._instances.wanted(wanted, self.epoch, after)
        verdicts = wanted.verdicts
        if verdicts is not None:
            rows = (row for row in rows if self._verdicts.get(row.instance_id, Verdict.FRESH) in verdicts)
        return first_page(rows, limit)

    def counts(self) -> FleetCounts:
        """Count the instances by status, verdict and organ."""
        rows = self._instances.by_id.values()
        return FleetCounts(
            statuses=Counter(row.status for row in rows),
            verdicts=Counter(self._verdicts.get(instance_id, Verdict.FRESH) for instance_id in self._instances.by_id),
            organs=Counter(row.organ_id for row in rows),
        )

    def _take(self, change: FeedChange) -> str | None:
        if change.instance is None and self._loads is not None:
            self._loads.discard(change.instance_id)
        if self._learned is not None:
            if change.logical_id in self._expected:
                self._expected[change.logical_id][change.instance_id] = change
            # an agent's listing is newer than the changes before it
            if change.version <= self._learned.get(change.logical_id, math.inf):
                return None
        if change.instance is None:
            gone = self._drop(change.instance_id)
            return None if gone is None else gone.logical_id
        self._instances.put(change.instance)
        if change.verdict is Verdict.FRESH:
            self._verdicts.pop(change.instance_id, None)
        else:
            self._verdicts[change.instance_id] = change.verdict
        return change.instance.logical_id

    def _drop(self, instance_id: str) -> Instance | None:
        self._verdicts.pop(instance_id, None)
        return self._instances.pop(instance_id)
