"""An index of instances by id, by agent and in listing order. Use it from one event loop."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Iterator

from seedcore.core.answers import InstanceFilter
from seedcore.core.instances import Instance
from seedcore.core.lifecycle import Status


class InstanceIndex:
    """Finds instances by id or agent, and iterates over them in key order. All of them are in memory."""

    def __init__(self) -> None:
        self.by_id: dict[str, Instance] = {}
        self.statuses: Counter[Status] = Counter()
        # most agents have one instance: a plain str then uses less memory than a tuple
        self._of: dict[str, str | tuple[str, ...]] = {}
        self._order: list[str] = []

    def __len__(self) -> int:
        return len(self.by_id)

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self.by_id

    def get(self, instance_id: str) -> Instance | None:
        """The instance with this id."""
        return self.by_id.get(instance_id)

    def of(self, logical_id: str) -> list[Instance]:
        """The instances of one agent, in the order of their insertion."""
        # another thread may read a follower's cache while an instance leaves it
        found = (self.by_id.get(instance_id) for instance_id in self._ids_of(logical_id))
        return [instance for instance in found if instance is not None]

    def has_agent(self, logical_id: str) -> bool:
        """Whether an agent has any instance."""
        return logical_id in self._of

    def has_several(self, logical_id: str) -> bool:
        """Whether an agent has more than one instance."""
        return isinstance(self._of.get(logical_id), tuple)

    def behind(self, after: tuple[str, str]) -> Iterator[Instance]:
        """All instances after a key (logical id, instance id), in key order."""
        for index in range(bisect_right(self._order, after, key=self._key), len(self._order)):
            yield self.by_id[self._order[index]]

    def wanted(self, wanted: InstanceFilter, epoch: str, after: tuple[str, str]) -> Iterator[Instance]:
        """The instances after a key that match a filter, in key order. `epoch` is the current epoch. Ignores leases."""
        if wanted.logical_id is None:
            candidates = self.behind(after)
        else:
            of_agent = sorted(self.of(wanted.logical_id), key=lambda row: row.instance_id)
            candidates = (row for row in of_agent if (row.logical_id, row.instance_id) > after)
        return (row for row in candidates if wanted.matches(row, epoch))

    def put(self, instance: Instance) -> None:
        """Add or replace an instance. The logical id of an instance must not change."""
        instance_id = instance.instance_id
        known = self.by_id.get(instance_id)
        self.by_id[instance_id] = instance
        self.statuses[instance.status] += 1
        if known is not None:
            self.statuses[known.status] -= 1
            return
        siblings = self._ids_of(instance.logical_id)
        self._of[instance.logical_id] = (*siblings, instance_id) if siblings else instance_id
        if not self._order or self._key(self._order[-1]) < (instance.logical_id, instance_id):
            # a database that is read returns them in order
            self._order.append(instance_id)
        else:
            insort(self._order, instance_id, key=self._key)

    def pop(self, instance_id: str) -> Instance | None:
        """Remove an instance and return it."""
        known = self.by_id.get(instance_id)
        if known is None:
            return None
        del self._order[bisect_left(self._order, self._key(instance_id), key=self._key)]
        del self.by_id[instance_id]
        self.statuses[known.status] -= 1
        siblings = tuple(other for other in self._ids_of(known.logical_id) if other != instance_id)
        if siblings:
            self._of[known.logical_id] = siblings if len(siblings) > 1 else siblings[0]
        else:
            del self._of[known.logical_id]
        return known

    def _ids_of(self, logical_id: str) -> tuple[str, ...]:
        ids = self._of.get(logical_id, ())
        return (ids,) if isinstance(ids, str) else ids

    def _key(self, instance_id: str) -> tuple[str, str]:
        return self.by_id[instance_id].logical_id, instance_id
